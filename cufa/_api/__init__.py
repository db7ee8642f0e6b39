"""The public functions: signatures and their documentation."""
