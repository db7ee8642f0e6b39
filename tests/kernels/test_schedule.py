"""Which tile, block of keys and chain is whose, as cuda_src/attention says: NVRTC evaluates it in static_asserts.

No GPU is needed. The properties are counted, by brute force. Only what the lanes of a warp do together cannot be
evaluated, and is written again here, serially: the running maximum of offsets, and the search for a packed unit's
sequence.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import plans
import pytest
from test_problem import OnGpu, backward_problem, gpu_problem, packed_gpu_problem

from cufa._call import problem as _problem
from cufa._call.problem import Problem
from cufa._compile import jit as _jit
from cufa._kernels import Plan, forward, forward_sm90
from cufa._kernels.backward import ALIGNED_ROWS, LAST_FIRST, ConfigBackward
from cufa._kernels.backward_split_sm90 import SPLIT_QUERIES

PRELUDE = """
#include "attention/backward_prepare.cuh"
#include "attention/backward_split_queries_sm90.cuh"
#include "attention/backward_work.cuh"
#include "attention/chains.cuh"
#include "attention/scheduler.cuh"
#include "attention/work.cuh"

using namespace attention;

template <int rows, int keys, class its_mask = FullMask, int heads = 1, bool shares = false>
struct Config {
  struct variant {
    static constexpr bool sequences_share = shares;
  };
  static constexpr int block_m = rows, block_n = keys, pack = heads;
  using element = f16;
  using mask = its_mask;
  static constexpr bool varlen = false;
};

// Every third block is hidden from a tile, and of those that it sees every second is not seen whole.
struct Lists {
  static constexpr int most = 8;
  i32 keys[most][most] = {}, queries[most][most] = {};
  int keys_count[most] = {}, queries_count[most] = {};

  static constexpr bool has(int m_block, int n_block) { return (m_block + n_block) % 3 != 0; }
  static constexpr bool all(int m_block, int n_block) { return (m_block + n_block) % 2 == 0; }

  constexpr Lists() {
    for (int m_block = 0; m_block < most; ++m_block) {
      for (int n_block = 0; n_block < most; ++n_block) {
        if (!has(m_block, n_block)) continue;
        keys[m_block][keys_count[m_block]++] = 2 * n_block + all(m_block, n_block);
        queries[n_block][queries_count[n_block]++] = 2 * m_block + all(m_block, n_block);
      }
    }
  }
};

constexpr Lists lists;

struct ListMask : FullMask {
  using Blocks = BlockList;
  using Tiles = BlockList;

  template <class Config>
  static constexpr Blocks key_blocks(const Params&, int, int, int m_block) {
    return {lists.keys[m_block], 0, lists.keys_count[m_block], 0};
  }

  template <class Config>
  static constexpr Blocks query_tiles(const Params&, int, int, int n_block) {
    return {lists.queries[n_block], 0, lists.queries_count[n_block], 0};
  }
};

template <class Base>
struct Varlen : Base {
  static constexpr bool varlen = true;
};

// Keeps which of `size` things have been met.
template <int size>
struct Met {
  bool met[size] = {};
  int count = 0;

  // Says whether thing `index` is one of the first `limit` and has not been met, and meets it.
  constexpr bool add(int index, int limit) {
    if (index < 0 || index >= limit || limit > size || met[index]) return false;
    ++count;
    return met[index] = true;
  }
};

constexpr int room = 1 << 11;

// block_range and query_range, which leave memory as it is until they set it, as no constant expression may.
template <class Config>
constexpr BlockRange block_range_of(const Params& params, const Seqlen& seqlen, int m_block) {
  BlockRange range{};
  find_block_range<Config>(params, seqlen, m_block, range);
  return range;
}

template <class Config>
constexpr BlockRange query_range_of(const Params& params, const Seqlen& seqlen, int n_block) {
  BlockRange range{};
  find_query_range<Config>(params, seqlen, n_block, range);
  return range;
}

// key_blocks and query_tiles.
template <class Config>
constexpr auto key_blocks_of(const Params& params, const Seqlen& seqlen, int m_block) {
  if constexpr (Config::mask::Blocks::contiguous)
    return block_range_of<Config>(params, seqlen, m_block);
  else
    return key_blocks<Config>(params, seqlen, 0, 0, m_block);
}

template <class Config>
constexpr auto query_tiles_of(const Params& params, const Seqlen& seqlen, int n_block) {
  if constexpr (Config::mask::Blocks::contiguous)
    return query_range_of<Config>(params, seqlen, n_block);
  else
    return query_tiles<Config>(params, seqlen, 0, 0, n_block);
}
"""


def run(*claims: str, prelude: str = "") -> None:
    """Compile a translation unit that asserts all of the claims."""
    asserts = "".join(f'static_assert({claim}, "");\n' for claim in dict.fromkeys(claims))
    _jit.compile_source(f"{PRELUDE}{prelude}\n{asserts}", _jit.options_of(80), "schedule")


def record(name: str, **fields: Any) -> str:
    """An expression of a C++ struct that has these fields, and zeros in the others; "forward__x" is forward.x."""
    assigned = "".join(f" it.{field.replace('__', '.')} = {int(value)};" for field, value in fields.items())
    return f"[] {{ {name} it{{}};{assigned} return it; }}()"


def braces(numbers: Any) -> str:
    return f"{{{', '.join(map(str, numbers))}}}"


# --- tiles of the forward -----------------------------------------------------------------------------

TILES = """
// Every tile is visited once. In each head the first tiles of units go from last to first and the second ones from
// first to last, and where a unit has no second tile, that one is past the end. Sections follow each other. Where
// sequences share what is read, a key head's query heads, of all sequences, come before the next's.
template <class Config>
constexpr bool dense_tiles(const Params& params) {
  Met<room> tiles;
  int firsts[room] = {}, seconds[room] = {};
  const int heads = params.num_heads_q / Config::pack, all = params.batch * heads, blocks = params.m_blocks;
  int last_section = 0;
  for (int unit = 0; unit < params.m_units * all; ++unit) {
    for (int second = 0; second < 1 + in_pairs(params); ++second) {
      const TileIndex tile = dense_tile<Config>(params, unit, second);
      if (tile.head < 0 || tile.head >= heads || tile.batch < 0 || tile.batch >= params.batch) return false;
      const int ratio = max_of(1, params.qheads_per_khead), group = tile.head / ratio;
      const int head = Config::variant::sequences_share
                           ? (group * params.batch + tile.batch) * ratio + tile.head % ratio
                           : tile.batch * heads + tile.head;
      const int section = head / params.heads_per_section;
      if (section < last_section) return false;
      last_section = section;
      if (second && tile.m_block == blocks) continue;
      if (tile.m_block != (second ? seconds[head]++ : blocks - 1 - firsts[head]++)) return false;
      if (!tiles.add(head * blocks + tile.m_block, all * blocks)) return false;
    }
  }
  return tiles.count == all * blocks;
}

