"""Triton kernels, one module per op. Importing this package imports none of them: they need Triton."""
