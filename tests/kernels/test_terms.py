"""What the kernels ask of a score term."""

from __future__ import annotations

import dataclasses
from typing import Any

import plans
import pytest
from plans import compile_plan, static

from cufa._call.options import Options
from cufa._compile import jit as _jit
from cufa._operations.forward import ATTENTION
from cufa._operations.sketch import sketch
from cufa._terms.alibi import Alibi
from cufa._terms.softcap import LargeSoftcap, Softcap


@pytest.mark.parametrize("changes", [{"variant": (Alibi(),)}, {"sinks": True}], ids=["alibi", "sinks"])
def test_what_differs_by_head_refuses_tiles_that_heads_share(changes: dict[str, Any]) -> None:
    plan = plans.forward(static("bf16", 64, 64), 90)
    wrong = plan._replace(config=dataclasses.replace(plan.config, pack=4, **changes))
    with pytest.raises(_jit.CompileError, match="no score term or sink may differ by query head"):
        compile_plan(wrong)


def test_terms_that_are_the_same_for_all_heads_may_share_tiles() -> None:
    plan = plans.forward(static("bf16", 64, 64), 90)
    shared = plan._replace(config=dataclasses.replace(plan.config, pack=4, variant=(Softcap(),)))
    assert compile_plan(shared).cubin


@pytest.mark.parametrize(
    ("dtype", "options", "low"),
    [
        ("float16", {"softcap": 128.0}, True),
        ("bfloat16", {"softcap": 129.0}, False),
        ("float32", {"softcap": 129.0}, True),
        ("float16", {"softcap": 1e-10}, False),
        ("float16", {"softcap": 30.0, "softmax_scale": 2.0**65}, False),
    ],
    ids=str,
)
def test_softcaps_go_the_quick_way_where_it_is_good_enough(dtype: str, options: dict[str, float], low: bool) -> None:
    plain = Options(False, None, None, 0.0, False, False)
    made = sketch(ATTENTION, dict.fromkeys("qkv", (1, 8, 1, 64)), dtype, plain._replace(**options))
    assert made.static.terms == ((Softcap() if low else LargeSoftcap()),)
