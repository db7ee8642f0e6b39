"""Kernels with biases and masks that are arrays: that they compile, and what they take."""

from __future__ import annotations

import re
from typing import Any

import plans
import pytest
import sass
from sampling import paired, sampled

from cufa._call.arrays import Spec, contiguous
from cufa._kernels.kernel import SHARED_MEMORY
from cufa._terms import bias as bias_module
from cufa._terms.bias import Bias
from cufa._terms.block_mask import BlockMaskTerm
from cufa._terms.mask_array import MaskArray
from cufa._terms.rel_bias import RelBias
from cufa._terms.score_array import Access

ENTRY = "attention_backward_bias_sm90"
PAIRED = Bias(Access(2, 1, True), "bf16")
BOXED = Access(2, 1, True, wide=True, shared=(True, False, False, False), mapped=True)
TERMS: dict[str, tuple[Any, ...]] = {
    "bias": (PAIRED,),
    "bias apart": (Bias(Access(2, 1, True, False, True, (True, False, False, False), True), "bf16", tiled=True),),
    "boxed bias": (Bias(BOXED, "bf16", tiled=True),),
    "shared bias": (Bias(Access(2, 1, True, False, False, (True, True, True, False)), "bf16"),),
    "float32 bias": (Bias(Access(4, 1, True), "f32"),),
    "relative bias": (RelBias(),),
    "mask": (MaskArray(Access(1, 1, True)),),
    "all": (PAIRED, RelBias(), MaskArray(Access(1, 1, True))),
}

WAYS = (plans.forward, plans.backward)


def named(given: Any) -> str:
    """Of a parameter."""
    return getattr(given, "__name__", str(given))


def spills(log: str) -> dict[str, int]:
    """Bytes that each entry spills, by what ``--ptxas-options=-v`` logs."""
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        spilt = re.search(r"(\d+) bytes spill stores", entry)
        assert spilt is not None, log
        found[entry.partition("'")[0]] = int(spilt[1])
    return found


def compiled(way: Any, terms: str, head_dim: int, arch: int, **features: Any) -> dict[str, int]:
    plan = way(plans.static("bf16", head_dim, head_dim, **features)._replace(terms=TERMS[terms]), arch)
    return spills(plans.compile_plan(plan).log)


@pytest.mark.parametrize(("terms", "way"), sampled(paired(TERMS, WAYS)), ids=named)
def test_kernels_for_hopper_hold_what_they_load(way: Any, terms: str) -> None:
    """But for some words of the gradients with all of them at once."""
    most = 32 if terms == "all" and way is plans.backward else 0
    assert max(compiled(way, terms, 128, 90, mask="causal").values()) <= most


@pytest.mark.parametrize(("terms", "taken"), paired(["bias", "boxed bias", "relative bias"], ["listed", "packed"]))
def test_kernels_that_take_tiles_as_they_come_have_biases(taken: str, terms: str) -> None:
    features: dict[str, Any] = {"varlen": True, "many_tiles": True} if taken == "packed" else {}
    facts = plans.static("bf16", 128, 128, **features)._replace(terms=TERMS[terms])
    if taken == "listed":
        facts = facts._replace(terms=(*facts.terms, BlockMaskTerm(128, 128, by_head=False)))
    plan = plans.forward(facts, 90)
    assert plan.name == f"attention_forward_{taken}_sm90" and not plan.config.stages_terms
    assert max(spills(plans.compile_plan(plan).log).values()) <= 32


def test_nothing_is_added_up_for_gradients_that_nobody_wants() -> None:
    """A constant bias takes no more atomic additions than none, and fewer instructions than one with a gradient."""
    reduced, sizes = [], []
    for terms in ((), tuple(term.wanting(()) for term in TERMS["shared bias"]), TERMS["shared bias"]):
        plan = plans.backward(plans.static("bf16", 128, 128)._replace(terms=terms), 90)
        kernels = sass.disassemble(plans.compile_plan(plan).cubin).values()
        reduced.append(sum(each.opcode.startswith("RED") for kernel in kernels for each in kernel))
        sizes.append(sum(map(len, kernels)))
    assert reduced[0] == reduced[1] < reduced[2] and sizes[1] < sizes[2]


