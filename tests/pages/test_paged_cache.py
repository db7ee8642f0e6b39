"""What is particular about `cufa.PagedKVCache`: what is found again, evicted and copied, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufa
from cufa import PagedKVCache, PagedSequence


def make(num_pages: int = 8, page_size: int = 4, layers: int = 1, **options: Any) -> PagedKVCache:
    sizes = {"num_layers": layers, "num_pages": num_pages, "page_size": page_size, "num_heads_k": 1, "head_dim": 2}
    return PagedKVCache.empty(**sizes, head_dim_v=3, dtype="float32", xp=np, **options)


def step(cache: PagedKVCache, *sequences: PagedSequence) -> None:
    """A step in which nothing is computed."""
    cache.batch(len(sequences), 100).update(sequences)
    cache.commit(sequences)


def sequence_of(cache: PagedKVCache, tokens: Any, **options: Any) -> PagedSequence:
    """A sequence whose tokens are all in the cache."""
    sequence = cache.add_sequence(tokens, **options)
    cache.append(sequence, list(tokens)[sequence.length :])
    step(cache, sequence)
    return sequence


# What is found again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12, 13])
def test_a_prompt_finds_all_full_pages_but_that_of_its_last_token(length: int) -> None:
    cache = make()
    tokens = list(range(13))
    pages = sequence_of(cache, tokens).pages
    again = cache.add_sequence(tokens[:length])
    assert again.length == (length - 1) // 4 * 4
    assert again.pages == pages[: again.length // 4]
    assert cache.stats()[-2:] == (13 + length, again.length)


def test_a_prompt_finds_what_others_began_with() -> None:
    cache = make()
    first = sequence_of(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cache.add_sequence([1, 2, 3, 4, 5, 6, 7, 0, 9]).pages == first.pages[:1]
    assert cache.add_sequence([0, 2, 3, 4, 5, 6, 7, 8, 9]).length == 0  # the second page is alike, the first is not
    assert cache.add_sequence([5, 6, 7, 8, 9]).length == 0


def test_pages_are_found_only_when_their_step_is_over() -> None:
    cache, tokens = make(), list(range(9))
    first = cache.add_sequence(tokens)
    cache.append(first, tokens)
    cache.batch(1, 100).update([first])
    assert cache.add_sequence(tokens).length == 0
    cache.commit([first])
    assert cache.add_sequence(tokens).length == 8


def test_generated_tokens_are_found_too() -> None:
    cache = make()
    first = sequence_of(cache, [1, 2, 3])
    for token in (4, 5, 6, 7, 8):
        cache.append(first, [token])
        step(cache, first)
    assert cache.add_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]).pages == first.pages


def test_salts_tell_equal_tokens_apart() -> None:
    cache, tokens = make(), list(range(6))
    sequence_of(cache, tokens, salt=b"one")
    assert [cache.add_sequence(tokens, salt=salt).length for salt in (b"one", b"two", b"")] == [4, 0, 0]


def test_nothing_is_found_without_prefix_caching() -> None:
    cache = make(prefix_caching=False)
    cache.free(sequence_of(cache, range(9)))
    assert cache.add_sequence(range(9)).length == 0
    assert cache.stats()[1:4] == (0, 0, 8)


def test_a_reset_forgets_what_runs_too() -> None:
    cache, tokens = make(), list(range(9))
    first, second = sequence_of(cache, tokens[:3]), sequence_of(cache, [9] * 6)
    cache.reset_prefix_cache()
    cache.append(first, tokens[3:])
    step(cache, first)
    assert cache.add_sequence(tokens).length == cache.add_sequence([9] * 6).length == 0
    cache.free(second)
    cache.free(first)
    assert cache.stats().held == 0


def test_one_of_pages_with_equal_content_is_found() -> None:
    cache, tokens = make(), list(range(5))
    twins = [cache.add_sequence(tokens) for _ in range(2)]
    for twin in twins:
        cache.append(twin, tokens)
    step(cache, *twins)
    assert cache.add_sequence(tokens).pages == twins[0].pages[:1]
    for twin in twins:
        cache.free(twin)
    assert cache.stats()[1:4] == (1, 0, 7)


def test_a_page_is_evicted_when_no_other_is_free_and_the_oldest_goes_first() -> None:
    cache = make(num_pages=4)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        cache.free(sequence_of(cache, tokens))
    assert cache.stats()[1:5] == (0, 4, 0, 0)
    sequence_of(cache, [3] * 4)
    assert cache.stats().evictions == 1
    assert cache.add_sequence([*old, 0]).length == 4  # the end of the oldest
    assert cache.add_sequence([*new, 0]).length == 8


def test_what_is_used_again_is_no_longer_the_oldest() -> None:
    cache = make(num_pages=3)
    prompts = [[n] * 4 for n in range(3)]
    for tokens in prompts:
        cache.free(sequence_of(cache, tokens))
    cache.free(cache.add_sequence([*prompts[0], 9]))
    sequence_of(cache, [7] * 4)
    assert [cache.add_sequence([*tokens, 9]).length for tokens in prompts] == [4, 0, 4]


# Shared pages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_forks_copy_the_last_page_when_they_go_on(beams: int) -> None:
    cache = make(layers=2)
    caches = cache.k_caches + cache.v_caches
    origin = sequence_of(cache, range(6))
    for number, array in enumerate(caches):
        array[...] = np.arange(array.size).reshape(array.shape) + 1000 * number
    forks = [cache.fork(origin) for _ in range(beams)]
    assert cache.stats().held == 2
    for fork in forks:
        cache.append(fork, [7, 8, 9])
    assert cache.stats().copies == beams
    batch = cache.batch(beams, 16).update(forks)
    assert batch.block_table[:, 0].tolist() == [0] * beams
    last = batch.block_table[:, 1].tolist()
    assert len({1, *last}) == beams + 1
    for array in caches:
        assert (array[last] == array[1]).all()
    cache.append(origin, [0])
    assert origin.pages == (0, 1)  # nobody else has it any more


def test_the_last_who_holds_a_page_writes_to_it() -> None:
    cache = make()
    origin = sequence_of(cache, range(6))
    fork = cache.fork(origin)
    cache.free(origin)
    cache.append(fork, [6])
    assert (fork.pages, cache.stats().copies) == ((0, 1), 0)


def test_a_page_that_is_written_again_is_not_found_as_what_it_was() -> None:
    cache, tokens = make(), list(range(9))
    sequence = sequence_of(cache, tokens)
    cache.truncate(sequence, 6)
    assert cache.add_sequence(tokens).length == 8
    sequence = sequence_of(cache, [7] * 8)
    cache.truncate(sequence, 6)
    cache.append(sequence, [1, 1])
    assert cache.add_sequence([7] * 9).length == 4
    step(cache, sequence)
    assert cache.add_sequence([7] * 6 + [1] * 3).length == 8


def test_forks_do_not_share_what_is_reserved() -> None:
    cache = make()
    origin = sequence_of(cache, range(6))
    cache.reserve(origin, 10)
    fork = cache.fork(origin)
    assert (origin.pages, fork.pages) == ((0, 1, 2, 3), (0, 1))


def test_a_page_is_copied_once() -> None:
    cache = make()
    fork = cache.fork(sequence_of(cache, range(6)))
    cache.append(fork, [6])
    batch = cache.batch(1, 16).update([fork])
    cache.k_caches[0][fork.pages[1]] = 7
    batch.update([fork])
    assert (cache.k_caches[0][fork.pages[1]] == 7).all()


def test_copies_are_what_pages_were_before_any() -> None:
    """A page that is copied may be given out again, as a copy of another, before the copies are made."""
    cache = make(num_pages=4, page_size=2)
    first, second = sequence_of(cache, [1]), sequence_of(cache, [2])
    for sequence in (first, second):
        cache.k_caches[0][sequence.pages[0]] = sequence.tokens[0]
    forks = cache.fork(first), cache.fork(second)
    cache.append(forks[0], [3])
    home = first.pages
    cache.free(first)
    cache.append(forks[1], [4])
    assert forks[1].pages == home
    batch = cache.batch(2, 4).update(forks)
    assert cache.k_caches[0][batch.block_table[:, 0], 0, 0, 0].tolist() == [1, 2]


def test_a_copy_of_a_copy_that_was_not_made_yet() -> None:
    cache = make(page_size=2)
    first = sequence_of(cache, [1])
    cache.k_caches[0][...] = np.nan
    cache.k_caches[0][first.pages[0]] = 5
    second = cache.fork(first)
    cache.reserve(second, 1)
    third = cache.fork(second)
    cache.reserve(third, 1)
    table = cache.batch(3, 2).update([first, second, third]).block_table
    assert len(set(table[:, 0].tolist())) == 3
    assert (cache.k_caches[0][table[:, 0]] == 5).all()


# Batches ------------------------------------------------------------------------------------------------


def test_a_batch_stays_where_it_is() -> None:
    cache = make()
    batch = cache.batch(4, 16)
    first, second = (sequence_of(cache, [n] * n) for n in (5, 3))
    cache.append(second, [0, 0])
    batch.update([first, second])
    arrays = batch.cache_seqlens, batch.cu_seqlens_q, batch.block_table
    assert [array.tolist() for array in arrays[:2]] == [[5, 3], [0, 0, 2]]
    assert arrays[2][0, :2].tolist() == list(first.pages) and arrays[2][1, :2].tolist() == list(second.pages)
    batch.update([second], pad_to=4)
    assert [array.tolist() for array in arrays[:2]] == [[3, 0], [0, 2, 2]]
    assert batch.block_table[1:].tolist() == [[-1] * 4] * 3 and batch.cu_seqlens_q.tolist() == [0, 2, 2, 2, 2]
    assert np.shares_memory(batch.block_table, arrays[2])
    assert all(array.dtype == np.int32 and array.ctypes.data % 16 == 0 for array in arrays)
    assert (batch.sequences, batch.num_tokens) == ((second,), 2)


def test_a_table_is_copied_when_it_changes_only() -> None:
    """What lies beyond the last row that changed is not copied."""
    cache, copied = make(num_pages=16), []

    class Device:
        def mirror(self, host: np.ndarray) -> np.ndarray:
            return np.full_like(host, 99)

        def upload(self, mirror: np.ndarray, host: np.ndarray, count: int) -> None:
            mirror[:count] = host[:count]
            copied.append(count - 8)  # the lengths and offsets of three

        def copy_pages(self, *arguments: Any) -> None: ...

    cache._memory = Device()  # type: ignore[assignment]
    batch = cache.batch(3, 16)
    sequences = [sequence_of(cache, [n] * 3) for n in range(3)]
    copied.clear()
    for _ in range(3):
        for sequence in sequences[:2]:
            cache.append(sequence, [9])
        batch.update(sequences)
        cache.commit(sequences)
        assert batch.block_table[:, :1].tolist() == [[each.pages[0]] for each in sequences]
    batch.update(sequences)
    batch.update(sequences[1:])
    cache.truncate(sequences[1], 4)
    batch.update(sequences[1:])
    assert copied == [12, 8, 0, 0, 8, 4]
    assert batch.block_table.tolist()[0][0] == sequences[1].pages[0]


def test_a_table_follows_its_sequences() -> None:
    cache = make(num_pages=16)
    batch = cache.batch(1, 16)
    prompts = [[1] * 6, [2] * 6]
    origins = [sequence_of(cache, prompt) for prompt in prompts]
    for prompt, origin in zip(prompts, origins, strict=True):
        again = cache.add_sequence(prompt)
        assert batch.update([again]).block_table[0, 0] == again.pages[0] == origin.pages[0]
    for origin in origins:
        fork = cache.fork(origin)
        assert batch.update([fork]).block_table[0, 1] == origin.pages[1]
        cache.append(fork, [3])
        assert batch.update([fork]).block_table[0, 1] == fork.pages[1] != origin.pages[1]
        cache.truncate(fork, 0)
        cache.append(fork, [3])
        assert batch.update([fork]).block_table[0, 0] == fork.pages[0]


# What is refused ----------------------------------------------------------------------------------------


def test_nothing_is_lost_when_pages_run_out() -> None:
    cache = make(num_pages=2)
    sequence = sequence_of(cache, range(6))
    fork = cache.fork(sequence)
    before = cache.stats()
    for function, argument in ((cache.append, [6]), (cache.reserve, 1), (cache.append, [6] * 9)):
        with pytest.raises(cufa.OutOfPagesError, match=r"more pages, and 0 of 2 are available; free or truncate"):
            function(fork, argument)
    assert (cache.stats(), fork.pages, fork.tokens) == (before, (0, 1), list(range(6)))
    cache.truncate(sequence, 4)
    cache.append(fork, [6])


MISUSES: dict[str, tuple[Callable[[PagedKVCache, PagedSequence], Any], type[Exception], str]] = {
    "freed": (lambda cache, _: cache.append(freed(cache), [1]), ValueError, "append: the sequence was freed"),
    "freed twice": (lambda cache, _: cache.free(freed(cache)), ValueError, "free: the sequence was freed"),
    "another cache's": (
        lambda cache, _: cache.fork(make().add_sequence()),
        ValueError,
        "fork: the sequence is of another cache",
    ),
    "no sequence": (lambda cache, _: cache.free(3), TypeError, "free: int is not a sequence"),  # type: ignore[arg-type]
    "fork of new tokens": (
        lambda cache, sequence: (cache.append(sequence, [1]), cache.fork(sequence)),
        ValueError,
        "fork: the sequence has 1 tokens that are not in the cache",
    ),
    "not computed": (
        lambda cache, sequence: (cache.append(sequence, [1]), cache.commit([sequence])),
        ValueError,
        "commit: a sequence has 1 new tokens, and a batch was last updated when it had 0",
    ),
    "appended since": (
        lambda cache, sequence: (
            cache.append(sequence, [1]),
            cache.batch(1, 9).update([sequence]),
            cache.append(sequence, [1]),
            cache.commit([sequence]),
        ),
        ValueError,
        "commit: a sequence has 2 new tokens, and a batch was last updated when it had 1",
    ),
    "taken back since": (
        lambda cache, sequence: (
            cache.append(sequence, [1]),
            cache.batch(1, 9).update([sequence]),
            cache.truncate(sequence, 6),
            cache.append(sequence, [2]),
            cache.commit([sequence]),
        ),
        ValueError,
        "commit: a sequence has 1 new tokens, and a batch was last updated when it had 0",
    ),
    "twice in a batch": (
        lambda cache, sequence: cache.batch(2, 9).update([sequence] * 2),
        ValueError,
        "update: a sequence is there twice",
    ),
    "too many": (
        lambda cache, sequence: cache.batch(1, 9).update([sequence, cache.add_sequence()]),
        ValueError,
        "there are 2 sequences, to be padded to 2, and the batch was made for 1",
    ),
    "padded to fewer": (
        lambda cache, sequence: cache.batch(2, 9).update([sequence], pad_to=0),
        ValueError,
        "padded to 0",
    ),
    "too long": (
        lambda cache, sequence: cache.batch(1, 4).update([sequence]),
        ValueError,
        "a sequence has 2 pages and the batch was made for 1",
    ),
    "no batch": (lambda cache, _: cache.batch(0, 9), ValueError, "batch: 0 sequences of 9 tokens"),
    "truncated to more": (
        lambda cache, sequence: cache.truncate(sequence, 7),
        ValueError,
        "truncate: length is 7, and 6 tokens are in the cache",
    ),
    "negative": (lambda cache, sequence: cache.reserve(sequence, -1), ValueError, "reserve: num_tokens is -1"),
    "half a token": (lambda cache, sequence: cache.reserve(sequence, 1.5), TypeError, "float"),  # type: ignore[arg-type]
    "a text": (lambda cache, sequence: cache.append(sequence, "text"), TypeError, "append: tokens must be"),  # type: ignore[arg-type]
    "a number": (lambda cache, sequence: cache.append(sequence, 3), TypeError, "append: tokens must be"),  # type: ignore[arg-type]
    "a huge token": (lambda cache, _: cache.add_sequence([2**63]), TypeError, "add_sequence: tokens must be"),
    "a salt of text": (lambda cache, _: cache.add_sequence([], salt="x"), TypeError, "salt is a str"),  # type: ignore[arg-type]
}


def freed(cache: PagedKVCache) -> PagedSequence:
    sequence = cache.add_sequence()
    cache.free(sequence)
    return sequence


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused(name: str) -> None:
    misuse, kind, message = MISUSES[name]
    cache = make()
    sequence = sequence_of(cache, range(6))
    with pytest.raises(kind, match=message):
        misuse(cache, sequence)
    assert (sequence.length, sequence.pages) == (6, (0, 1))


GOOD, OTHER = np.zeros((2, 8, 4, 1, 2))
READ_ONLY = GOOD.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("k_caches", "v_caches", "kind", "message"),
    [
        ([], [], ValueError, "there are 0 k_caches and 0 v_caches"),
        ([GOOD], [], ValueError, "there are 1 k_caches and 0 v_caches"),
        ([GOOD], [GOOD], ValueError, r"k_caches\[0\] and v_caches\[0\] are the same memory"),
        ([GOOD[0]], [OTHER], ValueError, r"k_caches\[0\] has shape \(4, 1, 2\)"),
        ([GOOD], [OTHER[:0]], ValueError, r"v_caches\[0\] has shape \(0, 4, 1, 2\)"),
        ([GOOD], [GOOD[1:]], ValueError, r"v_caches\[0\] has 7 pages of 4 and k_caches\[0\] has 8 of 4"),
        ([GOOD], [np.zeros((8, 4, 2, 2))], ValueError, r"v_caches\[0\] has 2 heads in float64 and k_caches\[0\] has 1"),
        ([GOOD], [GOOD.astype("f4")], ValueError, r"v_caches\[0\] has 1 heads in float32"),
        ([GOOD.astype(int)], [GOOD.astype(int)], ValueError, r"k_caches\[0\] is int64; pass one of float16"),
        ([GOOD], [READ_ONLY], ValueError, r"v_caches\[0\] is read-only"),
        ([GOOD], [[1]], TypeError, r"v_caches\[0\] is a list"),
        ([GOOD.astype(">f8")], [GOOD], cufa.UnsupportedError, r"k_caches\[0\] cannot be used: byte-swapped"),
    ],
)
def test_caches_that_do_not_fit_are_refused(k_caches: Any, v_caches: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^PagedKVCache: .*" + message):
        PagedKVCache(k_caches, v_caches)


def test_jax_arrays_are_refused() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(cufa.UnsupportedError, match="JAX arrays cannot be written"):
        PagedKVCache([jax.numpy.zeros((8, 4, 1, 2))], [jax.numpy.zeros((8, 4, 1, 2))])


# Frameworks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_views_of_one_array_are_copied_bit_by_bit(dtype: str) -> None:
    """Keys and values may be slices of one array, and any bits are theirs."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    fused = np.random.default_rng(0).bytes(8 * 2 * 4 * 3 * np.dtype(dtype).itemsize)
    both = np.frombuffer(bytearray(fused), dtype).reshape(8, 2, 4, 1, 3)
    cache = PagedKVCache([both[:, 0]], [both[:, 1, ::-1]])
    fork = cache.fork(sequence_of(cache, [1, 2]))
    expected = both.copy()
    expected[1] = expected[0]
    cache.append(fork, [3])
    assert fork.pages == (1,)
    cache.batch(1, 9).update([fork])
    assert both.tobytes() == expected.tobytes()


