"""The gradients' kernels, run on the CPU and held to the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gradients import VALUES, Call
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples, sampled

import cufa
import emulated
from cufa import reference
from cufa._call.problem import CHAIN_ROWS
from cufa._kernels import backward as kernels
from cufa.testing import Case
from emulated.cases import LAYOUTS, ORDERS, Kind, backward, dense, packed

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

DENSE = (
    Kind("float16", 64, 64),
    Kind("bfloat16", 128, 64, "causal", sinks=True),
    Kind("float32", 40, 57, "window", softcap=True, alibi=2, sinks=True),
    Kind("bfloat16", 31, 65, "causal", alibi=1, layouts="narrow"),
    Kind("float16", 200, 160, "window"),
)
PACKED = (
    Kind("bfloat16", 64, 64, "causal"),
    Kind("float16", 96, 40, "window", softcap=True, alibi=2, sinks=True),
    Kind("float32", 33, 17, layouts="narrow"),
)
IN_ORDER = (
    Kind("bfloat16", 32, 32, "causal"),
    Kind("float16", 48, 64, "window", sinks=True),
)
DENSE_SM90 = (
    Kind("float16", 64, 64, layouts="mapped"),
    Kind("bfloat16", 128, 96, "causal", sinks=True, layouts="mapped"),
    Kind("float16", 40, 64, "window", softcap=True, alibi=2, layouts="mapped"),
    Kind("bfloat16", 192, 256, "causal", layouts="narrow"),
)
PACKED_SM90 = (
    Kind("bfloat16", 64, 64, "causal", layouts="mapped"),
    Kind("float16", 128, 128, "window", sinks=True, layouts="mapped"),
)


@st.composite
def calls(draw: st.DrawFn, kind: Kind, cases: Any, deterministic: bool = False) -> Call:
    layouts = st.sampled_from(LAYOUTS[kind.layouts])
    three = st.tuples(layouts, layouts, layouts)
    return Call(
        case=draw(cases(kind, VALUES)),
        deterministic=deterministic,
        dlse=draw(st.booleans()),
        dout=draw(layouts),
        results=draw(three if kind.layouts == "narrow" else st.none() | three),
    )


@pytest.mark.parametrize("kind", DENSE, ids=str)
@settings(max_examples=examples(2, 3))
@given(data=st.data())
def test_dense_equals_reference(kind: Kind, data: st.DataObject) -> None:
    call = data.draw(calls(kind, dense))
    ran = backward(call, data.draw(ORDERS))
    assert "attention_backward_sm80" in ran.entries
    assert ("attention_align" in ran.entries) == (kind.layouts == "narrow")
    assert not (ran.repaired and call.case.values == "normal")


@pytest.mark.parametrize("kind", PACKED, ids=str)
@settings(max_examples=examples(2, 3))
@given(data=st.data())
def test_packed_equals_reference(kind: Kind, data: st.DataObject) -> None:
    call = data.draw(calls(kind, packed))
    ran = backward(call, data.draw(ORDERS))
    assert {"attention_backward_sm80", "attention_backward_offsets"} <= {*ran.entries}
    assert not (ran.repaired and call.case.values == "normal")


@pytest.mark.parametrize("cases", [dense, packed], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", IN_ORDER, ids=str)
@settings(max_examples=2)
@given(data=st.data())
def test_in_turn_gradients_are_the_same_bits_in_every_order(kind: Kind, cases: Any, data: st.DataObject) -> None:
    call = data.draw(calls(kind, cases, deterministic=True))
    ran = backward(call)
    for order in data.draw(st.tuples(*[st.integers(0, 999)] * 2)):
        assert backward(call, order).bits == ran.bits


def on_hopper(kind: Kind) -> str:
    return (
        "attention_backward_sm90"
        if max(kind.head_dim, kind.head_dim_v) <= 128
        else "attention_backward_split_keys_sm90"
    )


@pytest.mark.parametrize("kind", DENSE_SM90, ids=str)
@settings(max_examples=2)
@given(data=st.data())
def test_dense_on_hopper_equals_reference(kind: Kind, data: st.DataObject) -> None:
    call = data.draw(calls(kind, dense, deterministic=data.draw(st.booleans())))
    assert on_hopper(kind) in backward(call, data.draw(ORDERS), arch=90).entries


@pytest.mark.parametrize("kind", PACKED_SM90, ids=str)
@settings(max_examples=2)
@given(data=st.data())
def test_packed_on_hopper_equals_reference(kind: Kind, data: st.DataObject) -> None:
    call = data.draw(calls(kind, packed, deterministic=data.draw(st.booleans())))
    assert on_hopper(kind) in backward(call, data.draw(ORDERS), arch=90).entries


@pytest.mark.parametrize("cases", [dense, packed], ids=["dense", "packed"])
@settings(max_examples=1)
@given(data=st.data())
def test_in_turn_gradients_on_hopper_are_the_same_bits_in_every_order(cases: Any, data: st.DataObject) -> None:
    call = data.draw(calls(PACKED_SM90[0], cases, deterministic=True))
    ran = backward(call, arch=90)
    for order in data.draw(st.tuples(*[st.integers(0, 999)] * 2)):
        assert backward(call, order, arch=90).bits == ran.bits


LATE: dict[str, dict[str, Any]] = {
    "64": {"seqlen_q": 450, "seqlen_k": 450, "head_dim": 64},
    "128": {"seqlen_q": 450, "seqlen_k": 450, "head_dim": 128, "num_heads_q": 2},
    "rows that see no key": {"seqlen_q": 600, "seqlen_k": 390, "head_dim": 128},
    "tiles of late blocks alone": {"seqlen_q": 100, "seqlen_k": 520, "head_dim": 128},
}


@pytest.mark.parametrize("name", sampled(LATE, 1))
def test_late_blocks_on_hopper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a causal mask the blocks of keys from a head's middle on have sums of dq of their own, if they are many."""
    monkeypatch.setattr(kernels, "WAITING_BLOCKS", 2)
    sizes = LATE[name]
    case = Case(**sizes, head_dim_v=sizes["head_dim"], dtype="bfloat16", causal=True)
    call = Call(case=case, deterministic=True)
    ran = backward(call, arch=90, num_sms=3)
    assert "attention_backward_sm90" in ran.entries and not ran.repaired
    assert backward(call, 1, arch=90, num_sms=5).bits == ran.bits


