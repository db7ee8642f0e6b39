"""What torch adds: seeds from its generators, and gradients that are written into one packed tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._api.dropout import dropout_mask
from .._api.features import call_featured
from .._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from .._operations.call import call
from .._operations.forward import ATTENTION, ATTENTION_VARLEN
from .._operations.operation import Operation
from ..errors import UnsupportedError
from ..interop.torch import MEMORY
from . import _common

STEP = 4
"""By which torch's CUDA generators move on, at least."""

COLUMNS = 256
"""Probabilities of a row that one call gives: head_dim of v."""

_transforms = torch._C._are_functorch_transforms_active
_len_modes = torch._C._len_torch_dispatch_stack
_autocasts = torch._C._is_any_autocast_enabled


def records(packed: Any, others: tuple[Any, ...]) -> bool:
    """Whether `Packed` serves a call: plain tensors, of which the packed one, and no slope, requires grad."""
    q, *slopes = others
    return (
        torch.is_grad_enabled()
        and packed.requires_grad
        and not any(slope is not None and slope.requires_grad for slope in slopes)
        and MEMORY.issuperset((type(packed), type(q)))
        and not _transforms()
        and _len_modes() == 0
        and not _autocasts()
        and torch.autograd.forward_ad._current_level < 0
    )


def next_seed(tensor: Any, function: str = "flash_attn", name: str = "dropout_p") -> int:
    """A seed from the default generator of the tensor's device, which moves on; the host waits for nothing.

    So it follows from ``torch.manual_seed``, and is the same again where a checkpoint restores the generator's state.
    `function` and `name` are what was called, and its argument that asks for dropout.
    """
    if _transforms() and _draws_apart():
        raise UnsupportedError(
            f"{function}: {name} is given under torch.func.vmap, which asks for other randomness in each call, and "
            "all would drop the same; pass randomness='same', or call cufa.attention with a tensor of seeds."
        )
    if not tensor.is_cuda:
        return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"{function}: {name} is given in the capture of a CUDA graph, which would drop the same at every replay; "
            "capture without dropout, or call cufa.attention with a tensor as seed."
        )
    generator = torch.cuda.default_generators[tensor.device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + STEP)
    # An odd factor takes different offsets of a seed to different numbers, far apart.
    mixed: int = generator.initial_seed() + 0x9E3779B97F4A7C15 * offset
    return (mixed + 2**63) % 2**64 - 2**63


def _draws_apart() -> bool:
    """Whether a vmap is active that wants other random numbers in each of its calls, or none."""
    functorch: Any = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return any(
        functorch.CVmapInterpreterPtr(level).randomness() != functorch.RandomnessType.Same
        for level in levels
        if level.key() == functorch.TransformType.Vmap
    )


class Packed(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """out and lse of a packed tensor, whose gradient is one tensor that the kernels write."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Any,
        packed: Any,
        offsets: tuple[Any, ...],
        alibi_slopes: Any,
        asked: tuple[Any, ...],
        dropout: tuple[float, int | None],
        heads: tuple[int, int] | None,
    ) -> tuple[Any, Any]:
        operation: Operation = ATTENTION_VARLEN if offsets else ATTENTION
        causal, window, scale, softcap, _, _ = asked
        given = *_qkv(q, packed, heads), alibi_slopes, None, None, *offsets
        out, lse = _call(operation, given, (causal, window, scale, softcap, True, False), dropout)
        ctx.save_for_backward(q, packed, alibi_slopes, out, lse, *offsets)
        ctx.set_materialize_grads(False)
        ctx.asked, ctx.dropout, ctx.heads = asked, dropout, heads
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        q, packed, alibi_slopes, out, lse, *offsets = ctx.saved_tensors
        causal, window, scale, softcap, _, deterministic = ctx.asked
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        dout = torch.zeros_like(out) if dout is None else dout
        dpacked = torch.empty_like(packed)
        written = _qkv(None if q is None else torch.empty_like(q), dpacked, ctx.heads)
        given = *_qkv(q, packed, ctx.heads), alibi_slopes, None, out, *offsets, dout, lse, dlse, *written
        operation: Operation = ATTENTION_VARLEN_BACKWARD if offsets else ATTENTION_BACKWARD
        dq, *_ = _call(operation, given, (causal, window, scale, softcap, False, deterministic), ctx.dropout)
        return None if q is None else dq, dpacked, None, None, None, None, None


def _qkv(q: Any, packed: Any, heads: tuple[int, int] | None) -> tuple[Any, ...]:
    found = packed.unbind(-3) if heads is None else _common.split(packed, heads)
    return (*found,) if q is None else (q, *found)


def _call(
    operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...], dropout: tuple[float, int | None]
) -> Any:
    if dropout[1] is None:
        return call(operation, given, asked)
    return call_featured(operation, given, asked, None, None, None, None, *dropout)


def signed_probabilities(
    q: Any, k: Any, v: Any, alibi_slopes: Any, asked: tuple[Any, ...], dropout_p: float, seed: int
) -> Any:
    """The probabilities before dropout, negative where it drops them: what attention gives with one-hot values."""
    causal, window, scale, softcap, _, _ = asked
    batch, keys, heads, _ = k.shape
    with torch.no_grad():
        columns = []
        for start in range(0, keys, COLUMNS):
            width = min(COLUMNS, keys - start)
            one_hot = torch.zeros(keys, width, dtype=k.dtype, device=k.device)
            one_hot[start : start + width].fill_diagonal_(1.0)
            values = one_hot[None, :, None].expand(batch, keys, heads, width)
            given = q, k, values, alibi_slopes, None, None
            columns.append(call(ATTENTION, given, (causal, window, scale, softcap, False, False)))
        rows = (batch, q.shape[2], q.shape[1])
        found = torch.cat(columns, -1).transpose(1, 2) if columns else q.new_zeros((*rows, 0))
        kept = torch.as_tensor(dropout_mask((*rows, keys), dropout_p, seed), device=q.device)
        return torch.where(kept, found, -found)