def serve(xp: Any, device: Any, dtype: Any) -> tuple[Any, Any, PagedKVCache]:
    """A fork whose page was copied in arrays of `xp`, and a padded batch of it."""
    cache = PagedKVCache.empty(
        num_layers=2, num_pages=6, page_size=2, num_heads_k=1, head_dim=8, dtype=dtype, xp=xp, device=device
    )
    for number, array in enumerate(cache.k_caches + cache.v_caches):
        array[:] = number
        array[1] = number + 0.5
    origin = sequence_of(cache, [1, 2, 3])
    fork = cache.fork(origin)
    cache.append(fork, [4, 5])
    batch = cache.batch(3, 6).update([origin, fork], pad_to=3)
    for number, array in enumerate(cache.k_caches + cache.v_caches):
        assert bool((array[2] == number + 0.5).all()) and bool((array[3] == number).all())
    assert batch.cache_seqlens.tolist() == [3, 3, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 0, 2, 2]
    assert batch.block_table[:, :2].tolist() == [[0, 1], [0, 2], [-1, -1]]
    assert batch.block_table[1].tolist() == [0, 2, 3]
    return batch, fork, cache


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch(device: str) -> None:
    torch = pytest.importorskip("torch")
    batch, fork, cache = serve(torch, device, torch.bfloat16)
    assert batch.block_table.dtype == torch.int32 and batch.block_table.device.type == device
    cache.commit([fork])
    with torch.inference_mode():
        cache.append(fork, [6])
        assert batch.update([fork]).cache_seqlens.tolist() == [5]
    with pytest.raises(cufa.UnsupportedError, match="requires grad"):
        PagedKVCache([torch.zeros(8, 4, 1, 2, requires_grad=True)], [torch.zeros(8, 4, 1, 2)])


