"""Arrays of any framework in host memory, and copies of NumPy's where another array is."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_numpy(array: Any) -> NDArray[Any]:
    """The values of an array of any framework, for which the host waits if they are on a GPU."""
    if not isinstance(array, np.ndarray):
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            array = array.detach().cpu()
        elif hasattr(array, "get") and hasattr(array, "__cuda_array_interface__"):
            array = array.get()
        elif hasattr(array, "copy_to_host"):
            array = array.copy_to_host()
    found: NDArray[Any] = np.asarray(array)
    return found


def copied(array: NDArray[Any], like: Any) -> Any:
    """A copy in the framework and on the device of another array; NumPy's own is returned as it is."""
    name = type(like).__module__.partition(".")[0]
    if like is None or isinstance(like, np.ndarray):
        return array
    if name == "cupy":
        import cupy

        with like.device:
            return cupy.asarray(array)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.tensor(array, device=like.device)  # from_numpy() would share, and so warns of what is read-only
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(like, jax.Array):
        return jax.device_put(array, next(iter(like.devices())))
    if name == "numba":
        from numba import cuda

        return cuda.to_device(array)
    raise TypeError(f"like is a {type(like).__name__}; pass an array of NumPy, CuPy, torch, JAX or Numba.")
