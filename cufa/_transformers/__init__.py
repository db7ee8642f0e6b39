"""What `cufa.transformers` registers: an attention function, its mask function, and a folder for the kernels package."""
