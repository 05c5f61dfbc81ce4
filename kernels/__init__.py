"""Triton kernels of kdfast, a folder a family. The kernels are imported only when the Triton backend runs."""
