"""Host time of calls: `cufa.flash_attn` beside `cufa.attention`, torch's own attention and, if it is there, flash_attn.

    python benchmarks/flash_attn_calls.py [--calls N] [--rounds N]

Small problems, so that the host is what takes time; kinds take turns in one process, and the median of rounds counts.
With a GPU launches are waited for between rounds only. Without one cufa computes on the CPU, and what is printed is
how much longer `cufa.flash_attn` takes than `cufa.attention` where both do no more than look the problem up.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import cufa
import cufa.flash_attn

Kinds = dict[str, Callable[[], Any]]


def kinds_of(device: str, grad: bool) -> Kinds:
    """Calls of one problem: q, k and v of their own, and in one tensor."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv = torch.randn(1, 128, 3, 8, 64, device=device, dtype=dtype, requires_grad=grad)
    q, k, v = (each.detach().clone().requires_grad_(grad) for each in qkv.unbind(2))
    swapped = [each.detach().transpose(1, 2).requires_grad_(grad) for each in (q, k, v)]
    cache = torch.zeros(2, 1, 256, 8, 64, device=device, dtype=dtype)
    step, lengths = q.detach()[:, :1], torch.full((1,), 100, dtype=torch.int32, device=device)

    def sdpa() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True)

    kinds: Kinds = {
        "cufa.attention": lambda: cufa.attention(q, k, v, causal=True),
        "cufa: flash_attn_func": lambda: cufa.flash_attn.flash_attn_func(q, k, v, causal=True),
        "cufa.attention of views": lambda: cufa.attention(*qkv.unbind(2), causal=True),
        "cufa: flash_attn_qkvpacked_func": lambda: cufa.flash_attn.flash_attn_qkvpacked_func(qkv, causal=True),
    }
    if not grad:
        kinds["cufa.attention_with_kvcache"] = lambda: cufa.attention_with_kvcache(step, *cache, cache_seqlens=lengths)
        kinds["cufa: flash_attn_with_kvcache"] = lambda: cufa.flash_attn.flash_attn_with_kvcache(
            step, *cache, cache_seqlens=lengths
        )
    if device == "cuda":
        kinds["torch: SDPA"] = sdpa
        with contextlib.suppress(ImportError):
            # FlashAttention-4 has the package, but not this module.
            peer = importlib.import_module("flash_attn.flash_attn_interface")
            kinds["flash_attn: flash_attn_func"] = lambda: peer.flash_attn_func(q, k, v, causal=True)
            kinds["flash_attn: flash_attn_qkvpacked_func"] = lambda: peer.flash_attn_qkvpacked_func(qkv, causal=True)
    if not grad:
        return kinds

    def differentiated(call: Callable[[], Any]) -> Callable[[], Any]:
        dout = torch.ones_like(call())
        return lambda: call().backward(dout)

    return {name: differentiated(call) for name, call in kinds.items()}


def microseconds(kinds: Kinds, calls: int, rounds: int) -> dict[str, float]:
    """Of a call of each kind, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, call in kinds.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            found[name].append(1e6 * (time.perf_counter() - began) / calls)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def show(title: str, times: dict[str, float]) -> None:
    sdpa = times.get("torch: SDPA")
    print(title)
    for name, each in times.items():
        print(f"  {name:<42} {each:8.1f} µs" + (f"  {each / sdpa:5.2f} of SDPA" if sdpa else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of calls of cufa.flash_attn.")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if torch.cuda.is_available():
        show("forward", microseconds(kinds_of("cuda", False), options.calls, options.rounds))
        show("forward and backward", microseconds(kinds_of("cuda", True), options.calls, options.rounds))
        return
    # What computes on the CPU is left out: views, checks, allocation and look-ups remain.
    with mock.patch("cufa._operations.call.compute_on_cpu", lambda *_: None):
        show("forward, without computing", microseconds(kinds_of("cpu", False), options.calls, options.rounds))
        show("with gradients, without computing", microseconds(kinds_of("cpu", True), options.calls, options.rounds))


if __name__ == "__main__":
    main()
