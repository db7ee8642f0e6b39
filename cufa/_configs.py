"""The tile tables: one function for each kernel family, and no other place that knows a tile size.

What a tile may take is bounded by registers (255 a thread; an accumulator of m × n costs m·n / threads of them) and
by shared memory. Every row compiles without spills on every arch; tests compile them for sm_80 and sm_90, and a third
of them for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._problem import Static

SIZEOF = {"f16": 2, "bf16": 2, "f32": 4}

SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}
"""Bytes of shared memory that a block may use, by compute capability."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The members of the C++ ``Config``, with the same names, that every kernel has.

    Attributes
    ----------
    element : str
    variant : tuple of str
        Score terms in their order, as C++ types.
    head_dim, head_dim_v : int
        Exact.
    tile_head_dim, tile_head_dim_v : int
        Widths of the shared-memory tiles, zero-filled past the exact ones.
    block_m, block_n : int
        Rows of q and of k a tile.
    num_threads : int
    smem_bytes : int
    store_bytes : int
    causal, window, varlen, sinks : bool
    chains : bool
        Whether sums are taken over at intervals.
    pack : int
        Heads that share a key head and a tile of queries.
    """

    element: str
    variant: tuple[str, ...]
    head_dim: int
    head_dim_v: int
    tile_head_dim: int
    tile_head_dim_v: int
    block_m: int
    block_n: int
    num_threads: int
    smem_bytes: int
    store_bytes: int
    causal: bool
    window: bool
    varlen: bool
    sinks: bool
    chains: bool
    pack: int = 1


@dataclass(frozen=True, kw_only=True)
class ConfigSm80(Config):
    """What ``cuda_src/attention/forward_sm80.cuh`` has beside them.

    Attributes
    ----------
    column_warps : int
        Warps that share rows and split the columns of v.
    copy_bytes : int
    copy_unroll : int
        Passes over a tile's rows that are copied at a time.
    many : bool
        Whether a thread block takes several tiles, one after the other.
    scan_groups : int
        Of 32 offsets each, that a warp asks for at a time when it looks for a packed sequence.
    early_v : bool
        Whether a tile's first block of V is loaded with that of K.
    """

    column_warps: int
    copy_bytes: int
    copy_unroll: int
    many: bool
    scan_groups: int
    early_v: bool


@dataclass(frozen=True, kw_only=True)
class ConfigSm90(Config):
    """What ``cuda_src/attention/forward_sm90.cuh`` has beside them.

    Of its threads a warpgroup loads; for every `WARPGROUP_ROWS` of block_m there is one more.

    Attributes
    ----------
    stages : int
        Blocks of K, and of V, that are in shared memory at a time.
    producer_registers, consumer_registers : int
        Registers a thread of the warpgroup that loads, and of the others.
    early_steps : int
        Steps of P·V, of 16 keys, whose probabilities are computed while the products of the block before still run:
        what there are registers for.
    whole_turns : bool
        Whether a warpgroup's turn on the tensor cores ends with its products, and not already when they have begun.
    empty_rows : bool
        Whether rows of dense arrays may see no key.
    """

    stages: int
    producer_registers: int
    consumer_registers: int
    early_steps: int
    whole_turns: bool
    empty_rows: bool


@dataclass(frozen=True, kw_only=True)
class ConfigAlign:
    """The members of the C++ ``Config`` of ``cuda_src/attention/align.cuh``, which serves all arrays.

    Attributes
    ----------
    num_threads : int
    blocks_per_sm : int
        Thread blocks that an SM is to hold at a time, which leaves them so many registers.
    """

    num_threads: int
    blocks_per_sm: int


def forward_sm80(static: Static, arch: int) -> ConfigSm80:
    """Config of the mma.sync forward for compute capability `arch` (80 for 8.0)."""
    block_m, block_n, warps, column_warps = _tile_sm80(static, arch)
    size = SIZEOF[static.element]
    tile_head_dim = _round_up(static.head_dim, 32)
    # Warps that share columns have whole panels of them, of 128 bytes.
    tile_head_dim_v = _round_up(static.head_dim_v, 32 if column_warps == 1 else 128 // size * column_warps)
    tiles = (block_m + block_n) * tile_head_dim + block_n * tile_head_dim_v
    return ConfigSm80(
        **_common(static),
        tile_head_dim=tile_head_dim,
        tile_head_dim_v=tile_head_dim_v,
        block_m=block_m,
        block_n=block_n,
        num_threads=32 * warps,
        column_warps=column_warps,
        smem_bytes=size * max(tiles, block_m * tile_head_dim_v),
        copy_bytes=static.copy_bytes,
        copy_unroll=_copy_unroll(static, arch),
        many=static.many,
        scan_groups=8 if has_short_tile(static) else 2,  # many offsets, and registers to hold them
        early_v=has_short_tile(static),  # most have no other block whose products it could arrive beside
    )


def has_short_tile(static: Static) -> bool:
    """Whether the tables have a small tile, of either direction, that short sequences fill."""
    if static.short_rows == 0:
        return False
    # Of float32 larger ones take too many registers, or more shared memory than some GPUs have.
    return static.element != "f32" or (static.short_keys <= 32 and max(static.head_dim, static.head_dim_v) <= 128)


def _tile_sm80(static: Static, arch: int) -> tuple[int, int, int, int]:
    """(block_m, block_n, warps, column_warps)."""
    widest = max(static.head_dim, static.head_dim_v)
    if has_short_tile(static):
        # A warp for every 16 rows: dozens of thread blocks share an SM and hide each other's latency. Short copies take
        # registers that the widest output leaves to two warps only.
        column_warps = 2 if widest > 128 and static.copy_bytes < 16 else 1
        return static.short_rows, min(static.short_keys, 32), static.short_rows // 16 * column_warps, column_warps
    if static.element == "f32":
        if widest <= 64:
            return 64, 64, 4, 1
        if widest <= 96:
            return 64, 48, 4, 1
        if widest <= 128:
            return 64, 32, 4, 1
        if widest <= 192:
            return 64, 32, 8, 2
        return 64, 16, 8, 2
    # The largest tiles leave no register over: only the plainest kernels fit them without spilling.
    plain = (
        static.head_dim == static.head_dim_v
        and static.copy_bytes == static.store_bytes == 16
        and static.mask != "window"
        and not _variant(static)
        and not static.many
    )
    if widest <= 64:
        return 128, 112 if plain else 96, 4, 1
    if widest <= 96:
        return 128, 64, 4, 1
    if widest <= 128:
        if SHARED_MEMORY[arch] <= 99 << 10:
            return 128, 32, 4, 1  # 48 KB: two blocks share an SM
        if plain and (arch == 90 or (static.mask == "none" and not static.varlen and arch < 90)):  # others spill
            return 128, 64, 4, 1
        return 128, 32 if static.mask == "window" else 48, 4, 1
    if widest > 192 and static.copy_bytes < 16:
        return 64, 64, 8, 2  # the addresses of what is copied in pieces take registers
    return 64, 64, 4, 1


def _copy_unroll(static: Static, arch: int) -> int:
    if static.copy_bytes < 16 or static.element == "f32":
        return 1  # short copies are many as it is
    if has_short_tile(static):
        return 4
    if static.many:
        return 1  # its loop needs registers
    if 96 < max(static.head_dim, static.head_dim_v) <= 128:  # the fullest tiles
        return 2 if arch >= 90 or static.varlen else 4
    return 4


WARPGROUP_ROWS = 64
"""Rows of q that a warpgroup of the sm_90 kernel computes."""

STAGES = 2
"""Blocks of K, and of V, in its shared memory: more gain nothing."""

CONTROL_BYTES = 1 << 10
"""Its shared memory for barriers and for what it knows of its tiles and rows."""


def forward_sm90(static: Static) -> ConfigSm90:
    """Config of the wgmma forward."""
    block_m, block_n, early_steps, whole_turns = _tile_sm90(static)
    size = SIZEOF[static.element]
    tile_head_dim, tile_head_dim_v = _round_up(static.head_dim, 32), _round_up(static.head_dim_v, 32)
    tiles = block_m * tile_head_dim + STAGES * block_n * (tile_head_dim + tile_head_dim_v)
    consumers = block_m // WARPGROUP_ROWS
    # Tiles this narrow leave registers to what finds them.
    narrow = consumers == 2 and max(tile_head_dim, tile_head_dim_v) <= 64
    producer_registers, consumer_registers = (40, 232) if narrow else REGISTERS_SM90[consumers]
    return ConfigSm90(
        **_common(static),
        tile_head_dim=tile_head_dim,
        tile_head_dim_v=tile_head_dim_v,
        block_m=block_m,
        block_n=block_n,
        num_threads=128 * (1 + consumers),
        stages=STAGES,
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
        early_steps=early_steps,
        whole_turns=whole_turns,
        empty_rows=static.empty_rows,
        pack=static.pack,
        smem_bytes=size * tiles + CONTROL_BYTES,
    )


REGISTERS_SM90 = {2: (24, 240), 3: (32, 160)}
"""(producer, consumer) registers a thread by number of consumers: with what a block starts with, all there are."""


def _tile_sm90(static: Static) -> tuple[int, int, int, bool]:
    """(block_m, block_n, early_steps, whole_turns)."""
    dim, dim_v = _round_up(static.head_dim, 32), _round_up(static.head_dim_v, 32)
    widest = max(dim, dim_v)
    plain, window = not _variant(static), static.mask == "window"
    if widest <= 64:
        if window and plain:
            return 128, 128, 4, False
        return 128 if window or (static.short and static.mask == "causal") else 192, 128, 0, True
    # Scores, P and output share a thread's registers; Q and the stages of K and V the shared memory.
    ragged = widest > 96 and (dim, dim_v) != (static.head_dim, static.head_dim_v)  # which columns there are takes some
    registers = 196 if plain and not ragged else 184
    size = SIZEOF[static.element]
    by_smem = (SHARED_MEMORY[90] - CONTROL_BYTES - size * 128 * dim) // (size * STAGES * (dim + dim_v))
    longest = 64 if widest > 192 else 128 if window or static.short else 176
    block_n = min((registers - dim_v // 2) * 4 // 3, by_smem, longest) // 16 * 16
    early_steps = 4 if widest <= 128 else 1 if widest <= 160 else 2 if widest <= 192 else 0
    if ragged:
        early_steps = (early_steps + 1) // 2
    return 128, block_n, early_steps if plain else 0, False


def _common(static: Static) -> dict[str, Any]:
    """The members that follow from the problem alone."""
    return {
        "element": static.element,
        "variant": _variant(static),
        "head_dim": static.head_dim,
        "head_dim_v": static.head_dim_v,
        "store_bytes": static.store_bytes,
        "causal": static.mask == "causal",
        "window": static.mask == "window",
        "varlen": static.varlen,
        "sinks": static.sinks,
        "chains": static.chains,
    }


def _variant(static: Static) -> tuple[str, ...]:
    terms = []
    if static.softcap:
        terms.append(f"attention::Softcap<{static.element}>")
    if static.alibi:
        terms.append("attention::Alibi")
    return tuple(terms)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
