"""The forward's kernels, run on the CPU and held to the reference."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import places
import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples, paired

import cufa
import emulated
from cufa._call import problem as _problem
from cufa._call.problem import CHAIN_ROWS
from cufa.testing import Case
from emulated.cases import ORDERS, Kind, dense, forward, packed

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

DENSE = (
    Kind("float16", 64, 64),
    Kind("bfloat16", 128, 64, "causal", sinks=True),
    Kind("float32", 40, 57, "window", softcap=True, alibi=2, sinks=True),
    Kind("float16", 32, 96, "window", alibi=1),
    Kind("bfloat16", 31, 65, "causal", layouts="narrow"),
    Kind("float32", 200, 256),
    Kind("bfloat16", 256, 256, "causal"),
)
PACKED = (
    Kind("bfloat16", 64, 64, "causal"),
    Kind("float16", 96, 40, "window", softcap=True, alibi=2, sinks=True),
    Kind("float32", 64, 64, "causal", sinks=True),
    Kind("bfloat16", 33, 17, layouts="narrow"),
)


DENSE_SM90 = (
    Kind("float16", 64, 64, layouts="mapped"),
    Kind("bfloat16", 128, 128, "causal", sinks=True, layouts="mapped"),
    Kind("float16", 72, 96, "window", softcap=True, alibi=2, layouts="mapped"),
    Kind("bfloat16", 192, 256, "causal", layouts="narrow"),
)
PACKED_SM90 = (
    Kind("bfloat16", 64, 64, "causal", sinks=True, layouts="mapped"),
    Kind("float16", 128, 80, "window", layouts="mapped"),
)


@pytest.mark.parametrize("kind", DENSE, ids=str)
@settings(max_examples=examples(3, 6))
@given(data=st.data())
def test_dense_equals_reference(kind: Kind, data: st.DataObject) -> None:
    ran = forward(data.draw(dense(kind)), data.draw(ORDERS), num_sms=1 if kind.layouts == "narrow" else 3)
    assert ran.entries == ["attention_align"] * (kind.layouts == "narrow") + ["attention_forward_sm80"]


@pytest.mark.parametrize("kind", PACKED, ids=str)
@settings(max_examples=examples(3, 6))
@given(data=st.data())
def test_packed_equals_reference(kind: Kind, data: st.DataObject) -> None:
    assert forward(data.draw(packed(kind)), data.draw(ORDERS)).entries[-1] == "attention_forward_sm80"


@pytest.mark.parametrize("kind", DENSE_SM90, ids=str)
@settings(max_examples=3)
@given(data=st.data())
def test_dense_on_hopper_equals_reference(kind: Kind, data: st.DataObject) -> None:
    ran = forward(data.draw(dense(kind)), data.draw(ORDERS), arch=90)
    assert ran.entries[-1] == "attention_forward_sm90"
    assert kind.layouts == "mapped" or ran.entries[0] == "attention_align"


@pytest.mark.parametrize("kind", PACKED_SM90, ids=str)
@settings(max_examples=3)
@given(data=st.data())
def test_packed_on_hopper_equals_reference(kind: Kind, data: st.DataObject) -> None:
    ran = forward(data.draw(packed(kind)), data.draw(ORDERS), arch=90, num_sms=2)
    assert ran.entries[-1] == "attention_forward_sm90"


SIXTY_FOUR = {"head_dim": 64, "head_dim_v": 64, "return_lse": True}
SHORT = np.random.default_rng(0).integers(0, 33, 700).tolist()
LENGTHS = np.random.default_rng(1).integers(0, 90, 260).tolist()
OTHERS: dict[str, dict[str, Any]] = {
    "short": {"batch": 5, "seqlen_q": 17, "seqlen_k": 31, "num_heads_q": 2, "num_heads_k": 2, "causal": True},
    "short and wide": {"batch": 3, "seqlen_q": 16, "seqlen_k": 30, "head_dim": 256, "layouts": ("padded",) * 4},
    "short and packed": {"batch": 700, "seqlen_q": tuple(SHORT), "seqlen_k": tuple(SHORT[::-1])},
    "many": {"batch": 260, "seqlen_q": tuple(LENGTHS), "seqlen_k": tuple(LENGTHS[::-1]), "causal": True},
    "long": {"seqlen_q": 40, "seqlen_k": CHAIN_ROWS + 500, "dtype": "float32", "head_dim": 32, "head_dim_v": 32},
    "element by element": {"seqlen_q": 3, "seqlen_k": 90, "layouts": ("strided", "padded", "offset", "padded")},
    "no keys": {"batch": 2, "seqlen_q": 70, "seqlen_k": 0, "sinks": True},
    "no queries": {"batch": 2, "seqlen_q": 0, "seqlen_k": 70},
}


@pytest.mark.parametrize("name", OTHERS)
def test_problems_with_kernels_of_their_own(name: str) -> None:
    case = Case(**{"dtype": "float16", **SIXTY_FOUR, **OTHERS[name]})
    ran = forward(case)
    if case.batch < 10:
        assert forward(case, 1).bits == ran.bits


@pytest.mark.parametrize("arch", [86, 120])
def test_tiles_of_other_gpus(arch: int) -> None:
    case = Case(seqlen_q=130, seqlen_k=140, head_dim=128, head_dim_v=128, dtype="bfloat16", causal=True)
    assert forward(case, arch=arch).entries == ["attention_forward_sm80"]


@pytest.mark.parametrize(("head_dim", "causal"), paired([64, 128], [False, True]))
def test_every_gpus_kernel_on_hopper(head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where arrays have no tensor maps: two buffers for K and V at head_dim 64, votes on rescaling out above."""
    monkeypatch.setattr(_problem, "has_tensor_map", lambda *_: False)
    sizes = {"seqlen_q": 150, "seqlen_k": 300, "head_dim": head_dim, "head_dim_v": head_dim, "causal": causal}
    for values in ("normal", "large rows"):
        case = Case(**sizes, dtype="bfloat16", values=values, return_lse=True)
        ran = forward(case, arch=90)
        assert ran.entries == ["attention_forward_sm80"]
        assert forward(case, 1, arch=90).bits == ran.bits


