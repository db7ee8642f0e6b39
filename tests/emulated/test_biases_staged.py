"""The kernels for sm_90 where a warp brings what biases say to shared memory, run on the CPU."""

from __future__ import annotations

from typing import Any

import featured
import pytest
from gradients import Call
from sampling import sampled

import emulated
from cufa._kernels import choose
from cufa._kernels.backward_sm90 import BackwardSm90
from cufa._kernels.forward_sm90 import ForwardSm90
from cufa.testing import Case, to_numpy

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


def case(head_dim: int, **more: Any) -> Case:
    given: dict[str, Any] = {"batch": 2, "num_heads_q": 2, "num_heads_k": 1, "seqlen_q": 150, "seqlen_k": 280}
    given |= {"dtype": "bfloat16", "head_dim": head_dim, "head_dim_v": head_dim}
    return Case(**given | more)


CASES = {
    "bias": case(64, bias="1xxx", causal=True, sinks=True),
    "boxes": case(128, bias="xxxx", seqlen_k=248, window_size=(90, 30), values="garbage"),
    "narrow boxes": case(192, bias="x1xx", seqlen_q=65, seqlen_k=216, alibi_ndim=1, dtype="float16"),
    "relative": case(64, rel_bias=50, seqlen_q=(33, 200), seqlen_k=(150, 265), causal=True, dtype="float16"),
    "far": case(128, rel_bias=7, seqlen_q=65, seqlen_k=211),
    "both": case(96, bias="x1xx", rel_bias=300, softcap=5.0, alibi_ndim=1, seqlen_q=300, seqlen_k=88, causal=True),
}


def spied_on(kernel: type[Any], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the kernels of a kind that are chosen from now on stage what terms read."""
    staged = []
    config = kernel.config

    def spied(*arguments: Any) -> Any:
        made = config(*arguments)
        staged.append(made.stages_terms)
        return made

    choose.cache_clear()
    monkeypatch.setattr(kernel, "config", spied)
    return staged


@pytest.mark.parametrize("name", sampled(CASES, 1))
def test_the_forward_equals_reference_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = spied_on(ForwardSm90, monkeypatch)
    for order in (None, 1):
        with emulated.Gpu(arch=90, num_sms=3, order=order) as gpu:
            featured.forward(CASES[name], gpu)
    assert staged and all(staged)


CONSTANT = {
    "causal": case(96, bias="1xxx", seqlen_q=150, seqlen_k=264, causal=True, sinks=True),
    "capped": case(128, bias="xxxx", seqlen_q=70, seqlen_k=136, softcap=5.0, dtype="float16"),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_gradients_beside_a_constant_bias_equal_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = spied_on(BackwardSm90, monkeypatch)
    made = Call(case=CONSTANT[name])
    for order in (None, 1):
        with emulated.Gpu(arch=90, num_sms=3, order=order) as gpu:
            made.check((*map(to_numpy, featured.run_backward(made, gpu, ())), None))
    assert staged and all(staged)
