"""The rungs in NumPy, Triton and Numba: held to the reference, and to the bytes that they are said to move."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cufa import reference
from cufa.learn import r01_textbook, r03_keys_outer, r04_queries_outer, r05_backward, r06_split_keys
from cufa.learn.counting import Size, Traffic, in_slow_memory
from cufa.testing import Case, assert_close, assert_gradients_close, dense_cases

FORWARD = ("r01_textbook", "r02_online", "r03_keys_outer", "r04_queries_outer", "r06_split_keys")
CASES = dense_cases(
    max_seqlen=129,
    dtypes=("float32", "float64"),
    head_dims=(1, 8, 33),
    layouts=("contiguous", "transposed", "reversed"),
    values=("normal", "large rows", "tiny", "constant"),
)


def plain(case: Case) -> Case:
    """The case without what rungs do not have."""
    off: dict[str, Any] = {"window_size": None, "softcap": 0.0, "alibi_ndim": 0, "sinks": False}
    return replace(case, num_heads_k=case.num_heads_q, **off)


@settings(max_examples=30)
@given(CASES)
def test_rungs_equal_the_reference(case: Case) -> None:
    case = plain(case)
    arrays, asked = case.arrays(), {"causal": case.causal, "softmax_scale": case.softmax_scale}
    for name in FORWARD:
        out = importlib.import_module(f"cufa.learn.{name}").attention(**arrays, **asked)
        assert out.dtype == arrays["q"].dtype
        assert_close(out, **arrays, **case.options)
    out, lse = r04_queries_outer.attention_and_lse(**arrays, **asked)
    assert_close(out, **arrays, lse=lse, **case.options)
    if case.values != "constant":  # whose lse is beyond what a gradient in float32 can be told from
        dout = np.random.default_rng(case.seed).standard_normal(out.shape).astype(out.dtype)
        found = r05_backward.attention_backward(**arrays, out=out, lse=lse, dout=dout, **asked)
        assert_gradients_close(found, dout, **arrays, **case.options)


def test_integers_are_refused() -> None:
    """Their means would be cut off to integers."""
    x = np.arange(16).reshape(1, 4, 1, 4)
    for name in FORWARD:
        with pytest.raises(TypeError, match="q is int64"):
            importlib.import_module(f"cufa.learn.{name}").attention(x, x, x)
    with pytest.raises(TypeError, match="q is int64"):
        r05_backward.attention_backward(x, x, x, x, x[:, 0], x)


SIZES = st.builds(
    Size,
    seqlen_q=st.integers(1, 40),
    seqlen_k=st.integers(1, 40),
    head_dim=st.integers(1, 5),
    block_m=st.integers(1, 50),
    block_n=st.integers(1, 50),
    causal=st.booleans(),
    itemsize=st.just(8),
)


@settings(max_examples=40)
@given(SIZES)
def test_tiles_change_nothing_and_move_what_is_said(size: Size) -> None:
    random = np.random.default_rng(size.seqlen_q)
    q, dout = random.standard_normal((2, size.seqlen_q, size.head_dim))
    k, v = random.standard_normal((2, size.seqlen_k, size.head_dim))
    asked, tiles = {"causal": size.causal, "scale": 0.5}, {"block_m": size.block_m, "block_n": size.block_n}
    expected = r01_textbook.head(q, k, v, **asked)

    def counted(function: Any, *arrays: Any) -> tuple[Any, Traffic]:
        traffic, slow = in_slow_memory(*arrays)
        return function(*slow, **asked, **tiles), traffic

    v1, traffic = counted(r03_keys_outer.head, q, k, v)
    assert traffic == size.v1()
    (v2, lse), traffic = counted(r04_queries_outer.head, q, k, v)
    assert traffic == size.v2()
    split = r06_split_keys.head(q, k, v, **asked, splits=size.block_n)
    for out in (v1, v2, split):
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-12, atol=1e-12)

    def lay_out(x: Any) -> Any:
        return np.asarray(x)[None, :, None]

    found, traffic = counted(r05_backward.head_backward, q, k, v, np.asarray(v2), np.asarray(lse), dout)
    assert traffic == size.backward()
    options: dict[str, Any] = {"causal": size.causal, "softmax_scale": 0.5}
    for mine, theirs in zip(
        found, reference.attention_backward(*map(lay_out, (dout, q, k, v)), **options), strict=True
    ):
        np.testing.assert_allclose(lay_out(mine), theirs, rtol=1e-9, atol=1e-9)
    if not size.causal:
        traffic, slow = in_slow_memory(q, k, v)
        r01_textbook.head(*slow, **asked)
        assert traffic == size.textbook()
        assert size.pairs == size.seqlen_q * size.seqlen_k
    assert size.forward_flops() == 4 * size.head_dim * size.pairs == size.backward_flops() / 2.5


def test_pairs_are_those_of_the_mask() -> None:
    for seqlen_q, seqlen_k in ((5, 3), (3, 5), (4, 4)):
        mask = np.tril(np.ones((seqlen_q, seqlen_k)), seqlen_k - seqlen_q)
        assert Size(seqlen_q, seqlen_k, 1, causal=True).pairs == mask.sum()


@pytest.mark.parametrize("name", [*FORWARD, "r05_backward"])
def test_rungs_refuse_shapes_that_do_not_go_together(name: str) -> None:
    module = importlib.import_module(f"cufa.learn.{name}")
    q, short = np.ones((1, 4, 2, 8)), np.ones((1, 3, 2, 8))
    for k, v in ((short, q), (q[:, :, :1], q[:, :, :1]), (q[..., :4], q)):
        with pytest.raises(ValueError, match="do not go together"):
            if name == "r05_backward":
                module.attention_backward(q, k, v, q, np.ones((1, 2, 4)), q)
            else:
                module.attention(q, k, v)
    if name == "r05_backward":
        with pytest.raises(ValueError, match="not q's"):
            module.attention_backward(q, q, q, q, np.ones((1, 4, 2)), q)


INTERPRETED = """
import sys
import numpy as np
from cufa.learn import {name} as rung
from cufa.testing import Case, assert_close

