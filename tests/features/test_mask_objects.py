"""Masks as objects, and lists of their blocks: each beside its definition, and calls beside the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from block_masks import WINDOWS, Kind, Problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa import masks
from cufa._masks.shapes import Document
from cufa._terms.mask import mask_features

IDS = np.array([[0, 0, 1, 1, 1, 2, -1, 2, 2], [0, 1, 1, 1, 3, 3, 3, 3, 0]])
RANGES = np.array([[[1, 4], [6, 9]], [[0, 2], [5, 5]]], np.int32)
BOOLEANS = np.random.default_rng(0).random((2, 3, 7, 9)) < 0.5


def of(array: Any, b: int, position: int) -> int:
    return int(array[b % len(array)][position]) if 0 <= position < array.shape[1] else -1


def of_range(b: int, position: int) -> int:
    return next((n for n, (start, end) in enumerate(RANGES[b].tolist()) if start <= position < end), -1)


MASKS: dict[str, tuple[masks.Mask, Callable[[int, int, int, int, int], Any]]] = {
    "causal": (masks.causal(), lambda b, h, i, j, p: j <= p),
    "window": (masks.sliding_window(2, 1), lambda b, h, i, j, p: p - 2 <= j <= p + 1),
    "left": (masks.sliding_window(2, None), lambda b, h, i, j, p: p - 2 <= j),
    "right": (masks.sliding_window(-1, 1), lambda b, h, i, j, p: j <= p + 1),
    "all": (masks.sliding_window(None, None), lambda b, h, i, j, p: True),
    "chunked": (masks.chunked(4), lambda b, h, i, j, p: j // 4 == p // 4),
    "dilated": (masks.dilated(3), lambda b, h, i, j, p: abs(j - p) in (0, 3, 6, 9, 12)),
    "prefix": (masks.prefix_lm(3), lambda b, h, i, j, p: j < 3 or j <= p),
    "prefixes": (masks.prefix_lm(np.array([0, 5])), lambda b, h, i, j, p: j < (0, 5)[b] or j <= p),
    "ids": (masks.document(IDS), lambda b, h, i, j, p: of(IDS, b, j) == of(IDS, b, p) >= 0),
    "ids of all": (masks.document(IDS[0]), lambda b, h, i, j, p: of(IDS[:1], b, j) == of(IDS[:1], b, p) >= 0),
    "offsets": (
        masks.document(offsets=[1, 4, 4, 8]),
        lambda b, h, i, j, p: any(start <= j < end and start <= p < end for start, end in ((1, 4), (4, 8))),
    ),
    "ranges": (masks.image_ranges(RANGES), lambda b, h, i, j, p: of_range(b, j) == of_range(b, p) >= 0),
    "no ranges": (masks.image_ranges(np.zeros((0, 2), int)), lambda b, h, i, j, p: False),
    "first tokens": (masks.global_tokens(2), lambda b, h, i, j, p: j < 2 or 0 <= p < 2),
    "tokens": (masks.global_tokens([5, 1]), lambda b, h, i, j, p: j in (1, 5) or p in (1, 5)),
    "array": (masks.from_array(BOOLEANS), lambda b, h, i, j, p: BOOLEANS[b, h, i, j]),
    "function": (
        masks.from_function(
            lambda batch, head, query, key, a: a[head, key] > query + batch, np.arange(27).reshape(3, 9)
        ),
        lambda b, h, i, j, p: 9 * h + j > i + b,
    ),
    "positions": (
        masks.from_function(lambda batch, head, query, key: query.position - key == 2 * batch),
        lambda b, h, i, j, p: p - j == 2 * b,
    ),
    "not": (~masks.causal(), lambda b, h, i, j, p: j > p),
    "and": (masks.causal() & masks.document(IDS), lambda b, h, i, j, p: j <= p and of(IDS, b, j) == of(IDS, b, p) >= 0),
    "or": (
        masks.causal() | masks.image_ranges(RANGES),
        lambda b, h, i, j, p: j <= p or of_range(b, j) == of_range(b, p) >= 0,
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_what_they_are_defined_to_be(name: str) -> None:
    mask, definition = MASKS[name]
    for queries, keys in ((7, 9),) if name == "array" else ((7, 9), (9, 7), (1, 9)):
        found = mask.dense(2, 3, queries, keys)
        for place in np.ndindex(2, 3, queries, keys):
            b, h, i, j = place
            assert found[place] == bool(definition(b, h, i, j, i + keys - queries)), place


@pytest.mark.parametrize(
    "make",
    [
        lambda n: masks.document(np.arange(n)),
        lambda n: masks.document(offsets=[1, n]),
        lambda n: masks.image_ranges([[2, n], [0, 1]]),
        lambda n: masks.global_tokens([n]),
        lambda n: masks.prefix_lm(n),
        lambda n: masks.from_array(np.ones((n, n), bool)),
    ],
)
def test_lengths_make_no_other_kernel(make: Callable[[int], masks.Mask]) -> None:
    (one, arrays, *_), (other, *_) = (mask_features("attention", make(n))[0] for n in (5, 9))
    assert one == other and len(arrays) == 1


@pytest.mark.parametrize("size", [64, (128, 64), (64, 192)])
@pytest.mark.parametrize("name", ["chunked", "prefixes", "ids", "or", "first tokens", "all"])
def test_blocks_are_of_their_mask(name: str, size: Any) -> None:
    mask, _ = MASKS[name]
    for queries, keys in ((150, 200), (200, 70), (1, 64), (0, 70), (70, 0)):
        blocks = cufa.BlockMask.of(mask, 2, 1, queries, keys, size)
        dense = mask.dense(2, 1, queries, keys)
        assert np.array_equal(blocks.dense(2), dense)
        by_array = cufa.BlockMask.of(masks.from_array(dense), 2, 1, queries, keys, size)
        assert np.array_equal(by_array.dense(2), dense)
        if queries and keys:
            rows, columns = blocks.block_size
            for (b, h, m, n), kind in np.ndenumerate(blocks.kinds):
                part = dense[b, h, rows * m : rows * (m + 1), columns * n : columns * (n + 1)]
                assert kind == int(part.any()) + int(part.all())


NUMBERS = st.lists(st.integers(-1, 3), min_size=1, max_size=6)
LEAVES = st.one_of(
    st.just(masks.causal()),
    st.builds(masks.sliding_window, *[st.one_of(st.none(), st.integers(0, 200))] * 2),
    st.builds(masks.chunked, st.sampled_from((1, 7, 64, 100, 500))),
    st.builds(masks.dilated, st.sampled_from((1, 2, 3, 64))),
    st.builds(masks.prefix_lm, st.lists(st.integers(0, 250), min_size=2, max_size=2)),
    st.builds(lambda ids, times: masks.document(np.repeat(ids, times)), NUMBERS, st.sampled_from((1, 40, 64))),
    st.builds(masks.global_tokens, st.lists(st.integers(0, 250), min_size=1, max_size=3)),
    st.builds(lambda start: masks.image_ranges([[start, start + 70], [250, 255]]), st.integers(0, 170)),
    st.just(masks.from_function(lambda batch, head, query, key: (query + key) % 300 < 150)),
)
TREES = st.recursive(
    LEAVES,
    lambda some: st.one_of(
        st.builds(lambda x, y: x & y, some, some),
        st.builds(lambda x, y: x | y, some, some),
        st.builds(lambda x: ~x, some),
    ),
    max_leaves=4,
)


@given(
    mask=TREES,
    lengths=st.tuples(*[st.sampled_from((1, 63, 64, 129, 200, 260))] * 2),
    size=st.sampled_from((64, (64, 128))),
)
@settings(max_examples=150)
def test_bounds_of_blocks_change_nothing(mask: masks.Mask, lengths: tuple[int, int], size: Any) -> None:
    """Beside the same mask as an array, of which all entries are looked at: lists, tiles and bits are the same."""
    blocks = cufa.BlockMask.of(mask, 2, 1, *lengths, size)
    dense = mask.dense(2, 1, *lengths)[: blocks.shape[0]]
    assert blocks == cufa.BlockMask.of(masks.from_array(dense), len(dense), 1, *lengths, size)


def test_blocks_that_are_certain_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long sequences a few of all entries are, whatever masks are joined."""
    n, looked = 4096, [0]
    entries = masks.Mask.entries

    def told(*arguments: Any) -> Any:
        found = entries(*arguments)
        looked[0] += found.size
        return found

    monkeypatch.setattr(masks.Mask, "entries", told)
    ids = np.arange(n) // 700
    joined = masks.prefix_lm(900) & ~masks.sliding_window(50, 9), masks.global_tokens(2) | masks.sliding_window(300, 0)
    single = masks.causal(), masks.dilated(3), masks.chunked(300)
    for mask in (*single, *joined, masks.document(ids) & masks.causal()):
        looked[0] = 0
        cufa.BlockMask.of(mask, 1, 1, n, n)
        assert 0 < looked[0] <= n * n // 8


