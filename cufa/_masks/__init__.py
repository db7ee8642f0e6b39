"""Masks as objects: which keys a query sees, said once, for NumPy, for drawings and for kernels."""
