"""From a problem and a GPU to the kernel that serves it. Pure Python: it runs without a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from . import _configs
from ._configs import Config, ConfigSm90
from ._problem import Problem, Static
from .errors import UnsupportedError

OLDEST_ARCH = 80
MAX_GRID = (1 << 31) - 1

L2_SECTION = 16 << 20
"""Bytes of K and V that heads running side by side may share. More gives a causal mask better balance, less lets a
short sequence's K and V arrive sooner; the L2 of every GPU from sm_80 holds about this much."""


class Device(NamedTuple):
    """A GPU: compute capability (80 for 8.0) and number of SMs."""

    arch: int
    num_sms: int


class Plan(NamedTuple):
    """A kernel and how it is specialised.

    Attributes
    ----------
    kernel : str
        Name of the ``__global__`` function and of its header in ``cuda_src/attention/``.
    arch : int
        Compute capability it is compiled for.
    config : Config
    reason : str
        Why this kernel and not a faster one.
    """

    kernel: str
    arch: int
    config: Config
    reason: str


class Grid(NamedTuple):
    """Shape of a launch; see cuda_src/attention/scheduler.cuh."""

    blocks: int
    m_blocks: int
    m_units: int
    heads_per_section: int


@lru_cache(maxsize=1024)
def make_plan(static: Static, arch: int) -> Plan:
    """Choose kernel and Config.

    Raises
    ------
    UnsupportedError
        If the GPU is older than sm_80.
    """
    if arch < OLDEST_ARCH:
        raise UnsupportedError(
            f"cufa: a GPU of compute capability {arch // 10}.{arch % 10} is not supported; 8.0 (Ampere) or newer is. "
            "NumPy arrays are computed on the CPU."
        )
    if arch // 10 == 9 and static.element != "f32" and static.tma:
        reason = "it is the fastest for this GPU"
        return Plan("attention_forward_sm90", arch, _configs.forward_sm90(static), reason)
    known = max(each for each in _configs.SHARED_MEMORY if each <= arch)
    return Plan("attention_forward_sm80", arch, _configs.forward_sm80(static, known), _reason(static, arch))


def make_grid(plan: Plan, problem: Problem, num_sms: int) -> Grid:
    """How many blocks `problem` takes, and in which order they go through it."""
    config, heads = plan.config, problem.batch * problem.num_heads_q
    if problem.varlen:
        # Always enough tiles, without knowing one length: see varlen_tile in attention/scheduler.cuh.
        m_blocks = problem.seqlen_q // config.block_m + problem.batch
        num_tiles, section = m_blocks * problem.num_heads_q, 1
    else:
        m_blocks = -(-problem.seqlen_q // config.block_m)
        num_tiles, section = m_blocks * heads, heads_per_section(plan, problem)
    if num_tiles > MAX_GRID:
        raise UnsupportedError(
            f"{problem.function}: {num_tiles} tiles of queries are more than one launch holds ({MAX_GRID}); split the "
            "batch."
        )
    schedule = _schedule(plan, problem, m_blocks, heads, num_sms)
    m_units = -(-m_blocks // 2) if schedule == "pairs" else m_blocks
    blocks = num_tiles if schedule == "tiles" else min(m_units * heads, num_sms)
    return Grid(blocks, m_blocks, m_units, section)


def _schedule(plan: Plan, problem: Problem, m_blocks: int, heads: int, num_sms: int) -> str:
    """How the tiles come to the SMs.

    ``tiles``: a block each; the GPU hands them out in order, longest first. ``persistent``, for tiles that cost the
    same: one block an SM works through a share that is fixed beforehand, so that a tile's loads and the last one's
    output overlap with its neighbours' products. ``pairs``: the same with pairs of tiles that cost the same.
    """
    if problem.varlen or not isinstance(plan.config, ConfigSm90):
        return "tiles"
    if not plan.config.causal:
        return "persistent"
    return "pairs"


def heads_per_section(plan: Plan, problem: Problem) -> int:
    """Query heads scheduled side by side: as many as keep their K and V in the L2, in sections of equal size."""
    config, heads = plan.config, problem.batch * problem.num_heads_q
    size = _configs.SIZEOF[config.element]
    head_bytes = max(1, problem.seqlen_k * (config.head_dim + config.head_dim_v) * size)
    ratio = max(1, problem.num_heads_q // max(1, problem.num_heads_k))
    key_heads = -(-heads // ratio)
    sections = max(1, -(-key_heads // max(1, L2_SECTION // head_bytes)))
    return max(1, -(-key_heads // sections) * ratio)


def _reason(static: Static, arch: int) -> str:
    if static.element == "f32":
        return "float32 takes three tf32 products for one; float16 and bfloat16 are at least seven times as fast"
    if static.copy_bytes < 16:
        faster = "16-byte aligned rows would be faster"
        if arch // 10 == 9:
            faster = "16-byte aligned rows would let the tensor memory accelerator copy, for a faster kernel"
        return f"q, k and v are copied {static.copy_bytes} bytes at a time; {faster}"
    if arch // 10 == 9:
        return "a stride of q, k or v is negative or reaches 2^40 bytes, beyond the tensor memory accelerator"
    if arch >= 90:
        return f"the kernel for sm_80 and newer serves sm_{arch}; there is none specific to it"
    return "it is the fastest for this GPU"