@pytest.mark.gpu
def test_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True):
        batch, _, _ = serve(cupy, None, "float16")
    assert isinstance(batch.block_table, cupy.ndarray) and batch.block_table.dtype == np.int32


def test_no_framework_is_imported() -> None:
    program = "import sys, cufa; cufa.PagedKVCache; print(sorted({'cupy', 'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


# With attention -----------------------------------------------------------------------------------------


def test_the_loop_of_the_docs_writes_what_it_would_without_a_cache() -> None:
    page = (Path(__file__).parents[2] / "docs" / "paging.md").read_text()
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    run = [textwrap.dedent(block) for _, block in blocks if "import torch" not in block]
    assert len(run) == len(blocks) - 1 == 3
    names: dict[str, Any] = {}
    exec(run[0], names)
    embedding, weights = names["embedding"], names["weights"]

    def logits(tokens: list[int]) -> np.ndarray:
        """Those behind every token, by whole attention."""
        x = embedding[tokens]
        for weight in weights:
            q, k, v = (x @ weight).reshape(len(x), 3, 4, 32).swapaxes(0, 1)[:, None]
            x = x + cufa.attention(q, k, v, causal=True)[0].reshape(len(x), -1)
        return x @ embedding.T

    prompts, texts = names["prompts"], names["texts"]
    pairs = [(prompt, text) for prompt in prompts for text in texts if text[: len(prompt)] == prompt]
    assert len(pairs) == len(texts) == 8 and all(len(text) == 96 for text in texts)
    for prompt, text in pairs:
        scores = logits(text[:-1])[len(prompt) - 1 :]
        chosen = scores[np.arange(len(scores)), text[len(prompt) :]]
        np.testing.assert_allclose(chosen, scores.max(axis=-1), rtol=1e-5)
    stats = names["cache"].stats()
    assert stats.cached_tokens and stats.evictions
    for block in run[1:]:
        exec(block, names)
    assert names["cache"].stats().copies == 2
    for beam in names["beams"]:
        names["cache"].append(beam, [3])
        names["batch"].update([beam])
        np.testing.assert_allclose(names["forward"]([3])[0], logits(beam.tokens)[-1], rtol=1e-4, atol=1e-4)
