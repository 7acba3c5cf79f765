"""Kernels of csrc without torch: bound to numpy, sanitized, and CUDA ones run on the CPU."""
