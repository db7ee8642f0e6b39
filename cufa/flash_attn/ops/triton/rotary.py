"""flash_attn's ``apply_rotary``, computed by `cufa.rotary`, for torch."""

from __future__ import annotations

from typing import Any

import torch

from ...._api.rotary import rotary

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
    """
    offsets = None
    if isinstance(seqlen_offsets, int):
        cos, sin = cos[seqlen_offsets:], sin[seqlen_offsets:]
    else:
        offsets = seqlen_offsets.to(torch.int32)
    turned = rotary(
        x, None, cos, sin, offsets=offsets, cu_seqlens=cu_seqlens, interleaved=interleaved, inverse=conjugate
    )
    return x.copy_(turned) if inplace else turned
