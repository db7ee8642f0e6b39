"""For torch programs written for xformers: ``memory_efficient_attention``, and its attention biases.

xformers need not be there; where it is, biases of its own classes will do as well. docs/xformers.md says what there is.

Examples
--------
>>> import torch
>>> from cufa.xformers import LowerTriangularMask, memory_efficient_attention
>>> q, k, v = torch.ones(3, 2, 9, 4, 64)
>>> memory_efficient_attention(q, k, v, LowerTriangularMask()).shape
torch.Size([2, 9, 4, 64])
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._api.attention import attention, attention_varlen
from .errors import ArgumentError, UnsupportedError

__all__ = [
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "memory_efficient_attention",
]

Tensor = Any


def _check_number(name: str, given: int, least: int) -> None:
    if given < least:
        raise ArgumentError(f"cufa.xformers: {name} is {given}; it must be at least {least}.")


MASKS: dict[str, tuple[bool, str, str]] = {
    "LowerTriangularMask": (True, "", "0"),
    "LowerTriangularMaskWithTensorBias": (True, "", "0"),
    "LowerTriangularFromBottomRightMask": (False, "", "0"),
    "LowerTriangularFromBottomRightLocalAttentionMask": (False, "_window_size", "0"),
    "LocalAttentionFromBottomRightMask": (False, "window_left", "window_right"),
    "BlockDiagonalMask": (False, "", ""),
    "BlockDiagonalCausalMask": (True, "", "0"),
    "BlockDiagonalCausalFromBottomRightMask": (False, "", "0"),
    "BlockDiagonalCausalLocalAttentionMask": (True, "_window_size", "0"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (False, "_window_size", "0"),
    "BlockDiagonalPaddedKeysMask": (False, "", ""),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (False, "", "0"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (False, "window_left", "window_right"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (False, "_window_size", "0"),
}
"""Of a class's name: whether the first query sees the first key, instead of the last the last, and where the sides of
the window are found; an empty name is unbounded."""


class LowerTriangularMask:
    """Query i sees key j if ``j <= i``."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """The same with a tensor that is added to scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """`LowerTriangularMask`, and a tensor that is added to scores."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias


class LowerTriangularFromBottomRightMask:
    """The last query sees the last key, and each before it one less."""

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same, of the last `window_size` keys."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """`LowerTriangularFromBottomRightMask`, of the last `_window_size` keys."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_number("window_size", self._window_size, 1)


@dataclass
class LocalAttentionFromBottomRightMask:
    """Keys to both sides of a query's own, where the last query's own is the last key."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _check_number("window_left", self.window_left, 0)
        _check_number("window_right", self.window_right, 0)


@dataclass
class SeqLenInfo:
    """Where sequences begin and, if that is not where the next begins, how long they are."""

    seqstart_py: list[int]
    seqlen_py: list[int] | None = None
    seqstart: Tensor = field(init=False, repr=False)
    seqlen: Tensor = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.seqstart = torch.tensor(self.seqstart_py, dtype=torch.int32)
        if self.seqlen_py is not None:
            self.seqlen = torch.tensor(self.seqlen_py, dtype=torch.int32)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> SeqLenInfo:
        """Of sequences one behind the other."""
        for length in lengths:
            _check_number("a length", length, 0)
        return cls([0, *itertools.accumulate(lengths)])


@dataclass
class BlockDiagonalMask:
    """Sequences one behind the other, in tensors of batch size 1."""

    q_seqinfo: Any
    k_seqinfo: Any
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> Any:
        """Of sequences of these lengths."""
        q_seqinfo = SeqLenInfo.of(q_seqlen)
        if kv_seqlen is not None and len(q_seqlen) != len(kv_seqlen):
            raise ArgumentError(f"{cls.__name__}: q_seqlen has {len(q_seqlen)} lengths but kv_seqlen {len(kv_seqlen)}.")
        return cls(q_seqinfo, q_seqinfo if kv_seqlen is None else SeqLenInfo.of(kv_seqlen))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Of tensors (batch, seqlen, ...), and they in one."""
        found = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        found._batch_sizes = [x.shape[0] for x in tensors]
        return found, torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `from_tensor_list`."""
        ends = [0, *itertools.accumulate(self._batch_sizes or [1] * (len(self.q_seqinfo.seqstart_py) - 1))]
        starts = self.q_seqinfo.seqstart_py
        return [tensor[0, starts[a] : starts[b]].unflatten(0, (b - a, -1)) for a, b in itertools.pairwise(ends)]

    def make_causal(self) -> Any:
        """Each block as in a `LowerTriangularMask`."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> Any:
        """Each block as in a `LowerTriangularFromBottomRightMask`."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> Any:
        """`make_causal`, of the last `window_size` keys."""
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(self, window_size: int) -> Any:
        """`make_causal_from_bottomright`, of the last `window_size` keys."""
        given = self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(*given)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """What `BlockDiagonalMask.make_causal` gives."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """What `BlockDiagonalMask.make_causal_from_bottomright` gives."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """What `BlockDiagonalMask.make_local_attention` gives."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_number("window_size", self._window_size, 1)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """What `BlockDiagonalMask.make_local_attention_from_bottomright` gives."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_number("window_size", self._window_size, 1)


