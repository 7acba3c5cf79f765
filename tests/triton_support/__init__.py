"""Checks of Triton kernels on machines without a GPU: interpreted numerics and compile-only resource counts."""
