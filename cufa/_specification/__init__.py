"""The twins of score terms in `cufa.reference`, one file each."""