// A unit's head is the next one of the section after the head of the unit before, or, after the section's last head,
// the first one of a section.
constexpr bool heads_run_fastest(int units, int heads, int heads_per_section) {
  for (int unit = 1; unit < units * heads; ++unit) {
    const int before = unit_of(unit - 1, units, heads, heads_per_section).head;
    const int head = unit_of(unit, units, heads, heads_per_section).head;
    const bool last = before + 1 == heads || (before + 1) % heads_per_section == 0;
    if (last ? head % heads_per_section != 0 : head != before + 1) return false;
  }
  return true;
}

// Every tile is visited once, in the rounds or in the list. A block goes through its part of the list from the tiles
// that see most blocks of keys to those that see fewest.
template <class Config, int starts, int tiles>
constexpr bool listed_tiles(const Params& params, int round_units, const int (&begin)[starts],
                            const int (&listed)[tiles]) {
  Met<room> met;
  const int heads = params.num_heads_q / Config::pack, all = params.batch * heads * params.m_blocks;
  const Seqlen seqlen = dense_seqlen(params);
  const auto add = [&](const TileIndex& tile) {
    return met.add((tile.batch * heads + tile.head) * params.m_blocks + tile.m_block, all);
  };
  for (int unit = 0; unit < round_units; ++unit) {
    for (int second = 0; second < 1 + in_pairs(params); ++second) {
      const TileIndex tile = dense_tile<Config>(params, unit, second);
      if (tile.m_block < params.m_blocks && !add(tile)) return false;
    }
  }
  for (int block = 0; block + 1 < starts; ++block) {
    int before = 1 << 30;
    for (int i = begin[block]; i < begin[block + 1]; ++i) {
      const TileIndex tile = dense_tile<Config>(params, round_units + listed[i] / 2, listed[i] % 2);
      const BlockRange range = block_range_of<Config>(params, seqlen, tile.m_block);
      const int cost = max_of(0, range.end - range.begin);
      if (cost > before || !add(tile)) return false;
      before = cost;
    }
  }
  return met.count == all;
}

// What the offsets of cu_seqlens count as, and how many sequences with rows end with each or before it.
template <int count>
struct Offsets {
  int row[count] = {}, rank[count] = {};

  constexpr Offsets(const int (&given)[count], int total) {
    for (int b = 0; b < count; ++b) {
      const int before = b == 0 ? 0 : row[b - 1];
      row[b] = max_of(before, clamp(given[b], 0, total));
      rank[b] = b == 0 ? 0 : rank[b - 1] + (row[b] > before);
    }
  }
};

// Every tile with rows of every packed sequence is visited once. In each head the first tiles of units go from last to
// first and the second ones from first to last.
template <class Config, int count>
constexpr bool packed_tiles(const Params& params, int round_units, const int (&given)[count]) {
  constexpr int block_m = Config::block_m;
  const Offsets<count> offsets(given, params.seqlen_q);
  const bool pairs = in_pairs(params);
  Met<room> met;
  int all = 0, first_tile[count] = {};
  for (int b = 0; b + 1 < count; ++b) {
    first_tile[b] = all;
    all += ceil_div(offsets.row[b + 1] - offsets.row[b], block_m) * params.num_heads_q;
  }
  PackedScan scan{0, 0, 0, {-1, 0, 0, 0, 0}};
  for (int unit = 0; unit < round_units; ++unit) {
    const int slot = unit / params.num_heads_q;
    int end = 0;
    while (end < count && first_packed_unit<block_m>(offsets.row[end], end, pairs) <= slot) ++end;
    const int b = end == count ? -1 : end - 1;
    if (scan.holds<block_m>(slot, pairs) != (b >= 0 && b == scan.found.batch)) return false;
    scan.found = {b, b < 0 ? 0 : offsets.row[b], b < 0 ? 0 : offsets.row[end], 0, 0};
    for (int second = 0; second < 1 + pairs; ++second) {
      Work<Config> work{};
      work.seqlen = packed_seqlen(params, scan.found);
      work.tile = packed_tile<Config>(params, scan.found, unit, second);
      if (work.idle()) continue;
      const int tiles = ceil_div(work.seqlen.q, block_m), head = work.tile.head;
      if (work.tile.batch != b || head < 0 || head >= params.num_heads_q) return false;
      const int index = first_tile[b] + head * tiles + work.tile.m_block;
      if (!second && work.tile.m_block + 1 < tiles && !met.met[index + 1]) return false;
      if (second && work.tile.m_block > 0 && !met.met[index - 1]) return false;
      if (!met.add(index, all)) return false;
    }
  }
  return met.count == all;
}

// Every unit is taken once, by one block in one round.
constexpr bool rounds(int blocks, int units) {
  Met<room> met;
  for (int block = 0; block < blocks; ++block) {
    for (int round = 0; unit_in_round(round, block, blocks) < units; ++round) {
      if (!met.add(unit_in_round(round, block, blocks), units)) return false;
    }
  }
  return met.count == units;
}
"""


def config_of(config: Any) -> str:
    mask = "CausalMask" if config.causal else "WindowMask" if config.window else "FullMask"
    found = f"Config<{config.block_m}, {config.block_n}, {mask}, {getattr(config, 'pack', 1)}>"
    return f"Varlen<{found}>" if config.varlen else found


def params_of(problem: Problem, prefix: str = "", **changed: Any) -> dict[str, Any]:
    """The fields of Params that say which tile sees what."""
    left, right = (
        _problem.MAX_SEQLEN if side is None else side for side in (problem.window_left, problem.window_right)
    )
    fields = {"batch": problem.batch, "seqlen_q": problem.seqlen_q, "seqlen_k": problem.seqlen_k}
    fields |= {"num_heads_q": problem.num_heads_q, "window_left": left, "window_right": right}
    fields |= {"qheads_per_khead": problem.num_heads_q // problem.num_heads_k}
    return {prefix + name: value for name, value in (fields | changed).items()}


def grid_of(grid: Any) -> dict[str, Any]:
    return {"m_blocks": grid.m_blocks, "m_units": grid.m_units, "heads_per_section": grid.heads_per_section}


def test_dense_tiles_are_visited_once() -> None:
    claims = []
    for m_blocks, batch, heads, section in itertools.product((1, 2, 5, 8), (1, 3), (1, 6), (1, 4, 5, 18)):
        for m_units in {m_blocks, -(-m_blocks // 2)}:
            fields = {"batch": batch, "num_heads_q": heads, "m_blocks": m_blocks, "m_units": m_units}
            claims.append(f"dense_tiles<Config<64, 64>>({record('Params', **fields, heads_per_section=section)})")
            claims.append(f"heads_run_fastest({m_units}, {batch * heads}, {section})")
    shared = record("Params", batch=2, num_heads_q=12, m_blocks=3, m_units=3, heads_per_section=2)
    grouped = record("Params", batch=3, num_heads_q=6, qheads_per_khead=2, m_blocks=3, m_units=2, heads_per_section=4)
    claims.append(f"dense_tiles<Config<64, 64, FullMask, 1, true>>({grouped})")
    run(*claims, f"dense_tiles<Config<64, 64, FullMask, 4>>({shared})", prelude=TILES)


SORTED = """
// Says that odd tiles, and odd blocks of keys, take longest.
struct SortedMask : FullMask {
  struct Blocks : BlockList {
    static constexpr bool sorted = true;
  };
  using Tiles = Blocks;

