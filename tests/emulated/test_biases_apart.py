"""The kernel for sm_90 that makes the gradient of a bias that sequences or heads share, run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import featured
import pytest
from gradients import Call

import emulated
from cufa._call import problem as _problem
from cufa._terms import bias as _bias
from cufa.testing import Case, to_numpy

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

ENTRY = "attention_backward_bias_sm90"


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Biases of few tiles count as large."""
    with pytest.MonkeyPatch.context() as patch:
        _problem._checked.cache_clear()
        patch.setattr(_bias, "APART_TILES", 1)
        yield
    _problem._checked.cache_clear()


def case(head_dim: int, **more: Any) -> Case:
    given: dict[str, Any] = {"batch": 2, "num_heads_q": 2, "num_heads_k": 1, "seqlen_q": 70, "seqlen_k": 112}
    given |= {"dtype": "bfloat16", "head_dim": head_dim, "head_dim_v": head_dim}
    return Case(**given | more)


CASES = {
    "sequences": case(128, bias="1xxx", seqlen_q=150, seqlen_k=200, causal=True, sinks=True, values="garbage"),
    "heads": case(64, bias="x1xx", seqlen_k=113, window_size=(60, 20), dtype="float16", rel_bias=20),
    "both": case(64, bias="11xx", num_heads_q=4, seqlen_k=136, softcap=5.0, mask="xxxx", head_dim_v=96, dropout_p=0.3),
    "float32": case(40, bias="1xxx", seed=2, seqlen_q=129, seqlen_k=66, alibi_ndim=1, causal=True),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_reference_and_are_the_same_bits_in_any_order(name: str) -> None:
    found = []
    for order, deterministic in ((None, False), (1, True)):
        with emulated.Gpu(arch=90, num_sms=3, order=order) as gpu:
            results = Call(case=CASES[name], deterministic=deterministic).right(gpu)
            assert ENTRY in [each.function.entry for each in gpu.launches]
            dbias = to_numpy(results[3 + CASES[name].sinks])  # behind dq, dk, dv and dsinks
            found.append(dbias.tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "refused",
    [
        case(64, bias="11xx", seqlen_q=(33, 40), seqlen_k=(50, 65)),
        case(64, bias="1xx1"),
        case(64, bias="xxxx"),
        case(160, bias="11xx"),
    ],
    ids=["packed", "keys", "alone", "wide"],
)
def test_other_gradients_have_no_such_kernel(refused: Case) -> None:
    with emulated.Gpu(arch=90, num_sms=3) as gpu:
        featured.backward(Call(case=refused), gpu)
        assert ENTRY not in [each.function.entry for each in gpu.launches]