HOPPER: dict[str, dict[str, Any]] = {
    "heads that share tiles": {"batch": 2, "seqlen_q": 40, "seqlen_k": 150, "num_heads_q": 8, "causal": True},
    "tiles in a list": {"batch": 2, "seqlen_q": 700, "seqlen_k": 700, "num_heads_q": 2, "causal": True},
    "many": {"batch": 40, "seqlen_q": (70, 0, 33, 130) * 10, "seqlen_k": (40, 90, 0, 130) * 10, "num_heads_q": 3},
    "long": {"seqlen_q": 100, "seqlen_k": CHAIN_ROWS + 500},
    "rows that see no key": {"seqlen_q": 400, "seqlen_k": 100, "causal": True, "sinks": True},
    "no keys": {"batch": 2, "seqlen_q": 70, "seqlen_k": 0},
}


@pytest.fixture
def few_tiles_are_none() -> Iterator[None]:
    """Else all SMs share the keys of few tiles, by another kernel."""
    with places.bounds(_problem, FEW_TILES=0):
        yield


@pytest.mark.usefixtures("few_tiles_are_none")
@pytest.mark.parametrize("name", HOPPER)
def test_problems_on_hopper(name: str) -> None:
    case = Case(**{"dtype": "float16", **SIXTY_FOUR, **HOPPER[name]})
    ran = forward(case, arch=90)
    assert ran.entries == ["attention_forward_sm90"]
    assert forward(case, 1, arch=90).bits == ran.bits


