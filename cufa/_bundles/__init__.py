"""Kernels that are compiled ahead: which ones calls will need, and the bundles that hold them."""
