"""Biases, relative biases and masks that are arrays, on a GPU and beside the reference."""

from __future__ import annotations

from typing import Any

import featured
import pytest
from gradients import Call

from cufa._operations.backward import ATTENTION_BACKWARD
from cufa.testing import Case, to_numpy

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


def case(head_dim: int, **more: Any) -> Case:
    given: dict[str, Any] = {"batch": 2, "num_heads_q": 4, "num_heads_k": 2, "seqlen_q": 300, "seqlen_k": 420}
    given |= {"dtype": "bfloat16", "head_dim": head_dim, "head_dim_v": head_dim, "sinks": True}
    return Case(**given | more)


CASES = {
    "dense": case(128, bias="xxxx", rel_bias=64, mask="xxxx"),
    "causal": case(128, bias="1xxx", rel_bias=500, causal=True, softcap=5.0, alibi_ndim=1),
    "not paired": case(64, bias="xxxx", mask="xxxx", seqlen_k=421, window_size=(100, 30)),
    "packed": case(64, bias="xx1x", rel_bias=20, mask="x1xx", seqlen_q=(70, 300), seqlen_k=(300, 101), causal=True),
    "keys": case(96, bias="x11x", mask="x11x", dtype="float16"),
    "queries": case(64, bias="xxx1", rel_bias=0),
    "one": case(64, bias="1111", mask="11xx"),
    "wide": case(256, bias="xxxx", rel_bias=30, mask="xxxx", causal=True),
    "float32": case(80, bias="1x1x", rel_bias=64, mask="x1x1", dtype="float32"),
    "short": case(64, bias="xxxx", rel_bias=9, mask="1xxx", seqlen_q=20, seqlen_k=40),
    "loaded ahead": case(128, bias="1xxx", seqlen_k=424, causal=True, alibi_ndim=1),
    "both": case(96, bias="x1xx", rel_bias=100, seqlen_k=424, seed=2, window_size=(200, 30)),
    "relative": case(64, rel_bias=90, seqlen_q=(70, 300), seqlen_k=(300, 101), dtype="float16"),
}

# Enough of heads where a bias is one for all of them: the reference takes time for each.
FEWER: dict[str, Any] = {"num_heads_q": 2, "num_heads_k": 1}

APART = {
    "sequences": case(128, bias="1xxx", seqlen_q=600, seqlen_k=712, batch=3, causal=True, softcap=5.0),
    "heads": case(
        64, bias="x1xx", seqlen_q=1000, seqlen_k=901, rel_bias=60, window_size=(400, 100), dtype="float16", **FEWER
    ),
    "both": case(128, bias="11xx", seqlen_q=1024, seqlen_k=1032, mask="x1xx", seed=2, values="garbage", **FEWER),
}
"""Biases that sequences or heads share, of 64 tiles of 128 × 128 at least."""


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(cupy: Any, name: str) -> None:
    featured.forward(CASES[name], cupy)
    featured.backward(Call(case=CASES[name]), cupy)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_stages_are_not_overwritten_before_they_are_read(head_dim: int) -> None:
    """Products of all SMs delay the loads: many tiles, the same bits in every run, near float32's."""
    torch = pytest.importorskip("torch")
    import cufa

    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2048, 16, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    bias = torch.randn(1, 16, 2048, 2048, dtype=torch.bfloat16, device="cuda")
    runs = [cufa.attention(q, k, v, bias=bias) for _ in range(4)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    for sequence in range(4):
        scores = torch.einsum("qhd,khd->hqk", q[sequence].float(), k[sequence].float()) / head_dim**0.5
        expected = torch.einsum("hqk,khd->qhd", (scores + bias[0].float()).softmax(-1), v[sequence].float())
        far = (runs[0][sequence].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(far.max()) < 0.02


@pytest.mark.parametrize("seqlen_k", [4000, 70])
def test_few_rows_equal_reference(cupy: Any, seqlen_k: int) -> None:
    featured.forward(case(128, bias="xxxx", rel_bias=50, mask="x1xx", seqlen_q=2, seqlen_k=seqlen_k), cupy)


def test_a_gradient_that_is_stored_is_the_same_in_every_run(cupy: Any) -> None:
    made = Call(case=case(128, bias="xxxx", mask="xxxx", seqlen_q=1000, seqlen_k=1000), deterministic=True)
    arrays = made.arrays(cupy)
    runs = [featured.run(ATTENTION_BACKWARD, arrays, made.case.options, False, True) for _ in range(3)]
    bits = [b"".join(to_numpy(x).tobytes() for x in run) for run in runs]
    assert bits[0] == bits[1] == bits[2]
    made.check(tuple(map(to_numpy, runs[0])))


@pytest.mark.parametrize("name", ["causal", "packed", "keys", "queries", "one", "float32"])
def test_gradients_that_scores_share_are_the_same_in_every_run(cupy: Any, name: str) -> None:
    made = Call(case=CASES[name], deterministic=True)
    bits = [b"".join(x.tobytes() for x in featured.backward(made, cupy)) for _ in range(5)]
    assert bits[1:] == bits[:1] * 4


@pytest.mark.parametrize("name", APART)
def test_gradients_apart_equal_reference_and_are_the_same_in_every_run(cupy: Any, name: str) -> None:
    """Whether runs are to be so or not; dbias comes behind dq, dk, dv and dsinks."""
    made, fixed = (Call(case=APART[name], deterministic=each) for each in (False, True))
    runs = [featured.backward(made, cupy), featured.run_backward(made, cupy), featured.backward(fixed, cupy)]
    bits = [to_numpy(run[4]).tobytes() for run in runs]
    device = cupy.cuda.Device()
    if device.compute_capability == "90":
        assert bits[1:] == bits[:1] * 2


@pytest.mark.parametrize("axes", ["xxxx", "1xxx", "x11x"])
def test_torch_differentiates(axes: str) -> None:
    """By the operation's record alone."""
    torch = pytest.importorskip("torch")
    import cufa

    made = Call(case=case(64, bias=axes, rel_bias=40, causal=True))
    names = ("q", "k", "v", "sinks", "bias", "rel_bias")
    arrays = made.arrays(torch)
    leaves = {name: arrays[name].requires_grad_() for name in names}
    out, lse = cufa.attention(**leaves, **made.case.options, return_lse=True)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), (arrays["dout"], arrays["dlse"]))
    dq, dk, dv, dsinks, dbias, drel_bias = (to_numpy(x.float()) for x in gradients)
    storage = to_numpy(arrays["dout"]).dtype
    made.check((*(x.astype(storage) for x in (dq, dk, dv)), dsinks, None, drel_bias))
    assert dbias.shape == tuple(arrays["bias"].shape)
