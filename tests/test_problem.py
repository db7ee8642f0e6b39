"""What is refused and in which words, and the facts that follow from what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cufa
from cufa import _arrays, _params, _plan, _problem
from cufa._arrays import CPU, Adapter, Spec, contiguous
from cufa._problem import Problem

Call = Callable[..., Any]


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def dense(**changed: Any) -> Any:
    arguments: dict[str, Any] = {name: zeros(2, 8, 4, 16) for name in "qkv"} | changed
    return cufa.attention(**arguments)


OFFSETS = np.array([0, 3, 8], np.int32)


def packed(**changed: Any) -> Any:
    arguments: dict[str, Any] = {name: zeros(8, 4, 16) for name in "qkv"}
    return cufa.attention_varlen(**(arguments | {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS} | changed))


class OnGpu:
    """An array that claims to be on a GPU, so that what would run there can be planned here."""

    def __init__(self, *shape: int, dtype: str = "float16", device: int = 0, pointer: int = 0, strides: Any = None):
        self.shape, self.dtype, self.device, self.pointer = shape, dtype, device, pointer
        self.strides = contiguous(shape) if strides is None else strides


class OnGpuAdapter(Adapter):
    name = "pretended"

    def view(self, array: Any) -> tuple[int, Any]:
        layout = (self, array.shape, array.strides, array.dtype, array.device, array.pointer % 16, True)
        return array.pointer, layout

    def spec(self, layout: Any) -> Spec:
        return Spec(self.name, *layout[1:])


_arrays.register(OnGpu, OnGpuAdapter())


def gpu_problem(q: OnGpu, k: OnGpu, v: OnGpu, out: Any = None, **options: Any) -> Problem:
    arrays = _arrays.view("attention", _problem.DENSE_NAMES, (q, k, v, None, None, out))
    defaults = {"causal": False, "window_size": None, "softmax_scale": None, "softcap": 0.0}
    return _problem.dense_problem(arrays, *(defaults | options).values())


REFUSED: list[tuple[type[Exception], str, Call, dict[str, Any]]] = [
    (
        TypeError,
        "attention: k is a list, not an array; pass a CuPy, torch, JAX, Numba or NumPy array, or one with __dlpack__.",
        dense,
        {"k": [1]},
    ),
    (
        TypeError,
        "attention: q is a NoneType, not an array; pass a CuPy, torch, JAX, Numba or NumPy array, or one with "
        "__dlpack__.",
        dense,
        {"q": None},
    ),
    (
        TypeError,
        "attention: v is a masked array, whose mask would be ignored; pass its .filled(...).",
        dense,
        {"v": np.ma.masked_array(zeros(2, 8, 4, 16))},
    ),
    (
        TypeError,
        "attention: k is a pretended array but q is a numpy one; pass arrays of one framework.",
        dense,
        {"k": OnGpu(2, 8, 4, 16)},
    ),
    (
        ValueError,
        "attention: q has dtype int64; pass float16, bfloat16, float32 or float64.",
        dense,
        {"q": zeros(2, 8, 4, 16, dtype=np.int64)},
    ),
    (
        ValueError,
        "attention: k has dtype float16 but q has float32; q, k and v must agree.",
        dense,
        {"k": zeros(2, 8, 4, 16, dtype=np.float16)},
    ),
    (
        ValueError,
        "attention: k has shape (8, 4, 16); 4 dimensions (batch, seqlen, num_heads, head_dim) are expected.",
        dense,
        {"k": zeros(8, 4, 16)},
    ),
    (
        ValueError,
        "attention: q, k and v have batch sizes 2, 2 and 3; they must agree.",
        dense,
        {"v": zeros(3, 8, 4, 16)},
    ),
    (ValueError, "attention: v has seqlen 9 but k has 8; k and v must agree.", dense, {"v": zeros(2, 9, 4, 16)}),
    (ValueError, "attention: v has 2 heads but k has 4; k and v must agree.", dense, {"v": zeros(2, 8, 2, 16)}),
    (
        ValueError,
        "attention: k has head_dim 8 but q has 16; q and k must agree.",
        dense,
        {"k": zeros(2, 8, 4, 8)},
    ),
    (
        ValueError,
        "attention: q has 4 heads and k has 3; the heads of q must be a multiple of those of k.",
        dense,
        {"k": zeros(2, 8, 3, 16), "v": zeros(2, 8, 3, 16)},
    ),
    (
        ValueError,
        "attention: q has 4 heads and k has 0; the heads of q must be a multiple of those of k.",
        dense,
        {"k": zeros(2, 8, 0, 16), "v": zeros(2, 8, 0, 16)},
    ),
    (ValueError, "attention: head_dim_v is 0; it must be at least 1.", dense, {"v": zeros(2, 8, 4, 0)}),
    (
        cufa.UnsupportedError,
        "attention: head_dim_v 257 is not supported; it may be 1 to 256.",
        dense,
        {"v": zeros(2, 8, 4, 257)},
    ),
    (
        ValueError,
        "attention: softmax_scale is inf; it must be finite and greater than 0.",
        dense,
        {"softmax_scale": float("inf")},
    ),
    (
        ValueError,
        "attention: softmax_scale is 0.0; it must be finite and greater than 0.",
        dense,
        {"softmax_scale": 0},
    ),
    (TypeError, "attention: softmax_scale is a str; pass a number.", dense, {"softmax_scale": "1"}),
    (TypeError, "attention: softmax_scale is a ndarray; pass a number.", dense, {"softmax_scale": np.ones(1)}),
    (
        ValueError,
        "attention: softcap is -1.0; it must be finite and not negative (0.0 is off).",
        dense,
        {"softcap": -1},
    ),
    (TypeError, "attention: causal is a int; pass True or False.", dense, {"causal": 3}),
    (
        TypeError,
        "attention: window_size is 7; pass a pair (left, right), each a number of keys or None.",
        dense,
        {"window_size": 7},
    ),
    (
        TypeError,
        "attention: the right side of window_size is a float; pass an integer or None.",
        dense,
        {"window_size": (1, 0.5)},
    ),
    (
        ValueError,
        "attention: the left side of window_size is -2; pass at least 0, or None (or -1) for unbounded.",
        dense,
        {"window_size": [-2, 0]},
    ),
    (
        ValueError,
        "attention: alibi_slopes has shape (3,); (4,) or (2, 4), that is (num_heads_q,) or (batch, num_heads_q), is "
        "expected.",
        dense,
        {"alibi_slopes": zeros(3)},
    ),
    (
        ValueError,
        "attention: sinks has shape (2, 4); (4,), that is (num_heads_q,), is expected.",
        dense,
        {"sinks": zeros(2, 4)},
    ),
    (
        ValueError,
        "attention: sinks has dtype float16; pass float32.",
        dense,
        {"sinks": zeros(4, dtype=np.float16)},
    ),
    (
        ValueError,
        "attention: out has shape (2, 8, 4, 15); (2, 8, 4, 16) is expected.",
        dense,
        {"out": zeros(2, 8, 4, 15)},
    ),
    (
        ValueError,
        "attention: out has dtype float64 but q has float32; they must agree.",
        dense,
        {"out": zeros(2, 8, 4, 16, dtype=np.float64)},
    ),
    (
        ValueError,
        "attention: out is read-only; pass an array that can be written.",
        dense,
        {"out": np.broadcast_to(np.float32(0), (2, 8, 4, 16))},
    ),
    (
        ValueError,
        "attention_varlen: q has shape (1, 8, 4, 16); 3 dimensions (total, num_heads, head_dim) are expected.",
        packed,
        {"q": zeros(1, 8, 4, 16)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_q has dtype int64; pass int32.",
        packed,
        {"cu_seqlens_q": np.array([0, 3, 8])},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k has shape (0,); (batch + 1,) is expected.",
        packed,
        {"cu_seqlens_k": OFFSETS[:0]},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k has 2 entries but cu_seqlens_q has 3; both need one more than there are "
        "sequences.",
        packed,
        {"cu_seqlens_k": np.array([0, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: seqused_k has 3 entries; one for each of the 2 sequences is expected.",
        packed,
        {"seqused_k": OFFSETS},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_q starts at 1; it must start at 0.",
        packed,
        {"cu_seqlens_q": np.array([1, 3, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k decreases; offsets must not.",
        packed,
        {"cu_seqlens_k": np.array([0, 9, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k ends at 7 but k has 8 rows; they must agree.",
        packed,
        {"cu_seqlens_k": np.array([0, 3, 7], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: seqused_k must lie between 0 and the lengths in cu_seqlens_k.",
        packed,
        {"seqused_k": np.array([4, 5], np.int32)},
    ),
]


@pytest.mark.parametrize(("error", "text", "function", "changed"), REFUSED, ids=[row[1][:70] for row in REFUSED])
def test_refusals(error: type[Exception], text: str, function: Call, changed: dict[str, Any]) -> None:
    shape = (8, 4, 16) if function is packed else (2, 8, 4, 16)
    out = np.full(shape, 9, np.float32)
    with pytest.raises(error) as raised:
        function(**({"out": out} | changed))
    assert str(raised.value) == text
    assert (out == 9).all()


def test_what_a_gpu_does_not_do() -> None:
    array = OnGpu(1, 8, 2, 64, dtype="float64")
    with pytest.raises(cufa.UnsupportedError) as raised:
        gpu_problem(array, array, array)
    assert str(raised.value) == (
        "attention: float64 on a GPU is not supported; pass float16, bfloat16 or float32, or NumPy arrays to compute "
        "on the CPU."
    )
    here, there = OnGpu(1, 8, 2, 64), OnGpu(1, 8, 2, 64, device=1)
    with pytest.raises(
        ValueError, match=r"^attention: k is on cuda:1 but q is on cuda:0; pass arrays on one device\.$"
    ):
        gpu_problem(here, there, here)
    problem = gpu_problem(here, here, here)
    assert problem.static is not None
    with pytest.raises(cufa.UnsupportedError, match=r"^cufa: a GPU of compute capability 7\.5 is not supported; 8\.0"):
        _plan.make_plan(problem.static, 75)


@pytest.mark.parametrize(
    ("seqlen_q", "options", "mask"),
    [
        (8, {}, "none"),
        (8, {"causal": True}, "causal"),
        (8, {"window_size": (None, 0)}, "causal"),
        (8, {"window_size": (-1, 0)}, "causal"),
        (8, {"window_size": (None, None)}, "none"),
        (8, {"window_size": (None, 3)}, "window"),
        (8, {"causal": True, "window_size": (None, 3)}, "causal"),
        (8, {"causal": True, "window_size": (4, 3)}, "window"),
        (1, {"causal": True}, "none"),
        (1, {"causal": True, "window_size": (4, 3)}, "window"),
    ],
)
def test_masks_fold_into_one_kind(seqlen_q: int, options: dict[str, Any], mask: str) -> None:
    problem = gpu_problem(OnGpu(1, seqlen_q, 2, 64), OnGpu(1, 8, 2, 64), OnGpu(1, 8, 2, 64), **options)
    assert problem.static is not None and problem.static.mask == mask


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(-40, 40)), min_size=4, max_size=4),
    st.sampled_from([2, 4]),
    st.integers(0, 7),
)
def test_the_widest_copy_divides_every_row(axes: list[tuple[int, int]], itemsize: int, start: int) -> None:
    shape, strides = tuple(extent for extent, _ in axes), tuple(stride for _, stride in axes)
    pointer = 4096 + start * itemsize
    spec = Spec("any", shape, strides, "float32" if itemsize == 4 else "float16", 0, pointer % 16, True)
    width = _problem.widest_copy(spec, itemsize)
    assert width in (itemsize, 4, 8, 16)
    if width > itemsize:
        assert shape[-1] == 1 or strides[-1] == 1
        for index in np.ndindex(shape[:-1]):
            assert (pointer + itemsize * int(np.dot(index, strides[:-1]))) % width == 0


@given(st.data())
def test_an_out_that_overlaps_an_input_is_never_accepted(data: st.DataObject) -> None:
    memory = np.zeros(4096, np.float32)
    views = []
    for _ in range(2):
        strides = data.draw(st.permutations([1, 8, 32, 96]))
        offset = data.draw(st.integers(0, 600))
        views.append(
            np.lib.stride_tricks.as_strided(memory[offset:], (2, 4, 2, 4), tuple(4 * stride for stride in strides))
        )
    q, out = views
    other = zeros(2, 4, 2, 4)
    try:
        cufa.attention(q, other, other, out=out)
    except ValueError as error:
        assert "overlap" in str(error) or "share memory" in str(error)
    else:
        assert not np.shares_memory(q, out)


def test_slices_of_a_fused_array_may_be_written() -> None:
    fused = np.random.default_rng(0).standard_normal((2, 8, 4 * 3, 16), dtype=np.float32)
    q, k, v = fused[:, :, :3], fused[:, :, 3:6], fused[:, :, 6:9]
    expected = cufa.attention(q, k, v)
    assert np.array_equal(cufa.attention(q, k, v, out=fused[:, :, 9:]), expected)
    with pytest.raises(ValueError, match="out overlaps v"):
        cufa.attention(q, k, v, out=fused[:, :, 8:11])


def test_lists_and_numpy_numbers_are_options_too() -> None:
    plain = dense(window_size=(3, 2), softmax_scale=0.5, softcap=2.0)
    other = dense(window_size=[np.int64(3), 2], softmax_scale=np.float32(0.5), softcap=np.array(2.0))
    assert np.array_equal(plain, other)


def test_params_are_packed_as_they_are_declared() -> None:
    q = OnGpu(2, 100, 6, 64, strides=(1, 2, 3, 1))
    problem = gpu_problem(
        q, OnGpu(2, 70, 3, 64), OnGpu(2, 70, 3, 64), softmax_scale=0.25, softcap=3.0, window_size=(5, None)
    )
    assert problem.static is not None and problem.device != CPU
    values = _params.LAYOUT.unpack(_params.pack(problem, _plan.Grid(1, 7, 4, 9, 0)))
    named: dict[str, Any] = {}
    for field in _params.FIELDS:
        named[field.name], values = values[: field.length], values[field.length :]
    assert named["q_strides"] == (1, 2, 3, 1)
    assert named["out_strides"] == (100 * 6 * 64, 6 * 64, 64, 1)
    assert named["lse_batch_stride"] + named["lse_head_stride"] == (600, 100)
    assert (named["batch"], named["seqlen_q"], named["seqlen_k"]) == ((2,), (100,), (70,))
    assert (named["num_heads_q"], named["qheads_per_khead"]) == ((6,), (2,))
    assert (named["m_blocks"], named["m_units"], named["heads_per_section"]) == ((7,), (4,), (9,))
    assert (named["window_left"], named["window_right"]) == ((5,), (_problem.MAX_SEQLEN,))
    assert (named["softmax_scale"], named["softcap"]) == ((0.25,), (3.0,))


@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from([64, 128]))
def test_packed_sequences_always_have_slots_enough(lengths: list[int], block_m: int) -> None:
    """The scheduler's rule, as cuda_src/attention/scheduler.cuh has it: every tile is some slot's, and only one's."""
    offsets = np.cumsum([0, *lengths])
    first = [int(offset) // block_m + b for b, offset in enumerate(offsets)]
    slots = int(offsets[-1]) // block_m + len(lengths)
    tiles = set()
    for slot in range(slots):
        sequence = max((b for b in range(len(lengths)) if first[b] <= slot), default=0)
        m_block = first[sequence + 1] - 1 - slot if lengths else 0
        if m_block * block_m < lengths[sequence]:
            assert (sequence, m_block) not in tiles
            tiles.add((sequence, m_block))
    assert tiles == {(b, m) for b, length in enumerate(lengths) for m in range(-(-length // block_m))}


@given(st.integers(1, 200), st.integers(1, 2000))
def test_rounds_reach_every_slot(blocks: int, slots: int) -> None:
    """The scheduler's rule for packed sequences, as cuda_src/attention/scheduler.cuh has it."""
    taken = []
    for block in range(blocks):
        start, place = 0, block
        while start + place < slots:
            taken.append(start + place)
            start += blocks
            place = blocks - 1 - place
    assert sorted(taken) == list(range(slots))


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads", "blocks", "section"),
    [
        (2, 300, 300, 4, 2 * 4 * 3, 8),
        (2, 300, 1 << 15, 4, 2 * 4 * 3, 4),  # K and V of a key head take 8 MB: two of four fit
        (1, 300, 1 << 15, 6, 6 * 3, 4),  # two of three fit, so sections of two
        (5, 300, 1 << 14, 2, 10 * 3, 6),  # four of five fit: sections of three and two, not of four and one
        (1, 300, 1 << 20, 4, 4 * 3, 2),  # not even one fits: the two query heads that share it
        (0, 300, 300, 4, 0, 1),
        (1, 0, 300, 4, 0, 4),
    ],
)
def test_grids(batch: int, seqlen_q: int, seqlen_k: int, heads: int, blocks: int, section: int) -> None:
    k = OnGpu(batch, seqlen_k, heads // 2, 64)
    problem = gpu_problem(OnGpu(batch, seqlen_q, heads, 64), k, k)
    assert problem.static is not None
    grid = _plan.make_grid(_plan.make_plan(problem.static, 80), problem, 108)
    assert (grid.blocks, grid.heads_per_section) == (blocks, section)
    assert grid.m_units == grid.m_blocks


def test_a_grid_too_large_is_refused() -> None:
    q, k = OnGpu(1 << 20, 128 * 128, 64, 64), OnGpu(1 << 20, 1, 64, 64)
    problem = gpu_problem(q, k, k)
    assert problem.static is not None
    with pytest.raises(cufa.UnsupportedError, match=r"8589934592 tiles of queries are more than one launch holds"):
        _plan.make_grid(_plan.make_plan(problem.static, 80), problem, 108)


@given(
    st.integers(1, 4),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(1, 1), (4, 2), (6, 6)]),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([{}, {"causal": True}, {"window_size": (300, 0)}, {"window_size": (None, 200)}]),
    st.sampled_from([16, 132]),
)
def test_persistent_blocks_share_all_tiles(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: tuple[int, int],
    head_dim: int,
    mask: dict[str, Any],
    num_sms: int,
) -> None:
    """The scheduler's rule, as cuda_src/attention/scheduler.cuh has it: every tile is some block's, and only one's."""
    k = OnGpu(batch, seqlen_k, heads[1], head_dim)
    problem = gpu_problem(OnGpu(batch, seqlen_q, heads[0], head_dim), k, k, **mask)
    assert problem.static is not None
    plan = _plan.make_plan(problem.static, 90)
    causal = problem.static.mask == "causal"
    grid = _plan.make_grid(plan, problem, num_sms)
    packed = batch * heads[0] // plan.config.pack
    units = grid.m_units * packed
    assert grid.blocks == min(grid.m_blocks * packed, num_sms)
    assert grid.m_units == (-(-grid.m_blocks // 2) if causal else grid.m_blocks)
    assert grid.round_units == units or (mask and grid.round_units % grid.blocks == 0 and grid.listed)
    pair = 2 if grid.m_units < grid.m_blocks else 1
    taken = [(unit, second) for unit in range(grid.round_units) for second in range(pair)]
    assert sum(map(len, grid.listed)) <= 4 * grid.blocks
    taken += [(grid.round_units + tile // 2, tile % 2) for listed in grid.listed for tile in listed]
    tiles = []
    for unit, second in taken:
        section, within = divmod(unit, grid.heads_per_section * grid.m_units)
        row, head = divmod(within, min(grid.heads_per_section, packed - section * grid.heads_per_section))
        m_block = row if second else grid.m_blocks - 1 - row
        if not second or row < grid.m_blocks - 1 - row:
            tiles.append((section * grid.heads_per_section + head, m_block))
    assert sorted(tiles) == [(head, m) for head in range(packed) for m in range(grid.m_blocks)]


@pytest.mark.parametrize(
    ("seqlen_q", "heads", "pack"),
    [
        (1, (8, 2), 4),
        (128, (8, 2), 1),
        (129, (8, 2), 4),
        (100, (8, 1), 1),
        (64, (8, 1), 8),
        (5, (6, 2), 1),
        (5, (6, 6), 1),
    ],
)
def test_heads_share_tiles_where_rows_are_few(seqlen_q: int, heads: tuple[int, int], pack: int) -> None:
    k = OnGpu(2, 300, heads[1], 64)
    problem = gpu_problem(OnGpu(2, seqlen_q, heads[0], 64), k, k)
    assert problem.static is not None and problem.static.pack == pack
    grid = _plan.make_grid(_plan.make_plan(problem.static, 90), problem, 132)
    assert grid.m_blocks == -(-seqlen_q * pack // _plan.make_plan(problem.static, 90).config.block_m)


def test_what_tensor_maps_cannot_describe_is_served_without_them() -> None:
    q = OnGpu(2, 100, 4, 64)
    for other, tma in (
        (OnGpu(2, 100, 4, 64), True),
        (OnGpu(2, 100, 4, 64, strides=(25600, 256, 0, 1)), True),
        (OnGpu(2, 100, 4, 64, strides=(25600, -256, 64, 1)), False),
        (OnGpu(2, 100, 4, 64, strides=(26000, 260, 65, 1)), False),
        (OnGpu(2, 100, 4, 64, strides=(1 << 40, 256, 64, 1)), False),
        (OnGpu(2, 100, 4, 64, strides=(100, 256, 25600, 400)), False),
    ):
        problem = gpu_problem(q, other, q)
        assert problem.static is not None and problem.static.tma is tma
        plan = _plan.make_plan(problem.static, 90)
        assert plan.kernel == f"attention_forward_sm{90 if tma else 80}"
        if not tma:
            assert "tensor memory accelerator" in plan.reason
