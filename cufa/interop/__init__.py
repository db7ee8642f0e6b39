"""Frameworks that need more than an adapter; each module is imported only when one of its arrays arrives."""
