"""What calls take of Python's time, without a GPU: the real way of a call, on arrays that claim to be on one.

    python benchmarks/host_calls.py [--rounds N] [--only REGEX] [TREE ...]

Each TREE is a checkout, by default this one; they take turns, each time in a process of its own, so that what else the
machine does meets all alike. Everything is cufa's own but for the driver, whose launches do nothing, and the arrays:
CPU tensors of torch's, and arrays with CuPy's interface. So a launch, a GPU's allocator and its thread of torch's
autograd are left out, which on a GPU come on top. Times are of the thread that runs, not of the clock, and the least of
all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np

CALLS = 400
"""Calls of a kind between two looks at the clock."""

TURNS = 5
"""Rounds of all kinds in one process."""

SHAPE = 1, 64, 2, 16


class NoDriver:
    """The driver's functions that calls in steady state use, and those that make them ready."""

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4
        CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE = 5

    CUclusterSchedulingPolicy = SimpleNamespace(CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING=2)
    CUlaunchConfig = SimpleNamespace

    @staticmethod
    def CUlaunchAttribute() -> Any:
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    @staticmethod
    def cuLaunchKernelEx(config: Any, function: Any, arguments: int, extra: int) -> tuple[int]:
        return (0,)


class Memory:
    """What CuPy's ``array.data`` is."""

    __slots__ = ("device_id", "ptr")

    def __init__(self, ptr: int) -> None:
        self.ptr, self.device_id = ptr, 0


class Array:
    """An array with CuPy's interface, in memory that is not there; that of a shape and dtype is made but once."""

    __slots__ = ("data", "dtype", "shape", "strides")
    _made: ClassVar[dict[Any, Array]] = {}

    def __new__(cls, shape: tuple[int, ...], dtype: Any) -> Array:
        known = cls._made.get((shape, dtype))
        if known is None:
            known = cls._made[shape, dtype] = super().__new__(cls)
            known.shape, known.dtype = shape, np.dtype(dtype)
            steps = itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=known.dtype.itemsize)
            known.strides = tuple(steps)[::-1]
            known.data = Memory(len(cls._made) << 40)
        return known


def pretended_cupy() -> ModuleType:
    """A module of which cufa takes arrays for CuPy's."""
    cupy = ModuleType("cupy")
    stream = SimpleNamespace(ptr=7)
    runtime = SimpleNamespace(getDevice=int)  # which without an argument is 0
    memory = Memory(1 << 39)
    cuda = SimpleNamespace(get_current_stream={0: stream}.get, Device=None, runtime=runtime, alloc=lambda size: memory)

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        return Array(shape, dtype)

    for name, value in {"ndarray": Array, "empty": empty, "cuda": cuda}.items():
        setattr(cupy, name, value)
    return cupy


def pretend() -> None:
    """Let arrays be on a Hopper of which nothing but the number of its SMs is there."""
    from cufa._call import arrays as _arrays
    from cufa._compile import jit as _jit
    from cufa._compile import used as _used
    from cufa._driver import driver as _driver
    from cufa._kernels import tensor_map

    def patch(owner: Any, name: str, value: Any) -> None:
        mock.patch.object(owner, name, value, create=True).start()

    patch(_driver, "driver", NoDriver)
    patch(_driver, "device", lambda _: _driver.Device(90, 132))
    patch(_driver, "overlaps", lambda _: True)
    patch(_driver, "current", lambda _: contextlib.nullcontext())
    patch(_jit, "load_kernel", lambda plan, *_: plan.entries)
    patch(_used, "note", lambda *_: None)
    patch(tensor_map, "_driver_encode", lambda shape, address: address.to_bytes(8, "little") + bytes(120))
    sys.modules["cupy"] = pretended_cupy()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        patch(torch._C, "_cuda_getCurrentRawStream", {0: 7}.get)
        patch(torch._C, "_cuda_getDevice", int)
        guards = torch._C._dynamo.guards
        patch(guards, "_empty_strided_cuda", guards._empty_strided_cpu)
        own = _arrays.TorchAdapter.spec
        patch(_arrays.TorchAdapter, "spec", lambda self, layout: own(self, layout)._replace(device=0))


