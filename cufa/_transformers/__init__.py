"""What `cufa.transformers` registers: an attention function and its mask function, and a folder of kernels."""
