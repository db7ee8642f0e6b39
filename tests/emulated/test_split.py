"""The forward of few query rows, whose keys thread blocks share, run on the CPU and held to the reference."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import examples

import emulated
from cufa._call.problem import CHAIN_ROWS
from cufa._kernels import forward_split_sm80
from cufa.testing import VALUES, Case
from emulated.cases import ORDERS, Kind, features, forward

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

CLEARING, MAIN, MERGING = (f"attention_forward_split_{each}" for each in ("clear", "sm80", "merge"))


@pytest.fixture(autouse=True)
def few_keys_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that problems may be small. No other test has GPUs of as many SMs, whose problems would remember a grid."""
    monkeypatch.setattr(forward_split_sm80, "WHOLE_BYTES", 1 << 10)
    monkeypatch.setattr(forward_split_sm80, "LEAST_BYTES", 1 << 10)


SMS = st.sampled_from((1, 2, 5, 11))
FEW: tuple[tuple[Kind, int, tuple[tuple[int, int, int], ...]], ...] = (
    (Kind("float16", 64, 64), 16, ((1, 1, 1), (1, 2, 2), (1, 6, 2), (3, 5, 1), (16, 2, 2))),
    (Kind("bfloat16", 128, 64, "causal", alibi=2, sinks=True), 32, ((3, 16, 2), (32, 1, 1), (7, 3, 1), (20, 2, 2))),
    (Kind("float32", 40, 57, "window", softcap=True, alibi=1, sinks=True), 64, ((9, 5, 1), (64, 1, 1), (12, 8, 2))),
    (Kind("bfloat16", 31, 65, "causal", layouts="narrow"), 16, ((2, 6, 2), (5, 1, 1))),
    (Kind("float16", 32, 256, "window"), 64, ((40, 1, 1), (3, 12, 1))),
    (Kind("float32", 200, 256, "causal"), 16, ((2, 7, 1), (1, 2, 2), (4, 4, 4))),
    (Kind("float32", 64, 256, softcap=True, sinks=True), 32, ((2, 14, 1), (17, 1, 1))),
)


@st.composite
def few(draw: st.DrawFn, kind: Kind, rows: tuple[tuple[int, int, int], ...]) -> Case:
    """Of `rows`: (seqlen_q, num_heads_q, num_heads_k)."""
    seqlen_q, *heads = draw(st.sampled_from(rows))
    least = max(65, 8 * seqlen_q * heads[0] // heads[1])
    length = draw(st.sampled_from((0, 1, 63, 64, 111, 300)))
    drawn = features(draw, kind, VALUES) | {"num_heads_q": heads[0], "num_heads_k": heads[1]}
    return Case(batch=draw(st.integers(1, 3)), seqlen_q=seqlen_q, seqlen_k=least + length, **drawn)


@pytest.mark.parametrize(("kind", "few_rows", "rows"), FEW, ids=str)
@settings(max_examples=examples(4, 8))
@given(data=st.data())
def test_few_rows_equal_the_reference(
    kind: Kind, few_rows: int, rows: tuple[tuple[int, int, int], ...], data: st.DataObject
) -> None:
    case = data.draw(few(kind, rows))
    assert few_rows // 2 < case.seqlen_q * case.num_heads_q // case.num_heads_k <= few_rows or few_rows == 16
    assert forward(case, data.draw(ORDERS), num_sms=data.draw(SMS)).entries.count(MAIN) == 1


TOGETHER: dict[str, Any] = {"num_heads_q": 6, "num_heads_k": 2, "head_dim": 64, "head_dim_v": 64, "return_lse": True}


@pytest.mark.parametrize("num_sms", [2, 5])
def test_bits_do_not_depend_on_the_order_of_blocks(num_sms: int) -> None:
    case = Case(batch=3, seqlen_q=1, seqlen_k=700, dtype="float16", values="large rows", **TOGETHER)
    ran = [forward(case, order, num_sms=num_sms) for order in (None, 1, 2, 3, 4, 5)]
    assert ran[0].entries == [CLEARING, MAIN]
    assert len({each.bits for each in ran}) == 1


def test_what_no_block_shares_takes_one_launch() -> None:
    case = Case(batch=2, seqlen_q=1, seqlen_k=65, dtype="float16", **TOGETHER)
    assert forward(case, num_sms=1).entries == [MAIN]


def test_many_parts_of_one_row() -> None:
    """More than a warp has lanes."""
    case = Case(batch=1, seqlen_q=1, seqlen_k=3000, dtype="float16", **TOGETHER | {"num_heads_k": 1})
    assert forward(case, 1, num_sms=47).entries == [CLEARING, MAIN]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_long_sums_are_taken_over(dtype: str) -> None:
    """A block's warps have a chain each, and one more, of their own."""
    keys = 4 * CHAIN_ROWS + 8 * 300
    case = Case(batch=1, seqlen_q=1, seqlen_k=keys, dtype=dtype, **TOGETHER | {"num_heads_q": 2, "num_heads_k": 1})
    assert forward(case, num_sms=1).entries.count(MAIN) == 1


SEVERAL: tuple[tuple[Kind, tuple[tuple[int, int, int], ...]], ...] = (
    (Kind("float16", 64, 64), ((17, 8, 2), (65, 1, 1), (4, 24, 1))),
    (Kind("bfloat16", 32, 64, "causal", alibi=2, sinks=True), ((70, 2, 2), (50, 3, 1), (13, 20, 2))),
    (Kind("float32", 40, 57, "window", softcap=True, alibi=1), ((129, 1, 1), (20, 7, 1))),
)


@st.composite
def several(draw: st.DrawFn, kind: Kind, rows: tuple[tuple[int, int, int], ...]) -> Case:
    """Of `rows` as above, which are more than one tile."""
    seqlen_q, *heads = draw(st.sampled_from(rows))
    drawn = features(draw, kind, VALUES) | {"num_heads_q": heads[0], "num_heads_k": heads[1]}
    seqlen_k = max(65, 4 * seqlen_q) + draw(st.sampled_from((0, 1, 63, 64, 111)))
    return Case(batch=draw(st.integers(1, 2)), seqlen_q=seqlen_q, seqlen_k=seqlen_k, **drawn)


@pytest.fixture
def no_keys_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tiles that are several. Problems of these lengths are no other test's."""
    monkeypatch.setattr("cufa._call.problem.MANY_KEYS", 1)


@pytest.mark.usefixtures("no_keys_are_few")
@pytest.mark.parametrize(("kind", "rows"), SEVERAL, ids=str)
@settings(max_examples=examples(4, 8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_tiles_equal_the_reference(
    kind: Kind, rows: tuple[tuple[int, int, int], ...], data: st.DataObject
) -> None:
    case = data.draw(several(kind, rows))
    assert forward(case, data.draw(ORDERS), num_sms=data.draw(SMS)).entries.count(MAIN) == 1


@pytest.mark.usefixtures("no_keys_are_few")
@pytest.mark.parametrize("num_sms", [3, 5])
def test_bits_of_several_tiles_do_not_depend_on_the_order_of_blocks(num_sms: int) -> None:
    case = Case(batch=1, seqlen_q=23, seqlen_k=531, causal=True, dtype="float16", **TOGETHER | {"num_heads_q": 8})
    ran = [forward(case, order, num_sms=num_sms) for order in (None, 1, 2, 3)]
    assert ran[0].entries == [MAIN, MERGING]
    assert len({each.bits for each in ran}) == 1
