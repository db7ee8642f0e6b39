"""Kernels with biases and masks that are arrays, run on the CPU and held to the reference."""

from __future__ import annotations

from typing import Any

import featured
import pytest
from gradients import Call
from sampling import paired, sampled

import emulated
from cufa.testing import Case, to_numpy

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

HEADS: dict[str, Any] = {"batch": 2, "num_heads_q": 2, "num_heads_k": 1, "sinks": True, "rel_bias": 20}
LENGTHS: dict[str, Any] = {"seqlen_q": 70, "seqlen_k": 112}
PACKED: dict[str, Any] = {"seqlen_q": (33, 129), "seqlen_k": (150, 65)}


def case(head_dim: int, **more: Any) -> Case:
    given: dict[str, Any] = HEADS | LENGTHS | {"dtype": "bfloat16", "head_dim": head_dim, "head_dim_v": head_dim}
    return Case(**given | more)


BOTH = [
    pytest.param(90, case(64, bias="xxxx", mask="xxxx", causal=True, softcap=5.0), "sm90", id="90 dense"),
    pytest.param(90, case(64, bias="xxx1", mask="x1xx", **PACKED), "sm90", id="90 packed"),
    pytest.param(90, case(64, bias="1x1x", seqlen_k=113, window_size=(60, 20)), "sm90", id="90 not paired"),
    pytest.param(90, case(128, bias="xxxx", mask="xxxx", seqlen_k=208, window_size=(90, 30)), "sm90", id="90 rows"),
    pytest.param(90, case(128, bias="1xxx", mask="xxxx", seqlen_k=144, seed=2), "sm90", id="90 wide float32"),
    pytest.param(90, case(128, mask="x1xx", seqlen_k=176, causal=True), "sm90", id="90 wide rows of booleans"),
    pytest.param(90, case(64, bias="xxxx", mask="xxxx", seqlen_k=(160, 65), seqlen_q=(33, 129)), "sm90", id="90 both"),
    pytest.param(90, case(64, bias="xxxx", mask="1xxx", seqlen_k=118, causal=True), "sm90", id="90 in pairs"),
    pytest.param(90, case(160, bias="11xx", mask="111x"), "sm90", id="90 wide"),
    pytest.param(80, case(40, bias="x1x1", mask="xxxx", dtype="float32", causal=True), "sm80", id="80 float32"),
    pytest.param(80, case(64, bias="xxxx", mask="11xx", seqlen_k=113), "sm80", id="80 dense"),
    pytest.param(80, case(64, bias="1x1x", mask="1x1x", **PACKED), "sm80", id="80 packed"),
    pytest.param(80, case(32, bias="1111", seqlen_q=16, seqlen_k=30), "sm80", id="80 short"),
]


@pytest.mark.parametrize(("arch", "case", "family"), BOTH)
def test_kernels_equal_reference(arch: int, case: Case, family: str) -> None:
    number = next(number for number, each in enumerate(BOTH) if each.values[1] is case)
    for way in sampled(("forward", "backward"), number):  # which read arrays by the same code
        with emulated.Gpu(arch=arch, num_sms=3, order=1) as gpu:
            if way == "forward":
                featured.forward(case, gpu)
            else:
                featured.backward(Call(case=case), gpu)
            assert any(way in each.function.entry and family in each.function.entry for each in gpu.launches)


@pytest.mark.parametrize(("clusters", "axes"), paired([False, True], ["xxxx", "1x1x"]))
def test_few_rows_equal_reference(axes: str, clusters: bool) -> None:
    """Heads that share a tile have rows of the bias of their own."""
    decoded = case(64, bias=axes, mask=axes, seqlen_q=1, seqlen_k=700, num_heads_q=4)
    with emulated.Gpu(arch=90 if clusters else 80, num_sms=3) as gpu:
        featured.forward(decoded, gpu)
        assert any("split" in each.function.entry or "cluster" in each.function.entry for each in gpu.launches)


def test_a_gradient_that_is_stored_needs_no_zeros_and_is_deterministic() -> None:
    """Memory that nobody has written would be NaN, or an odd number, there."""
    made = Call(case=case(64, bias="xxxx", rel_bias=None), deterministic=True)
    found = []
    for order in (None, 1, 2):
        with emulated.Gpu(arch=90, num_sms=3, order=order) as gpu:
            found.append(b"".join(x.tobytes() for x in featured.backward(made, gpu)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("arch", "wanted"), [(80, ()), (80, ("drel_bias",)), (90, ("dbias",))])
def test_constants_get_no_gradients(arch: int, wanted: tuple[str, ...]) -> None:
    """Nor have gradients of the others to wait for sums of theirs that are exact."""
    made = Call(case=case(64, bias="11xx", causal=True), deterministic=not wanted)
    with emulated.Gpu(arch=arch, num_sms=3, order=1) as gpu:
        found = [*map(to_numpy, featured.run_backward(made, gpu, wanted))]
        assert "attention_backward_terms" not in [each.function.entry for each in gpu.launches]
    assert len(found) == 4 + len(wanted)
    behind = iter(found[4:])
    made.check((*found[:4], *(next(behind) if name in wanted else None for name in ("dbias", "drel_bias"))))


IN_ORDER = [
    pytest.param(90, case(64, bias="11xx", causal=True), "sm90", id="90 dense"),
    pytest.param(90, case(64, bias="1x1x", **PACKED), "sm90", id="90 packed"),
    pytest.param(90, case(160, bias="x1x1"), "split_keys_sm90", id="90 wide"),
    pytest.param(80, case(64, bias="1111", dtype="float32", window_size=(60, 20)), "sm80", id="80 dense"),
    pytest.param(80, case(40, bias="1xx1", **PACKED), "sm80", id="80 packed"),
    pytest.param(80, case(32, bias="11xx", seqlen_q=16, seqlen_k=30), "sm80", id="80 short"),
]


@pytest.mark.parametrize(("arch", "case", "family"), IN_ORDER)
def test_gradients_that_scores_share_are_the_same_bits_in_any_order(arch: int, case: Case, family: str) -> None:
    found = []
    for order in (None, 1, 2, 3):
        with emulated.Gpu(arch=arch, num_sms=3, order=order) as gpu:
            found.append([x.tobytes() for x in featured.backward(Call(case=case, deterministic=True), gpu)])
            assert f"attention_backward_{family}" in [each.function.entry for each in gpu.launches]
    assert found[1:] == found[:1] * 3
