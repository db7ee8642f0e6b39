"""The command line, one module for each command; `main` finds them by name."""