@given(data=st.data())
@settings(max_examples=40)
def test_rows_and_pairs_are_the_same_lists(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    listed = rng.random((3, 4)) < data.draw(st.sampled_from((0.0, 0.4, 1.0)))
    mask = data.draw(st.sampled_from((None, masks.causal(), masks.dilated(2))))
    offsets = np.concatenate([[0], np.cumsum(listed.sum(1))])
    rows = cufa.BlockMask.from_csr(offsets, np.nonzero(listed)[1], 180, 250, 64, mask=mask)
    order = rng.permutation(listed.sum())
    query_blocks, key_blocks = (each[order] for each in np.nonzero(listed))
    pairs = cufa.BlockMask.from_coo(query_blocks, key_blocks, 180, 250, 64, mask=mask)
    dense = listed.repeat(64, 0).repeat(64, 1)[:180, :250]
    if mask is not None:
        dense = dense & mask.dense(1, 1, 180, 250)[0, 0]
    assert rows == pairs and hash(rows) == hash(pairs)
    assert np.array_equal(rows.dense()[0, 0], dense)
    # The lists, both ways, hold what the tiles say.
    key_entries, key_offsets, query_entries, query_offsets, tiles = rows.arrays[:5]
    for m in range(3):
        entries = key_entries[key_offsets[0, 0, m] : key_offsets[0, 0, m + 1]]
        assert entries.tolist() == [2 * n + (tiles[0, 0, m, n] == -1) for n in range(4) if tiles[0, 0, m, n] >= -1]
    for n in range(4):
        entries = query_entries[query_offsets[0, 0, n] : query_offsets[0, 0, n + 1]]
        assert entries.tolist() == [2 * m + (tiles[0, 0, m, n] == -1) for m in range(3) if tiles[0, 0, m, n] >= -1]


@pytest.mark.parametrize("name", MASKS)
def test_drawings_show_what_is_seen(name: str) -> None:
    mask, _ = MASKS[name]
    dense = mask.dense(2, 3, 7, 9)[1, 2]
    lines = mask.draw(7, 9, batch=1, head=2).splitlines()
    assert [re.sub(r"[^#.]", "", line) for line in lines] == [
        "",
        *("".join(".#"[int(each)] for each in row) for row in dense),
    ]
    image = mask.to_svg(7, 9, 1, 2)
    widths = re.findall(r'<rect x="\d+" y="\d+" width="(\d+)" height="12"', image)
    assert sum(map(int, widths)) == 12 * dense.sum() and image.startswith("<svg xmlns=")


@pytest.mark.parametrize("name", ["prefixes", "ids", "ranges", "array", "not", "and"])
def test_masks_of_several_sequences_and_heads_are_drawn(name: str) -> None:
    mask, _ = MASKS[name]
    dense = mask.dense(2, 3, 7, 9)
    for b, h in ((0, 0), (1, 2)):
        one = masks.from_array(dense[b, h])
        assert mask.draw(7, 9, b, h) == one.draw(7, 9) and mask.to_svg(7, 9, b, h) == one.to_svg(7, 9)
    assert mask.draw(7, 9) == mask.draw(7, 9, 0, 0)


def test_notebooks_show_masks_at_lengths_that_they_have() -> None:
    array = masks.from_array(BOOLEANS)
    assert (~array)._repr_svg_() == (~array).to_svg(7, 9)
    assert (masks.causal() & masks.from_array(BOOLEANS[:, :, :1]))._repr_svg_().count("<line") == 25 + 10  # type: ignore[union-attr]
    assert masks.from_array(np.zeros((2, 1000), bool))._repr_svg_() is None
    assert masks.document(IDS)._repr_svg_() == masks.document(IDS[0]).to_svg(24, 24)


def test_blocks_of_one_sequence_and_head_are_drawn() -> None:
    of_each = cufa.BlockMask.of(lambda batch, head, query, key: key // 64 == batch, 2, 1, 64, 128, 64)
    assert [of_each.draw(b, head) for b, head in ((0, 0), (1, 0), (1, 5))] == ["# .", ". #", ". #"]
    of_all = cufa.BlockMask.of(masks.causal(), 1, 1, 64, 128, 64)
    assert of_all.draw(3, 4) == of_all.draw()


def test_drawing_of_many_keys() -> None:
    assert masks.causal().draw(2, 11).splitlines() == [
        "       j  0  1  2  3  4  5  6  7  8  9 10",
        "   i 0    #  #  #  #  #  #  #  #  #  #  .",
        "   i 1    #  #  #  #  #  #  #  #  #  #  #",
    ]
    assert masks.causal()._repr_svg_() == masks.causal().to_svg(24, 24)


def test_masks_are_compared_by_what_they_are_made_of() -> None:
    made = [lambda: masks.causal() & ~masks.chunked(4), lambda: masks.document([0, 1]), lambda: masks.prefix_lm(3)]
    for one in made:
        for other in made:
            assert (one() == other()) == (one is other)
            assert (hash(one()) == hash(other())) or one is not other
    assert repr(made[0]()) == "(causal() & ~chunked(4))"
    assert masks.image_ranges([[0, 2]]) != Document(np.zeros((1, 2), np.int32), "ids")
    with pytest.raises(TypeError, match=r"combine masks by &, \| and ~"):
        bool(masks.causal())


@pytest.mark.parametrize(
    "mask", [masks.causal(), masks.sliding_window(20, 5), masks.causal() & masks.sliding_window(9, -1)]
)
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_are_those_of_the_options(mask: masks.Mask, window: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, rows, 2, 8)) for rows in (130, 140, 140))
    found = cufa.attention(q, k, v, mask=mask, **window)
    both = mask.dense(1, 1, 130, 140)
    for name, sides in window.items():
        both = both & (masks.causal() if name == "causal" else masks.sliding_window(*sides)).dense(1, 1, 130, 140)
    expected = cufa.attention(q, k, v, mask=cufa.BlockMask.of(masks.from_array(both), 1, 1, 130, 140))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@given(data=st.data())
