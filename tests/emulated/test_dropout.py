"""Kernels with dropout, run on the CPU: they keep what `cufa.dropout_mask` says, and give what the reference does."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
from dropping import problem, telling, told
from sampling import sampled

import cufa
import emulated
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._terms.philox import philox, round_keys
from cufa.testing import to_numpy
from emulated import Function, Gpu, Launched, Program

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


class Served(NamedTuple):
    """A call that a kernel of the forward and one of the gradients serve."""

    forward: str
    backward: str
    arch: int
    dtype: str
    rows: int
    keys: int
    head_dims: tuple[int, int]


SERVED = (
    Served("forward_sm80", "backward_sm80", 80, "bfloat16", 100, 150, (64, 160)),
    Served("forward_sm80", "backward_sm80", 80, "float32", 70, 90, (40, 96)),
    Served("forward_sm80", "backward_sm80", 90, "float16", 30, 50, (32, 64)),
    Served("forward_sm90", "backward_sm90", 90, "float16", 100, 120, (64, 128)),
    Served("forward_sm90", "backward_split_queries_sm90", 90, "bfloat16", 150, 250, (64, 256)),
    Served("forward_split_sm80", "backward_sm80", 80, "float16", 5, 256, (64, 256)),
    Served("forward_cluster_sm90", "backward_split_keys_sm90", 90, "bfloat16", 9, 250, (64, 256)),
)


def run(given: Any, arch: int, order: int | None = None) -> tuple[tuple[Any, ...], set[str]]:
    """Results, and the kernels that made them."""
    with Gpu(arch=arch, num_sms=3, order=order) as gpu:
        found = tuple(map(to_numpy, given.run(gpu.array)))
        return found, {launched.function.entry.removeprefix("attention_") for launched in gpu.launches}


@pytest.mark.parametrize("served", SERVED, ids=lambda served: f"{served.forward}-{served.backward}-{served.dtype}")
def test_every_kernel_keeps_what_the_mask_says(served: Served) -> None:
    given = telling(served.dtype, served.rows, served.keys, served.head_dims)
    found, entries = run(given, served.arch)
    assert {served.forward, served.backward} <= entries
    kept = cufa.dropout_mask((2, 2, served.rows, served.keys), given.dropout_p, given.seed)
    for entries_kept in told(given, found):
        np.testing.assert_array_equal(entries_kept, kept)


@pytest.mark.parametrize(
    ("served", "dtype", "seed"),
    sampled([(SERVED[0], np.int64, -(2**62) - 3), (SERVED[5], np.uint32, 2**32 - 7), (SERVED[3], np.int32, -5)]),
)
def test_a_seed_may_lie_in_memory(served: Served, dtype: Any, seed: int) -> None:
    """Kernels read it there, and give the same bits as if they were told."""
    given = problem(served.dtype, rows=served.rows, keys=served.keys, heads=(2, 1), head_dims=(64, 64), batch=1)
    told_it, reads_it = (given._replace(seed=each) for each in (seed, np.array(seed, dtype)))
    for one, other in zip(*(run(each, served.arch, order=1)[0] for each in (told_it, reads_it)), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_problem_keeps_what_the_mask_of_each_seed_says() -> None:
    """One that copies arrays first, in both directions."""
    given = telling("float16", 70, 90, (64, 96))
    for name in "qk":
        wide = np.zeros((*given.arrays[name].shape[:-1], 65), np.float16)
        wide[..., :64] = given.arrays[name]
        given.arrays[name] = wide[..., :64]
    with Gpu(arch=80, num_sms=3) as gpu:
        misses = []
        for seed in (1, 2, -(2**63)):
            one = given._replace(seed=seed)
            found = tuple(map(to_numpy, one.run(gpu.array)))
            misses.append(_problem._checked.cache_info().misses)
            kept = cufa.dropout_mask((2, 2, 70, 90), given.dropout_p, seed)
            for entries_kept in told(one, found):
                np.testing.assert_array_equal(entries_kept, kept)
        assert misses == misses[:1] * 3
        assert {"attention_align"} < {launched.function.entry for launched in gpu.launches}


PROBLEMS: tuple[tuple[int, dict[str, Any]], ...] = (
    (80, {"dtype": "bfloat16", "rows": 100, "keys": 150, "head_dims": (64, 64), "causal": True, "sinks": True}),
    (80, {"dtype": "float32", "rows": 70, "keys": 90, "head_dims": (40, 57), "window_size": (40, 3)}),
    (80, {"dtype": "float16", "rows": 3, "keys": 500, "head_dims": (64, 64), "softcap": 4.0, "sinks": True}),
    (80, {"dtype": "float16", "rows": 90, "keys": 120, "head_dims": (64, 64), "packed": True, "alibi": True}),
    (90, {"dtype": "bfloat16", "rows": 150, "keys": 250, "head_dims": (64, 64), "dropout_p": 0.8}),
    (90, {"dtype": "float16", "rows": 150, "keys": 250, "head_dims": (128, 128), "causal": True, "sinks": True}),
    (90, {"dtype": "bfloat16", "rows": 90, "keys": 300, "head_dims": (64, 128), "window_size": (65, 3)}),
    (90, {"dtype": "bfloat16", "rows": 110, "keys": 190, "head_dims": (192, 192), "softcap": 4.0, "alibi": True}),
    (90, {"dtype": "bfloat16", "rows": 90, "keys": 120, "head_dims": (64, 64), "packed": True, "causal": True}),
    (90, {"dtype": "bfloat16", "rows": 3, "keys": 500, "head_dims": (64, 64), "heads": (6, 2)}),
    (90, {"dtype": "float16", "rows": 20, "keys": 30, "head_dims": (64, 64), "causal": True}),
)


@pytest.mark.parametrize(("arch", "facts"), sampled(PROBLEMS), ids=str)
def test_kernels_equal_the_reference(arch: int, facts: dict[str, Any]) -> None:
    given = problem(**({"heads": (2, 1)} | facts))
    given.check(run(given, arch, order=5)[0])


@pytest.mark.parametrize(("arch", "head_dims"), [(80, (64, 64)), (90, (64, 64)), (90, (192, 192))])
def test_nan_reaches_what_a_product_with_0_gives(arch: int, head_dims: tuple[int, int]) -> None:
    """A row of NaN scores makes NaN of dv of all keys, those whose entries are dropped included."""
    given = problem("bfloat16", rows=100, keys=150, heads=(2, 1), head_dims=head_dims, dropout_p=0.8)
    given.arrays["q"][1, 20, 0] = np.nan
    given.arrays["v"][0, 30] = np.nan
    given.check(run(given, arch)[0])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_are_finite_where_half_of_them_is_most_that_float32_holds(head_dim: int) -> None:
    """On Hopper sums of dv are twice what they are to be; those that overflow are made again."""
    head_dims = (head_dim, head_dim)
    given = problem("bfloat16", batch=1, rows=100, keys=120, heads=(1, 1), head_dims=head_dims, dropout_p=0.25)
    arrays = {name: np.zeros_like(x) if name in ("q", "k", "dlse") else x for name, x in given.arrays.items()}
    arrays |= {"v": np.full_like(arrays["v"], 2.0**-120), "dout": np.full_like(arrays["dout"], 2.875e38)}
    found, entries = run(given._replace(arrays=arrays), 90)
    assert "backward_sm90" in entries
    kept = cufa.dropout_mask((1, 1, 100, 120), given.dropout_p, given.seed)[0, 0].sum(axis=0)
    exact = kept / 120 / 0.75 * float(arrays["dout"][0, 0, 0, 0])
    assert (2 * 0.75 * exact > np.finfo(np.float32).max).any()
    np.testing.assert_allclose(found[4][0, :, 0].astype(np.float64), np.repeat(exact[:, None], head_dim, 1), rtol=2**-7)


SOURCE = """
#include "core/philox.cuh"
#include "ptx/set.cuh"