WIDE = {"head_dim": 256, "head_dim_v": 256}
WINDOWS: dict[str, dict[str, Any]] = {
    "dense": {"seqlen_q": 520, "seqlen_k": 450, "num_heads_q": 2, "window_size": (150, 20), "sinks": True},
    "wide": {**WIDE, "seqlen_q": 300, "seqlen_k": 330, "num_heads_q": 2, "window_size": (70, 0)},
    "rows that see no key": {"seqlen_q": 500, "seqlen_k": 200, "window_size": (60, 0)},
    "packed": {"batch": 3, "seqlen_q": (300, 0, 250), "seqlen_k": (280, 90, 400), "window_size": (90, 33)},
    "packed and wide": {**WIDE, "batch": 2, "seqlen_q": (70, 200), "seqlen_k": (70, 220), "window_size": (40, 3)},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_warpgroups_with_blocks_of_their_own(name: str) -> None:
    case = Case(**{"dtype": "bfloat16", **SIXTY_FOUR, **WINDOWS[name]})
    ran = forward(case, arch=90, num_sms=2)
    assert ran.entries == ["attention_forward_sm90"]
    assert forward(case, 1, arch=90, num_sms=1).bits == ran.bits


@pytest.mark.parametrize(
    ("mask", "head_dim"), paired([{}, {"causal": True}, {"window_size": (100, 20)}], [64, 128]), ids=str
)
def test_packed_tiles_are_taken_as_they_come(mask: dict[str, Any], head_dim: int) -> None:
    """By whichever block comes first, and so by other ones in every run."""
    dims = {"head_dim": head_dim, "head_dim_v": head_dim, "num_heads_q": 2, "return_lse": True}
    lengths = {"seqlen_q": (130, 0, 260, 33), "seqlen_k": (150, 70, 260, 0), "seqused_k": (150, 70, 200, 0)}
    case = Case(batch=4, dtype="float16", values="large rows", **dims, **lengths, **mask)
    with places.bounds(_problem, MANY_ROWS=0, TAKEN_ROWS=0):
        ran = forward(case, arch=90, num_sms=3)
        assert ran.entries == ["attention_taken_begin", "attention_forward_packed_sm90"]
        assert forward(case, 7, arch=90, num_sms=2).bits == ran.bits
    assert head_dim == 128 or forward(case, arch=90).bits == ran.bits


@pytest.mark.parametrize(("arch", "rule"), [(80, "the running maximum"), (90, "the first block's maximum")])
def test_results_are_those_of_the_model_of_errors(arch: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for some that lie where rounding is decided by the last bits of float32."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    model = importlib.import_module("errors")
    case = Case(**SIXTY_FOUR, seqlen_q=1024, seqlen_k=1024, dtype="bfloat16")
    arrays = case.arrays()
    with emulated.Gpu(arch=arch, num_sms=1) as gpu:
        out = cufa.attention(**case.arrays(gpu)).numpy().astype(np.float64)
    found = model.Forward(*(arrays[name].astype(np.float64)[0, :, 0] for name in "qkv"), causal=False, bits=8)
    block = plans.forward(plans.static("bf16", 64, 64), arch).config.block_n
    assert np.mean(out[0, :, 0] == found.approximate(rule, block)) > 0.98


CAPPED = ((80, "float16", 64), (90, "bfloat16", 64), (90, "float16", 192))


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), CAPPED)
def test_capped_scores_take_nothing_of_keys_that_are_hidden(arch: int, dtype: str, head_dim: int) -> None:
    """Two scores side by side share a reciprocal, but rows above a key's have the same bits whatever it holds."""
    case = Case(seqlen_q=150, seqlen_k=150, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype)
    seen_from = 101
    runs = []
    for value in (0.0, 3.0, np.nan, np.inf):
        arrays = case.arrays()
        arrays["k"][:, seen_from] = value
        with emulated.Gpu(arch=arch, num_sms=2) as gpu:
            q, k, v = (gpu.array(arrays[name]) for name in "qkv")
            out, lse = cufa.attention(q, k, v, causal=True, softcap=5.0, return_lse=True)
            dq = cufa.attention_backward(q, q, k, v, out, lse, causal=True, softcap=5.0)[0]
            out, lse, dq = (x.numpy() for x in (out, lse, dq))
        found = [x.tobytes() for x in (out[:, :seen_from], lse[..., :seen_from], dq[:, :seen_from])]
        runs.append(found if np.isfinite(value) else found[:2])  # what is not finite of dq is made again
        assert np.isinf(value) or (np.isnan(lse[..., seen_from:]) == np.isnan(value)).all()
        np.testing.assert_array_equal(np.isfinite(dq[:, :seen_from]), True)
    first = runs[0]
    assert runs[1:] == [first, first[:2], first[:2]]