@settings(max_examples=25)
def test_calls_equal_the_reference(dtype: str, data: st.DataObject) -> None:
    kind = Kind(dtype, 16, 24, data.draw(st.sampled_from(WINDOWS)), data.draw(st.booleans()))
    problem: Problem = data.draw(problems(kind, (1, 40, 130, 200), (64, 128, (64, 192))))
    problem.check(problem.run())


def test_gradients_are_differences() -> None:
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, rows, 2, 4)) for rows in (90, 70, 70, 90))
    mask = cufa.BlockMask.of(masks.chunked(30) | masks.dilated(7), 1, 1, 90, 70, 64)
    out, lse = cufa.attention(q, k, v, mask=mask, return_lse=True)
    found = cufa.attention_backward(dout, q, k, v, out, lse, mask=mask)

    def loss(**changed: Any) -> float:
        return float((cufa.attention(**{"q": q, "k": k, "v": v} | changed, mask=mask) * dout).sum())

    for name, x, gradient in zip("qkv", (q, k, v), found, strict=True):
        step = 1e-6 * rng.standard_normal(x.shape)
        difference = loss(**{name: x + step}) - loss(**{name: x - step})
        assert np.isclose(difference, 2 * (gradient * step).sum(), rtol=1e-6)


def test_rows_that_see_no_key() -> None:
    x = np.random.default_rng(0).standard_normal((1, 70, 1, 8))
    mask = cufa.BlockMask.of(masks.document([-1] * 10 + [0] * 60), 1, 1, 70, 70, 64)
    x[:, :10] = np.nan
    out, lse = cufa.attention(x, x, x, mask=mask, return_lse=True)
    assert (out[:, :10] == 0).all() and np.isneginf(lse[..., :10]).all() and np.isfinite(lse[..., 10:]).all()
    for gradient in cufa.attention_backward(x, x, x, x, out, lse, mask=mask):
        assert (gradient[:, :10] == 0).all() and np.isfinite(gradient).all()


