"""Kernels that are compiled ahead: which ones calls will need."""
