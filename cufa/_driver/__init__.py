"""The CUDA driver, and launches of loaded functions."""
