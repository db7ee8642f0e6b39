"""Exact attention for the arrays you already hold: CuPy, torch, JAX, Numba, NumPy, and any with ``__dlpack__``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "CompileError",
    "CudaError",
    "DecodePlan",
    "JitKernel",
    "MissingKernelError",
    "OutOfPagesError",
    "PagedBatch",
    "PagedKVCache",
    "PagedSequence",
    "UnsupportedError",
    "attention",
    "attention_backward",
    "attention_shared_prefix",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_with_kvcache",
    "cache",
    "cuda_function",
    "decode_plan",
    "dropout_mask",
    "explain",
    "functions",
    "is_available",
    "jit",
    "masks",
    "merge_states",
    "merge_states_backward",
    "reference",
    "rotary",
    "show_config",
    "stats",
    "t5_buckets",
    "tensor_map",
    "testing",
    "warmup",
]

if TYPE_CHECKING:
    from . import functions, masks, reference, testing
    from ._api.attention import attention, attention_varlen
    from ._api.backward import attention_backward, attention_varlen_backward
    from ._api.cache import cache
    from ._api.config import is_available, show_config
    from ._api.decode_plan import decode_plan
    from ._api.dropout import dropout_mask
    from ._api.explain import explain
    from ._api.kvcache import attention_with_kvcache
    from ._api.rotary import rotary
    from ._api.shared_prefix import attention_shared_prefix
    from ._api.states import merge_states, merge_states_backward
    from ._api.stats import stats
    from ._api.t5 import t5_buckets
    from ._api.warmup import warmup
    from ._call.kvcache import DecodePlan
    from ._jit.kernel import JitKernel, jit
    from ._jit.tensor_map import tensor_map
    from ._masks.blocks import BlockMask
    from ._pages.batch import PagedBatch
    from ._pages.cache import PagedKVCache
    from ._pages.sequence import PagedSequence
    from ._terms.snippet import cuda_function
    from .errors import CompileError, CudaError, MissingKernelError, OutOfPagesError, UnsupportedError

_HOMES = {
    "attention": "_api.attention",
    "attention_backward": "_api.backward",
    "attention_shared_prefix": "_api.shared_prefix",
    "attention_varlen": "_api.attention",
    "attention_varlen_backward": "_api.backward",
    "attention_with_kvcache": "_api.kvcache",
    "cache": "_api.cache",
    "cuda_function": "_terms.snippet",
    "decode_plan": "_api.decode_plan",
    "dropout_mask": "_api.dropout",
    "explain": "_api.explain",
    "is_available": "_api.config",
    "jit": "_jit.kernel",
    "merge_states": "_api.states",
    "merge_states_backward": "_api.states",
    "rotary": "_api.rotary",
    "show_config": "_api.config",
    "stats": "_api.stats",
    "t5_buckets": "_api.t5",
    "tensor_map": "_jit.tensor_map",
    "warmup": "_api.warmup",
    "BlockMask": "_masks.blocks",
    "CompileError": "errors",
    "CudaError": "errors",
    "DecodePlan": "_call.kvcache",
    "JitKernel": "_jit.kernel",
    "MissingKernelError": "errors",
    "OutOfPagesError": "errors",
    "PagedBatch": "_pages.batch",
    "PagedKVCache": "_pages.cache",
    "PagedSequence": "_pages.sequence",
    "UnsupportedError": "errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import cufa`` alone does next to nothing."""
    import importlib

    if name in (
        "flash_attn",
        "functions",
        "jax",
        "masks",
        "reference",
        "testing",
        "torch",
        "transformers",
    ):  # frameworks and flash_attn are not in __all__: a star would hide them
        return importlib.import_module(f"cufa.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'cufa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cufa.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
