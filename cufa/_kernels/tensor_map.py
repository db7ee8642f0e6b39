"""Tensor maps: how the tensor memory accelerator is told of q, k and v.

A map depends on shape and strides; its address, which leads the 128 bytes, is filled in at every launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .._call.problem import ITEMSIZE, Problem
from .._driver import driver as _driver
from ..errors import CudaError, UnsupportedError
from .kernel import SIZEOF, WARPGROUP_ROWS, Config, Map
from .record import MAP_BYTES

TYPES = {"f16": "FLOAT16", "bf16": "BFLOAT16"}
"""Elements of maps, and the driver's names of them. What is not here has none, and is not taken for another."""

NAMES = {"float16": "f16", "bfloat16": "bf16"}
"""Elements by the dtype of an array."""

_ADDRESSES = (1 << 20, 0x7F12_3456_7890)


class Shape(NamedTuple):
    """A map: extents and strides, innermost first and strides in bytes without the first, and the box."""

    element: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def of_forward(problem: Problem, config: Config) -> tuple[Map, ...]:
    """The maps of q, k and v; see ``attention/tma_params.cuh`` for their axes."""
    shapes = {"q": (_queries(problem, config), 0)}
    shapes |= {name: _rows(problem, config, name, config.block_n) for name in "kv"}
    return _encoded(problem.device, shapes)


def of_scores(problem: Problem, config: Config, arrays: Sequence[str]) -> tuple[Map, ...]:
    """The map of the array of scores that is staged, if one is: boxes are tiles of these."""
    maps: list[Map] = []
    for name in arrays:
        spec = problem.specs[name]
        size = ITEMSIZE[spec.dtype]
        strides = [0 if n == 1 else size * stride for n, stride in zip(spec.shape, spec.strides, strict=True)]
        extents = [1 if stride == 0 else n for n, stride in zip(spec.shape, strides, strict=True)]
        (batch, heads, queries, keys), (*outer, _) = extents, strides
        shape = _shape(config, config.block_n, (keys, queries, heads, batch), tuple(outer[::-1]), (config.block_m,))
        maps += _encoded(problem.device, {name: (shape._replace(element=NAMES[spec.dtype]), 0)})
    return tuple(each._replace(member="scores") for each in maps)


def of_caches(problem: Problem, config: Config, q: tuple[str, Sequence[int]], box_rows: int) -> tuple[Map, ...]:
    """The maps of caches, see ``attention/cache_tma_params.cuh``, and of what is read as q: its name and strides."""
    shapes = {f"{name}_cache": _cached_rows(problem, config, name, box_rows) for name in "kv"}
    name, strides = q
    maps = _encoded(problem.device, {name: (_queries(problem, config, strides), 0), **shapes})
    return tuple(each._replace(member=member) for each, member in zip(maps, "qkv", strict=True))


def of_backward(problem: Problem, config: Config, key_box: int | None = None) -> tuple[Map, ...]:
    """The maps of q, k, v and dout, all with the axes that those of k and v have in the forward.

    Boxes of keys have `key_box` rows, by default those of a block.
    """
    keys = key_box or config.block_n
    rows = {"q": config.block_m, "k": keys, "v": keys, "dout": config.block_m}
    return _encoded(problem.device, {name: _rows(problem, config, name, box) for name, box in rows.items()})


def _encoded(device: int, shapes: dict[str, tuple[Shape, int]]) -> tuple[Map, ...]:
    """Maps in members of the arrays' names."""
    with _driver.current(device):  # no map is made without a context, and the thread may have none
        return tuple(Map(name, name, shift, _encode(shape)) for name, (shape, shift) in shapes.items())


