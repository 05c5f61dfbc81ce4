"""Triton kernels of kdfast, one file a family. Imported only when the Triton backend runs."""