struct Arguments {
  u32* x;
  u32* y;
};

extern "C" __global__ void draw(const __grid_constant__ Arguments arguments) {  // X: a counter and its keys
  u32 x[4];
  for (int i = 0; i < 4; ++i) x[i] = arguments.x[i];
  philox(x, arguments.x + 4);
  for (int i = 0; i < 4; ++i) arguments.y[i] = x[i];
}

extern "C" __global__ void compare(const __grid_constant__ Arguments arguments) {  // X: two pairs of numbers
  arguments.y[0] = ptx::set_abs_lt_f16x2(arguments.x[0], arguments.x[1]);
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(SOURCE, _jit.headers(), "Arguments", ("draw", "compare"))


def launch(program: Program, name: str, x: list[int]) -> list[int]:
    """The words that a kernel makes of others."""
    with Gpu() as gpu:
        placed = gpu.arrays({"x": np.array(x, np.uint32), "y": np.zeros(4, np.uint32)})
        placed["y"].allow(emulated.memory.WRITABLE)
        argument = struct.pack("2Q", placed["x"].address, placed["y"].address)
        gpu.enqueue(Launched(Function(program, name, 16), 1, 1, 0, argument))
        return [int(word) for word in placed["y"].numpy()]


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822])
def test_philox_in_kernels_is_that_of_the_cpu(program: Program, seed: int) -> None:
    """Which gives the known answers."""
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    expected = [int(word) for word in philox(counter, seed)]
    assert launch(program, "draw", [*counter, *round_keys(seed)]) == expected


@pytest.mark.parametrize("bound", [0, 1, 0x3FF, 0x400, 0x4000, 0x7C00])
def test_numbers_of_15_bits_compare_as_float16(program: Program, bound: int) -> None:
    for number in (0, 1, 0x3FF, 0x400, 0x3FFF, 0x4000, 0x7BFF, 0x7C00, 0x7C01, 0x7FFF):
        words = [(number | 0x8000) << 16 | number, bound << 16 | bound]
        assert launch(program, "compare", words)[0] == (2**32 - 1 if number < bound else 0)
