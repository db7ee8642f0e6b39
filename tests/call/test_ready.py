"""Calls of a problem whose kernels are loaded, of arrays that are viewed each time: they launch what its first did."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pretended
import pytest

import cufa
from cufa._call import arrays as _arrays
from cufa._call import problem as _problem
from cufa._operations import repeated as _repeated

SHAPE = 1, 64, 2, 64
FIRST_MADE = 1 << 8
"""More arrays than a test has before its calls make any."""


class Array:
    """An array with CuPy's interface; what is made for results of a call has the same addresses in each."""

    made = 0

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        Array.made += 1
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.strides = np.empty(shape, dtype).strides
        self.data = SimpleNamespace(ptr=Array.made << 32, device_id=0)


class Gpu(pretended.Gpu):
    """That of CuPy's arrays."""

    def alloc(self, size: int) -> Any:
        return SimpleNamespace(ptr=1 << 50)

    @contextlib.contextmanager
    def same_memory(self) -> Iterator[None]:
        before, Array.made = Array.made, FIRST_MADE
        yield
        Array.made = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    found.stand_in(monkeypatch, _repeated.Ready)
    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(getDevice=lambda: found.current)
    cuda = SimpleNamespace(
        get_current_stream=lambda device: SimpleNamespace(ptr=found.stream),
        Device=lambda device: contextlib.nullcontext(),
        runtime=runtime,
        alloc=found.alloc,
    )
    for name, value in {"ndarray": Array, "cuda": cuda}.items():
        setattr(cupy, name, value)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(_arrays._ADAPTERS, Array, _arrays.CupyAdapter())
    _problem._checked.cache_clear()
    yield found
    _problem._checked.cache_clear()


def calls() -> dict[str, Callable[[], Any]]:
    q, k, v, out, dout = (Array(SHAPE, "float16") for _ in range(5))
    lse, sinks = Array((1, 2, 64), "float32"), Array((2,), "float32")
    packed, offsets = [Array(SHAPE[1:], "float16") for _ in range(3)], Array((3,), "int32")
    cache, step, lengths = Array((1, 4096, 2, 64), "float16"), Array((1, 1, 2, 64), "float16"), Array((1,), "int32")
    return {
        "attention": lambda: cufa.attention(q, k, v, causal=True),
        "lse": lambda: cufa.attention(q, k, k, return_lse=True, sinks=sinks),
        "gradients": lambda: cufa.attention_backward(dout, q, k, v, out, lse, causal=True),
        "packed": lambda: cufa.attention_varlen(*packed, offsets, offsets, causal=True),
        "a cache": lambda: cufa.attention_with_kvcache(step, cache, cache, cache_seqlens=lengths),
    }


@pytest.mark.parametrize("kind", calls())
def test_calls_launch_what_the_first_did(kind: str, gpu: Gpu) -> None:
    call = calls()[kind]
    first = gpu.launches(call)
    assert first and not gpu.short_cuts
    for turn in range(1, 4):
        assert gpu.launches(call) == first and gpu.short_cuts == turn


def test_streams_and_the_current_gpu_are_asked_for_each_time(gpu: Gpu) -> None:
    call = calls()["attention"]
    for _ in range(2):
        gpu.launches(call)
    gpu.stream = 8
    assert {stream for stream, *_ in gpu.launches(call)} == {8} and gpu.short_cuts == 2
    gpu.current = 1
    assert gpu.launches(call) and gpu.short_cuts == 2
    gpu.current = 0
    assert gpu.launches(call) and gpu.short_cuts == 3


def test_other_calls_are_not_taken_for_them(gpu: Gpu) -> None:
    q, k, v = (Array(SHAPE, "float16") for _ in range(3))
    for _ in range(2):
        cufa.attention(q, k, v)
    assert gpu.short_cuts == 1
    out = Array(SHAPE, "float16")
    for _ in range(3):
        assert cufa.attention(q, k, v, out=out) is out
        cufa.attention(q, k, v, dropout_p=0.5, seed=3)
    assert gpu.short_cuts == 1
    k.data.ptr += 2
    for _ in range(2):
        cufa.attention(q, k, v)  # rows that are not aligned are copied first
    assert gpu.short_cuts == 1
    with pytest.raises(ValueError, match="dtype"):
        cufa.attention(q, q, Array(SHAPE, "float32"))
