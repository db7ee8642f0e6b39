"""Sums of float32 numbers that are exact: ``cuda_src/attention/exact_sums.cuh``, run on the CPU."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

import emulated
from cufa._compile import jit as _jit
from cufa._terms.exact_sums import floats
from emulated import Function, Gpu, Launched, Program

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

SOURCE = """
#include "attention/exact_sums.cuh"

struct Arguments {
  float* sums;
  u64* words;
  const float* numbers;  // of every sum, in a block each
  i64 count;

  attention::ExactSums all() const { return {sums, words, count}; }
};

#define KERNEL(name) extern "C" __global__ void name(const __grid_constant__ Arguments arguments)

KERNEL(begin) { arguments.all().begin(threadIdx.x, blockDim.x); }
KERNEL(add) {
  if (threadIdx.x >= arguments.count) return;
  arguments.all().add(arguments.sums + threadIdx.x, arguments.numbers[blockIdx.x * arguments.count + threadIdx.x]);
}
KERNEL(finish) { arguments.all().finish(threadIdx.x, blockDim.x); }
"""

SUMMED = 64
LARGEST = float(np.finfo(np.float32).max)
RNG = np.random.default_rng(0)
NUMBERS: dict[str, list[float]] = {
    "nothing": [],
    "zeros": [0.0, -0.0],
    "of one size": list(RNG.standard_normal(SUMMED)),
    "of all sizes": list(np.ldexp(RNG.standard_normal(SUMMED), RNG.integers(-140, 127, SUMMED))),
    "of small sizes": list(np.ldexp(RNG.standard_normal(SUMMED), RNG.integers(-149, -100, SUMMED))),
    "all positive": list(np.ldexp(RNG.random(SUMMED), RNG.integers(0, 40, SUMMED))),
    "that cancel": [3e38, -1e-20, 3e38, 2e10, -3e38, -2e10, -3e38, 1e-30],
    "below 0": [-1.0, 2.0**-60],
    "largest": [LARGEST] * 20 + [-LARGEST] * 19,
    "beyond the largest": [LARGEST] * 20 + [-1.0],
    "beyond the least": [-LARGEST] * 2,
    "a tie to even": [1.0, 2.0**-24],
    "a tie away": [1.0 + 2.0**-23, 2.0**-24],
    "more than a tie": [1.0, 2.0**-24, 2.0**-120],
    "less than a tie": [1.0, 2.0**-24, -(2.0**-120)],
    "up to a power of 2": [2.0**32 - 2.0**8, 2.0**8 - 1.0],
    "the smallest normal": [2.0**-126] * 3,
    "an infinity": [1.0, math.inf, -LARGEST],
    "both infinities": [math.inf, -math.inf],
    "a NaN": [math.nan, 1.0],
}


def rounded(numbers: np.ndarray) -> float:
    """The sum, without what numbers have below 2^-128, to the nearest float32 number."""
    if not np.isfinite(numbers).all():
        return float(numbers.astype(np.float64).sum())
    total = sum(int(Fraction(float(x)) * 2**128) for x in numbers)
    dropped = max(0, abs(total).bit_length() - 24)
    mantissa = round(Fraction(total, 2**dropped))  # of halves to the even one
    found = math.ldexp(mantissa, dropped - 128)
    return found if abs(found) <= LARGEST else math.copysign(math.inf, found)


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(SOURCE, _jit.headers(), "Arguments", ("begin", "add", "finish"))


@pytest.mark.parametrize("order", [None, 1, 2])
def test_sums_are_rounded_once(program: Program, order: int | None) -> None:
    count = len(NUMBERS)
    numbers = np.zeros((SUMMED, count), np.float32)
    for column, given in enumerate(NUMBERS.values()):
        numbers[: len(given), column] = given
    numbers = RNG.permuted(numbers, axis=0)
    with Gpu(order=order) as gpu:
        sums, words = gpu.empty((count,), "float32"), gpu.empty((floats(count),), "float32")
        held = gpu.array(numbers)
        argument = struct.pack("3Qq", sums.address, words.address, held.address, count)
        for name, blocks in (("begin", 1), ("add", SUMMED), ("finish", 1)):
            gpu.enqueue(Launched(Function(program, name, len(argument)), blocks, 32, 0, argument))
        found = sums.numpy()
    with np.errstate(invalid="ignore"):
        expected = [rounded(column) for column in numbers.T]
    assert dict(zip(NUMBERS, map(repr, found.tolist()), strict=True)) == dict(
        zip(NUMBERS, map(repr, expected), strict=True)
    )