@dataclass
class BlockDiagonalPaddedKeysMask:
    """Sequences whose keys have `kv_padding` rows each, of which the first are live."""

    q_seqinfo: Any
    k_seqinfo: Any

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int]) -> Any:
        """Of so many queries, and so many live keys."""
        if len(q_seqlen) != len(kv_seqlen):
            raise ArgumentError(f"{cls.__name__}: q_seqlen has {len(q_seqlen)} lengths but kv_seqlen {len(kv_seqlen)}.")
        for length in kv_seqlen:
            _check_number("a length", length, 0)
            if length > kv_padding:
                raise ArgumentError(f"{cls.__name__}: kv_seqlen holds {length}, but kv_padding is {kv_padding}.")
        starts = [kv_padding * index for index in range(len(kv_seqlen) + 1)]
        return cls(SeqLenInfo.of(q_seqlen), SeqLenInfo(starts, list(kv_seqlen)))


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, where the last query sees the last live key, and each before it one less."""


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: Any = None,
) -> Tensor:
    """`cufa.attention` with the arguments of xformers.

    Parameters
    ----------
    query : tensor, (B, Mq, H, K), (B, Mq, K) or (B, Mq, G, H, K)
        Whatever `cufa.attention` takes.
    key : tensor, (B, Mkv, H, K), (B, Mkv, K) or (B, Mkv, G, H, K)
        In the first shape H may be a divisor of the query's. Where heads of a group are expanded, they are one key
        head.
    value : tensor, (B, Mkv, H, Kv), (B, Mkv, Kv) or (B, Mkv, G, H, Kv)
    attn_bias : tensor or attention bias, optional
        A tensor (B, H, Mq, Mkv), (B, Mq, Mkv) or (B, G, H, Mq, Mkv) is added to scores, and has a gradient.
    p : float
        Probabilities are dropped with this probability; torch's default generator gives the seed.
    scale : float, optional
        Default ``K ** -0.5``.
    op : None
        Not supported.
    output_dtype : dtype, optional
        To which the result is converted.

    Returns
    -------
    tensor, shaped like query, with Kv columns
        Rows that see no key are 0.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As for `cufa.attention`; `UnsupportedError` also for `op`, and for other classes of biases.

    Examples
    --------
    >>> import torch
    >>> from cufa.xformers import BlockDiagonalMask, memory_efficient_attention
    >>> mask, x = BlockDiagonalMask.from_tensor_list([torch.ones(1, 3, 4, 64), torch.ones(2, 5, 4, 64)])
    >>> [part.shape[:2] for part in mask.split(memory_efficient_attention(x, x, x, mask.make_causal()))]
    [torch.Size([1, 3]), torch.Size([2, 5])]
    """
    if op is not None:
        raise UnsupportedError(f"{_NAME}: op is not supported; leave it out.")
    shape = query.shape
    if not 3 <= query.ndim == key.ndim == value.ndim <= 5:
        raise ArgumentError(f"{_NAME}: query, key and value have {query.ndim}, {key.ndim} and {value.ndim} dimensions.")
    if query.ndim == 5 and key.shape[3] > 1 and key.stride(3) == value.stride(3) == 0:  # heads that are one key head
        key, value = key[:, :, :, :1], value[:, :, :, :1]
    query, key, value = (_heads(x) for x in (query, key, value))
    bias = attn_bias if isinstance(attn_bias, torch.Tensor) else getattr(attn_bias, "_bias", None)
    if bias is not None:
        bias = bias.unsqueeze(1) if bias.ndim == 3 else bias.flatten(1, 2) if bias.ndim == 5 else bias
    options = {"softmax_scale": scale, "dropout_p": p, "seed": _seed(query) if p else None}
    if attn_bias is None or isinstance(attn_bias, torch.Tensor):
        out = attention(query, key, value, bias=bias, **options)
    elif hasattr(attn_bias, "k_seqinfo"):
        out = _of_blocks(query, key, value, attn_bias, options)
    else:
        top_left, left, right = _sides(attn_bias)
        rows, keys = query.shape[1], key.shape[1]
        if top_left and keys > rows:  # keys that no query sees
            key, value, bias = key[:, :rows], value[:, :rows], None if bias is None else bias[..., :rows]
        elif top_left and keys < rows:  # whose own positions are counted from the last key here
            right = rows - keys
        out = attention(query, key, value, window_size=(left, right), bias=bias, **options)
    out = out.reshape(*shape[:-1], out.shape[-1])
    return out if output_dtype is None else out.to(output_dtype)


_NAME = "memory_efficient_attention"


def _seed(query: Tensor) -> int:
    from .flash_attn._torch import next_seed  # which most calls do without

    return next_seed(query, _NAME, "p")


def _heads(x: Tensor) -> Tensor:
    """A tensor as (batch, rows, heads, columns)."""
    return x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, 3) if x.ndim == 5 else x


def _sides(bias: Any) -> tuple[bool, int | None, int | None]:
    """Whether the first query sees the first key, and the sides of the window."""
    name = type(bias).__name__
    if name not in MASKS:
        raise UnsupportedError(f"{_NAME}: attn_bias is a {name}; supported are {', '.join(sorted(MASKS))}.")
    top_left, *places = MASKS[name]
    left, right = (int(x) if x.isdigit() else getattr(bias, x) if x else None for x in places)
    return top_left, left - 1 if places[0] == "_window_size" and left is not None else left, right


def _of_blocks(query: Tensor, key: Tensor, value: Tensor, bias: Any, options: dict[str, Any]) -> Tensor:
    top_left, left, right = _sides(bias)
    if query.shape[0] != 1:
        raise ArgumentError(f"{_NAME}: the batch size is {query.shape[0]}; a {type(bias).__name__} is for 1.")
    for name, x, info in (("query", query, bias.q_seqinfo), ("key", key, bias.k_seqinfo)):
        if x.shape[1] != info.seqstart_py[-1]:
            raise ArgumentError(
                f"{_NAME}: {name} has {x.shape[1]} rows; a {type(bias).__name__} of {info.seqstart_py[-1]} is given."
            )
    starts = [info.seqstart.to(query.device) for info in (bias.q_seqinfo, bias.k_seqinfo)]
    used = getattr(bias.k_seqinfo, "seqlen", None)
    more: dict[str, Any] = {"window_size": (left, right)}
    if top_left and bias.q_seqinfo.seqstart_py != bias.k_seqinfo.seqstart_py:
        reach = query.shape[1] if left is None else left
        more = {"mask": lambda batch, head, row, column: (column <= row) & (column >= row - reach)}
    if used is not None:
        more["seqused_k"] = used.to(query.device)
    return attention_varlen(query[0], key[0], value[0], *starts, **more, **options)[None]
