"""The forward for few query rows of few sequences: the thread blocks of a cluster share the keys of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.problem import MAX_CLUSTER, Problem, Static
from .forward_split_sm80 import ConfigSplitSm80, ForwardSplitSm80, members, seen_blocks, tile_of
from .kernel import NO_SCRATCH, PORTABLE_CLUSTER, Scratch, Step, known_arch, round_up, small_reciprocal
from .params import params_of

LARGE_CLUSTERS = (9, 10)
"""Major compute capabilities whose clusters have up to `MAX_CLUSTER` thread blocks; others' have `PORTABLE_CLUSTER`."""

RESIDENT = 2
"""Thread blocks that an SM is to hold at a time. With one, rings are longer, but a cluster of 16 needs a GPC of 16 SMs
to itself."""

ARRIVES_FIRST = False
"""Whether thread blocks come to the cluster's barrier before they ask for the first keys, rather than then."""

LEAST_BLOCKS = 2
"""Blocks of keys for each warp that are worth twice as many thread blocks."""


@dataclass(frozen=True, kw_only=True)
class ConfigClusterSm90(ConfigSplitSm80):
    """What ``cuda_src/attention/forward_cluster_sm90.cuh`` needs besides.

    Attributes
    ----------
    max_cluster : int
        Thread blocks of the largest cluster.
    exchange_bytes : int
        Shared memory behind that of the tiles, where a thread block is sent parts of rows.
    arrives_first : bool
        Whether thread blocks come to the cluster's barrier before they ask for keys.
    """

    max_cluster: int
    exchange_bytes: int
    arrives_first: bool


class ClusterGrid(NamedTuple):
    """Shape of a launch.

    Attributes
    ----------
    items : int
        Tiles of queries, of all key heads.
    cluster : int
        Thread blocks that share a tile.
    """

    items: int
    cluster: int

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.items * self.cluster,)


class ForwardClusterSm90(ForwardSplitSm80):
    """The forward of few query rows of few sequences."""

    name = "attention_forward_cluster_sm90"
    record = "ClusterParams"
    few = "q has few rows, in so few tiles that the thread blocks of a cluster share the keys of each"

    def runs_on(self, arch: int) -> bool:
        return arch >= 90

    def refusal(self, static: Static) -> str:
        if why := super().refusal(static):
            return why
        return "" if static.clusters else "it is for so few tiles of q that a GPU holds a cluster for each"

    def config(self, static: Static, arch: int) -> ConfigClusterSm90:
        tile = tile_of(static, known_arch(arch), exchange_bytes(static), RESIDENT)
        return ConfigClusterSm90(**members(static, tile), **cluster_members(static, arch))

    def steps(self, config: ConfigSplitSm80) -> tuple[Step, ...]:
        assert isinstance(config, ConfigClusterSm90)
        return (cluster_step(self.name, config),)

    def grid(self, config: ConfigSplitSm80, problem: Problem, num_sms: int) -> Any:
        assert isinstance(config, ConfigClusterSm90)
        items = problem.batch * problem.num_heads_k  # `few_rows` hold all that a key head has
        return ClusterGrid(items, cluster_of(config, items, seen_blocks(problem, config.block_n), num_sms))

    def clusters(self, config: Any, grid: ClusterGrid) -> tuple[int, ...]:
        return (grid.cluster,)

    def values(self, config: Any, problem: Problem, grid: Any) -> dict[str, Any]:
        params = params_of(problem, m_blocks=1, heads_per_section=1)
        heads = problem.num_heads_k
        return {"params": params, "num_heads_k": heads, "heads_reciprocal": small_reciprocal(heads)}

    def scratch(self, config: Any, problem: Problem, grid: Any) -> Scratch:
        return NO_SCRATCH


def exchange_bytes(static: Static) -> int:
    """``sizeof(Received)`` in cuda_src/attention/cluster_merge.cuh."""
    return 4 * static.few_rows * (round_up(static.head_dim_v, 16) + 2) + 16


def cluster_members(static: Static, arch: int) -> dict[str, Any]:
    """The members of a Config of kernels with clusters, on GPUs of compute capability `arch`."""
    return {
        "max_cluster": MAX_CLUSTER if arch // 10 in LARGE_CLUSTERS else PORTABLE_CLUSTER,
        "exchange_bytes": exchange_bytes(static),
        "arrives_first": ARRIVES_FIRST,
    }


def cluster_step(name: str, config: ConfigClusterSm90) -> Step:
    """The launch of a kernel with clusters."""
    return Step(name, config.num_threads, config.smem_bytes + config.exchange_bytes, config.max_cluster)


def cluster_of(config: ConfigClusterSm90, items: int, item_blocks: int, num_sms: int) -> int:
    """How many thread blocks share each of so many tiles that see so many blocks of keys."""
    size, groups = config.max_cluster, config.num_threads // 32 // (config.block_m // 16 * config.column_warps)
    while size > 1 and (items * size > config.resident * num_sms or item_blocks < LEAST_BLOCKS * groups * size):
        size //= 2
    return size