@pytest.mark.parametrize(("arch", "way"), paired([90, 80], WAYS), ids=named)
def test_the_widest_heads_compile(way: Any, arch: int) -> None:
    """They spill in the gradients, as other terms do, and hardly elsewhere."""
    spilt = compiled(way, "all", 256, arch, mask="window", varlen=True)
    assert way is plans.backward or max(spilt.values()) <= 8


@pytest.mark.parametrize(("terms", "way"), paired(["boxed bias", "bias apart", "relative bias"], WAYS), ids=named)
def test_nothing_touches_what_runs(terms: str, way: Any) -> None:
    """The kernels that compute beside products: the forward's first steps, and the gradient of a bias."""
    plan = way(plans.static("bf16", 128, 128)._replace(terms=TERMS[terms]), 90)
    for entry, code in sass.disassemble(plans.compile_plan(plan).cubin).items():
        assert not sass.wgmma_hazards(code), entry


def specialised(*shape: int) -> Bias:
    """The bias of 8 sequences of 1024 with 16 heads."""
    shapes = {"bias": shape, "q": (8, 1024, 16, 128), "k": (8, 1024, 16, 128)}
    specs = {name: Spec("torch", each, contiguous(each), "bfloat16", 0, 0, True) for name, each in shapes.items()}
    return Bias().specialised(specs, False)


@pytest.mark.parametrize(
    ("shape", "apart"),
    [
        ((1, 16, 1024, 1024), True),
        ((8, 1, 1024, 1024), True),
        ((1, 1, 1024, 1024), True),
        ((8, 16, 1024, 1024), False),
        ((1, 16, 1, 1024), False),
        ((1, 16, 1024, 1), False),
    ],
)
def test_gradients_that_sequences_or_heads_share_are_made_apart(shape: tuple[int, ...], apart: bool) -> None:
    bias = specialised(*shape)
    for deterministic in (False, True):
        term = bias.in_order() if deterministic else bias
        facts = plans.static("bf16", 128, 128)._replace(terms=(term,))
        plan = plans.backward(facts, 90, deterministic)
        assert (ENTRY in plan.entries) is apart
        assert not (apart and plan.config.variant[0].finishes)  # there are no exact sums
        assert ENTRY not in plans.backward(facts, 80, deterministic).entries


def test_few_tiles_of_a_gradient_are_not_made_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for least, apart in ((64, True), (65, False)):
        monkeypatch.setattr(bias_module, "APART_TILES", least)
        assert specialised(1, 1, 1024, 1024).set_apart().apart is apart


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_staged_boxes_fit_a_block(head_dim: int) -> None:
    """In shared memory beside the 1 KB that the gradients' code declares; and they are whole rows of a swizzle."""
    for way in (plans.forward, plans.backward):
        plan = way(plans.static("bf16", head_dim, head_dim)._replace(terms=TERMS["boxed bias"]), 90)
        assert plan.config.block_n % 32 == 0 and plan.config.smem_bytes + 1024 <= SHARED_MEMORY[90]


def test_a_stage_of_boxes_is_given_back_behind_its_loads() -> None:
    """Else a tensor copy may overwrite what they have not read: an arrival does not wait for them."""
    plan = plans.forward(plans.static("bf16", 128, 128)._replace(terms=TERMS["boxed bias"]), 90)
    code = sass.disassemble(plans.compile_plan(plan).cubin).get(plan.name, [])
    kinds = [each.opcode.split(".")[0] for each in code]
    loads = [i for i, kind in enumerate(kinds) if kind == "LDSM"]
    assert not code or loads
    for i in loads:
        rest = [kind for kind in kinds[i:] if kind in ("FENCE", "SYNCS")]
        assert rest[0] == "FENCE"


def test_tiles_leave_registers_to_what_is_loaded() -> None:
    """Beside 128 columns of out and half as many scores, P and numbers of the bias."""
    facts = plans.static("bf16", 128, 128)
    blocks = [plans.forward(facts._replace(terms=TERMS[name]), 90).config.block_n for name in ("bias", "float32 bias")]
    assert blocks == [112, 96] and plans.forward(facts._replace(terms=TERMS["relative bias"]), 90).config.block_n == 160
