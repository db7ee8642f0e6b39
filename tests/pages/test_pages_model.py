"""`cufa.PagedKVCache` against a model that knows no pages: lists of tokens, and of what each position must hold."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import cufa
from cufa import PagedKVCache, PagedSequence

LAYERS = 2
MAX_BATCH = 4
TOKENS = st.sampled_from((0, 0, 0, 1))  # so few that sequences often begin alike
WHICH = st.integers(0, 999)
some = precondition(lambda pages: pages.expected)


def content(tokens: list[int], salt: bytes) -> float:
    """What a model would leave for the last of `tokens`: a number that depends on all of them."""
    return float(zlib.crc32(bytes(tokens), zlib.crc32(salt)) + 1)


class Expected(NamedTuple):
    """A sequence as the model has it."""

    tokens: list[int]
    new: list[int]
    salt: bytes
    epoch: int


class Pages(RuleBasedStateMachine):
    """Steps as a server makes them, on a cache so small that pages run out."""

    @initialize(num_pages=st.integers(3, 12), page_size=st.integers(1, 4), caching=st.sampled_from((True, True, False)))
    def make(self, num_pages: int, page_size: int, caching: bool) -> None:
        shape = (num_pages, page_size, 1, 1)
        caches = [np.full(shape, np.nan) for _ in range(2 * LAYERS)]
        self.cache = PagedKVCache(caches[:LAYERS], caches[LAYERS:], prefix_caching=caching)
        self.batch = self.cache.batch(MAX_BATCH, num_pages * page_size)
        self.expected: dict[PagedSequence, Expected] = {}
        self.known: set[tuple[bytes, tuple[int, ...]]] = set()  # prefixes that were ever in the cache, by salt
        self.epoch = 0
        self.add([0] * 5, b"", steps=2)

    def try_to(self, function: Any, sequence: PagedSequence, argument: Any, count: int) -> bool:
        """Make room, or see that it fails exactly where there are too few pages, and changes nothing."""
        before = self.state()
        needed, available = self.cache.pages_needed(sequence, count), self.cache.num_available_pages
        try:
            function(sequence, argument)
        except cufa.OutOfPagesError:
            note(f"out of pages: {needed} needed, {available} available")
            assert needed > available
            assert self.state() == before
            return False
        assert needed <= available
        assert self.cache.num_available_pages == available - needed
        return True

    def pick(self, which: int) -> tuple[PagedSequence, Expected]:
        """One of the sequences."""
        return list(self.expected.items())[which % len(self.expected)]

    def state(self) -> Any:
        return self.cache.stats(), [(each.pages, each.tokens, each.length) for each in self.expected]

    @rule(
        tokens=st.lists(TOKENS, max_size=12), salt=st.sampled_from((b"", b"", b"", b"other")), steps=st.integers(0, 2)
    )
    def add(self, tokens: list[int], salt: bytes, steps: int) -> None:
        before = self.cache.num_available_pages
        sequence = self.cache.add_sequence(tokens, salt=salt)
        found = tokens[: sequence.length]
        assert sequence.tokens == found and len(found) % self.cache.page_size == 0
        assert not tokens or len(found) < len(tokens)
        assert not found or (salt, tuple(found)) in self.known
        assert before - self.cache.num_available_pages <= len(sequence.pages)
        self.expected[sequence] = Expected(found, [], salt, self.epoch)
        rest = tokens[len(found) :]
        if steps > 0 and self.try_to(self.cache.append, sequence, rest, len(rest)):
            self.expected[sequence].new.extend(rest)
        if steps > 1:
            self.compute([sequence])

    @some
    @rule(which=WHICH, tokens=st.lists(TOKENS, max_size=9))
    def append(self, which: int, tokens: list[int]) -> None:
        sequence, expected = self.pick(which)
        if self.try_to(self.cache.append, sequence, tokens, len(tokens)):
            expected.new.extend(tokens)

    @some
    @rule(which=WHICH, count=st.integers(0, 6))
    def reserve(self, which: int, count: int) -> None:
        sequence, _ = self.pick(which)
        if self.try_to(self.cache.reserve, sequence, count, count):
            assert self.cache.pages_needed(sequence, count) == 0

    @precondition(lambda pages: any(not each.new for each in pages.expected.values()))
    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        still = [pair for pair in self.expected.items() if not pair[1].new]
        sequence, expected = still[which % len(still)]
        available = self.cache.num_available_pages
        fork = self.cache.fork(sequence)
        assert self.cache.num_available_pages == available
        self.expected[fork] = expected._replace(tokens=expected.tokens[:], new=[])

    @some
    @rule(which=WHICH, back=st.integers(0, 6))
    def truncate(self, which: int, back: int) -> None:
        sequence, expected = self.pick(which)
        length = max(len(expected.tokens) - back, 0)
        self.cache.truncate(sequence, length)
        del expected.tokens[length:]
        expected.new.clear()
        assert len(sequence.pages) == -(-length // self.cache.page_size)

    @some
    @rule(which=WHICH)
    def free(self, which: int) -> None:
        sequence, _ = self.pick(which)
        self.cache.free(sequence)
        del self.expected[sequence]

    @some
    @rule(first=WHICH, count=st.integers(1, MAX_BATCH), pad=st.booleans(), fails=st.sampled_from((0, 0, 0, 0, 1)))
    def step(self, first: int, count: int, pad: bool, fails: bool) -> None:
        self.compute(list({self.pick(first + n)[0]: None for n in range(count)}), pad, fails)

    @some
    @rule(first=WHICH, tokens=st.lists(TOKENS, min_size=1, max_size=MAX_BATCH))
    def decode(self, first: int, tokens: list[int]) -> None:
        """A token for each of some sequences."""
        chosen = {self.pick(first + n)[0]: token for n, token in enumerate(tokens)}
        for sequence, token in chosen.items():
            if self.try_to(self.cache.append, sequence, [token], 1):
                self.expected[sequence].new.append(token)
        self.compute(list(chosen))

    def compute(self, chosen: list[PagedSequence], pad: bool = False, fails: bool = False) -> None:
        """A step writes the rows of new tokens through the batch's arrays, and nothing else."""
        batch = self.batch.update(chosen, pad_to=MAX_BATCH if pad else None)
        table, offsets = batch.block_table, batch.cu_seqlens_q
        assert len(table) == len(batch.cache_seqlens) == len(offsets) - 1 == (MAX_BATCH if pad else len(chosen))
        assert offsets[0] == 0 and offsets[-1] == batch.num_tokens
        assert (table[len(chosen) :] == -1).all() and not batch.cache_seqlens[len(chosen) :].any()
        for b, sequence in enumerate(chosen):
            expected = self.expected[sequence]
            assert batch.cache_seqlens[b] == len(expected.tokens)
            assert offsets[b + 1] - offsets[b] == len(expected.new)
            for n in range(len(expected.new)):
                position = len(expected.tokens) + n
                page, row = table[b, position // self.cache.page_size], position % self.cache.page_size
                number = content((expected.tokens + expected.new)[: position + 1], expected.salt)
                for layer in range(LAYERS):
                    self.cache.k_caches[layer][page, row] = number + layer
                    self.cache.v_caches[layer][page, row] = -(number + layer)
        if fails:
            for sequence in chosen:
                self.cache.truncate(sequence, sequence.length)
                self.expected[sequence].new.clear()
            return
        self.cache.commit(chosen)
        for sequence in chosen:
            expected = self.expected[sequence]
            expected.tokens.extend(expected.new)
            expected.new.clear()
            if expected.epoch == self.epoch:
                self.known |= {(expected.salt, tuple(expected.tokens[:n])) for n in range(len(expected.tokens) + 1)}

    @rule()
    def reset(self) -> None:
        self.cache.reset_prefix_cache()
        self.known.clear()
        self.epoch += 1

    @invariant()
    def handles_know_their_tokens(self) -> None:
        for sequence, expected in self.expected.items():
            assert sequence.tokens == expected.tokens + expected.new
            assert (sequence.length, sequence.num_new_tokens) == (len(expected.tokens), len(expected.new))

    @rule()
    def look(self) -> None:
        """Every sequence finds its own keys and values where its row of the table says."""
        size = self.cache.page_size
        for sequence, expected in self.expected.items():
            table = self.batch.update([sequence]).block_table[0]
            wanted = [content(expected.tokens[: n + 1], expected.salt) for n in range(len(expected.tokens))]
            for sign, caches in ((1, self.cache.k_caches), (-1, self.cache.v_caches)):
                for layer, cache in enumerate(caches):
                    found = [cache[table[n // size], n % size, 0, 0] for n in range(len(wanted))]
                    assert found == [sign * (number + layer) for number in wanted]

    @invariant()
    def no_page_is_lost_or_had_twice(self) -> None:
        size, stats = self.cache.page_size, self.cache.stats()
        assert stats.held + stats.cached + stats.free == stats.num_pages
        assert stats.cached + stats.free == self.cache.num_available_pages
        assert stats.held == len({page for sequence in self.expected for page in sequence.pages})
        written: dict[int, int] = {}  # pages that a sequence may write to, and how many sequences hold each
        for sequence in self.expected:
            assert len(set(sequence.pages)) == len(sequence.pages)
            for page in sequence.pages:
                written[page] = written.get(page, 0) + 1
        for sequence in self.expected:
            if sequence.num_new_tokens:
                assert all(written[page] == 1 for page in sequence.pages[sequence.length // size :])

    def teardown(self) -> None:
        if hasattr(self, "expected"):
            self.look()
            for sequence in self.expected:
                self.cache.free(sequence)
            assert self.cache.num_available_pages == self.cache.num_pages


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=100, stateful_step_count=50)