  static constexpr int order(int count, int place) {
    return place < count / 2 ? 2 * place + 1 : 2 * (place - count / 2);
  }

  template <class Config>
  static constexpr int longest_tile(const Params& params, int, int, int place) {
    return order(params.m_blocks, place);
  }
  template <class Config>
  static constexpr int longest_block(const Params& params, int, int, int place) {
    return order(params.m_blocks, place);
  }
};

template <bool in_turn>
struct SortedConfig : Config<64, 64, SortedMask> {
  static constexpr bool deterministic = in_turn;
};

// Every tile and every block of keys is visited once, and those of the last section's heads as the mask says, unless
// blocks add in turn.
template <bool in_turn>
constexpr bool sorted_units(const Params& params) {
  BackwardParams backward{};
  backward.forward = params;
  backward.n_blocks = params.m_blocks;
  Met<room> tiles, blocks;
  const int heads = params.batch * params.num_heads_q, count = params.m_blocks;
  for (int unit = 0; unit < heads * count; ++unit) {
    const UnitIndex index = unit_of(unit, count, heads, params.heads_per_section);
    const bool last = index.head / params.heads_per_section == (heads - 1) / params.heads_per_section;
    const int sorted = SortedMask::order(count, index.place);
    const TileIndex tile = dense_tile<SortedConfig<in_turn>>(params, unit, false);
    const DenseUnit found = dense_unit<SortedConfig<in_turn>>(backward, unit);
    if (tile.m_block != (last ? sorted : count - 1 - index.place)) return false;
    if (found.n_block != (last && !in_turn ? sorted : index.place)) return false;
    const auto place = [&](int batch, int head, int at) { return (batch * params.num_heads_q + head) * count + at; };
    if (!tiles.add(place(tile.batch, tile.head, tile.m_block), heads * count)) return false;
    if (!blocks.add(place(found.batch, found.head, found.n_block), heads * count)) return false;
  }
  return tiles.count == heads * count && blocks.count == heads * count;
}
"""


def test_last_heads_have_the_longest_first() -> None:
    claims = []
    for count, batch, heads, section in itertools.product((1, 2, 5), (1, 3), (1, 6), (1, 4, 18)):
        fields = {"batch": batch, "num_heads_q": heads, "qheads_per_khead": 1, "m_blocks": count, "m_units": count}
        params = record("Params", **fields, heads_per_section=section)
        claims += [f"sorted_units<{in_turn}>({params})" for in_turn in ("false", "true")]
    run(*claims, prelude=SORTED)


DENSE_MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window_size": (300, 0)}, {"window_size": (None, 200)}]


DENSE_SHAPES: list[tuple[int, int, int, tuple[int, int], int]] = [
    (1, 1, 700, (1, 1), 64),
    (2, 700, 300, (4, 2), 128),
    (1, 2500, 2500, (6, 6), 256),
    (3, 900, 1300, (6, 6), 64),
    (4, 640, 640, (4, 2), 64),
    (2, 100, 900, (8, 2), 128),
]


def on_hopper(
    batch: int, seqlen_q: int, seqlen_k: int, heads: tuple[int, int], head_dim: int, **mask: Any
) -> tuple[Plan, Problem]:
    """A problem, and its plan with the kernel whose blocks go through several tiles."""
    k = OnGpu(batch, seqlen_k, heads[1], head_dim)
    problem = gpu_problem(OnGpu(batch, seqlen_q, heads[0], head_dim), k, k, **mask)
    assert problem.static is not None
    return plans.forward(problem.static._replace(short_rows=0, short_keys=0, few_rows=0), 90), problem


@pytest.mark.parametrize("section", [None, 4])
def test_blocks_share_all_dense_tiles(section: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`grid`, `share_out` and ``dense_tile``: every tile is some block's, and only one's."""
    if section:
        monkeypatch.setattr(forward_sm90, "heads_per_section", lambda *_: section)
    claims, lists = [], set()
    for shape, mask, sms in itertools.product(DENSE_SHAPES, DENSE_MASKS, (5, 16, 132)):
        plan, problem = on_hopper(*shape, **mask)
        grid = plans.grid(plan, problem, sms)
        lists.add(grid.listed)
        listed = list(itertools.chain(*grid.listed))
        begin = np.cumsum([0, *map(len, grid.listed)]).tolist()
        params = record("Params", **params_of(problem, **grid_of(grid)))
        given = f"{grid.round_units}, {braces(begin)}, {braces(listed or [0])}"
        claims.append(f"listed_tiles<{config_of(plan.config)}>({params}, {given})")
    assert len(lists) > 10
    run(*claims, prelude=TILES)


