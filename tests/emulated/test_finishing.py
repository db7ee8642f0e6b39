"""dq that Hopper's one-pass kernel writes while it works on other heads, or under windows on other parts of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gradients import Call

import emulated
from cufa._kernels import backward as kernels
from cufa._kernels import backward_sm90, choose
from cufa.testing import Case
from emulated.cases import backward

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

DENSE: dict[str, dict[str, Any]] = {
    "128 rows": {"seqlen_q": 730, "seqlen_k": 190, "head_dim": 40, "num_heads_q": 3},
    "64 rows": {"seqlen_q": 970, "seqlen_k": 110, "head_dim": 72, "num_heads_q": 3},  # heads of 16 tiles
    "few of 64 rows": {"seqlen_q": 270, "seqlen_k": 140, "head_dim": 72, "num_heads_q": 3},  # they are left to the end
    "rows that see no key": {"seqlen_q": 610, "seqlen_k": 270, "head_dim": 48, "causal": True, "num_heads_q": 3},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "equal": {"seqlen_q": 540, "seqlen_k": 540, "window_size": (200, 0), "num_heads_q": 4, "num_heads_k": 2},
    "more keys": {"seqlen_q": 310, "seqlen_k": 533, "window_size": (77, 30)},
    "few queries": {"seqlen_q": 90, "seqlen_k": 970, "window_size": (3, 0), "num_heads_q": 1},  # more counts than tiles
    "rows that see no key": {"seqlen_q": 610, "seqlen_k": 310, "window_size": (100, 0)},
    "terms": {"seqlen_q": 390, "seqlen_k": 390, "window_size": (140, 7), "alibi_ndim": 1, "sinks": True},
}


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of so few blocks that small heads have several."""
    monkeypatch.setattr(backward_sm90, "PART_BLOCKS", 2)
    choose.cache_clear()
    yield
    choose.cache_clear()


def finishes(sizes: dict[str, Any]) -> None:
    """By one thread block, which comes to its last head late, and by several, which wait for each other."""
    case = Case(**{"num_heads_q": 2, "num_heads_k": 1, **sizes}, head_dim_v=sizes["head_dim"], dtype="bfloat16")
    for order, num_sms in enumerate((1, 3)):
        ran = backward(Call(case=case), order, arch=90, num_sms=num_sms)
        assert "attention_backward_sm90" in ran.entries and not ran.repaired


@pytest.mark.parametrize("name", DENSE)
def test_heads_that_are_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SECTION", 1)  # one head after the other
    finishes({"num_heads_k": 3, **DENSE[name]})


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.usefixtures("short_parts")
def test_parts_that_are_done(name: str) -> None:
    finishes({"head_dim": 64, **WINDOWS[name]})