def test_explain_says_what_a_mask_costs() -> None:
    x = np.zeros((1, 256, 1, 8), np.float32)
    said = cufa.explain(x, x, x, mask=cufa.BlockMask.of(masks.causal(), 1, 1, 256, 256, 64))
    assert (
        "  mask       BlockMask(256 × 256 in blocks of 64 × 64: 6 full, 4 partial, 6 empty)" in str(said).splitlines()
    )


def test_the_reference_takes_masks_and_blocks() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 70, heads, 8)) for heads in (4, 2, 2))
    by_head = masks.from_function(lambda batch, head, query, key: (key + head) % 2 == batch)
    for mask in (masks.causal() & masks.prefix_lm([3, 40]), cufa.BlockMask.of(by_head, 2, 2, 70, 70, 64)):
        dense = mask.dense(2, 2, 70, 70) if isinstance(mask, masks.Mask) else mask.dense()
        expected = cufa.reference.attention(q, k, v, mask=dense.repeat(2, axis=1))
        assert np.array_equal(cufa.reference.attention(q, k, v, mask=mask), expected)
    lengths = np.array([0, 30, 70], np.int32)
    found = cufa.reference.attention_varlen(q[0], k[0], v[0], lengths, lengths, mask=masks.prefix_lm([3, 40]))
    for begin, end, prefix in ((0, 30, 3), (30, 70, 40)):
        alone = cufa.reference.attention(*(x[:1, begin:end] for x in (q, k, v)), mask=masks.prefix_lm(prefix))
        assert np.array_equal(found[begin:end], alone[0])
    with pytest.raises(
        ValueError, match=re.escape("attention: mask has shape (2, 4, 70, 70); (2, 4, 69, 70), that is")
    ):
        cufa.reference.attention(q[:, 1:], k, v, mask=cufa.BlockMask.of(by_head, 2, 2, 70, 70, 64))


