"""Rotary embedding: flash_attn's ``layers.rotary``, for torch."""

from __future__ import annotations

from typing import Any

import torch

from ..._call import options as _options
from ...errors import ArgumentError
from ..ops.triton.rotary import apply_rotary

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]

Tensor = Any


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`cufa.flash_attn.ops.triton.rotary.apply_rotary`, with its arguments in another order."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The same of rows from position 0 on, or with angles of each sequence, in torch's own operations.

    Parameters
    ----------
    x : tensor, (batch, seqlen, nheads, headdim)
    cos, sin : tensor, (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2)
    interleaved : bool

    Returns
    -------
    tensor, shaped like `x`
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    columns = 2 * cos.shape[-1]
    turned, rest = x[..., :columns], x[..., columns:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = first * cos - second * sin, first * sin + second * cos
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotary embedding of q and k in place.

    Parameters
    ----------
    qkv : tensor, (batch, seqlen, 3, nheads, headdim) or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)
    cos, sin, cos_k, sin_k : tensor, (seqlen_ro, rotary_dim / 2)
        Those of k are by default those of q.
    interleaved : bool
    seqlen_offsets : int or integer tensor, (batch,)
    num_heads_q : int, optional
        For the second shape of `qkv`.

    Returns
    -------
    tensor
        `qkv`.
    """
    shape = tuple(qkv.shape)
    if len(shape) == 5 and shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif (
        len(shape) == 4 and num_heads_q is not None and 0 < num_heads_q < shape[2] and (shape[2] - num_heads_q) % 2 == 0
    ):
        end = (shape[2] + num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end]
    else:
        raise ArgumentError(
            f"apply_rotary_emb_qkv_: qkv has shape {shape} and num_heads_q is {num_heads_q}; (batch, seqlen, 3, "
            "nheads, headdim) or, with num_heads_q, (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) is "
            "expected."
        )
    own = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    turned = [
        apply_rotary(x, *tables, seqlen_offsets, interleaved=interleaved) for x, tables in ((q, (cos, sin)), (k, own))
    ]
    for x, each in zip((q, k), turned, strict=True):  # neither is written before both were found right
        x.copy_(each)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotary embedding of k in place.

    Parameters
    ----------
    kv : tensor, (batch, seqlen, 2, nheads, headdim)
    cos, sin : tensor, (seqlen_ro, rotary_dim / 2)
    interleaved : bool
    seqlen_offsets : int or integer tensor, (batch,)

    Returns
    -------
    tensor
        `kv`.
    """
    _check_kv("apply_rotary_emb_kv_", kv)
    apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    return kv


def _check_kv(function: str, kv: Tensor) -> None:
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ArgumentError(
            f"{function}: kv has shape {tuple(kv.shape)}; (batch, seqlen, 2, nheads, headdim) is expected."
        )


class RotaryEmbedding(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Rotary embedding with tables that grow with the positions it meets.

    Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021; with `scale_base` Sun et al., *A
    Length-Extrapolatable Transformer*, 2022.

    Parameters
    ----------
    dim : int
        Columns that are turned.
    base : float
    interleaved : bool
    scale_base : float, optional
    device : device, optional
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        columns = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self.base ** (-columns / dim), persistent=False)
        scale = None if scale_base is None else (columns + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Any = None
        self._sin_cached: Any = None
        self._cos_k_cached: Any = None
        self._sin_k_cached: Any = None

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        known = self._cos_cached
        fits = known is not None and seqlen <= self._seq_len_cached and (known.device, known.dtype) == (device, dtype)
        if fits and not (self.training and known.is_inference()):
            return
        self._seq_len_cached = seqlen
        # In float32 whatever the module was cast to: angles and powers lose their sense in 16 bits.
        columns = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)[:, None]
        kept = self.inv_freq.to(device) if self.inv_freq.dtype == torch.float32 else self.base ** (-columns / self.dim)
        angles = positions * kept
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is not None:
            power = (positions - seqlen // 2) / self.scale_base
            scale = ((columns + 0.4 * self.dim) / (1.4 * self.dim)) ** power
            self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """Turn q and k in place.

        Parameters
        ----------
        qkv : tensor
            As `apply_rotary_emb_qkv_` takes it or, with `kv`, q alone: (batch, seqlen, nheads, headdim).
        kv : tensor, (batch, seqlen, 2, nheads, headdim), optional
        seqlen_offset : int or integer tensor, (batch,)
        max_seqlen : int, optional
            The positions that there may be; needed where `seqlen_offset` is a tensor.
        num_heads_q : int, optional

        Returns
        -------
        qkv, or q and kv : tensor
        """
        if max_seqlen is None:
            if isinstance(seqlen_offset, torch.Tensor):
                raise ArgumentError("RotaryEmbedding: seqlen_offset is a tensor; pass max_seqlen too.")
            max_seqlen = qkv.shape[1] + _options.integer("RotaryEmbedding", "seqlen_offset", seqlen_offset)
        self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        tables = self._cos_cached, self._sin_cached
        of_k = tables if self.scale_base is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *tables, *of_k, self.interleaved, seqlen_offset, num_heads_q)
        _check_kv("RotaryEmbedding", kv)
        q = apply_rotary_emb(qkv, *tables, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, *of_k, self.interleaved, seqlen_offset)
