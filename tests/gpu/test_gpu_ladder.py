"""On a GPU: the rungs in Triton and in Numba, compiled by their own compilers."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
from test_gpu import framework

from cufa.testing import Case, assert_close

pytestmark = pytest.mark.gpu


def case_of(dtype: str, head_dim: int, causal: bool) -> Case:
    return Case(
        batch=2,
        seqlen_q=150,
        seqlen_k=333,
        num_heads_q=3,
        num_heads_k=3,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype=dtype,
        causal=causal,
        softmax_scale=0.2,
    )


def hold(name: str, case: Case, xp: Any) -> None:
    rung = importlib.import_module(f"cufa.learn.{name}")
    out = rung.attention(**case.arrays(xp), causal=case.causal, softmax_scale=case.softmax_scale)
    assert_close(out, **case.arrays(), **case.options)


@functools.cache
def why_numba_compiles_nothing() -> str:
    """What keeps Numba from compiling even a kernel that does nothing, as a NumPy that is newer than it knows."""
    from numba import cuda

    try:
        cuda.jit("void()")(lambda: None)
    except Exception as error:
        return f"numba compiles no kernel here: {type(error).__name__}: {error}"
    return ""


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "causal"), [("float16", 128, True), ("bfloat16", 64, False), ("float32", 40, True)]
)
def test_triton_equals_the_reference(dtype: str, head_dim: int, causal: bool) -> None:
    framework("triton")
    hold("t04_triton", case_of(dtype, head_dim, causal), framework("torch"))


@pytest.mark.filterwarnings("ignore:.*Grid size")  # Numba would rather have larger ones, and says so in bold
@pytest.mark.parametrize("name", ["n03_numba_v1", "n04_numba_v2"])
@pytest.mark.parametrize("causal", [False, True])
def test_numba_equals_the_reference(name: str, causal: bool) -> None:
    cuda = framework("numba.cuda")
    if reason := why_numba_compiles_nothing():
        pytest.skip(reason)
    hold(name, case_of("float32", 64, causal), lambda flat, view: cuda.to_device(view.on(flat)))
