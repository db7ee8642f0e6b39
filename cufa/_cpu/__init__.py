"""Attention and its gradients on NumPy arrays."""
