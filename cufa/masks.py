"""Masks: which keys a query sees, as objects that are combined, drawn, compared and handed to ``mask=``.

``causal() & chunked(512)`` is a mask, and so is ``causal() | image_ranges(ranges)``. All of them count positions from
the first key, and the last query is at the last key, as under ``causal=True``. `cufa.BlockMask` makes of a mask
lists of the blocks that kernels need to go over.
"""

from __future__ import annotations

from ._masks.mask import Mask
from ._masks.shapes import (
    causal,
    chunked,
    dilated,
    document,
    from_array,
    from_function,
    global_tokens,
    image_ranges,
    prefix_lm,
    sliding_window,
)

__all__ = [
    "Mask",
    "causal",
    "chunked",
    "dilated",
    "document",
    "from_array",
    "from_function",
    "global_tokens",
    "image_ranges",
    "prefix_lm",
    "sliding_window",
]
