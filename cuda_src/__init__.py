"""The CUDA C++ sources of cufa, read with importlib.resources and handed to NVRTC in memory."""
