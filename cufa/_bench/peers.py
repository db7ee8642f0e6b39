"""What is measured: calls of cufa, and of the libraries beside it that can be imported.

A peer is given the framework of the arrays, a row, q, k and v, for gradients dout too, and returns a function without
arguments. It raises ImportError if its library is not there, and NotImplementedError for a row that it does not serve.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from .._api.attention import attention, attention_varlen
from .._api.backward import attention_backward, attention_varlen_backward
from .frameworks import Framework
from .reports import BASELINE, Row

REFUSALS = ("No available kernel", "No viable backend", "No valid execution plan")
"""What torch says where the backend that was asked for does not serve a call."""

Call = Callable[[], Any]
Peer = Callable[..., Call]


def _options(row: Row) -> dict[str, Any]:
    window = {} if row.window is None else {"window_size": (row.window, None)}
    return {"causal": row.causal, **window}


def _cufa(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    options = _options(row)
    if row.lengths is None:
        return lambda: attention(q, k, v, **options)
    offsets = framework.offsets(row.lengths)
    return lambda: attention_varlen(q, k, v, offsets, offsets, **options)


def _cufa_backward(framework: Framework, row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    options, deterministic = _options(row), row.deterministic
    if row.lengths is None:
        out, lse = attention(q, k, v, return_lse=True, **options)
        return lambda: attention_backward(dout, q, k, v, out, lse, deterministic=deterministic, **options)
    offsets = framework.offsets(row.lengths)
    out, lse = attention_varlen(q, k, v, offsets, offsets, return_lse=True, **options)
    return lambda: attention_varlen_backward(
        dout, q, k, v, out, lse, offsets, offsets, deterministic=deterministic, **options
    )


# --- torch's attention ------------------------------------------------------------------------------


def _sdpa(backend: str) -> Peer:
    def make(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        if row.window is not None or row.lengths is not None:
            raise NotImplementedError("no windows and no packed sequences")
        transposed = [each.transpose(1, 2) for each in (q, k, v)]
        grouped = row.num_heads_q != row.num_heads_k

        def run() -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                out = scaled_dot_product_attention(*transposed, is_causal=row.causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return refusing(run)

    return make


def refusing(run: Call) -> Call:
    """`run`, tried once: NotImplementedError if the backend of torch that it names does not serve the call."""
    try:
        with warnings.catch_warnings():  # in which torch says why
            warnings.simplefilter("ignore")
            run()
    except RuntimeError as reason:
        if any(words in str(reason) for words in REFUSALS):
            raise NotImplementedError("not served by this backend") from reason
        raise
    return run


def _check_worth_compiling(row: Row) -> None:
    """Raise on all rows but two, for peers that compile for every row, and for long."""
    if not row.on_the_ladder or (row.head_dim, row.seqlen) != (128, 8192):
        raise NotImplementedError("compiling it takes long: only head_dim 128 at 8192")


def _flex(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    _check_worth_compiling(row)
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query >= key

    mask = create_block_mask(sees, None, None, row.seqlen, row.seqlen) if row.causal else None
    torch._dynamo.reset()  # it stops compiling after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    transposed = [each.transpose(1, 2) for each in (q, k, v)]
    grouped = row.num_heads_q != row.num_heads_k
    return lambda: compiled(*transposed, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def autograd(forward: Peer, *, deterministic: bool = False) -> Peer:
    """What torch's autograd makes of a peer's forward, which itself is not measured; `deterministic`: if it can be."""

    def make(framework: Framework, row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
        import torch

        if row.deterministic and not deterministic:
            raise NotImplementedError("not known to be deterministic")
        leaves = [each.detach().requires_grad_() for each in (q, k, v)]
        out = forward(framework, row, *leaves)()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return make


def flash(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    """The kernels behind torch's flash backend, which has neither windows nor packed sequences."""
    import torch

    offsets = None if row.lengths is None else framework.offsets(row.lengths)
    longest = max(row.lengths or (row.seqlen,))
    options = {} if row.window is None else {"window_size_left": row.window}
    _check_16_bit(row)
    return lambda: torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, row.causal, False, **options
    )[0]


