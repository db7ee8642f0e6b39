"""Attention in five minutes: run it, check it, time it, and see what ran.

    python examples/quickstart.py

The arrays are CuPy's where there is an NVIDIA GPU and NumPy's where there is none; no call differs between
the two. Every array is laid out (batch, seqlen, num_heads, head_dim).
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from types import ModuleType
from typing import Any

import numpy as np

import cufa
import cufa.testing

Array = Any  # a NumPy or a CuPy array: nothing below asks which
Shape = tuple[int, ...]


def array_library() -> ModuleType:
    """CuPy where there is a GPU for it, else NumPy."""
    if cufa.is_available() and importlib.util.find_spec("cupy"):
        return importlib.import_module("cupy")
    return np


def random_array(xp: ModuleType, shape: Shape, seed: int) -> Array:
    """Normally distributed numbers: float16 on the GPU, float32 with NumPy."""
    x = xp.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return x if xp is np else x.astype(np.float16)


def random_qkv(xp: ModuleType, shape_q: Shape, shape_k: Shape) -> tuple[Array, Array, Array]:
    return random_array(xp, shape_q, 0), random_array(xp, shape_k, 1), random_array(xp, shape_k, 2)


def synchronize(xp: ModuleType) -> None:
    """Wait for the GPU: it works behind Python's back, and a clock must not stop before it is done."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def run_check_and_time(xp: ModuleType, batch: int, seqlen: int, num_heads: int, head_dim: int) -> None:
    """Causal attention, compared with the float64 reference and timed."""
    shape = (batch, seqlen, num_heads, head_dim)
    q, k, v = random_qkv(xp, shape, shape)
    print(f"\nCausal attention of {q.dtype} arrays, (batch, seqlen, num_heads, head_dim) = {shape}")

    synchronize(xp)
    start = time.perf_counter()
    out = cufa.attention(q, k, v, causal=True)
    synchronize(xp)
    first = time.perf_counter() - start

    # The reference holds every score in float64, so it gets some rows and not the whole problem. The first
    # rows see the first keys alone. The last see all: a causal mask lines up with the ends of q and k.
    rows = min(32, seqlen)
    cufa.testing.assert_close(out[:1, :rows], q[:1, :rows], k[:1, :rows], v[:1, :rows], causal=True)
    cufa.testing.assert_close(out[-1:, -rows:], q[-1:, -rows:], k[-1:], v[-1:], causal=True)

    later = cufa.testing.bench(lambda: cufa.attention(q, k, v, causal=True), like=q).median
    # Two matrix products of 2 * seqlen**2 * head_dim each; the causal mask leaves half of either.
    gflops = 4 * batch * num_heads * seqlen**2 * head_dim / 2 / later / 1e9
    found = "" if xp is np else ", its kernel compiled or read from the cache"
    print(f"  checked      the first and the last {rows} rows agree with the float64 reference")
    print(f"  first call   {first * 1e3:10.3f} ms{found}")
    print(f"  later calls  {later * 1e3:10.3f} ms, {gflops:,.0f} GFLOP/s")
    print(f"\nWhat ran:\n{cufa.explain(q, k, v, causal=True)}")


def show(xp: ModuleType, title: str, shape_q: Shape, shape_k: Shape, **options: Any) -> None:
    """One call with some options, compared with the reference, which takes the same options."""
    q, k, v = random_qkv(xp, shape_q, shape_k)
    out = cufa.attention(q, k, v, **options)
    cufa.testing.assert_close(out, q, k, v, **options)
    print(f"  {title:<66}{out.shape}")


def show_packed(xp: ModuleType, lengths: list[int]) -> None:
    """Sequences of any lengths, laid end to end without padding; offsets say where each begins."""
    q, k, v = random_qkv(xp, (sum(lengths), 4, 64), (sum(lengths), 4, 64))
    cu_seqlens = xp.asarray(np.cumsum([0, *lengths]), dtype=np.int32)
    out = cufa.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    cufa.testing.assert_close(out, q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)
    print(f"  {f'sequences of {lengths} tokens in one call, without padding':<66}{out.shape}")


def show_mistake(xp: ModuleType) -> None:
    """What a call that cannot be right says."""
    q, k, v = random_qkv(xp, (1, 8, 2, 128), (1, 8, 2, 64))
    try:
        cufa.attention(q, k, v)
    except ValueError as error:
        print(f"\nA mistake is told at once:\n  ValueError: {error}")


def main() -> None:
    xp = array_library()
    cufa.show_config()
    if xp is np:
        run_check_and_time(xp, batch=1, seqlen=1024, num_heads=8, head_dim=64)
    else:
        run_check_and_time(xp, batch=2, seqlen=4096, num_heads=16, head_dim=128)

    print("\nThe same call does more. Each of these agrees with the reference; right is the shape of out:")
    q_heads = xp.arange(1, 9, dtype=np.float32)
    show(
        xp,
        "a sliding window: 64 keys back, none ahead",
        (1, 256, 8, 64),
        (1, 256, 8, 64),
        window_size=(64, 0),
    )
    show(xp, "grouped heads: 8 of q share 2 of k and v", (1, 256, 8, 64), (1, 256, 2, 64), causal=True)
    show(xp, "decoding: one new token looks back at 2000", (1, 1, 8, 64), (1, 2000, 2, 64), causal=True)
    show(
        xp,
        "any of them together: softcap, ALiBi, sinks and a window",
        (2, 100, 8, 40),
        (2, 300, 4, 40),
        window_size=(128, 16),
        softcap=30.0,
        alibi_slopes=0.5**q_heads,
        sinks=q_heads / 8,
    )
    show_packed(xp, [5, 300, 120])
    show_mistake(xp)


if __name__ == "__main__":
    main()
