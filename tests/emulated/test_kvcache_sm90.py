"""Attention over caches on Hopper where queries are many, run on the CPU and held to the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import places
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples, sampled

import cufa
import emulated
from cufa.testing import KVCacheCase, assert_kvcache_close
from emulated.cases import ALIGNED, ORDERS
from emulated.gpu import Gpu
from emulated.test_kvcache import PLANNED, attend, cases

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

APPENDING, COMPUTING = "attention_cache_append", "attention_forward_cache_sm90"
MAPPED = ALIGNED[:-1]


@pytest.fixture(scope="module")
def few_fill_tiles() -> Iterator[None]:
    with places.few_fill_tiles():
        yield


KINDS = {
    "float16": cases("float16", 64, MAPPED),
    "bfloat16": cases("bfloat16", 128, MAPPED, causal=True),
    "window": cases("float16", 40, MAPPED, window_size=(30, 2)),
    "terms": cases("float16", 32, MAPPED, softcap=5.0, alibi_ndim=2, sinks=True, causal=True),
    "wide": cases("bfloat16", 256, MAPPED, causal=True),
}


@pytest.mark.usefixtures("few_fill_tiles")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(3, 8))
@given(data=st.data())
def test_caches_equal_reference(kind: str, data: st.DataObject) -> None:
    case = data.draw(KINDS[kind])
    ran = attend(case, data.draw(ORDERS), arch=90, num_sms=data.draw(st.sampled_from((1, 3, 8))))
    pages_fit = case.page_size % 8 == 0 and not (case.page_size and case.leftpad is not None)
    serves = pages_fit and (case.num_splits == 0 or (case.num_splits == 1 and isinstance(case.seqlen_q, int)))
    assert "attention_forward_cache_sm80" not in ran.entries or not serves


MANY: dict[str, Any] = {"batch": 2, "seqlen_q": 130, "seqlen_new": 130, "lengths": (200, 7), "capacity": 400}
MANY |= {"num_heads_q": 16, "num_heads_k": 2, "head_dim": 64, "head_dim_v": 64, "dtype": "float16", "causal": True}
MANY |= {"return_lse": True, "rotary_dim": 32}
PAGES = {"page_size": 16}

PROBLEMS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "first keys that are none": {"leftpad": (77, 0), "use_cache_batch_idx": True},
    "pages of 8": {"page_size": 8},
    "pages of 48": {"page_size": 48, "rotary_dim": 0},
    "pages longer than blocks": {"page_size": 192},
    "heads that share tiles": {"seqlen_q": 40, "seqlen_new": 3, "num_heads_q": 64, "num_heads_k": 8, **PAGES},
    "rows that see no key": {"lengths": (3, 0), "seqlen_new": 20, "rotary_dim": 0, **PAGES},
    "packed": {"seqlen_q": (300, 0), **PAGES},
    "packed, with sinks": {"batch": 4, "seqlen_q": (1, 200, 0, 190), "lengths": (9, 100, 50, 0), "sinks": True},
}


@pytest.mark.parametrize("name", sampled(PROBLEMS))
def test_many_queries_have_large_tiles(name: str) -> None:
    case = KVCacheCase(**MANY | PROBLEMS[name])
    ran = attend(case, arch=90, num_sms=3)
    assert ran.entries == [APPENDING, COMPUTING]
    assert attend(case, 1, arch=90, num_sms=40).bits == ran.bits


def test_nothing_is_appended() -> None:
    case = KVCacheCase(**MANY | {"seqlen_new": None, "rotary_dim": 0, "causal": False}, page_size=16)
    assert attend(case, arch=90, num_sms=3).entries == [APPENDING, COMPUTING]


def test_plans_change_nothing() -> None:
    """Of a call with a plan, whose tiles need none, and of one without."""
    case = KVCacheCase(**MANY, page_size=16)
    expected = attend(case, arch=90, num_sms=3)
    with Gpu(arch=90, num_sms=3) as gpu:
        arrays = case.arrays(gpu)
        plan = cufa.decode_plan(**{name: arrays[name] for name in PLANNED if name in arrays}, causal=True)
        out = cufa.attention_with_kvcache(**arrays, **case.options, plan=plan).numpy()
    assert np.array_equal(out, expected.results[0])


@pytest.mark.parametrize("changed", sampled([{}, PAGES, {"seqlen_q": (300, 40)}], 1), ids=str)
def test_rows_before_infinite_values_are_repaired(changed: dict[str, Any]) -> None:
    """Each block finds the tiles that it took once more."""
    case = KVCacheCase(**MANY | changed)
    arrays = case.arrays()
    arrays["v"][..., 100, 0, :] = np.inf
    with Gpu(arch=90, num_sms=5) as gpu:
        placed = gpu.arrays(arrays)
        out = cufa.attention_with_kvcache(**placed, **case.options).numpy()
        caches = placed["k_cache"].numpy(), placed["v_cache"].numpy()
        assert [launched.function.entry for launched in gpu.launches] == [APPENDING, COMPUTING]
    assert np.isfinite(out).any() and not np.isfinite(out).all()
    assert_kvcache_close(out, caches=caches, **arrays, **case.options)