def _fa2(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    make = _sdpa("FLASH_ATTENTION") if row.window is None and row.lengths is None else flash
    return make(framework, row, q, k, v)


def _fa2_backward(framework: Framework, row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    import torch

    run = autograd(_fa2)(framework, row._replace(deterministic=False), q, k, v, dout)
    if not row.deterministic:
        return run

    def run_deterministically() -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(False)

    return run_deterministically


def _flex_backward(framework: Framework, row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    _check_worth_compiling(row)
    import torch._functorch.config as config

    config.donated_buffer = False  # the graph is kept for more than one gradient
    return autograd(_flex)(framework, row, q, k, v, dout)


# --- FlashAttention ---------------------------------------------------------------------------------


def _check_16_bit(row: Row) -> None:
    if row.dtype == "float32":
        raise NotImplementedError("16-bit numbers only")


def _flash_attn(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    _check_16_bit(row)
    options: dict[str, Any] = {"causal": row.causal}
    if row.window is not None:
        options["window_size"] = (row.window, -1)
    if row.lengths is None:
        return lambda: flash_attn_func(q, k, v, **options)
    offsets, longest = framework.offsets(row.lengths), max(row.lengths)
    return lambda: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, **options)


def _fa3(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    import fa3_fwd_config

    sys.modules.setdefault("flash_attn_config", fa3_fwd_config)  # the name under which the package looks for it
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

    _check_16_bit(row)
    if row.window is not None:
        raise NotImplementedError("the wheel is built without windows")
    if row.lengths is None:
        return lambda: _first(flash_attn_func(q, k, v, causal=row.causal))
    offsets, longest = framework.offsets(row.lengths), max(row.lengths)
    return lambda: _first(flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=row.causal))


def _fa4(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    _check_16_bit(row)
    options: dict[str, Any] = {"causal": row.causal, "deterministic": row.deterministic}
    if row.window is not None:
        options |= {"causal": False, "window_size": (row.window, 0 if row.causal else None)}
    if row.lengths is None:
        return lambda: _first(flash_attn_func(q, k, v, **options))
    offsets, longest = framework.offsets(row.lengths), max(row.lengths)
    options |= {f"cu_seqlens_{name}": offsets for name in "qk"} | {f"max_seqlen_{name}": longest for name in "qk"}
    return lambda: _first(flash_attn_varlen_func(q, k, v, **options))


def _first(found: Any) -> Any:
    """The output alone, where some releases return it with lse."""
    return found[0] if isinstance(found, tuple) else found


# --- JAX --------------------------------------------------------------------------------------------


def _import_jax() -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    import jax

    return jax


def _jax(framework: Framework, row: Row, q: Any, k: Any, v: Any) -> Call:
    _check_worth_compiling(row)
    jax = _import_jax()
    arrays = [jax.dlpack.from_dlpack(each.contiguous()) for each in (q, k, v)]
    attend = jax.jit(lambda *given: jax.nn.dot_product_attention(*given, is_causal=row.causal, implementation="cudnn"))
    attend(*arrays).block_until_ready()

    def run() -> Any:
        return attend(*arrays)

    run.foreign = True  # type: ignore[attr-defined]
    return run


def _jax_backward(framework: Framework, row: Row, q: Any, k: Any, v: Any, dout: Any) -> Call:
    _check_worth_compiling(row)
    jax = _import_jax()
    *arrays, gradient = (jax.dlpack.from_dlpack(each) for each in (q, k, v, dout))

    def attend(*given: Any) -> Any:
        return jax.nn.dot_product_attention(*given, is_causal=row.causal, implementation="cudnn")

    _, pullback = jax.jit(lambda *given: jax.vjp(attend, *given))(*arrays)
    backward = jax.jit(lambda pullback, gradient: pullback(gradient))

    def run() -> Any:
        return backward(pullback, gradient)

    run.foreign = True  # type: ignore[attr-defined]
    return run


# --- all of them ------------------------------------------------------------------------------------

FORWARD: dict[str, Peer] = {
    "cufa": _cufa,
    BASELINE: _fa2,
    "cuDNN (torch)": _sdpa("CUDNN_ATTENTION"),
    "memory-efficient (torch)": _sdpa("EFFICIENT_ATTENTION"),
    "flash-attn": _flash_attn,
    "FA3": _fa3,
    "FA4": _fa4,
    "FlexAttention": _flex,
    "cuDNN (JAX)*": _jax,
}

BACKWARD: dict[str, Peer] = {
    "cufa": _cufa_backward,
    BASELINE: _fa2_backward,
    "cuDNN (torch)": autograd(FORWARD["cuDNN (torch)"]),
    "memory-efficient (torch)": autograd(FORWARD["memory-efficient (torch)"]),
    "flash-attn": autograd(_flash_attn),
    "FA4": autograd(_fa4, deterministic=True),
    "FlexAttention": _flex_backward,
    "cuDNN (JAX)*": _jax_backward,
}

COMPILED = ("FlexAttention", "cuDNN (JAX)*")
"""Peers that compile for long, and are measured on few rows."""
