"""Score and mask functions on a GPU, held to the reference, to the CPU and to cufa's own terms."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import own_functions as own
import pytest

import cufa
from cufa import functions
from cufa.testing import to_numpy

pytestmark = pytest.mark.gpu

UNITS: dict[Any, float] = {np.float32: 2.0**-17, np.float16: 2.0**-8, ml_dtypes.bfloat16: 2.0**-5}


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


FUNCTIONS = (
    *(("tables", "documents"), ("smooth", None), ("capped", "sliding"), ("shifted", "documents"), ("stepped", None)),
)
"""Score and mask."""

# A call takes two kernels of its own: every function, dtype and head_dim meet, packed in every second of these.
KINDS = [
    (*each, head_dim, dtype, bool((i + j + k) % 2))
    for i, each in enumerate(FUNCTIONS)
    for j, head_dim in enumerate((40, 128, 200))
    for k, dtype in enumerate(UNITS)
]


def name_of(value: Any) -> str:
    if isinstance(value, bool):
        return "packed" if value else "dense"
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize(("score", "mask", "head_dim", "dtype", "packed"), KINDS, ids=name_of)
def test_functions_equal_reference(
    cupy: Any, score: str, mask: str | None, head_dim: int, dtype: Any, packed: bool
) -> None:
    chosen = own.SCORES[score], own.MASKS.get(mask or "")
    facts: dict[str, Any] = {"rows": 150, "keys": 210, "head_dim": head_dim, "causal": packed, "sinks": True}
    problem = own.problem(*chosen, dtype=dtype, packed=packed, softcap=4.0, alibi=True, **facts)
    own.check([to_numpy(x) for x in problem.on(cupy.asarray).both()], problem.right(), UNITS[dtype])


@pytest.mark.parametrize(("rows", "keys"), [(20, 30), (1, 3000), (2, 700)], ids=["short", "split", "cluster"])
def test_few_rows_equal_reference(cupy: Any, rows: int, keys: int) -> None:
    problem = own.problem(own.SCORES["tables"], dtype=np.float16, rows=rows, keys=keys, head_dim=64)
    own.check([to_numpy(x) for x in problem.on(cupy.asarray).both()], problem.right(), UNITS[np.float16])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_functions_are_what_terms_are(cupy: Any, head_dim: int) -> None:
    """Softcap and ALiBi, in Python and in C++."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (cupy.asarray(x) for x in rng.standard_normal((4, 2, 500, 4, head_dim)).astype(np.float16))
    slopes, cap = cupy.asarray(rng.uniform(0, 0.1, 4).astype(np.float32)), 3.0

    def in_python(s: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return cap * functions.tanh(s / cap) - functions.stop_gradient(slopes[head]) * abs(query.position - key)

    source = "cap * tanh(score / cap) - slopes(head) * abs(distance)"
    in_cuda = cufa.cuda_function(source, arrays={"slopes": slopes}, scalars={"cap": cap})
    built_in = {"softcap": cap, "alibi_slopes": slopes}
    right = None
    for options in (built_in, {"score": in_python}, {"score": in_cuda}):
        out, lse = cufa.attention(q, k, v, causal=True, return_lse=True, **options)
        found = [out, lse, *cufa.attention_backward(dout, q, k, v, out, lse, causal=True, **options)]
        found = [to_numpy(x).astype(np.float64) for x in found]
        right = right or found
        own.check(found, right, 2.0**-11)


def test_masks_in_cuda_hide_what_their_twins_do(cupy: Any) -> None:
    x = cupy.asarray(np.random.default_rng(0).standard_normal((1, 300, 2, 64)).astype(np.float16))
    until = cupy.asarray(np.array([70, 250], np.int32))

    def in_python(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key < until[head]) | (query.position - key < 3)

    in_cuda = cufa.cuda_function("key < until(head) || distance < 3.0f", arrays={"until": until})
    found, right = (to_numpy(cufa.attention(x, x, x, mask=mask)).astype(np.float64) for mask in (in_cuda, in_python))
    own.check([found], [right], 2.0**-11)


def test_sums_of_many_gradients(cupy: Any) -> None:
    """Of numbers that all scores share, which add up over rows, warps and thread blocks."""
    problem = own.problem(own.SCORES["smooth"], dtype=np.float32, rows=700, keys=900, head_dim=64, dlse=False)
    found = [to_numpy(x) for x in problem.on(cupy.asarray).both()]
    right = [x.astype(np.float64) for x in problem.both()]
    own.check(found, right, 2.0**-15)


def test_numbers_change_without_another_kernel(cupy: Any) -> None:
    x = cupy.asarray(np.random.default_rng(0).standard_normal((1, 200, 2, 64)).astype(np.float16))
    loaded = []
    for factor in (1.0, 0.25):
        found = cufa.attention(x, x, x, score=lambda s, b, h, q, k, factor=factor: s * factor)
        right = cufa.attention(x, x, x, softmax_scale=factor * 64**-0.5)
        own.check([to_numpy(found)], [to_numpy(right).astype(np.float64)], 2.0**-11)
        loaded.append(cufa.stats().kernels["loaded"])
    assert loaded[1] == loaded[0]


def test_arrays_of_another_device_are_refused(cupy: Any) -> None:
    x, table = cupy.zeros((1, 200, 2, 64), np.float16), np.ones(2, np.float32)
    with pytest.raises(TypeError, match=r"^attention: score_table is a numpy array but q is a cupy one"):
        cufa.attention(x, x, x, score=lambda s, b, h, q, k: s + table[h])
    table = cupy.ones(2, np.float32)
    with pytest.raises(cufa.UnsupportedError, match=r"the gradients of score add up in no fixed order on a GPU"):
        lse = cupy.zeros((1, 2, 200), np.float32)
        cufa.attention_backward(x, x, x, x, x, lse, deterministic=True, score=lambda s, b, h, q, k: s + table[h])
