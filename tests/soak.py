"""Random problems, the GPU's own kernel against the one for every GPU; see test_soak.py.

    python tests/soak.py [--count 10000] [--seed 0]

Needs CuPy and an sm_90 GPU. Exits with status 1 at the first disagreement, with the problem in words.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cupy
import numpy as np
from tqdm import tqdm

import cufa
from cufa import _attention, _jit, _plan

HANG_SECONDS = 60
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2}
"""Relative, by Frobenius' norm: both kernels round P and the output to the dtype, at different moments."""


class Kind(NamedTuple):
    """What makes another kernel."""

    dtype: str
    head_dim: int
    head_dim_v: int
    varlen: bool
    options: tuple[tuple[str, Any], ...]
    alibi: bool
    sinks: bool


def kinds(rng: np.random.Generator, count: int) -> list[Kind]:
    """A sample of kernels: every head_dim with every mask, features at random."""
    masks: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"window_size": (150, 20)})
    shapes = [(d, d) for d in (32, 64, 80, 96, 128, 160, 192, 256)] + [(64, 128), (192, 128), (40, 56), (128, 64)]
    found = []
    for (head_dim, head_dim_v), mask in itertools.islice(itertools.cycle(itertools.product(shapes, masks)), count):
        options = mask | ({"softcap": 15.0} if rng.random() < 0.25 else {})
        dtype = str(rng.choice(["float16", "bfloat16"]))
        varlen, alibi, sinks = (bool(rng.random() < chance) for chance in (0.4, 0.2, 0.2))
        found.append(Kind(dtype, head_dim, head_dim_v, varlen, tuple(options.items()), alibi, sinks))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def plans(generic: bool) -> Iterator[None]:
    """Let calls be served by the kernel for every GPU, or by the GPU's own."""
    make_plan = _plan.make_plan
    if generic:
        _plan.make_plan = lambda static, arch: make_plan(static._replace(tma=False), arch)  # type: ignore[assignment]
    try:
        yield
    finally:
        _plan.make_plan = make_plan


class Problem(NamedTuple):
    """A kind with sizes; how it is described is how it is repeated."""

    kind: Kind
    seed: int

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        kind = self.kind
        ratio, heads_k = int(rng.choice([1, 1, 2, 4, 5])), int(rng.integers(1, 5))
        heads_q = ratio * heads_k

        def length() -> int:
            top = int(rng.choice([8, 70, 200, 400, 1500]))
            return int(rng.integers(0 if rng.random() < 0.1 else 1, top))

        device = cupy.random.default_rng(self.seed)

        def array(*shape: int) -> Any:
            return device.standard_normal(shape, dtype=cupy.float32).astype(kind.dtype)

        options: dict[str, Any] = dict(kind.options)
        if kind.varlen:
            lengths = [(length(), length()) for _ in range(int(rng.integers(1, 9)))]
            offsets = [np.cumsum([0, *(pair[side] for pair in lengths)], dtype=np.int32) for side in (0, 1)]
            rows = [(int(offsets[0][-1]),), (int(offsets[1][-1]),)]
            options |= {"cu_seqlens_q": cupy.asarray(offsets[0]), "cu_seqlens_k": cupy.asarray(offsets[1])}
            if rng.random() < 0.5:
                used = [int(rng.integers(0, k + 1)) for _, k in lengths]
                options["seqused_k"] = cupy.asarray(used, dtype=cupy.int32)
        else:
            batch = int(rng.integers(1, 4))
            rows = [(batch, length()), (batch, length())]
        options["q"] = array(*rows[0], heads_q, kind.head_dim)
        options["k"] = array(*rows[1], heads_k, kind.head_dim)
        options["v"] = array(*rows[1], heads_k, kind.head_dim_v)
        if kind.alibi:
            options["alibi_slopes"] = cupy.asarray(rng.random(heads_q), dtype=cupy.float32)
        if kind.sinks:
            options["sinks"] = cupy.asarray(rng.standard_normal(heads_q), dtype=cupy.float32)
        return (cufa.attention_varlen if kind.varlen else cufa.attention), options


def disagreement(problem: Problem) -> str:
    """Empty if both kernels agree."""
    function, options = problem.arguments()
    out, lse = function(**options, return_lse=True)
    with plans(generic=True):
        _forget()
        expected, expected_lse = function(**options, return_lse=True)
    _forget()
    if out.size == 0:
        return ""
    difference = cupy.linalg.norm((out.astype(cupy.float32) - expected.astype(cupy.float32)).ravel())
    norm = cupy.linalg.norm(expected.astype(cupy.float32).ravel())
    if not bool(difference <= TOLERANCE[problem.kind.dtype] * norm + 1e-6):
        return f"out differs by {float(difference / norm):.2e}"
    if not bool((cupy.isneginf(lse) == cupy.isneginf(expected_lse)).all()):
        return "lse is -inf elsewhere"
    gap = float(cupy.nan_to_num(cupy.abs(lse - expected_lse)).max())
    return "" if gap <= 2e-3 else f"lse differs by {gap:.2e}"


def _forget() -> None:
    """Drop the launches that are remembered with problems."""
    from cufa import _problem

    _problem._checked.cache_clear()


def compile_all(problems: list[Problem]) -> None:
    """Fill the cache, on all cores, with what the problems need. Sizes decide too: several of every kind are asked."""
    found: dict[_plan.Plan, None] = {}
    prepare = _attention.prepare

    def note(problem: Any, stream: int) -> Any:
        raise _Noted(_plan.make_plan(problem.static, _device_arch()))

    _attention.prepare = note  # type: ignore[assignment]
    try:
        for generic in (False, True):
            with plans(generic):
                for problem in problems[: 10 * len({problem.kind for problem in problems})]:
                    function, options = problem.arguments()
                    _forget()
                    try:
                        function(**options)
                    except _Noted as noted:
                        found[noted.plan] = None
    finally:
        _attention.prepare = prepare
        _forget()
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(_jit.entry_of, found), total=len(found), desc="compile", disable=None))


class _Noted(Exception):
    def __init__(self, plan: _plan.Plan) -> None:
        self.plan = plan


def _device_arch() -> int:
    return int(cupy.cuda.Device().compute_capability)


def soak(count: int, seed: int, kernels: int = 72) -> str:
    """Run `count` problems; the first disagreement, or nothing."""
    rng = np.random.default_rng(seed)
    choice = kinds(rng, kernels)
    problems = [Problem(choice[i % len(choice)], int(s)) for i, s in enumerate(rng.integers(0, 1 << 31, count))]
    compile_all(problems)
    at = [time.monotonic(), ""]
    _watch(at)
    for problem in tqdm(problems, desc="problems", disable=None):
        at[:] = time.monotonic(), str(problem)
        wrong = disagreement(problem)
        if wrong:
            return f"{problem}: {wrong}"
    at[1] = ""
    return ""


def _watch(at: list[Any]) -> None:
    def run() -> None:
        while True:
            time.sleep(1)
            if at[1] and time.monotonic() - at[0] > HANG_SECONDS:
                import os

                os.write(2, f"\n{at[1]} hangs\n".encode())
                os._exit(70)

    threading.Thread(target=run, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    wrong = soak(arguments.count, arguments.seed)
    if wrong:
        sys.exit(wrong)
    print(f"{arguments.count} problems agree, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