for seqlen_q, seqlen_k, causal, head_dim, dtype in {problems}:
    case = Case(batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads_q=2, num_heads_k=2, head_dim=head_dim,
                head_dim_v=head_dim, causal=causal, dtype=dtype, softmax_scale=0.3, layouts=("{layout}",) * 4)
    arrays = case.arrays({xp})
    out = rung.attention(**arrays, causal=causal, softmax_scale=0.3)
    assert_close(out if {xp} is not np else out.copy_to_host(), **case.arrays(), **case.options)
for length, message in ((1, "do not go together"), (0, "expected")):
    try:
        rung.attention(arrays["q"][:, :length], arrays["k"], arrays["v"][:, :1] if length else arrays["v"])
        print("done")
    except ValueError as error:
        print("refused" if message in str(error) else error)
"""


THREADS = [(35, 5, True, 3, "float32"), (3, 34, True, 8, "float32"), (33, 33, False, 2, "float32")]
TILES = [(100, 5, True, 3, "float32"), (70, 200, True, 64, "float16"), (3, 66, False, 16, "float32")]
"""seqlen_q, seqlen_k, causal, head_dim, dtype"""


@pytest.mark.parametrize(
    ("name", "needs", "variable", "problems"),
    [
        *((name, "numba", "NUMBA_ENABLE_CUDASIM", THREADS) for name in ("n03_numba_v1", "n04_numba_v2")),
        ("t04_triton", "triton", "TRITON_INTERPRET", TILES),
    ],
)
def test_rungs_in_other_languages_run_on_the_cpu(name: str, needs: str, variable: str, problems: list[Any]) -> None:
    for module in (needs, *(["torch"] if needs == "triton" else [])):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    xp, layout = ("sys.modules['torch']", "transposed") if needs == "triton" else ("np", "contiguous")
    filled = {"name": name, "problems": problems, "xp": xp, "layout": layout}
    code = ("import torch\n" if needs == "triton" else "") + INTERPRETED.format(**filled)
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {variable: "1"}, capture_output=True, text=True, check=False
    )
    empty = "done" if needs == "triton" else "refused"  # Numba makes no empty arrays on a GPU
    assert found.stdout == f"refused\n{empty}\n", found.stderr
