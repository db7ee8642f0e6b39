"""The forward over caches for few query rows of few sequences: a cluster of thread blocks shares the keys of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .._call.kvcache import KVCacheProblem
from .._call.problem import Problem, Static
from ..errors import UnsupportedError
from .forward_cache_sm80 import (
    CacheGrid,
    CachePlan,
    ConfigCacheSm80,
    ForwardCacheSm80,
    PlanGrid,
    cache_members,
    rotated,
    scratch_of,
    tokens_of,
    with_tile,
)
from .forward_cluster_sm90 import RESIDENT, ConfigClusterSm90, cluster_members, cluster_of, cluster_step, exchange_bytes
from .forward_split_sm80 import seen_blocks, tile_of
from .kernel import MAX_GRID, Scratch, Step, known_arch

APPENDING = "attention_cluster_cache_append"


@dataclass(frozen=True, kw_only=True)
class ConfigClusterCacheSm90(ConfigCacheSm80, ConfigClusterSm90):
    """What ``cuda_src/attention/forward_cluster_cache_sm90.cuh`` needs besides."""


class ForwardClusterCacheSm90(ForwardCacheSm80):
    """The forward over caches of few query rows of few sequences."""

    name = "attention_forward_cluster_cache_sm90"
    special = True

    def runs_on(self, arch: int) -> bool:
        return arch >= 90

    def refusal(self, static: Static) -> str:
        if static.clusters:
            return ""
        return (
            "it is for so few tiles of q that a GPU holds a cluster for each, where q is not packed and num_splits "
            "does not say how keys are divided"
        )

    def reason(self, static: Static, arch: int) -> str:
        return "tiles of q are so few that the thread blocks of a cluster share the keys of each"

    def config(self, static: Static, arch: int) -> ConfigClusterCacheSm90:
        static = with_tile(static)
        tile = tile_of(static, known_arch(arch), exchange_bytes(static), RESIDENT)
        return ConfigClusterCacheSm90(**cache_members(static, tile), **cluster_members(static, arch))

    def steps(self, config: ConfigCacheSm80) -> tuple[Step, ...]:
        assert isinstance(config, ConfigClusterCacheSm90)
        return (Step(APPENDING, config.prepare_threads), cluster_step(self.name, config))

    def grid(self, config: ConfigCacheSm80, problem: Problem, num_sms: int) -> CacheGrid:
        assert isinstance(problem, KVCacheProblem) and isinstance(config, ConfigClusterCacheSm90)
        tokens = tokens_of(problem)
        if tokens > MAX_GRID:
            raise UnsupportedError(
                f"{problem.function}: {tokens} new rows are more than one launch appends ({MAX_GRID}); append fewer."
            )
        m_blocks = -(-problem.seqlen_q * (problem.num_heads_q // problem.num_heads_k) // config.block_m)
        items = problem.batch * m_blocks * problem.num_heads_k
        cluster = cluster_of(config, items, seen_blocks(problem, config.block_n), num_sms)
        return CacheGrid(tokens, items * cluster, 0, False, cluster=cluster)

    def clusters(self, config: Any, grid: CacheGrid) -> tuple[int, ...]:
        return (1, grid.cluster)

    def scratch(self, config: ConfigCacheSm80, problem: Problem, grid: CacheGrid) -> Scratch:
        assert isinstance(problem, KVCacheProblem)
        return scratch_of(rotated(problem))


class ClusterCachePlan(CachePlan):
    """The plan of such calls, which has no memory and takes no launch, since they need none."""

    special = True

    def runs_on(self, arch: int) -> bool:
        return ForwardClusterCacheSm90().runs_on(arch)

    def refusal(self, static: Static) -> str:
        return "" if static.clusters else "it is for calls that clusters of thread blocks serve, which need no plan"

    def reason(self, static: Static, arch: int) -> str:
        return "clusters of thread blocks serve such calls, which need no plan, so that nothing is launched"

    def grid(self, config: ConfigCacheSm80, problem: Problem, num_sms: int) -> PlanGrid:
        return PlanGrid(0, 0, 0, False)
