"""Score terms as the specification has them: in float64, one file each, and without a short cut."""
