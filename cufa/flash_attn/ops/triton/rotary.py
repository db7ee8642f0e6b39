"""flash_attn's ``apply_rotary``, computed by `cufa.rotary`, for torch."""

from __future__ import annotations

from typing import Any

import torch

from ...._api.rotary import rotary
from ...._call import options as _options
from ....errors import ArgumentError

__all__ = ["apply_rotary"]

Tensor = Any


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the first columns of each row by the angles of its position.

    Parameters
    ----------
    x : tensor, (batch, seqlen, nheads, headdim) or, with `cu_seqlens`, (total_seqlen, nheads, headdim)
    cos, sin : tensor, (seqlen_ro, rotary_dim / 2)
    seqlen_offsets : int or integer tensor, (batch,)
        The position of the first row of each sequence.
    cu_seqlens : int32 tensor, (batch + 1,), optional
    max_seqlen : int, optional
        Not needed, and never read.
    interleaved : bool
        Turn pairs of columns ``(2i, 2i + 1)``; else ``(i, i + rotary_dim / 2)``.
    inplace : bool
        Write the result into `x`, and return that.
    conjugate : bool
        Turn back.

    Returns
    -------
    tensor, shaped like `x`

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As for `cufa.rotary`, and if `seqlen_offsets` is negative or of another dtype.
    """
    offsets = None
    if isinstance(seqlen_offsets, torch.Tensor):
        if seqlen_offsets.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"apply_rotary: seqlen_offsets has dtype {seqlen_offsets.dtype}; pass int32 or int64, or a number."
            )
        offsets = seqlen_offsets.to(torch.int32)
    else:
        start = _options.integer("apply_rotary", "seqlen_offsets", seqlen_offsets, "an integer or a torch tensor")
        if start < 0:
            raise ArgumentError(f"apply_rotary: seqlen_offsets is {start}; it must not be negative.")
        cos, sin = cos[start:], sin[start:]
    turned = rotary(
        x, None, cos, sin, offsets=offsets, cu_seqlens=cu_seqlens, interleaved=interleaved, inverse=conjugate
    )
    return x.copy_(turned) if inplace else turned
