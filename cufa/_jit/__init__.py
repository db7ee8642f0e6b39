"""Kernels of the caller's own: CUDA C++ in, something to launch on arrays out."""
