"""flash_attn 2.8 for programs that were written for it: its functions, by their names and with their arguments.

``import cufa.flash_attn as flash_attn`` is all that changes in a program, or nothing, after `install`. The functions
take CuPy, torch, JAX and NumPy arrays; what of flash_attn there is, and what differs, is in docs/flash_attn.md.

Examples
--------
>>> import numpy as np
>>> import cufa.flash_attn as flash_attn
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 128, 4, 64), dtype=np.float32)
>>> flash_attn.flash_attn_func(q, k, v, causal=True).shape
(2, 128, 4, 64)
"""

from __future__ import annotations

from ._installed import VERSION, Installation, install
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "Installation",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]

__version__ = VERSION