SPLIT = """
#include "attention/split_schedule.cuh"

// Items of lengths of their own, as the device knows them.
struct Items {
  static constexpr int count = 5;
  int ends[count];

  constexpr Item item(int index) const {
    const int first = index == 0 ? 0 : ends[index - 1];
    return {index, first, ends[index] - first};
  }
  constexpr Item at(int position) const {
    int index = 0;
    while (ends[index] <= position) ++index;
    return item(index);
  }
};

// Every position of every item is some thread block's, in order; no block has more than one position more than another,
// or more than two parts of items that others have parts of; and who shares an item is as `sharers` says, with an order
// in which partial sums have places of their own.
template <class Items>
constexpr bool even(const Items& items, int count, int total, int blocks) {
  const EvenSchedule<Items> schedule{items, {total / blocks, total % blocks}};
  int seen = 0, most = 0, least = total, item = 0, sharing = 0;
  for (int block = 0; block < blocks; ++block) {
    int own = 0, places[2] = {};
    for (auto unit = schedule.first(block); unit.exists(); unit = schedule.next(unit, block)) {
      if (unit.item.first + unit.begin != seen + own || unit.begin >= unit.end) return false;
      own += unit.end - unit.begin;
      const Sharers sharers = schedule.sharers(unit.item);
      if (unit.begin == 0) {
        item = unit.item.index;
        sharing = 0;
        if (sharers.first != block) return false;
      }
      if (item != unit.item.index || block != sharers.first + sharing++) return false;
      if ((unit.end == unit.item.blocks) != (sharing == sharers.count)) return false;
      if (sharers.count > 1 && ++places[block == sharers.first] > 1) return false;
    }
    seen += own;
    most = max_of(most, own);
    least = min_of(least, own);
  }
  return seen == total && most - least <= 1 && items.item(count - 1).index == item;
}
"""


def test_split_keys_are_shared_evenly() -> None:
    claims = []
    for count, item_blocks, blocks in itertools.product((1, 2, 7), (1, 3, 10), (1, 2, 3, 5, 8, 13, 100)):
        claims.append(f"even(EqualItems{{{item_blocks}}}, {count}, {count * item_blocks}, {blocks})")
    for lengths, blocks in itertools.product(((1, 1, 9, 2, 1), (7, 3, 1, 1, 20), (4, 4, 4, 4, 4)), (1, 2, 3, 7, 40)):
        ends = np.cumsum(lengths).tolist()
        items = f"Items{{{braces(ends)}}}"
        claims.append(f"even({items}, 5, {ends[-1]}, {blocks})")
    run(*claims, prelude=SPLIT)


