"""How the work on caches is divided, by a plan that the device makes: counted by brute force."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
from cufa._compile import jit as _jit
from cufa._kernels import record
from emulated.build import Program
from emulated.gpu import Function, Gpu, Launched

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

BLOCK_M, BLOCK_N, THREADS = 16, 32, 64
SOURCE = f"""
#include "attention/cache_prepare.cuh"

template <class its_mask, bool packed>
struct Config {{
  using element = f16;
  using kv_element = f16;
  using mask = its_mask;
  static constexpr int head_dim = 16, head_dim_v = 16, page_rows = 0;
  static constexpr int block_m = {BLOCK_M}, block_n = {BLOCK_N}, prepare_threads = {THREADS};
  static constexpr bool varlen = packed;
}};

extern "C" {{
__global__ void none_dense(const __grid_constant__ attention::CacheArgument argument) {{
  attention::cache_prepare<Config<attention::FullMask, false>>(argument);
}}
__global__ void causal_packed(const __grid_constant__ attention::CacheArgument argument) {{
  attention::cache_prepare<Config<attention::CausalMask, true>>(argument);
}}
__global__ void window_dense(const __grid_constant__ attention::CacheArgument argument) {{
  attention::cache_prepare<Config<attention::WindowMask, false>>(argument);
}}
}}
"""
ENTRIES = ("none_dense", "causal_packed", "window_dense")
HEADS = 2
LEFT, RIGHT = 70, 9


class Asked(NamedTuple):
    """Sequences: their lengths in the cache, how many of these are padding, and rows of q, or offsets of them."""

    entry: str
    lengths: list[int]
    pads: list[int]
    rows: int
    offsets: list[int]
    added: int
    ratio: int
    capacity: int
    num_splits: int
    plan_blocks: int
    least_positions: int

    @property
    def packed(self) -> bool:
        return self.entry.endswith("packed")

    def sequences(self) -> list[tuple[int, int, int, int]]:
        """Of each: rows of q, the first of them, keys and the first of these."""
        found = []
        begin = 0
        for b, (length, pad) in enumerate(zip(self.lengths, self.pads, strict=True)):
            rows, first_row = self.rows, 0
            if self.packed:
                begin, end = (max(0, *(min(x, self.rows) for x in self.offsets[: i + 1])) for i in (b, b + 1))
                rows, first_row = end - begin, begin
            length = min(max(0, min(length, self.capacity)) + (rows if self.packed else self.added), self.capacity)
            pad = max(0, min(pad, length))
            found.append((rows, first_row, length - pad, pad))
        return found

    def items(self, b: int) -> list[tuple[int, int, int]]:
        """Of a sequence: tile, key head and positions of each item."""
        rows, _, keys, _ = self.sequences()[b]
        found = []
        for m_block in range(-(-rows * self.ratio // BLOCK_M)):
            own = [
                r // self.ratio + keys - rows
                for r in range(m_block * BLOCK_M, min((m_block + 1) * BLOCK_M, rows * self.ratio))
            ]
            end = (
                keys
                if self.entry.startswith("none")
                else min(keys, own[-1] + 1 + (RIGHT if "window" in self.entry else 0))
            )
            begin = max(0, own[0] - LEFT) if "window" in self.entry else 0
            blocks = max(1, -(-max(0, end) // BLOCK_N) - begin // BLOCK_N)
            found += [(m_block, head, self.num_splits or blocks) for head in range(HEADS)]
        return found


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    entry, capacity = draw(st.sampled_from(ENTRIES)), draw(st.sampled_from((0, 1, 100, 500)))
    batch = draw(st.sampled_from((0, 1, 2, 5, 70, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    lengths, pads = (rng.integers(-3, high + 3, batch).tolist() for high in (capacity, 1 + capacity // 2))
    offsets = np.cumsum(np.r_[0, rng.integers(0, 4 + 200 // (batch + 1), batch)])
    rows = int(draw(st.sampled_from((1, 3, 40)))) if not entry.endswith("packed") else int(offsets[-1]) + 2
    if draw(st.booleans()):
        offsets = rng.permutation(offsets)
    numbers = st.tuples(*map(st.sampled_from, ((0, 1, 7), (1, 3, 7), (0, 0, 1, 3), (1, 4, 33, 200), (1, 2, 50))))
    added, ratio, num_splits, plan_blocks, least = draw(numbers)
    return Asked(entry, lengths, pads, rows, offsets.tolist(), added, ratio, capacity, num_splits, plan_blocks, least)


_made: list[Program] = []


def planned(asked: Asked, order: int | None) -> tuple[Any, Any, Any]:
    """The plan: what blocks, and what sequences have, and the counters."""
    if not _made:
        _made.append(Program(SOURCE, _jit.headers(), "attention::CacheArgument", ENTRIES))
    texts = tuple(text.decode() for path, text in _jit.headers().items() if path.startswith("attention/"))
    argument = record.read("CacheArgument", texts)
    batch = len(asked.lengths)
    values: dict[str, dict[str, Any]] = {"params": {}, "cache": {}}
    for member in argument.members:
        assert member.record is not None
        for each in member.record.members:
            if each.format != "P":
                zeros = [0] * (len(each.record.members) if each.record else each.elements)
                values[member.name][each.name] = zeros if each.record or each.elements > 1 else 0
    values["params"] |= {"batch": batch, "seqlen_q": asked.rows, "seqlen_k": asked.capacity, "cu_seqlens_q_stride": 1}
    values["params"] |= {"num_heads_q": HEADS * asked.ratio, "qheads_per_khead": asked.ratio}
    values["params"] |= {"window_left": LEFT, "window_right": RIGHT}
    values["cache"] |= {"cache_seqlens_stride": 1, "cache_leftpad_stride": 1, "appends": 1, "seqlen_new": asked.added}
    values["cache"] |= {"num_heads_k": HEADS, "makes_plan": 1, "divides": 0, "num_splits": asked.num_splits}
    values["cache"] |= {"plan_blocks": asked.plan_blocks, "least_blocks": min(2, asked.plan_blocks)}
    values["cache"] |= {"least_positions": asked.least_positions}
    size = 9 * asked.plan_blocks + 4 * (batch + 1)
    with Gpu(order=order) as gpu:
        given = {"cache_seqlens": asked.lengths, "cache_leftpad": asked.pads, "cu_seqlens_q": asked.offsets}
        placed = gpu.arrays({name: np.array(values, np.int32) for name, values in given.items()})
        placed["plan"] = gpu.empty((size,), "int32")
        packed = bytearray(argument.pack(values))
        for pointer in argument.pointers():
            if pointer.name in placed:
                struct.pack_into("<Q", packed, pointer.offset, placed[pointer.name].address)
        gpu.enqueue(Launched(Function(_made[0], asked.entry, len(packed)), 1, THREADS, 0, bytes(packed)))
        plan = placed["plan"].numpy()
    blocks, sequences, counters = np.split(plan, [8 * asked.plan_blocks, size - asked.plan_blocks])
    return blocks.reshape(-1, 8), sequences.reshape(-1, 4), counters


@settings(max_examples=40, deadline=None)
@given(asked=asked(), order=st.none() | st.integers(0, 99))
def test_all_positions_are_divided_evenly(asked: Asked, order: int | None) -> None:
    blocks, sequences, counters = planned(asked, order)
    assert not counters.any()
    counts = [sum(count for _, _, count in asked.items(b)) for b in range(len(asked.lengths))]
    before = np.r_[0, np.cumsum(counts, dtype=int)]
    assert np.array_equal(sequences[:, 0], before)
    total = int(before[-1])
    used = min(asked.plan_blocks, max(2, total // asked.least_positions))
    expected = asked.sequences()
    assert [(first, pad, keys) for _, first, keys, pad in expected] == [tuple(s[1:]) for s in sequences[:-1].tolist()]
    position = 0
    for i, (quotient, remainder, batch, rows, *sequence) in enumerate(blocks.tolist()):
        begin, end = (j * quotient + min(j, remainder) for j in (i, i + 1))
        if i >= min(used, total):
            assert begin == end
            continue
        assert begin == position and 0 <= end - begin - total // used <= 1
        assert before[batch] <= begin < before[batch + 1]
        assert sequence == sequences[batch].tolist() and rows == expected[batch][0]
        position = end
    assert position == total
