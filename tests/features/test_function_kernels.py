"""Kernels with score and mask functions compile, and are as large as those of cufa's own terms."""

from __future__ import annotations

from typing import Any

import numpy as np
import own_functions as own
import plans
import pytest
import sass
from sampling import paired

import cufa
from cufa import functions
from cufa._compile import jit as _jit
from cufa._kernels import unit as units
from cufa._terms.alibi import Alibi
from cufa._terms.function import mask_feature, score_feature
from cufa._terms.softcap import LargeSoftcap

SLOPES, CAP = np.array([0.5, 0.25], np.float32), 20.0


def term(example: own.Example) -> Any:
    arrays = example.arrays(2, np.float32, np.random.default_rng(0))
    return score_feature("attention", (example.function, *arrays)).term


def mask(example: own.Example) -> Any:
    arrays = example.arrays(2, np.float32, np.random.default_rng(0))
    return mask_feature("attention", (example.function, *arrays)).term


SNIPPET = score_feature(
    "attention",
    cufa.cuda_function(
        "cap * tanh(score / cap) + table(head, key)  // as text may end",
        arrays={"table": np.ones((2, 9), np.float32)},
        scalars={"cap": CAP},
    ),
).term
MASK_SNIPPET = mask_feature(
    "attention",
    cufa.cuda_function(
        "if (key < until(head)) return true;\nreturn distance < 3.0f;", arrays={"until": np.ones(2, np.int32)}
    ),
).term
TERMS_OF_FUNCTIONS = {
    "tables": (term(own.SCORES["tables"]), mask(own.MASKS["documents"])),
    "smooth": (term(own.SCORES["smooth"]),),
    "shifted": (term(own.SCORES["shifted"]), mask(own.MASKS["sliding"])),
    "cuda": (SNIPPET, MASK_SNIPPET),
}


KINDS = (
    ("tables", 80, "bf16", 256),
    ("tables", 90, "bf16", 128),
    ("shifted", 90, "bf16", 256),
    ("cuda", 80, "f16", 128),
)
"""Terms, compute capability, dtype and head_dim."""
WAYS = {"forward": plans.forward, "backward": plans.backward}


@pytest.mark.parametrize(("kind", "way"), paired(KINDS, WAYS), ids=str)
def test_kernels_compile_with_functions(kind: tuple[str, int, str, int], way: str) -> None:
    (terms, arch, element, head_dim), of = kind, WAYS[way]
    chosen = TERMS_OF_FUNCTIONS[terms]
    plan = of(plans.static(element, head_dim, head_dim, mask="causal", varlen=True)._replace(terms=chosen), arch)
    if of is plans.backward and arch == 90:
        assert ("backward_split_sm90" if head_dim > 128 else "backward_sm90") in plan.name
    compiled = plans.compile_plan(plan)
    assert "C75" not in compiled.log
    for instructions in sass.disassemble(compiled.cubin).values() if arch == 90 else ():
        assert not sass.wgmma_hazards(instructions)


def capped(s: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return CAP * functions.tanh(s / CAP)


def alibi(s: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return s - functions.stop_gradient(SLOPES[head]) * abs(query.position - key)


ALIKE: dict[str, tuple[Any, Any]] = {"softcap": (capped, LargeSoftcap()), "alibi": (alibi, Alibi())}


@pytest.mark.parametrize(("name", "way"), paired(ALIKE, WAYS))
def test_functions_take_as_many_instructions_as_terms(name: str, way: str) -> None:
    """That do the same: the kernel with most instructions has at most 3 of 100 more."""
    (function, same), of, sizes = ALIKE[name], WAYS[way], []
    for each in (score_feature("attention", function).term, same):
        plan = of(plans.static("bf16", 128, 128, mask="causal")._replace(terms=(each,)), 90)
        compiled = plans.compile_plan(plan)
        assert _jit.resources_of(compiled.log).spill_bytes == 0
        sizes.append(max(map(len, sass.disassemble(compiled.cubin).values()), default=0))
    assert sizes[0] <= 1.03 * sizes[1]


def test_kernels_are_found_by_what_functions_do() -> None:
    """In another process, too: names and sources follow from the graph alone."""

    def unit(function: Any) -> Any:
        chosen = (score_feature("attention", function).term,)
        plan = plans.forward(plans.static("bf16", 64, 64)._replace(terms=chosen), 80)
        return _jit.unit_of(plan), units.record_of(plan, _jit.headers())

    (one, record), (other, _) = unit(capped), unit(lambda s, *_: CAP * functions.tanh(s / CAP))
    assert one.source == other.source and one.headers == other.headers
    assert _jit.source_key(one) != _jit.source_key(unit(lambda s, *_: 3.0 * functions.tanh(s / CAP))[0])
    assert b"score_CAP" in b"".join(one.headers.values())
    assert record.name == "Params"