X = np.zeros((2, 70, 4, 8), np.float32)
PACKED = np.array([0, 7, 40, 70], np.int32)


def attend(batch: int = 1, heads: int = 1, seqlen_q: int = 70, seqlen_k: int = 70) -> Any:
    heads_mask = masks.from_function(lambda batch, head, query, key: (key + 0 * query + head + batch) % 2 == 0)
    mask = cufa.BlockMask.of(heads_mask, batch, heads, seqlen_q, seqlen_k, 64)
    return cufa.attention(X, X[:, :, :2], X[:, :, :2], mask=mask)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "lengths": (
        lambda: attend(seqlen_q=71),
        "attention: the mask is for 71 queries and 70 keys, but q has 70 rows and k 70; they must agree.",
    ),
    "batch": (lambda: attend(batch=3), "attention: the mask is for 3 sequences but q has 2; 1 or 2 are expected."),
    "heads": (
        lambda: attend(heads=4),
        "attention: the mask is for 4 key heads but k has 2; 1 or 2 are expected. Query heads that share a key head "
        "share its blocks.",
    ),
    "packed": (
        lambda: cufa.attention_varlen(
            X[0],
            X[0],
            X[0],
            np.array([0, 70], np.int32),
            np.array([0, 70], np.int32),
            mask=cufa.BlockMask.of(masks.causal(), 1, 1, 70, 70),
        ),
        "attention_varlen: a BlockMask serves sequences of one length alone, and not packed ones.",
    ),
    "block size": (
        lambda: cufa.BlockMask.of(masks.causal(), 1, 1, 70, 70, 96),
        "BlockMask: block_size is 96; pass a multiple of 64, or two of them.",
    ),
    "offsets decrease": (
        lambda: cufa.BlockMask.from_csr([0, 2, 1], [0, 1], 128, 128, 64),
        "BlockMask.from_csr: offsets must not decrease, and lie between 0 and the 2 blocks.",
    ),
    "too few offsets": (
        lambda: cufa.BlockMask.from_csr([0, 2], [0, 1], 128, 128, 64),
        "BlockMask.from_csr: offsets has shape (1, 1, 2); one more than the 2 blocks of queries are expected last.",
    ),
    "blocks do not increase": (
        lambda: cufa.BlockMask.from_csr([0, 2, 2], [1, 0], 128, 128, 64),
        "BlockMask.from_csr: the blocks of keys of a block of queries must increase.",
    ),
    "no such block": (
        lambda: cufa.BlockMask.from_csr([0, 1, 2], [1, 2], 128, 128, 64),
        "BlockMask.from_csr: blocks holds 2; there are 2 such blocks, from 0 on.",
    ),
    "no such query block": (
        lambda: cufa.BlockMask.from_coo([-1], [0], 128, 128, 64),
        "BlockMask.from_coo: query_blocks holds -1; there are 2 such blocks, from 0 on.",
    ),
    "twice": (
        lambda: cufa.BlockMask.from_coo([0, 0], [1, 1], 128, 128, 64),
        "BlockMask.from_coo: a pair of blocks comes twice; pass each once.",
    ),
    "pairs": (
        lambda: cufa.BlockMask.from_coo([0, 0], [1], 128, 128, 64),
        "BlockMask.from_coo: query_blocks has 2 entries but key_blocks has 1; they must agree.",
    ),
    "ranges overlap": (
        lambda: masks.image_ranges([[0, 3], [2, 4]]),
        "masks.image_ranges: the range (2, 4) overlaps another of its sequence; join the two.",
    ),
    "a range before 0": (
        lambda: masks.image_ranges([[-1, 3]]),
        "masks.image_ranges: a range begins at -1; ranges begin at 0 or later.",
    ),
    "sequences of a mask": (
        lambda: masks.document(IDS).dense(3, 1, 4, 4),
        "masks.document: ids is for 2 sequences, but there are 3; 1 or 3 are expected.",
    ),
    "lengths of an array": (
        lambda: masks.from_array(BOOLEANS).dense(2, 3, 7, 10),
        "masks.from_array: the array has shape (2, 3, 7, 9); its last axes are to be 1 or the 7 queries, and 1 or "
        "the 10 keys.",
    ),
    "a mask of other sequences": (
        lambda: cufa.attention(X, X, X, mask=masks.causal() & masks.prefix_lm([1, 2, 3])),
        "masks.prefix_lm: prefix_lengths is for 3 sequences, but there are 2; 1 or 2 are expected.",
    ),
    "a mask of other lengths": (
        lambda: cufa.explain(X, X, X, mask=masks.from_array(BOOLEANS[:, :1])),
        "masks.from_array: the array has shape (2, 1, 7, 9); its last axes are to be 1 or the 70 queries, and 1 or "
        "the 70 keys.",
    ),
    "a mask of other packed sequences": (
        lambda: cufa.attention_varlen(X[0], X[0], X[0], PACKED, PACKED, mask=masks.document(IDS)),
        "masks.document: ids is for 2 sequences, but there are 3; 1 or 3 are expected.",
    ),
    "an array's mask of packed sequences": (
        lambda: cufa.attention_varlen(X[0], X[0], X[0], PACKED, PACKED, mask=~masks.from_array(BOOLEANS[0, 0])),
        "attention_varlen: masks.from_array serves sequences of one length alone, and not packed ones; pass the array "
        "itself as mask, of the longest sequence.",
    ),
    "a sequence that is not there": (
        lambda: (masks.causal() & masks.document(IDS)).draw(4, 4, batch=2),
        "masks: batch is 2; the mask is for 2 sequences, from 0 on.",
    ),
    "a head before 0": (lambda: masks.causal().to_svg(4, 4, head=-1), "masks: head is -1; heads are counted from 0."),
    "sequences that disagree": (
        lambda: (masks.prefix_lm([1, 2, 3]) | masks.document(IDS)).draw(4, 4),
        "masks.document: ids is for 2 sequences, but there are 3; 1 or 3 are expected.",
    ),
    "blocks of a sequence that is not there": (
        lambda: cufa.BlockMask.of(masks.document(IDS), 2, 1, 9, 9).draw(-1),
        "BlockMask: batch is -1; the mask is for 2 sequences, from 0 on.",
    ),
    "size": (lambda: masks.chunked(0), "masks.chunked: size is 0; it must be at least 1."),
    "floats": (
        lambda: masks.prefix_lm(np.zeros(2)),
        "masks.prefix_lm: prefix_lengths has dtype float64 and 1 dimensions; integers of 0 or 1 are expected.",
    ),
    "documents beyond 32 bits": (
        lambda: masks.document(np.array([0, 1 << 32])),
        "masks.document: ids holds 4294967296, which int32 does not hold.",
    ),
    "a prefix beyond 32 bits": (
        lambda: masks.prefix_lm((1 << 32) + 1),
        "masks.prefix_lm: prefix_lengths holds 4294967297, which int32 does not hold.",
    ),
    "an array beyond 32 bits": (
        lambda: masks.from_function(lambda b, h, q, k, x: x[k] > 0, np.array([1 << 31], np.uint32)),
        "masks.from_function: an array holds 2147483648, which int32 does not hold.",
    ),
    "no sequences": (
        lambda: cufa.BlockMask.of(masks.causal(), 0, 1, 70, 70),
        "BlockMask.of: batch is 0; it must be from 1 to 1073741823.",
    ),
    "queries before 0": (
        lambda: cufa.BlockMask.from_csr([0], [], -1, 70),
        "BlockMask.from_csr: seqlen_q is -1; it must be from 0 to 1073741823.",
    ),
    "keys beyond all": (
        lambda: cufa.BlockMask.from_coo([], [], 70, 1 << 40),
        "BlockMask.from_coo: seqlen_k is 1099511627776; it must be from 0 to 1073741823.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_will_not_do_is_refused(name: str) -> None:
    call, text = WRONG[name]
    with pytest.raises((ValueError, cufa.UnsupportedError)) as refusal:
        call()
    assert str(refusal.value) == text


def test_sizes_beyond_all_lengths_are_as_good_as_the_longest() -> None:
    """In kernels too, whose numbers have 32 bits; and there may be no tokens."""
    q = np.random.default_rng(0).standard_normal((1, 5, 4, 8), dtype=np.float32)
    for mask in (masks.chunked(1 << 40), ~masks.sliding_window(1 << 40, 0) | masks.causal(), ~masks.dilated(1 << 40)):
        out = cufa.attention(q, q, q, mask=mask)
        np.testing.assert_allclose(out, cufa.attention(q, q, q, mask=masks.from_array(mask.dense(1, 4, 5, 5))))
    assert not masks.global_tokens([]).dense(1, 1, 3, 3).any()


@pytest.mark.parametrize("seen", [True, False])
def test_a_function_may_give_the_same_for_all(seen: bool) -> None:
    mask = masks.from_function(lambda batch, head, query, key: seen)
    q = np.ones((1, 5, 4, 8), np.float32)
    for each, expected in ((mask, seen), (~mask, not seen), (mask & masks.causal() | ~mask, True)):
        dense = each.dense(1, 4, 5, 5)
        assert dense[..., 0].all() == dense[..., 0].any() == expected
        np.testing.assert_array_equal(cufa.BlockMask.of(each, 1, 4, 5, 5, 64).dense(1, 4), dense)
        np.testing.assert_array_equal(cufa.attention(q, q, q, mask=each), cufa.attention(q, q, q, mask=dense))
    for wrong in (None, 1, 0.5):
        with pytest.raises(TypeError, match="it must return a bool"):
            cufa.BlockMask.of(lambda batch, head, query, key, wrong=wrong: wrong, 1, 1, 5, 5)


def test_types_that_will_not_do_are_refused() -> None:
    for wrong in (
        lambda: masks.chunked(2.5),  # type: ignore[arg-type]
        lambda: masks.chunked(True),
        lambda: masks.document(),
        lambda: cufa.BlockMask.of(3, 1, 1, 2, 2),  # type: ignore[arg-type]
        lambda: cufa.BlockMask.of(masks.causal(), 1, 1, 2.0, 2),  # type: ignore[arg-type]
    ):
        with pytest.raises(
            TypeError, match=r"pass (an integer|either ids or offsets|one of cufa\.masks, or a function)"
        ):
            wrong()


def test_jax_differentiates_and_maps_calls_with_a_mask() -> None:
    jax = pytest.importorskip("jax")
    given = np.random.default_rng(0).standard_normal((3, 2, 70, 2, 8)).astype(np.float32)
    mask = cufa.BlockMask.of(masks.causal() & masks.chunked(30), 2, 1, 70, 70, 64)
    out, lse = cufa.attention(*given, mask=mask, return_lse=True)
    expected = cufa.attention_backward(2 * out, *given, out, lse, mask=mask)
    q, k, v = map(jax.numpy.asarray, given)
    for size in (64, 128):  # which are terms of the same name
        moved = cufa.BlockMask.of(masks.causal() & masks.chunked(30), 2, 1, 70, 70, size, like=q)

        def loss(q: Any, k: Any, v: Any, moved: Any = moved) -> Any:
            return (cufa.attention(q, k, v, mask=moved) ** 2).sum()

        for found, right in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda q: cufa.attention(q, k, v, mask=moved))(jax.numpy.stack([q, q]))
    np.testing.assert_allclose(mapped, np.stack([out, out]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_masks_without_blocks_are_asked_entry_by_entry(name: str) -> None:

    mask, _ = MASKS[name]
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, rows, 3, 8)) for rows in (7, 9, 9, 7))
    listed = cufa.BlockMask.of(masks.from_array(mask.dense(2, 3, 7, 9)), 2, 3, 7, 9, 64)
    results = []
    for each in (mask.to(q), listed):
        out, lse = cufa.attention(q, k, v, mask=each, return_lse=True)
        results.append((out, lse, *cufa.attention_backward(dout, q, k, v, out, lse, mask=each)))
    for found, right in zip(*results, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-12)
