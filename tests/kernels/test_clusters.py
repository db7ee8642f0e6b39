"""Kernels whose thread blocks form clusters: which calls they serve, how these are divided, and what is launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import plans
import pytest
from cuda.bindings import driver as bindings
from hypothesis import given
from hypothesis import strategies as st
from sampling import paired

from cufa._call.options import Options
from cufa._call.problem import CLUSTER_BYTES, CLUSTER_ITEMS, CLUSTER_SHARE, CLUSTERS_THAT_FILL, clusters_pay
from cufa._compile import jit as _jit
from cufa._driver import driver as _driver
from cufa._driver import launch as _launch
from cufa._driver.driver import Device
from cufa._driver.launch import Shape
from cufa._kernels import Plan, choose
from cufa._kernels.forward_cluster_sm90 import cluster_of
from cufa._kernels.kernel import reciprocal_of, small_reciprocal
from cufa._operations.call import Planned, planned_for
from cufa._operations.forward import ATTENTION, FORWARD
from cufa._operations.kvcache import KVCACHE
from cufa._operations.sketch import sketch

H200 = Device(90, 132)


def decode(batch: int, keys: int, heads: tuple[int, int] = (32, 8), device: Device = H200) -> Planned:
    cache = (batch, keys, heads[1], 128)
    shapes = {"q": (batch, 1, heads[0], 128), "k": cache, "v": cache}
    return planned_for(sketch(ATTENTION, shapes, "bfloat16", Options(False, None, None, 0.0, False, False)), device)


@pytest.mark.parametrize(
    ("batch", "keys", "cluster"),
    [
        (1, 1024, 8),
        (1, 8192, 16),
        (2, 8192, 16),
        (4, 8192, 8),
        (8, 8192, 4),
        (16, 4096, 2),
        (1, 200, 1),
        (1, 40000, 16),
    ],
)
def test_clusters_fill_the_gpu_and_every_warp_has_keys(batch: int, keys: int, cluster: int) -> None:
    planned = decode(batch, keys)
    assert planned.plan.name == "attention_forward_cluster_sm90"
    assert planned.grid.blocks == (8 * batch * cluster,)
    assert planned.plan.kernel.clusters(planned.plan.config, planned.grid) == (cluster,)
    assert planned.floats == 0, "no memory beside, and one launch"


@pytest.mark.parametrize(
    ("batch", "keys", "heads"),
    [
        (64, 4096, (32, 8)),
        (17, 1024, (8, 8)),
        (1, 1 << 17, (8, 1)),
        (1, 1 << 17, (32, 8)),
        (8, 1 << 15, (32, 8)),
        (16, 1 << 13, (32, 8)),
    ],
)
def test_larger_calls_are_shared_by_all_sms(batch: int, keys: int, heads: tuple[int, int]) -> None:
    plan = decode(batch, keys, heads).plan
    assert plan.name == "attention_forward_split_sm80"
    assert "so few tiles of q" in dict(plan.refusals)["attention_forward_cluster_sm90"]


def test_other_gpus() -> None:
    assert decode(1, 1024, device=Device(80, 108)).plan.name == "attention_forward_split_sm80"
    assert decode(1, 2048, device=Device(100, 148)).grid.cluster == 16
    assert decode(1, 1024, device=Device(120, 170)).grid.cluster == 8
    assert decode(1, 1024, device=Device(90, 1)).grid.cluster == 1


@given(st.integers(1, 2 * CLUSTER_ITEMS), st.integers(0, 20 * CLUSTER_SHARE))
def test_what_pays(items: int, item_bytes: int) -> None:
    config: Any = SimpleNamespace(max_cluster=16, resident=2, num_threads=128, block_m=16, column_warps=1)
    share = item_bytes / cluster_of(config, items, 1 << 20, 128)
    filled = items >= CLUSTERS_THAT_FILL
    pays = items <= CLUSTER_ITEMS and (share <= CLUSTER_SHARE if filled else item_bytes <= CLUSTER_BYTES)
    assert clusters_pay(items, item_bytes) == pays
    assert not clusters_pay(0, item_bytes)


@given(st.integers(1, CLUSTER_ITEMS), st.integers(0, 1 << 20), st.integers(1, 200))
def test_the_size_of_clusters(items: int, item_blocks: int, num_sms: int) -> None:
    config: Any = SimpleNamespace(max_cluster=16, resident=2, num_threads=128, block_m=16, column_warps=1)
    size = cluster_of(config, items, item_blocks, num_sms)
    assert size in (1, 2, 4, 8, 16)
    assert size == 1 or (items * size <= 2 * num_sms and item_blocks >= 8 * size)
    assert size == 16 or items * 2 * size > 2 * num_sms or item_blocks < 16 * size


def test_small_divisors() -> None:
    """As ``SmallDivisor`` computes."""
    x, number = np.arange(1024), np.arange(1, 1025)[:, None]
    reciprocal = np.array([[small_reciprocal(each)] for each in range(1, 1025)])
    product = x * reciprocal
    assert product.max() < 1 << 32
    np.testing.assert_array_equal(product >> 20, x // number)


@given(st.integers(1, (1 << 31) - 1), st.integers(0, (1 << 31) - 1))
def test_divisors(number: int, x: int) -> None:
    """As ``Divisor`` computes, with unsigned numbers of 32 bits."""
    shift, reciprocal = reciprocal_of(number)
    assert reciprocal < 1 << 32
    for each in (x, x // number * number, max(0, x // number * number - 1)):
        assert (2 * each * reciprocal >> 32) >> shift == each // number


CACHES = {
    "contiguous": {},
    "paged": {"page_rows": 16, "slots": True},
    "appended": {"page_rows": 1, "slots": True, "rotary": "halves", "appends": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "page_rows": 64},
}


def compiled(plan: Plan) -> None:
    resources = _jit.resources_of(plans.compile_plan(plan).log)
    assert resources.spill_bytes == 0
    assert resources.registers * plan.config.num_threads * plan.config.resident <= 1 << 16


TILES = (64, 16), (128, 16), (128, 64), (256, 16)
"""head_dim and rows."""


@pytest.mark.parametrize(
    ("tile", "kind"), paired(TILES, [("plain", 90), ("plain", 120), ("window", 120), ("window", 90)]), ids=str
)
def test_nothing_spills(tile: tuple[int, int], kind: tuple[str, int]) -> None:
    (head_dim, few_rows), (features, arch) = tile, kind
    facts = plans.static("bf16", head_dim, head_dim, **plans.FEATURES[features], few_rows=few_rows, clusters=True)
    plan = choose(FORWARD, facts, arch)
    assert plan.name == "attention_forward_cluster_sm90"
    compiled(plan)


@pytest.mark.parametrize(("name", "head_dim"), paired(CACHES, [64, 128]))
def test_nothing_spills_over_caches(name: str, head_dim: int) -> None:
    facts = plans.static("bf16", head_dim, head_dim, **CACHES[name], few_rows=16, clusters=True)
    plan = choose(KVCACHE, facts, 90)
    assert plan.name == "attention_forward_cluster_cache_sm90"
    compiled(plan)


def test_what_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_driver, "driver", lambda: bindings)
    ids = bindings.CUlaunchAttributeID
    cluster, policy, overlap = (
        ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE,
        ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    )
    for shape, overlaps, told in (
        (Shape(32, 128, 1024, 16), False, [cluster, policy]),
        (Shape(32, 128, 1024, 16), True, [overlap, cluster, policy]),
        (Shape(32, 128, 1024), True, [overlap]),
        (Shape(32, 128, 1024), False, []),
    ):
        config = _launch._config(shape, 0, overlaps)
        assert config.numAttrs == len(told) and [each.id for each in config.attrs] == told
        for each in config.attrs:
            if each.id == cluster:
                extents = each.value.clusterDim
                assert (extents.x, extents.y, extents.z) == (16, 1, 1)
            elif each.id == policy:
                balanced = bindings.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING
                assert each.value.clusterSchedulingPolicyPreference == balanced
            else:
                assert each.value.programmaticStreamSerializationAllowed == 1
