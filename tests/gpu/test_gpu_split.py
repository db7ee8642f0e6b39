"""On a GPU: few query rows, whose keys thread blocks share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_gpu import attend, check, framework, same

import cufa
from cufa.testing import Case, assert_close

pytestmark = pytest.mark.gpu

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2500, 3)},
    "terms": {"causal": True, "softcap": 5.0, "alibi_ndim": 2, "sinks": True},
    "narrow": {"layouts": ("padded", "offset", "strided", "padded")},
}
ROWS = ((1, 8, 2), (1, 1, 1), (5, 6, 2), (3, 20, 2), (33, 1, 1), (7, 16, 2))
"""(seqlen_q, num_heads_q, num_heads_k): tiles of 16, 32 and 64 rows."""

LENGTHS = ((1, 9001), (3, 4097), (2, 511), (150, 530))
"""(batch, seqlen_k). The reference takes a second for each ten million elements of k."""

ANY_ROWS = ("attention_forward_sm80", "attention_forward_sm90")
"""The kernels for any number of rows."""


def case_of(rows: tuple[int, int, int], batch: int, seqlen_k: int, **facts: Any) -> Case:
    sizes: dict[str, Any] = {"head_dim": 128, "head_dim_v": 128, "dtype": "bfloat16", "return_lse": True}
    return Case(
        batch=batch, seqlen_q=rows[0], num_heads_q=rows[1], num_heads_k=rows[2], seqlen_k=seqlen_k, **sizes | facts
    )


def kernel_of(case: Case, xp: Any) -> str:
    return cufa.explain(**case.arrays(xp), **case.options).kernel.split()[0]


@pytest.fixture
def cupy() -> Any:
    return framework("cupy")


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_few_rows_equal_the_reference(cupy: Any, rows: tuple[int, int, int], features: str) -> None:
    kernels = set()
    for batch, seqlen_k in LENGTHS:
        case = case_of(rows, batch, seqlen_k, **FEATURES[features])
        kernel = kernel_of(case, cupy)
        assert (kernel in ANY_ROWS) == (seqlen_k < 8 * rows[0] * rows[1] // rows[2])
        kernels.add(kernel)
        check(case, cupy)
    assert "attention_forward_split_sm80" in kernels  # and others, which depends on the GPU


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", [ROWS[1], ROWS[4]], ids=str)
def test_more_keys_than_16_bits_count(cupy: Any, rows: tuple[int, int, int], features: str) -> None:
    case = case_of(rows, 1, 66000, **FEATURES[features])
    assert kernel_of(case, cupy) not in ANY_ROWS
    check(case, cupy)


SEVERAL = (((64, 8, 2), 1, 8192), ((65, 1, 1), 3, 2048), ((10, 60, 2), 2, 5001), ((4, 24, 1), 2, 20000))
"""Rows as above, in several tiles; batch and seqlen_k."""


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("rows", "batch", "seqlen_k"), SEVERAL, ids=str)
def test_several_tiles_equal_the_reference(
    cupy: Any, rows: tuple[int, int, int], batch: int, seqlen_k: int, features: str
) -> None:
    case = case_of(rows, batch, seqlen_k, **FEATURES[features])
    assert kernel_of(case, cupy) == "attention_forward_split_sm80"
    check(case, cupy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dims", [(64, 64), (256, 256), (40, 57), (192, 128)], ids=str)
def test_every_head_dim(cupy: Any, head_dims: tuple[int, int], dtype: str) -> None:
    for rows, values in ((ROWS[0], "normal"), (ROWS[2], "garbage"), (ROWS[3], "huge scores"), (ROWS[4], "infinite")):
        facts = {"head_dim": head_dims[0], "head_dim_v": head_dims[1], "dtype": dtype, "values": values}
        check(case_of(rows, 3, 5000, **facts), cupy)


@pytest.mark.parametrize("rows", [ROWS[0], SEVERAL[0][0]], ids=str)
def test_results_are_bitwise_repeatable(cupy: Any, rows: tuple[int, int, int]) -> None:
    """Whoever arrives last; and whatever the scratch memory held before."""
    case = case_of(rows, 1, 20000)
    first, first_lse, arrays = attend(case, cupy)
    for fill in range(100):
        dirty = cupy.full(1 << 22, fill, cupy.int32)  # goes back to the pool, from which the call takes its memory
        del dirty
        out, lse = cufa.attention(**arrays, return_lse=True)
        assert same(out, first) and same(lse, first_lse)


@pytest.mark.parametrize("rows", [ROWS[0], SEVERAL[0][0]], ids=str)
def test_calls_are_captured_and_replayed(cupy: Any, rows: tuple[int, int, int]) -> None:
    """With memory of the capture's own, which one call leaves to the next: each clears its counters."""
    case = case_of(rows, 1, 20000)
    arrays, out = case.arrays(cupy), case.output(cupy)
    cufa.attention(**arrays, out=out)
    cupy.cuda.Device().synchronize()
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    with stream:
        with cupy.cuda.using_allocator(pool.malloc):
            cufa.attention(**arrays, out=out)  # leaves memory in the pool for the next
            stream.begin_capture()
            for _ in range(3):
                cufa.attention(**arrays, out=out)
            graph = stream.end_capture()
        for seed in range(20 if rows[0] == 1 else 4):  # what is right takes the host a second for many rows
            arrays["k"][...] = cupy.asarray(np.random.default_rng(seed).standard_normal(case.head_dim))
            out[...] = 0
            graph.launch(stream)
            stream.synchronize()
            assert_close(out, **arrays)


def test_a_launch_for_each_of_many_items(cupy: Any) -> None:
    """Of which no thread block shares one."""
    check(case_of(ROWS[0], 700, 300), cupy)