def _queries(problem: Problem, config: Config, strides: Sequence[int] | None = None) -> Shape:
    batch, row, head = _steps(problem, config, "q", strides)
    if config.pack > 1:
        pack = config.pack
        heads = problem.num_heads_q // pack
        packed = (problem.head_dim, pack, problem.seqlen_q, heads, problem.batch)
        return _shape(
            config, config.tile_head_dim, packed, (head, row, pack * head, batch), (pack, WARPGROUP_ROWS // pack)
        )
    outer = 1 if problem.varlen else problem.batch
    extents = (problem.head_dim, problem.seqlen_q, problem.num_heads_q, outer)
    return _shape(config, config.tile_head_dim, extents, (row, head, batch), (WARPGROUP_ROWS,))


def _rows(problem: Problem, config: Config, name: str, box_rows: int) -> tuple[Shape, int]:
    batch, row, head = _steps(problem, config, name)
    rows, heads = _rows_and_heads(problem, name)
    dim, tile_dim = (
        (problem.head_dim, config.tile_head_dim) if name in "qk" else (problem.head_dim_v, config.tile_head_dim_v)
    )
    if not problem.varlen:
        return _shape(config, tile_dim, (dim, rows, heads, problem.batch), (row, head, batch), (box_rows,)), 0
    # Rows are addressed twice: row c1 of box_rows, past which a box is clipped, and row c3 of the packed array. The
    # address is where both add up to box_rows, so that a box of n live rows up to row r is at (box_rows - n, r).
    extents = (dim, box_rows, heads, rows + 1)
    return _shape(config, tile_dim, extents, (row, head, row), (box_rows,)), -box_rows * row


def _cached_rows(problem: Problem, config: Config, name: str, box_rows: int) -> tuple[Shape, int]:
    """Of caches or pages; their rows are addressed twice, as those of packed arrays are."""
    spec, tile_dim = problem.specs[f"{name}_cache"], config.tile_head_dim if name == "k" else config.tile_head_dim_v
    caches, rows, heads, dim = spec.shape
    cache, row, head = _bytes(config, spec.strides[:-1], (caches, rows, heads))
    extents = (dim, box_rows, heads, rows + 1, caches)
    return _shape(config, tile_dim, extents, (row, head, row, cache), (box_rows,)), -box_rows * row


def _rows_and_heads(problem: Problem, name: str) -> tuple[int, int]:
    queries = name in ("q", "dout")
    return (problem.seqlen_q, problem.num_heads_q) if queries else (problem.seqlen_k, problem.num_heads_k)


def _steps(problem: Problem, config: Config, name: str, strides: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides of batch, rows and heads in bytes, of the problem's array if not others are given."""
    strides = (problem.strides[name] if strides is None else strides)[:-1]
    rows, heads = _rows_and_heads(problem, name)
    if problem.varlen:
        strides = (0, *strides)
    return _bytes(config, strides, (1 if problem.varlen else problem.batch, rows, heads))


def _bytes(config: Config, strides: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """Strides in bytes; 0 where there is only one, or no element at all."""
    size = 0 if 0 in counts else SIZEOF[config.element]
    return tuple(stride * size if count > 1 else 0 for stride, count in zip(strides, counts, strict=True))


def _shape(
    config: Config, tile_dim: int, extents: tuple[int, ...], strides: tuple[int, ...], rows: tuple[int, ...]
) -> Shape:
    """Of a map whose boxes have a panel's columns, then `rows`, and one of each of the axes behind."""
    panel = 128 // SIZEOF[config.element]  # elements of a row of tile::SharedTile that lie side by side
    columns = panel if tile_dim % panel == 0 else panel // 2
    box = (columns, *rows, *[1] * (len(extents) - 1 - len(rows)))
    return Shape(config.element, tuple(max(1, extent) for extent in extents), strides, box)


def _encode(shape: Shape) -> bytes:
    """The 128 bytes of a map but for its address.

    Raises
    ------
    CudaError
        If the driver refuses the map, or keeps the address elsewhere than the launches put it.
    """
    first, second = (_driver_encode(shape, address) for address in _ADDRESSES)
    if [address.to_bytes(8, "little") for address in _ADDRESSES] != [first[:8], second[:8]] or first[8:] != second[8:]:
        raise CudaError("cufa: this driver lays out tensor maps in a way that cufa does not know.")
    return bytes(8) + first[8:]


@lru_cache(maxsize=256)
def _driver_encode(shape: Shape, address: int) -> bytes:
    if shape.element not in TYPES:
        raise UnsupportedError(f"cufa: there are no tensor maps of {shape.element}.")
    driver = _driver.driver()
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    tensor_map = _driver.call(
        "cuTensorMapEncodeTiled",
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{TYPES[shape.element]}"),
        len(shape.extents),
        address,
        [u64(extent) for extent in shape.extents],
        [u64(stride) for stride in shape.strides],
        [u32(extent) for extent in shape.box],
        [u32(1)] * len(shape.box),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{SIZEOF[shape.element] * shape.box[0]}B"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(int(tensor_map.getPtr()), MAP_BYTES)
