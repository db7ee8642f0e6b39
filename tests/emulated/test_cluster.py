"""The kernels whose thread blocks form clusters, run on the CPU and held to the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples

import cufa
import emulated
from cufa._call.problem import CHAIN_ROWS
from cufa.testing import Case, KVCacheCase, assert_close, assert_kvcache_close
from emulated.cases import MASKS, ORDERS, Kind, features, forward
from emulated.test_kvcache import KINDS as CACHES
from emulated.test_kvcache import LONG, PLANNED, attend

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

SMS = st.sampled_from((1, 3, 20, 132))

KINDS = (
    Kind("float16", 64, 64),
    Kind("bfloat16", 128, 72, "causal", sinks=True),
    Kind("float32", 40, 57, "window", softcap=True, alibi=2, sinks=True),
    Kind("bfloat16", 31, 65, layouts="narrow"),
)


@st.composite
def few_rows(draw: st.DrawFn, kind: Kind) -> Case:
    """Of 16 rows at most and many more keys, of which some blocks of a cluster may have none."""
    seqlen_q, (heads_q, heads_k) = draw(st.sampled_from(((1, (1, 1)), (2, (6, 2)), (5, (3, 1)), (1, (16, 1)))))
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": draw(st.sampled_from((130, 257, 400, 1100)))}
    heads = {"num_heads_q": heads_q, "num_heads_k": heads_k}
    return Case(**features(draw, kind) | lengths | heads, batch=draw(st.integers(1, 3)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=examples(5, 10))
@given(data=st.data())
def test_few_rows_equal_reference(kind: Kind, data: st.DataObject) -> None:
    ran = forward(data.draw(few_rows(kind)), data.draw(ORDERS), arch=90, num_sms=data.draw(SMS))
    assert ran.entries == ["attention_forward_cluster_sm90"]


SIXTY_FOUR: dict[str, Any] = {"head_dim": 64, "head_dim_v": 64, "dtype": "float16", "return_lse": True}
EMPTY: dict[str, Any] = {"dtype": "float16", "head_dim": 1, "head_dim_v": 1, "num_heads_q": 1, "num_heads_k": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "32 rows": {"seqlen_q": 8, "seqlen_k": 700, "num_heads_q": 4, "num_heads_k": 1, **MASKS["causal"][0]},
    "64 rows": {"seqlen_q": 50, "seqlen_k": 600, "num_heads_q": 1, "num_heads_k": 1, "sinks": True},
    "long": {"seqlen_q": 1, "seqlen_k": CHAIN_ROWS + 500, "dtype": "float32", "head_dim": 24, "head_dim_v": 32},
    "wide": {"seqlen_q": 3, "seqlen_k": 400, "head_dim": 256, "head_dim_v": 192},
    "not a number": {"seqlen_q": 2, "seqlen_k": 300, "num_heads_q": 2, "num_heads_k": 1, "values": "huge"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_bits_are_the_same_in_any_order(name: str) -> None:
    case = Case(**SIXTY_FOUR | OTHERS[name])
    ran = forward(case, arch=90, num_sms=132)
    assert ran.entries == ["attention_forward_cluster_sm90"]
    for order in (1, 2):
        assert forward(case, order, arch=90, num_sms=132).bits == ran.bits


def test_blocks_that_are_alone_need_no_cluster() -> None:
    case = Case(**SIXTY_FOUR | {"seqlen_q": 1, "seqlen_k": 600, "num_heads_q": 10, "num_heads_k": 2})
    with emulated.Gpu(arch=90, num_sms=1, order=1) as gpu:
        arrays = case.arrays(gpu)
        out, lse = cufa.attention(**arrays, **case.options, return_lse=True)
        assert_close(out.numpy(), lse=lse.numpy(), **case.arrays(), **case.options)
        assert [(each.blocks, each.cluster) for each in gpu.launches] == [(2, 1)]


def test_caches_without_room() -> None:
    case = KVCacheCase(**EMPTY, lengths=(0,), capacity=0, return_lse=True)
    assert attend(case, arch=90, num_sms=132).entries == ["attention_forward_cluster_cache_sm90"]


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=examples(2, 12))
@given(data=st.data())
def test_caches_equal_reference(kind: str, data: st.DataObject) -> None:
    case = dataclasses.replace(data.draw(CACHES[kind]), num_splits=0)
    attend(case, data.draw(ORDERS), arch=90, num_sms=data.draw(SMS))


@pytest.mark.parametrize("page_size", [0, 5, 32])
def test_a_step_of_decoding_is_one_launch_without_new_rows(page_size: int) -> None:
    case = KVCacheCase(**LONG | {"page_size": page_size, "seqlen_new": 0, "rotary_dim": 0})
    ran = attend(case, arch=90, num_sms=132)
    assert ran.entries == ["attention_forward_cluster_cache_sm90"]
    for order in (1, 2):
        assert attend(case, order, arch=90, num_sms=132).bits == ran.bits


def test_new_rows_are_appended_first() -> None:
    ran = attend(KVCacheCase(**LONG), 1, arch=90, num_sms=132)
    assert ran.entries == ["attention_cluster_cache_append", "attention_forward_cluster_cache_sm90"]


def test_parts_that_are_given_are_kept() -> None:
    ran = attend(KVCacheCase(**LONG, num_splits=3), arch=90, num_sms=132)
    assert ran.entries[-1] == "attention_forward_cache_sm80"


@pytest.mark.parametrize("batch", [3, 1])
def test_plans_of_few_tiles_are_empty(batch: int) -> None:
    """They take no launch, calls with them are those without, and lengths count as they are at each call."""
    case = KVCacheCase(**LONG | {"batch": batch, "lengths": LONG["lengths"][:batch]})
    expected = attend(case, arch=90, num_sms=132)
    with emulated.Gpu(arch=90, num_sms=132) as gpu:
        arrays = case.arrays(gpu)
        plan = cufa.decode_plan(**{name: arrays[name] for name in PLANNED if name in arrays})
        assert plan.memory.shape == (0,) and not gpu.launches
        out, lse = cufa.attention_with_kvcache(**arrays, **case.options, plan=plan, return_lse=True)
        bits = [out.numpy().tobytes(), lse.numpy().tobytes(), *(arrays[f"{x}_cache"].numpy().tobytes() for x in "kv")]
        assert bits == [each.tobytes() for each in expected.results]
        assert [each.function.entry for each in gpu.launches] == expected.entries
        seqlens = arrays["cache_seqlens"]
        other = dataclasses.replace(case, lengths=(20, 399, 0)[:batch])
        gpu.memory.view(seqlens.address, seqlens.shape, seqlens.strides, np.int32)[...] = other.lengths
        given = {**other.arrays(gpu), "cache_seqlens": seqlens}
        out = cufa.attention_with_kvcache(**given, **case.options, plan=plan).numpy()
        caches = given["k_cache"].numpy(), given["v_cache"].numpy()
        assert_kvcache_close(out, caches=caches, **other.arrays(), **case.options)
        launched = len(gpu.launches)
        plan.update()
        assert len(gpu.launches) == launched