@pytest.mark.parametrize("sms", [1, 5, 132])
def test_few_rows_are_divided_as_the_host_says(sms: int) -> None:
    """`divided`: all blocks of keys are some thread block's, and one launch is enough where none is shared."""
    one_tile = ((1, 5000, (4, 4), 1), (3, 70, (6, 2), 2), (40, 9000, (8, 1), 3), (0, 1 << 20, (4, 4), 1))
    shapes = (*one_tile, (1, 8192, (32, 8), 64), (2, 2048, (5, 1), 300))
    for batch, seqlen_k, heads, seqlen_q in shapes:
        for mask in DENSE_MASKS:
            k = OnGpu(batch, seqlen_k, heads[1], 128)
            problem = gpu_problem(OnGpu(batch, seqlen_q, heads[0], 128), k, k, **mask)
            assert problem.static is not None
            plan = plans.forward(problem.static, 80)
            grid = plans.grid(plan, problem, sms)
            items = batch * heads[1] * grid.m_blocks
            assert grid.m_blocks * plan.config.block_m >= seqlen_q * heads[0] // heads[1]
            total = items * grid.item_blocks
            assert grid.num_blocks * grid.quotient + grid.remainder == total
            shared = grid.clearing + grid.merging > 0
            assert shared == bool(plan.kernel.scratch(plan.config, problem, grid).floats)
            assert not (grid.clearing and grid.merging)
            assert grid.merging in (0, items * plan.config.block_m * 32 // plan.config.num_threads)
            assert shared or grid.quotient % grid.item_blocks == grid.remainder == 0
            assert grid.num_blocks <= max(plan.config.resident * sms, items)


def test_the_cost_of_a_tile_is_that_of_its_keys() -> None:
    """`key_blocks` counts what ``block_range`` says."""
    prelude = """
    template <class Config, int tiles>
    constexpr bool costs(const Params& params, const int (&blocks)[tiles]) {
      for (int m_block = 0; m_block < tiles; ++m_block) {
        const BlockRange range = block_range_of<Config>(params, dense_seqlen(params), m_block);
        if (max_of(0, range.end - range.begin) != blocks[m_block]) return false;
      }
      return true;
    }
    """
    claims = []
    windows = [(0, 0), (1, 0), (127, 0), (128, 1), (129, 127), (300, 128), (None, 200)]
    shapes = [shape for shape in DENSE_SHAPES if shape[1] < 1000] + [(1, 650, 649, (2, 2), 128)]
    for shape, mask in itertools.product(shapes, [*DENSE_MASKS, *({"window_size": window} for window in windows)]):
        plan, problem = on_hopper(*shape, **mask)
        assert not isinstance(plan.config, ConfigBackward)
        m_blocks = plans.grid(plan, problem, 132).m_blocks
        costs = [forward.key_blocks(problem, plan.config, m_block) for m_block in range(m_blocks)]
        claims.append(f"costs<{config_of(plan.config)}>({record('Params', **params_of(problem))}, {braces(costs)})")
    run(*claims, prelude=prelude)


LENGTHS: list[list[int]] = [
    [],
    [0],
    [1],
    [2500],
    [0, 0, 64, 0, 0],
    [128, 127, 129, 0, 1, 63],
    [1000, 0, 300, 65, 64],
    [300, 1, 0, 1000, 128, 0, 0, 0],
]


def offsets_of(lengths: list[int], before: int) -> list[int]:
    return [before + sum(lengths[:b]) for b in range(len(lengths) + 1)]


def unruly(seed: int) -> tuple[list[int], int]:
    """Offsets that no one should give, and the rows of the array."""
    chosen = random.Random(seed)
    total = chosen.choice([0, 1, 200, 1500])
    return [chosen.randint(-300, total + 300) for _ in range(chosen.randint(1, 9))], total


PACKINGS: list[tuple[list[int], int]] = [
    *((offsets_of(lengths, before), before + sum(lengths) + 130) for lengths in LENGTHS for before in (0, 69)),
    *((offsets_of(lengths, 0), sum(lengths)) for lengths in LENGTHS),
    ([0, 500, 500, 0, 0, 0], 500),  # trailing zeros
    *map(unruly, range(12)),
]


@pytest.mark.parametrize(
    ("hopper", "short_rows", "pairs"), [(True, 0, False), (True, 0, True), (False, 0, False), (False, 16, False)]
)
def test_packed_tiles_are_visited_once(
    hopper: bool, short_rows: int, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid has enough units for any offsets, and each tile with rows is one unit's."""
    claims, paired = [], 0
    monkeypatch.setattr(forward_sm90, "PERSISTENT_ROUNDS", 0)
    monkeypatch.setattr(forward_sm90, "PAIRED_TILES", 0 if pairs else 1 << 20)
    for (offsets, total), (heads, causal) in itertools.product(PACKINGS, [((1, 1), True), ((6, 6), False)]):
        q, k = (OnGpu(total, each, 256 if hopper else 64) for each in heads)
        problem = packed_gpu_problem(q, k, len(offsets) - 1, causal=causal)
        assert problem.static is not None
        static = problem.static._replace(short_rows=short_rows, short_keys=short_rows)
        plan = plans.forward(static, 90 if hopper else 80)
        assert not short_rows or plan.config.block_m == short_rows
        grid = plans.grid(plan, problem, 2)
        paired += grid.m_units < grid.m_blocks
        for section in {grid.heads_per_section, 4}:
            params = record("Params", **params_of(problem, **grid_of(grid) | {"heads_per_section": section}))
            config = config_of(plan.config)
            claims.append(f"packed_tiles<{config}>({params}, {grid.round_units}, {braces(offsets)})")
    assert not pairs or paired > 20
    run(*claims, prelude=TILES)


def test_rounds_reach_every_unit() -> None:
    run(*(f"rounds({blocks}, {units})" for blocks in (1, 2, 7, 132) for units in (1, 2, 131, 133, 500)), prelude=TILES)


# --- who sees what ------------------------------------------------------------------------------------

RANGES = """
template <class Mask>
constexpr bool sees(const Params& params, const Seqlen& seqlen, int query, int key) {
  constexpr bool causal = is_same<Mask, CausalMask>, window = is_same<Mask, WindowMask>;
  const int aligned = query + seqlen.k - seqlen.q;  // the key that is the query's own
  return !(causal && key > aligned) &&
         !(window && (key < aligned - params.window_left || key > aligned + params.window_right));
}

// Whether some query of a tile sees some key of a block, and whether every query sees all block_n keys.
struct Seen {
  bool some, all;
};

template <class Config>
constexpr Seen brute(const Params& params, const Seqlen& seqlen, int m_block, int n_block) {
  Seen seen{false, true};
  for (int row = m_block * Config::block_m; row < (m_block + 1) * Config::block_m; ++row) {
    const int query = row / Config::pack;
    if (query >= seqlen.q) break;
    for (int key = n_block * Config::block_n; key < (n_block + 1) * Config::block_n; ++key) {
      const bool it_does = key < seqlen.k && sees<typename Config::mask>(params, seqlen, query, key);
      seen.some |= it_does;
      seen.all &= it_does;
    }
  }
  return seen;
}

template <class Config>
constexpr bool key_spans(const Params& params) {
  using Mask = typename Config::mask;
  const Seqlen seqlen = dense_seqlen(params);
  for (int query = 0; query < seqlen.q; ++query) {
    const int first = Mask::first_key(params, seqlen, query), last = Mask::last_key(params, seqlen, query);
    for (int key = 0; key < seqlen.k; ++key) {
      const bool it_does = sees<typename Config::mask>(params, seqlen, query, key);
      if (it_does != (first <= key && key <= last)) return false;
    }
  }
  return true;
}

template <class Config>
constexpr bool block_ranges(const Params& params) {
  const Seqlen seqlen = dense_seqlen(params);
  for (int m_block = 0; m_block < ceil_div(seqlen.q * Config::pack, Config::block_m); ++m_block) {
    const BlockRange range = block_range_of<Config>(params, seqlen, m_block);
    if (range.begin < 0 || range.end < 0 || range.end > ceil_div(seqlen.k, Config::block_n)) return false;
    bool empty = true;
    for (int n = 0; n < ceil_div(seqlen.k, Config::block_n); ++n) {
      const Seen seen = brute<Config>(params, seqlen, m_block, n);
      empty &= !seen.some;
      if (seen.some != (range.begin <= n && n < range.end)) return false;
      if (seen.all != (range.full_begin <= n && n < range.full_end)) return false;
      if (seen.some && range.is_boundary<Config::mask::hides_first>(n) == seen.all) return false;
    }
    if (range.empty() != empty) return false;
  }
  return true;
}

// No query sees a key past the end, so a block of keys that is not whole is a boundary of every tile. Queries past the
// end are not asked.
template <class Config>
constexpr bool query_ranges(const Params& params) {
  const Seqlen seqlen = dense_seqlen(params);
  for (int n_block = 0; n_block < ceil_div(seqlen.k, Config::block_n) + 1; ++n_block) {
    const BlockRange range = query_range_of<Config>(params, seqlen, n_block);
    if (range.begin < 0 || range.end < 0 || range.end > ceil_div(seqlen.q, Config::block_m)) return false;
    bool empty = true;
    for (int m = 0; m < ceil_div(seqlen.q, Config::block_m); ++m) {
      const Seen seen = brute<Config>(params, seqlen, m, n_block);
      empty &= !seen.some;
      if (seen.some != (range.begin <= m && m < range.end)) return false;
      if (seen.all != (range.full_begin <= m && m < range.full_end)) return false;
      if (seen.some && range.is_boundary(m) == seen.all) return false;
    }
    if (range.empty() != empty) return false;
  }
  return true;
}
"""

SHAPES = [(1, 1), (1, 13), (13, 1), (8, 8), (12, 12), (13, 13), (5, 17), (17, 5), (9, 16), (16, 9), (0, 5), (5, 0)]
WINDOWS = [(0, 0), (1, 0), (0, 3), (3, 2), (7, 0), (4, 9), (20, 20), (_problem.MAX_SEQLEN, 1), (2, _problem.MAX_SEQLEN)]


def masked() -> list[tuple[str, str]]:
    """Masks, and Params that have them, of several lengths."""
    found = []
    for seqlen_q, seqlen_k in SHAPES:
        params = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        found += [(mask, record("Params", **params)) for mask in ("FullMask", "CausalMask")]
        found += [
            ("WindowMask", record("Params", **params, window_left=left, window_right=right)) for left, right in WINDOWS
        ]
    return found


def test_a_row_sees_the_keys_of_its_span() -> None:
    run(*(f"key_spans<Config<4, 4, {mask}>>({params})" for mask, params in masked()), prelude=RANGES)


@pytest.mark.parametrize("tile", ["4, 3", "3, 8", "8, 4"])
def test_tiles_need_the_blocks_of_keys_that_their_rows_see(tile: str) -> None:
    run(
        *(f"block_ranges<Config<{tile}, {mask}>>({params})" for mask, params in masked()),
        *(f"block_ranges<Config<{tile}, {mask}, 2>>({params})" for mask, params in masked()[::3]),
        prelude=RANGES,
    )


@pytest.mark.parametrize("tile", ["4, 3", "3, 8", "8, 4"])
def test_blocks_of_keys_need_the_tiles_whose_rows_see_them(tile: str) -> None:
    run(*(f"query_ranges<Config<{tile}, {mask}>>({params})" for mask, params in masked()), prelude=RANGES)


# --- kinds of blocks ----------------------------------------------------------------------------------

BLOCKS = """
constexpr i32 listed[] = {2 * 1 + 1, 2 * 4, 2 * 5 + 1, 2 * 9 + 1, 2 * 10 + 1, 2 * 17};
constexpr BlockList list{listed, 0, 6, 10}, some{listed, 2, 5, 99}, no_list{listed, 3, 3, 99};
constexpr BlockRange range{3, 11, 5, 9}, short_range{7, 8, 0, 8}, no_range{4, 2, 0, 0};

// Positions are these blocks, and no others, each a boundary or not.
template <class Blocks, int count>
constexpr bool are(const Blocks& blocks, const int (&wanted)[count], const bool (&boundary)[count]) {
  if (blocks.end - blocks.begin != count || blocks.empty()) return false;
  for (int i = 0; i < count; ++i) {
    const int position = blocks.begin + i;
    if (blocks.block(position) != wanted[i] || blocks.is_boundary(position) != boundary[i]) return false;
    if (i > 0 && blocks.block_before(position) != wanted[i - 1]) return false;
  }
  return true;
}

// A block is found where it is, one between two of the blocks where the second is, and none that is not there.
template <class Blocks>
constexpr bool are_found(const Blocks& blocks, int limit) {
  int count = 0;
  for (int block = 0; block < limit; ++block) {
    const int position = blocks.position_of(block);
    const bool inside = position >= blocks.begin && position < blocks.end;
    if (blocks.contains(block) != (inside && blocks.block(position) == block)) return false;
    if (inside && blocks.block(position) < block) return false;
    if (inside && position > blocks.begin && blocks.block(position - 1) >= block) return false;
    count += blocks.contains(block);
  }
  return count == max_of(0, blocks.end - blocks.begin);
}

// Parts have every position once, in order, and about as many each. In a part a block is what it is in the whole.
template <class Blocks>
constexpr bool parts(const Blocks& blocks, int count) {
  const int least = max_of(0, blocks.end - blocks.begin) / count;
  int next = blocks.begin;
  for (int index = 0; index < count; ++index) {
    const Blocks its = part(blocks, index, count);
    if (its.begin != next || its.end - its.begin < least || its.end - its.begin > least + 1) return false;
    for (int position = its.begin; position < its.end; ++position) {
      if (its.block(position) != blocks.block(position)) return false;
      if (its.is_boundary(position) != blocks.is_boundary(position)) return false;
    }
    next = its.end;
  }
  return next == max_of(blocks.begin, blocks.end);
}

// Chains have every position once, from last to first.
template <class Blocks>
constexpr bool tile_chains(const Blocks& blocks, int most) {
  int next = blocks.end;
  for (int index = 0;; ++index) {
    Blocks its = blocks;
    int ends = 0;
    take_chain(its, ends, index, most);
    const int size = its.end - its.begin;
    if (its.end != next || size < 1 || size > most || (ends & first_end) != (index == 0 ? first_end : 0)) return false;
    next = its.begin;
    if (ends & last_end) return next == blocks.begin;
    if (size != most) return false;
  }
}

// Turns count the blocks from the one before the middle down to the first, and then from the middle on, or count these
// anew if they have sums of their own.
template <class Blocks>
constexpr bool turns(const Blocks& blocks, int middle, bool late = false) {
  BackwardParams backward{};
  backward.middle = middle;
  backward.late_sums = late;
  int turn = 0, early = 0;
  for (int position = blocks.end - 1; position >= blocks.begin; --position) {
    if (blocks.block(position) < middle && turn_in(backward, blocks, blocks.block(position)) != turn++) return false;
  }
  if (late) early = turn, turn = 0;
  for (int position = blocks.begin; position < blocks.end; ++position) {
    if (blocks.block(position) >= middle && turn_in(backward, blocks, blocks.block(position)) != turn++) return false;
  }
  return early + turn == max_of(0, blocks.end - blocks.begin);
}

// What a mask lists, but for what is not live. Keys past the end make a boundary of a block, in either direction.
template <class Config>
constexpr bool live_lists(const Params& params) {
  const Seqlen seqlen = dense_seqlen(params);
  const int tiles = ceil_div(seqlen.q, Config::block_m), blocks = ceil_div(seqlen.k, Config::block_n);
  for (int m = 0; m < Lists::most; ++m) {
    for (int n = 0; n < Lists::most; ++n) {
      const bool boundary = !Lists::all(m, n) || (n + 1) * Config::block_n > seqlen.k;
      const auto keys = key_blocks<Config>(params, seqlen, 0, 0, m);
      if (keys.contains(n) != (n < blocks && Lists::has(m, n))) return false;
      if (keys.contains(n) && keys.is_boundary(keys.position_of(n)) != boundary) return false;
      const auto queries = query_tiles<Config>(params, seqlen, 0, 0, n);
      if (queries.contains(m) != (n < blocks && m < tiles && Lists::has(m, n))) return false;
      if (queries.contains(m) && queries.is_boundary(queries.position_of(m)) != boundary) return false;
    }
  }
  return true;
}

constexpr BlockList clipped(BlockList blocks, int count, int full_end) {
  blocks.clip({0, count, 0, full_end});
  return blocks;
}
"""


def test_a_kind_of_blocks_says_which_block_a_position_is() -> None:
    kinds = ("range", "short_range", "no_range", "list", "some", "no_list")
    run(
        "are(range, {3, 4, 5, 6, 7, 8, 9, 10}, {true, true, false, false, false, false, true, true})",
        "are(list, {1, 4, 5, 9, 10, 17}, {false, true, false, false, true, true})",
        "are(some, {5, 9, 10}, {false, false, false})",
        "are(clipped(list, 10, 5), {1, 4, 5, 9}, {false, true, true, true})",
        "clipped(list, 1, 0).empty() && no_list.empty() && no_range.empty()",
        *(f"are_found({kind}, 20)" for kind in kinds),
        *(f"parts({kind}, {count})" for kind in kinds for count in (1, 2, 3, 5, 6, 13)),
        *(f"tile_chains({kind}, {most})" for kind in kinds if "no" not in kind for most in (1, 2, 3, 8, 9)),
        *(f"turns({kind}, {middle})" for kind in kinds for middle in (0, 2, "2, true", LAST_FIRST)),
        prelude=BLOCKS,
    )


def test_of_a_list_the_live_blocks_are_taken() -> None:
    run(
        *(f"live_lists<Config<4, 3, ListMask>>({record('Params', seqlen_q=q, seqlen_k=k)})" for q, k in SHAPES),
        prelude=BLOCKS,
    )


# --- the gradients' work ------------------------------------------------------------------------------

WORK = """
// Every block of keys is visited once. The blocks of a head go from the one before the middle to the first, and then
// from the middle to the last, and a block's turn at a tile of dq is how many blocks before it add to the
// tile, to the same sums.
template <class Config>
constexpr bool key_blocks(const BackwardParams& backward) {
  const Params& params = backward.forward;
  const Seqlen seqlen = dense_seqlen(params);
  const int heads = params.num_heads_q / params.qheads_per_khead, all = params.batch * heads * backward.n_blocks;
  const int units = BackwardWork<Config>::units(backward), tiles = ceil_div(seqlen.q, Config::block_m);
  Met<room> met;
  int of_head[room] = {}, added[2][room] = {};  // to sums that late blocks do not add to, and to theirs
  for (int unit = 0; unit < units; ++unit) {
    const DenseUnit found = dense_unit<Config>(backward, unit);
    const int head = found.batch * heads + found.head, index = of_head[head]++;
    if (found.head < 0 || found.head >= heads || found.batch >= params.batch) return false;
    const int lower = min_of(backward.middle, backward.n_blocks);
    if (found.n_block != (index < lower ? lower - 1 - index : index)) return false;
    if (!met.add(head * backward.n_blocks + found.n_block, all)) return false;
    const auto queries = query_tiles_of<Config>(params, seqlen, found.n_block);
    for (int position = queries.begin; position < queries.end; ++position) {
      const int m_block = queries.block(position);
      const int turn = turn_in(backward, key_blocks_of<Config>(params, seqlen, m_block), found.n_block);
      if (turn != added[is_late(backward, found.n_block)][head * tiles + m_block]++) return false;
    }
  }
  return met.count == all;
}

template <int count>
struct Table {
  PackedOffset offsets[count] = {};

  constexpr Table(const int (&given)[count], int total) {
    for (int b = 0, row = 0, rank = 0; b < count; ++b) {
      const int now = max_of(row, clamp(given[b], 0, total));
      rank += b > 0 && now > row;
      offsets[b] = {row = now, rank};
    }
  }
};

// Every block of `rows` rows of every packed sequence is visited once, and the blocks of a head in order. sum_tile
// gives each a place of its own among `places`, unless that is 0.
template <class Config, int rows, int count>
constexpr bool packed_units(const BackwardParams& backward, int heads, int section, int units, int total,
                            const int (&given)[count], int places = 0) {
  const Table<count> table(given, total);
  const PackedOffset* const offsets = table.offsets;
  Met<room> met, place_met;
  int all = 0, begin[count] = {};
  for (int b = 0; b + 1 < count; ++b) {
    begin[b] = all;
    all += ceil_div(offsets[b + 1].row - offsets[b].row, rows) * heads;
  }
  for (int unit = 0; unit < units; ++unit) {
    // packed_unit does this, with a warp that searches for the sequence.
    const auto first_unit = [&](int b) { return first_packed_unit<rows>(offsets[b].row, offsets[b].rank); };
    int b = -1;
    while (b + 1 < count && first_unit(b + 1) <= unit / heads) ++b;
    if (b < 0 || b + 1 == count) continue;
    const int first = first_unit(b), own = first_unit(b + 1) - first;
    const UnitIndex index = unit_of(unit - first * heads, own, heads, section);
    const int place = index.place, live = ceil_div(offsets[b + 1].row - offsets[b].row, rows);
    if (place >= live) continue;
    const int at = begin[b] + index.head * live + place;
    if (place > 0 && !met.met[at - 1]) return false;
    if (!met.add(at, all)) return false;
    if (places == 0) continue;
    RowTile tile{};
    tile.seqlen.q_first_row = offsets[b].row;
    tile.rank = offsets[b].rank;
    if (!place_met.add(sum_tile<Config>(backward, tile, index.head, place), places)) return false;
  }
  return met.count == all;
}

// The rows of every sequence begin in the workspace with a multiple of four, and end before those of the next sequence
// begin, and before the workspace ends.
template <class Config, int count>
constexpr bool padded_rows(const BackwardParams& backward, const int (&given)[count]) {
  const Table<count> table(given, backward.forward.seqlen_q);
  const PackedOffset* const offsets = table.offsets;
  const auto at = [&](int b) { return padded_row<Config>(offsets[b].row, offsets[b].rank); };
  for (int b = 0; b + 1 < count; ++b) {
    RowTile tile{};
    tile.seqlen.q_first_row = offsets[b].row;
    tile.rank = offsets[b].rank;
    const i64 row = workspace_row<Config>(backward, tile, 2);
    if (row != 2 * backward.workspace_rows + at(b) || row % 4 != 0) return false;
    if (at(b + 1) - at(b) < offsets[b + 1].row - offsets[b].row || at(b + 1) > backward.workspace_rows) return false;
  }
  return true;
}

// take_chain puts every tile of queries of every query head in one chain, and tells the first and the last chain. A
// work of up to two chains' tiles stays whole.
template <class Config>
constexpr bool chains(int heads, int begin, int end) {
  const int tiles = end - begin, limit = tile::chain_blocks(Config::block_m);
  Params params{};
  params.qheads_per_khead = heads;
  const int most = heads * tiles <= 2 * limit ? 2 * limit : limit;
  Met<room> met;
  for (int chain = 0; chain <= room; ++chain) {
    BackwardWork<Config> work{};
    work.head = 3;
    work.tiles.begin = begin, work.tiles.end = end;
    work.take_all(params);
    work.chain = chain;
    work.take_chain();
    if (work.first_chain != (chain == 0)) return false;
    if ((work.query_head_end - work.query_head) * (work.tiles.end - work.tiles.begin) > most) return false;
    for (int head = work.query_head; head < work.query_head_end; ++head) {
      for (int m_block = work.tiles.begin; m_block < work.tiles.end; ++m_block) {
        if (m_block < begin || !met.add((head - 3 * heads) * tiles + m_block - begin, heads * tiles)) return false;
      }
    }
    if (work.last_chain) break;
  }
  return met.count == heads * tiles;
}

// for_each_query_chain does the same.
template <class Mask>
constexpr bool chains_of_steps(int heads, int begin, int end, int chain) {
  Params params{};
  params.qheads_per_khead = heads;
  BackwardWork<Config<64, 64, Mask>> work{};
  work.head = 3;
  work.tiles.begin = begin, work.tiles.end = end;
  Met<room> met;
  int steps = 0, ended = 0;
  bool right = true, done = false;
  for_each_query_chain<true>(
      params, work, chain,
      [&](int head, int m_block) {
        right &= met.add((head - 3 * heads) * (end - begin) + m_block - begin, heads * (end - begin));
        right &= ++steps <= chain && !done;
      },
      [&](bool first, bool last) {
        right &= first == (ended++ == 0) && steps > 0;
        steps = 0;
        done = last;
      });
  return right && (done || begin == end) && met.count == heads * (end - begin);
}

static_assert(aligned_rows == ALIGNED_ROWS && QueriesConfig<Config<64, 64>>::block_m == SPLIT_QUERIES, "");
""".replace("ALIGNED_ROWS", str(ALIGNED_ROWS)).replace("SPLIT_QUERIES", str(SPLIT_QUERIES))


def test_blocks_of_keys_are_visited_once_and_in_turn() -> None:
    claims = []
    for (seqlen_q, seqlen_k), (heads, ratio), section in itertools.product(SHAPES, [(1, 1), (6, 2)], (1, 4, 5)):
        for (mask, left, right), (middle, late) in itertools.product(
            [("FullMask", 0, 0), ("CausalMask", 0, 0), ("WindowMask", 3, 2), ("ListMask", 0, 0)],
            [(0, False), (2, False), (2, True), (LAST_FIRST, False)],
        ):
            fields = {"batch": 2, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads_q": heads * ratio}
            fields |= {"qheads_per_khead": ratio, "heads_per_section": section}
            fields |= {"window_left": left, "window_right": right}
            given_forward = {f"forward__{name}": value for name, value in fields.items()}
            order = {"n_blocks": -(-seqlen_k // 3), "middle": middle, "late_sums": int(late)}
            backward = record("BackwardParams", **given_forward, **order)
            claims.append(f"key_blocks<Config<4, 3, {mask}>>({backward})")
    run(*claims[::5], *(claim for claim in claims if "ListMask" in claim), prelude=WORK)


KERNELS = [("sm80", 64), ("sm90", 64), ("sm90", 128), ("split_sm90", 256), ("short", 64)]


@pytest.mark.parametrize(("kernel", "head_dim"), KERNELS)
def test_packed_blocks_of_keys_and_tiles_of_queries_are_visited_once(kernel: str, head_dim: int) -> None:
    """A grid has enough units and workspace for any offsets."""
    claims = []
    for (offsets, total), (offsets_k, total_k) in zip(PACKINGS, PACKINGS[5:] + PACKINGS[:5], strict=True):
        batch = min(len(offsets), len(offsets_k)) - 1
        offsets, offsets_k = offsets[: batch + 1], offsets_k[: batch + 1]
        for heads_q, heads_k in ((4, 2), (3, 3)):
            q, k = OnGpu(total, heads_q, head_dim), OnGpu(total_k, heads_k, head_dim)
            problem = backward_problem(q, k, k, batch=batch, causal=True)
            assert problem.static is not None
            short = 16 if kernel == "short" else 0
            static = problem.static._replace(short_rows=short, short_keys=short)
            plan = plans.backward(static, 80 if kernel == "sm80" else 90, False)
            config = plan.config
            assert isinstance(config, ConfigBackward)
            assert plan.name == f"attention_backward_{kernel.replace('short', 'sm80')}"
            grid = plans.grid(plan, problem, 132)
            _, prepare, *_ = grid.blocks
            params = params_of(problem, "forward__", m_blocks=grid.m_blocks)
            backward = record("BackwardParams", **params, n_blocks=grid.n_blocks, workspace_rows=grid.workspace_rows)
            name = config_of(config)
            units, tiles = grid.n_blocks * heads_k, grid.m_blocks * heads_q
            claims.append(f"BackwardWork<{name}>::units({backward}) == {units}")
            given = f"{units}, {total_k}, {braces(offsets_k)}"
            for section in (grid.heads_per_section, 2):
                claims.append(f"packed_units<{name}, {config.block_n}>({backward}, {heads_k}, {section}, {given})")
            assert prepare * config.row_tiles >= tiles
            given = f"{braces(offsets)}, {max(tiles, 1)}"
            claims.append(
                f"packed_units<{name}, {config.block_m}>({backward}, {heads_q}, 1, {tiles}, {total}, {given})"
            )
            if kernel == "split_sm90":
                claims.append(f"unit_counts == {plan.kernel.unit_counts}")  # type: ignore[attr-defined]
                count = (total // SPLIT_QUERIES + min(batch, total)) * heads_q
                claims.append(f"QueryWork<QueriesConfig<{name}>>::units({backward}) == {count}")
                for section in (grid.heads_per_section * heads_q // heads_k, 2):
                    given = f"{heads_q}, {section}, {count}, {total}, {braces(offsets)}"
                    claims.append(f"packed_units<{name}, {SPLIT_QUERIES}>({backward}, {given})")
            claims.append(f"padded_rows<{name}>({backward}, {braces(offsets)})")
    run(*claims, prelude=WORK)


def test_chains_have_every_tile_once() -> None:
    cases = list(itertools.product((1, 2, 5), (0, 3), (0, 1, 3, 4, 5, 9, 30)))
    masks = ("FullMask", "ListMask")
    run(
        *(
            f"chains<Config<{rows}, 64, {mask}>>({heads}, {begin}, {begin + tiles})"
            for (heads, begin, tiles), mask, rows in itertools.product(cases, masks, (4096, 1024))
        ),
        *(
            f"chains_of_steps<{mask}>({heads}, {begin}, {begin + tiles}, 4)"
            for (heads, begin, tiles), mask in itertools.product(cases, masks)
        ),
        prelude=WORK,
    )