def cupy_calls() -> dict[str, Callable[[], Any]]:
    import cufa

    q, k, v, cache = (Array(SHAPE, np.float16),) * 4
    step, lengths = Array((*SHAPE[:1], 1, *SHAPE[2:]), np.float16), Array((1,), np.int32)
    lse = Array((1, 2, 64), np.float32)
    return {
        "CuPy: attention": lambda: cufa.attention(q, k, v, causal=True),
        "CuPy: attention_with_kvcache": lambda: cufa.attention_with_kvcache(step, k, cache, cache_seqlens=lengths),
        "CuPy: attention_backward": lambda: cufa.attention_backward(q, q, k, v, q, lse, causal=True),
    }


def torch_calls() -> dict[str, Callable[[], Any]]:
    import torch

    import cufa
    from cufa import flash_attn

    class Nothing(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            return own_out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> tuple[Any, ...]:
            return own_out, own_out, own_out

    # What a Function returns requires grad from then on, so that no other call is given it.
    q, k, v, out, cache, own_out = (torch.zeros(SHAPE, dtype=torch.float16) for _ in range(6))
    own = [each.clone().requires_grad_() for each in (q, k, v)]
    qkv = torch.zeros(*SHAPE[:2], 3, *SHAPE[2:], dtype=torch.float16, requires_grad=True)
    dout, lse = torch.zeros_like(q), torch.zeros(1, 2, 64)
    step, lengths = q[:, :1].clone(), torch.ones(1, dtype=torch.int32)
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    packed = [each[0] for each in (q, k, v)]
    return {
        "attention": lambda: cufa.attention(q, k, v, causal=True),
        "attention, lse": lambda: cufa.attention(q, k, v, causal=True, return_lse=True),
        "attention_varlen": lambda: cufa.attention_varlen(*packed, offsets, offsets, causal=True),
        "attention_with_kvcache": lambda: cufa.attention_with_kvcache(step, k, cache, cache_seqlens=lengths),
        "attention_backward": lambda: cufa.attention_backward(dout, q, k, v, out, lse, causal=True),
        "attention, recorded": lambda: cufa.attention(*own, causal=True),
        "attention and its gradients": lambda: cufa.attention(*own, causal=True).backward(dout),
        "flash_attn_func": lambda: flash_attn.flash_attn_func(q, k, v, causal=True),
        "flash_attn_func and its gradients": lambda: flash_attn.flash_attn_func(*own, causal=True).backward(dout),
        "qkvpacked and its gradients": lambda: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True).backward(dout),
        "a Function that does nothing": lambda: Nothing.apply(*own).backward(dout),
    }


def measure(only: str) -> dict[str, float]:
    """Microseconds of each kind."""
    kinds: dict[str, Callable[[], Any]] = {}
    try:
        import torch
    except ImportError:
        pretend()
    else:
        torch.set_num_threads(1)
        pretend()
        kinds = torch_calls()
    kinds = {name: call for name, call in {**kinds, **cupy_calls()}.items() if re.search(only, name)}
    found = dict.fromkeys(kinds, float("inf"))
    gc.freeze()
    for _ in range(TURNS):
        for name, call in kinds.items():
            call()
            began = time.thread_time()
            for _ in range(CALLS):
                call()
            found[name] = min(found[name], 1e6 * (time.thread_time() - began) / CALLS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What calls take of Python's time, without a GPU.")
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", default=[Path(__file__).parents[1]])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="regular expression that a kind's name must contain")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.only)))
        return
    command = [sys.executable, __file__, "--measure", "--only", options.only]
    rounds: list[list[dict[str, float]]] = [[] for _ in options.trees]
    for _ in range(options.rounds):
        for tree, found in zip(options.trees, rounds, strict=True):
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found.append(json.loads(done.stdout))
    print(f"{'least µs a call, and how far the rounds are apart':<50}", *options.trees, sep="  ")
    for name in rounds[0][0]:
        times = [[each[name] for each in found] for found in rounds]
        print(f"{name:<50}", *(f"{min(each):8.2f} ± {(max(each) - min(each)) / 2:.2f}" for each in times), sep="  ")


if __name__ == "__main__":
    main()