TWO_PASSES: dict[str, dict[str, Any]] = {
    "queries past the end": {"seqlen_q": 320, "seqlen_k": 70, "head_dim": 256},
    "sections": {"seqlen_q": 300, "seqlen_k": 120, "head_dim": 192, "num_heads_q": 6, "num_heads_k": 3, "causal": True},
    "packed": {"batch": 4, "seqlen_q": (320, 0, 190, 64), "seqlen_k": (90, 70, 0, 130), "head_dim": 256},
    "no keys": {"seqlen_q": 150, "seqlen_k": 0, "head_dim": 192},
    "keys in registers": {
        "batch": 3,
        "seqlen_q": (200, 70, 0),
        "seqlen_k": (150, 0, 130),
        "head_dim": 160,
        "causal": True,
    },
}


@pytest.mark.parametrize("name", TWO_PASSES)
def test_two_passes_on_hopper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take one unit after the other, those of few heads side by side.

    Of a tile's queries the second half may lie past the end. They are not loaded, and the memory of blocks that have
    had no other tile holds NaN there, for which nothing has to be made again.
    """
    monkeypatch.setattr(kernels, "SECTION", 1)
    sizes = TWO_PASSES[name]
    call = Call(case=Case(**sizes, head_dim_v=sizes["head_dim"], dtype="bfloat16"))
    ran = backward(call, arch=90, num_sms=4)
    assert "attention_backward_split_queries_sm90" in ran.entries and not ran.repaired
    assert backward(call, 1, arch=90, num_sms=2).bits == ran.bits


@pytest.mark.parametrize("sizes", [(450, 450, 2, 64), (300, 420, 4, 40)], ids=["equal", "longer"])
def test_keys_in_two_stages_on_hopper(sizes: tuple[int, int, int, int]) -> None:
    """The keys of a block's next work arrive while it multiplies by those of this one."""
    seqlen_q, seqlen_k, heads, head_dim = sizes
    dims = {"head_dim": head_dim, "head_dim_v": head_dim}
    case = Case(
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads_q=heads, num_heads_k=2, dtype="bfloat16", causal=True, **dims
    )
    for order in range(2):
        ran = backward(Call(case=case), order, arch=90, num_sms=1 + order)
        assert "attention_backward_sm90" in ran.entries and not ran.repaired


