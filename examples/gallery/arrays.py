"""Arrays for the gallery: CuPy's where there is an NVIDIA GPU, else NumPy's."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

import cufa

Array = Any  # a NumPy or a CuPy array: no example asks which
xp = importlib.import_module("cupy") if cufa.is_available() and importlib.util.find_spec("cupy") else np


def normal(*shape: int, seed: int, dtype: Any = None) -> Array:
    """Normal numbers: if not said otherwise, float32 with NumPy and float16 on the GPU."""
    x = xp.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return x.astype(dtype or (np.float32 if xp is np else np.float16))


def normals(count: int, *shape: int) -> list[Array]:
    """Several such arrays, as q, k and v are."""
    return [normal(*shape, seed=seed) for seed in range(count)]


def tell(found: Array, expected: Array) -> None:
    print(f"largest difference {float(abs(found - expected).max()):.1e}")
