"""What several families of kernels share: row factors, the sum in a launch, walks over strides, normals."""
