"""flash_attn's forward and backward one by one, for programs that put parts of attention together themselves.

Their names begin with an underscore in flash_attn too, but rings of devices are built on them. They record nothing for
autograd. lse is +inf in rows that see no key, which the gradients take as they take -inf: such a row gives nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from .._api.attention import attention, attention_varlen
from .._api.backward import attention_backward, attention_varlen_backward
from ..errors import UnsupportedError
from . import _common
from ._torch import next_seed

Tensor = Any


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, Tensor]:
    """out, softmax_lse, None and rng_state, from which `_flash_attn_backward` knows what was dropped."""
    window = _common.window((window_size_left, window_size_right))
    return _forward(
        attention, (q, k, v), dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, return_softmax
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: None = None,
    leftpad_k: None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, None, Tensor]:
    """`_flash_attn_forward` of packed sequences; block_table and leftpad_k are not supported.

    zero_tensors, which has flash_attn clear out before it is written, has nothing to do: rows of no sequence are 0.
    """
    for name, given in (("block_table", block_table), ("leftpad_k", leftpad_k)):
        if given is not None:
            raise UnsupportedError(f"_flash_attn_varlen_forward: {name} is not supported; leave it out.")
    given = q, k, v, cu_seqlens_q, cu_seqlens_k
    window = _common.window((window_size_left, window_size_right))
    asked = dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, return_softmax
    return _forward(attention_varlen, given, *asked, seqused_k=seqused_k)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """Write the gradients into dq, dk and dv; those that are None are computed for nobody."""
    window = _common.window((window_size_left, window_size_right))
    own = softmax_scale, causal, window, softcap, alibi_slopes, deterministic
    _backward(attention_backward, (dout, q, k, v, out, softmax_lse), (dq, dk, dv), dropout_p, rng_state, *own)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    """`_flash_attn_backward` of packed sequences; zero_tensors has nothing to do here either."""
    given = dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k
    window = _common.window((window_size_left, window_size_right))
    own = softmax_scale, causal, window, softcap, alibi_slopes, deterministic
    _backward(attention_varlen_backward, given, (dq, dk, dv), dropout_p, rng_state, *own)


def _forward(
    function: Any,
    given: tuple[Tensor, ...],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    **more: Any,
) -> tuple[Tensor, Tensor, None, Tensor]:
    if return_softmax and dropout_p != 0.0:
        raise UnsupportedError(
            "_flash_attn_forward: return_softmax is given together with dropout_p; flash_attn_func makes probabilities."
        )
    if not isinstance(given[0], torch.Tensor):
        raise TypeError(f"_flash_attn_forward: q is a {type(given[0]).__name__}; pass torch tensors.")
    seed = next_seed(given[0]) if dropout_p != 0.0 else 0
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window, "softcap": softcap}
    dropout = {"dropout_p": dropout_p, "seed": seed}
    with torch.no_grad():
        out, lse = function(*given, **options, **dropout, alibi_slopes=alibi_slopes, return_lse=True, **more)
    return out, _common.replaced(lse, -float("inf"), float("inf")), None, torch.tensor([seed, 0], dtype=torch.int64)


def _is_made(rng_state: Any) -> bool:
    """Whether it is what `_forward` returns."""
    if not isinstance(rng_state, torch.Tensor) or rng_state.is_cuda:
        return False
    return bool(rng_state.dtype == torch.int64 and rng_state.shape == (2,))


def _backward(
    function: Any,
    given: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    dropout_p: float,
    rng_state: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> None:
    seed = None
    if dropout_p != 0.0:
        if not _is_made(rng_state):
            raise UnsupportedError("_flash_attn_backward: rng_state is not what the forward has returned; pass that.")
        seed = int(rng_state[0])  # type: ignore[index]
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window, "softcap": softcap}
    options |= {"dropout_p": dropout_p, "seed": seed, "alibi_slopes": alibi_slopes, "deterministic": deterministic}
    with torch.no_grad():
        function(*given, **dict(zip(("dq", "dk", "dv"), gradients, strict=True)), **options)
