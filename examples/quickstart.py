"""Attention in five minutes: run it, check it, time it, and see which kernel ran.

    python examples/quickstart.py

The arrays are CuPy's where there is an NVIDIA GPU and NumPy's where there is none; not one call differs
between the two. Every array is laid out (batch, seqlen, num_heads, head_dim).
"""

from __future__ import annotations

import importlib.util
import time
from types import ModuleType
from typing import Any

import numpy as np

import cufa
import cufa.testing

Array = Any  # a NumPy or a CuPy array: the example never asks which


def array_library() -> ModuleType:
    """CuPy where there is a GPU for it, else NumPy."""
    if not cufa.is_available():
        print("Running on the CPU with NumPy: no usable NVIDIA GPU was found.")
        return np
    if importlib.util.find_spec("cupy") is None:
        print("Running on the CPU with NumPy. There is a GPU: `pip install cupy-cuda13x` puts it to use.")
        return np
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    print(f"Running on the GPU with CuPy: {name}.")
    return cupy


def random_array(xp: ModuleType, shape: tuple[int, ...], dtype: type, seed: int) -> Array:
    """Normally distributed numbers in any dtype; the generators themselves know no float16."""
    return xp.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def synchronize(xp: ModuleType) -> None:
    """Wait for the GPU: its work runs behind Python's back, and a clock must not stop before it is done."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def run_check_and_time(xp: ModuleType, dtype: type, batch: int, seqlen: int, heads: int, head_dim: int) -> None:
    """Causal attention, compared with the float64 reference and timed."""
    q, k, v = (random_array(xp, (batch, seqlen, heads, head_dim), dtype, seed) for seed in range(3))
    print(f"\nCausal attention, {np.dtype(dtype).name}, (batch, seqlen, heads, head_dim) = {q.shape}")

    synchronize(xp)
    start = time.perf_counter()
    out = cufa.attention(q, k, v, causal=True)
    synchronize(xp)
    first = time.perf_counter() - start

    # The reference holds every score in float64, so it gets a few rows and not the whole problem. The first
    # rows see the first keys alone. The last rows see all: a causal mask lines up with the ends of q and k.
    rows = min(32, seqlen)
    cufa.testing.assert_close(out[:1, :rows], q[:1, :rows], k[:1, :rows], v[:1, :rows], causal=True)
    cufa.testing.assert_close(out[-1:, -rows:], q[-1:, -rows:], k[-1:], v[-1:], causal=True)
    print(f"  check        the first and the last {rows} rows agree with the float64 reference")

    steady = cufa.testing.bench(lambda: cufa.attention(q, k, v, causal=True), like=q).median
    # Two matrix products of 2 * seqlen**2 * head_dim each; the causal mask leaves half of either.
    flop = 4 * batch * heads * seqlen**2 * head_dim / 2
    print(f"  first call   {first * 1e3:10.3f} ms   (finds its kernel: compiled, or read from the cache)")
    print(f"  later calls  {steady * 1e3:10.3f} ms   {flop / steady / 1e12:.3g} TFLOP/s")
    print("  what ran:")
    print("    " + str(cufa.explain(q, k, v, causal=True)).replace("\n", "\n    "))


def show_grouped_heads(xp: ModuleType, dtype: type) -> None:
    """Grouped-query attention: four query heads share one head of k and v; the shapes say it all."""
    q = random_array(xp, (1, 256, 8, 64), dtype, seed=0)
    k, v = (random_array(xp, (1, 256, 2, 64), dtype, seed) for seed in (1, 2))
    out = cufa.attention(q, k, v, causal=True)
    cufa.testing.assert_close(out, q, k, v, causal=True)
    print(f"  grouped heads    8 heads of q share 2 of k and v: out is {out.shape}, agrees with the reference")


def show_window(xp: ModuleType, dtype: type) -> None:
    """A sliding window: every query sees itself and the 64 keys before it."""
    q, k, v = (random_array(xp, (1, 256, 4, 64), dtype, seed) for seed in range(3))
    out = cufa.attention(q, k, v, window_size=(64, 0))
    cufa.testing.assert_close(out, q, k, v, window_size=(64, 0))
    print(f"  sliding window   64 keys back and none ahead: out is {out.shape}, agrees with the reference")


def show_packed_sequences(xp: ModuleType, dtype: type) -> None:
    """Sequences of any lengths, packed end to end without padding; offsets say where each begins."""
    offsets = [0, 5, 305, 425]  # three sequences, of 5, 300 and 120 tokens
    q, k, v = (random_array(xp, (offsets[-1], 4, 64), dtype, seed) for seed in range(3))
    cu_seqlens = xp.asarray(offsets, dtype=np.int32)
    out = cufa.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    for begin, end in zip(offsets, offsets[1:], strict=False):
        one = slice(begin, end)
        cufa.testing.assert_close(out[None, one], q[None, one], k[None, one], v[None, one], causal=True)
    print(f"  packed           5 + 300 + 120 tokens in one call: out is {out.shape}, agrees sequence by sequence")


def main() -> None:
    xp = array_library()
    cufa.show_config()
    if xp is np:
        dtype: type = np.float32
        run_check_and_time(xp, dtype, batch=1, seqlen=1024, heads=8, head_dim=64)
    else:
        dtype = np.float16
        run_check_and_time(xp, dtype, batch=2, seqlen=4096, heads=16, head_dim=128)
    print("\nThe same call does more:")
    show_grouped_heads(xp, dtype)
    show_window(xp, dtype)
    show_packed_sequences(xp, dtype)


if __name__ == "__main__":
    main()
