"""From a translation unit to loaded functions: NVRTC, and the cubins that are kept on disk."""
