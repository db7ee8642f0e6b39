"""Sequences padded to one length and packed ones, from each other: flash_attn's ``bert_padding``, for torch."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentError

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

Tensor = Any


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows ``input[indices]``; indices are distinct.

    Parameters
    ----------
    input : tensor, (first_axis_dim, ...)
    indices : int64 tensor, (total,)

    Returns
    -------
    tensor, (total, ...)
    """
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros, with `values` in the rows `indices`, which are distinct.

    Parameters
    ----------
    values : tensor, (total, ...)
    indices : int64 tensor, (total,)
    first_axis_dim : int

    Returns
    -------
    tensor, (first_axis_dim, ...)
    """
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``input[indices]``, and the input.

    Parameters
    ----------
    input : tensor, (first_axis_dim, ...)
    indices : int64 tensor, (total,)

    Returns
    -------
    tensor, (total, ...)
    tensor, (first_axis_dim, ...)
    """
    return input[indices], input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask keeps. The host waits for how many there are.

    Parameters
    ----------
    hidden_states : tensor, (batch, seqlen, ...)
    attention_mask : tensor, (batch, seqlen)
        Not 0 where there is a token.
    unused_mask : tensor, (batch, seqlen), optional
        Not 0 where there is room that counts as tokens, but not in `seqused`.

    Returns
    -------
    hidden_states : tensor, (total, ...)
    indices : int64 tensor, (total,)
        Of the tokens, among those of all sequences.
    cu_seqlens : int32 tensor, (batch + 1,)
    max_seqlen_in_batch : int
    seqused : int32 tensor, (batch,)
        Tokens of `attention_mask` alone.
    """
    _check_mask("unpad_input", "attention_mask", hidden_states, attention_mask)
    tokens = kept = attention_mask != 0  # which may number sequences, as masks of packed ones do
    if unused_mask is not None:
        _check_mask("unpad_input", "unused_mask", hidden_states, unused_mask)
        kept = tokens | (unused_mask != 0)
    cu_seqlens, longest = _offsets(kept.sum(-1, dtype=torch.int32))
    indices = kept.flatten().nonzero().flatten()
    packed = hidden_states.flatten(0, 1)[indices]
    return packed, indices, cu_seqlens, longest, tokens.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that hold several sequences each. The host waits for how many there are.

    Parameters
    ----------
    hidden_states : tensor, (batch, seqlen, ...)
    attention_mask_in_length : integer tensor, (batch, seqlen)
        Lengths of a row's sequences, which begin with its first token, and zeros.

    Returns
    -------
    hidden_states : tensor, (total, ...)
    indices : int64 tensor, (total,)
    cu_seqlens : int32 tensor, (sequences + 1,)
    max_seqlen_in_batch : int
    """
    _check_mask(
        "unpad_input_for_concatenated_sequences", "attention_mask_in_length", hidden_states, attention_mask_in_length
    )
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, longest = _offsets(lengths[lengths.nonzero().flatten()])
    columns = torch.arange(attention_mask_in_length.shape[1], device=lengths.device)
    indices = (columns < attention_mask_in_length.sum(-1, keepdim=True)).flatten().nonzero().flatten()
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`, with zeros where there is no token.

    Parameters
    ----------
    hidden_states : tensor, (total, ...)
    indices : int64 tensor, (total,)
    batch, seqlen : int

    Returns
    -------
    tensor, (batch, seqlen, ...)
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_mask(function: str, name: str, hidden_states: Tensor, mask: Tensor) -> None:
    rows = hidden_states.shape[:2]
    if mask.shape != rows:
        raise ArgumentError(
            f"{function}: {name} has shape {tuple(mask.shape)} but hidden_states has {tuple(rows)} tokens; they must "
            "agree."
        )


def _offsets(lengths: Tensor) -> tuple[Tensor, int]:
    ends = lengths.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0)), int(lengths.max()) if len(lengths) else 0