@pytest.mark.parametrize(
    ("lengths", "causal"),
    [((300, 0, 257, 64, 140), False), ((520, 700), True), ((40,) * 35, False)],
    ids=["mixed", "long", "many"],
)
def test_packed_sequences_side_by_side_on_hopper(lengths: tuple[int, ...], causal: bool) -> None:
    """Where blocks of keys add in turn, few of a head run at a time: those of several sequences take turns."""
    case = Case(
        batch=len(lengths),
        seqlen_q=lengths,
        seqlen_k=lengths,
        num_heads_q=2,
        head_dim=64,
        head_dim_v=64,
        dtype="bfloat16",
        causal=causal,
    )
    call = Call(case=case, deterministic=True)
    ran = backward(call, arch=90, num_sms=8)
    assert "attention_backward_sm90" in ran.entries and not ran.repaired
    assert backward(call, 1, arch=90, num_sms=16).bits == backward(call, 2, arch=90, num_sms=2).bits == ran.bits


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float16", 128), ("bfloat16", 256)])
def test_errors_on_hopper_are_those_of_the_same_mathematics(dtype: str, head_dim: int) -> None:
    """P and dS are rounded once each. A dS that is made of rounded P would err by 1.2 times that."""
    case = Case(seqlen_q=192, seqlen_k=192, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype, values="normal")
    host = Call(case=case, dlse=False).arrays()
    given = {name: host[name] for name in ("dout", "q", "k", "v")} | {"dlse": None}
    exact = reference._differentiate(**given)
    rounded = reference._differentiate(**given, precision=reference.Precision(np.float32, host["q"].dtype))
    with emulated.Gpu(arch=90) as gpu:
        dout, *arrays = (gpu.array(host[name]) for name in ("dout", "q", "k", "v"))
        out, lse = cufa.attention(*arrays, return_lse=True)
        found = [each.numpy().astype(np.float64) for each in cufa.attention_backward(dout, *arrays, out, lse)]
    for gradient, true, other in zip(found, exact, rounded, strict=False):
        assert np.linalg.norm(gradient - true) <= 1.05 * np.linalg.norm(other - true)


SHORT = {"head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16"}
WIDE = {"head_dim": 256, "head_dim_v": 256}
OTHERS: dict[str, dict[str, Any]] = {
    "short": {"batch": 5, "seqlen_q": 17, "seqlen_k": 31, "num_heads_q": 2, "causal": True},
    "short and packed": {"batch": 40, "seqlen_q": (7, 30, 0, 16, 11) * 8, "seqlen_k": (20, 3, 9, 16, 0) * 8},
    "long": {"seqlen_q": CHAIN_ROWS + 300, "seqlen_k": 40, "head_dim": 32, "head_dim_v": 32},
    "element by element": {"seqlen_q": 3, "seqlen_k": 90, "layouts": ("strided", "padded", "offset", "padded")},
    "scores by halves": {"seqlen_q": 150, "seqlen_k": 100, "num_heads_q": 2, "causal": True, **WIDE},
    "warps without scores": {"seqlen_q": 100, "seqlen_k": 40, "head_dim": 192, "head_dim_v": 192, "dtype": "float32"},
    "no keys": {"batch": 2, "seqlen_q": 70, "seqlen_k": 0, "sinks": True},
    "no queries": {"batch": 2, "seqlen_q": 0, "seqlen_k": 70},
    "no heads": {"batch": 2, "seqlen_q": (100, 50), "seqlen_k": (70, 80), "num_heads_q": 0, "num_heads_k": 0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_problems_with_kernels_of_their_own(name: str) -> None:
    backward(Call(case=Case(**SHORT | OTHERS[name])), 1)


@pytest.mark.parametrize(("arch", "head_dim"), [(86, 96), (100, 128), (100, 256)])
def test_tiles_of_other_gpus(arch: int, head_dim: int) -> None:
    """Those of less shared memory, and those of GPUs that have stmatrix."""
    case = Case(seqlen_q=70, seqlen_k=140, head_dim=head_dim, head_dim_v=head_dim, dtype="float16", causal=True)
    assert "attention_backward_sm80" in backward(Call(case=case), arch=arch).entries


HOPPER: dict[str, dict[str, Any]] = {
    "long": {"seqlen_q": CHAIN_ROWS + 300, "seqlen_k": 140},
    "long and packed": {"batch": 2, "seqlen_q": (CHAIN_ROWS + 300, 100), "seqlen_k": (40, 300)},
    "rows that see no key": {"seqlen_q": 300, "seqlen_k": 150, "causal": True},
    "keys that no row sees": {"seqlen_q": 40, "seqlen_k": 700, "window_size": (20, 0), "num_heads_q": 4},
    "wide and packed": {
        "batch": 3,
        "seqlen_q": (150, 0, 280),
        "seqlen_k": (300, 40, 130),
        "head_dim": 192,
        "head_dim_v": 160,
    },
    "no keys": {"batch": 2, "seqlen_q": 70, "seqlen_k": 0, "sinks": True},
}


@pytest.mark.parametrize("name", HOPPER)
def test_problems_on_hopper(name: str) -> None:
    case = Case(**SHORT | HOPPER[name])
    ran = backward(Call(case=case), 1, arch=90, num_sms=2)
    assert case.seqlen_k == 0 or any(entry.endswith("sm90") for entry in ran.entries)
