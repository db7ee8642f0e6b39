"""Pages of key-value caches: which sequence holds which, on the host. Kernels see block tables and lengths only."""
