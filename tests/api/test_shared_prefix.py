"""Attention of sequences that share prefixes is attention over the whole keys of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cufa
from cufa import reference
from cufa._api import shared_prefix
from cufa.testing import to_numpy

OFFSETS = np.int32


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Sequences with prefixes: a common one, and levels of groups of sequences below it.

    Attributes
    ----------
    queries, keys : tuple of int
        Of each sequence, its own ones.
    prefix : int or None
        Length of the common prefix.
    levels : tuple of tuple of (int, int)
        Of each level: how many sequences a group has, and the length of its prefix.
    packed : bool
        Else all sequences have as many queries, and as many keys, as the first.
    options : dict
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    prefix: int | None
    levels: tuple[tuple[tuple[int, int], ...], ...]
    packed: bool
    options: dict[str, Any]

    def arrays(self) -> dict[str, Any]:
        rng = np.random.default_rng(len(self.queries))

        def make(rows: int, heads: int, dim: int) -> np.ndarray:
            return rng.standard_normal((rows, heads, dim)).astype(np.float32)

        found = {
            "q": make(sum(self.queries), 4, 16),
            "k": make(sum(self.keys), 2, 16),
            "v": make(sum(self.keys), 2, 24),
        }
        found |= {"k_prefix": None, "v_prefix": None}
        if self.prefix is not None:
            found |= {"k_prefix": make(self.prefix, 2, 16), "v_prefix": make(self.prefix, 2, 24)}
        rows = np.cumsum([0, *self.queries])
        levels = []
        for level in self.levels:
            ends = rows[np.cumsum([0, *(count for count, _ in level)])].astype(OFFSETS)
            lengths = np.cumsum([0, *(length for _, length in level)]).astype(OFFSETS)
            levels.append((make(lengths[-1], 2, 16), make(lengths[-1], 2, 24), ends, lengths))
        found["levels"] = levels
        if self.packed:
            found |= {"cu_seqlens_q": rows.astype(OFFSETS), "cu_seqlens_k": np.cumsum([0, *self.keys]).astype(OFFSETS)}
        else:
            for name, count in (("q", self.queries[0]), ("k", self.keys[0]), ("v", self.keys[0])):
                found[name] = found[name].reshape(len(self.queries), count, *found[name].shape[1:])
        return found

    def whole(self, arrays: dict[str, Any], b: int) -> tuple[Any, Any, Any]:
        """q, and all keys and values, of a sequence."""
        first, last = sum(self.queries[:b]), sum(self.queries[: b + 1])
        own = slice(sum(self.keys[:b]), sum(self.keys[: b + 1]))
        q, k, v = (arrays[name] if self.packed else arrays[name].reshape(-1, *arrays[name].shape[2:]) for name in "qkv")
        parts = [(k[own], v[own])]
        for level_k, level_v, rows, lengths in reversed(arrays["levels"]):
            group = int(np.searchsorted(rows, first, side="right")) - 1
            part = slice(lengths[group], lengths[group + 1])
            parts.insert(0, (level_k[part], level_v[part]))
        if arrays["k_prefix"] is not None:
            parts.insert(0, (arrays["k_prefix"], arrays["v_prefix"]))
        return q[None, first:last], *(np.concatenate(each)[None] for each in zip(*parts, strict=True))

    def check(self, out: Any, lse: Any, arrays: dict[str, Any]) -> None:
        out, lse = to_numpy(out), to_numpy(lse)
        assert out.dtype == arrays["q"].dtype and out.shape == (*arrays["q"].shape[:-1], 24)
        for b in range(len(self.queries)):
            rows = slice(sum(self.queries[:b]), sum(self.queries[: b + 1]))
            right = reference.attention(*self.whole(arrays, b), **self.options, return_lse=True)
            np.testing.assert_allclose(out[rows] if self.packed else out[b], right[0][0], atol=3e-6)
            np.testing.assert_allclose(lse[:, rows] if self.packed else lse[b], right[1][0], atol=3e-6)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    packed, batch = draw(st.booleans()), draw(st.integers(1, 5))
    queries = tuple(draw(st.integers(1, 4)) for _ in range(batch)) if packed else (draw(st.integers(1, 4)),) * batch
    more = [draw(st.integers(0, 9)) for _ in range(batch)] if packed else [draw(st.integers(0, 9))] * batch
    levels = []
    for _ in range(draw(st.integers(0, 2))):
        counts = [1] * batch
        while len(counts) > 1 and draw(st.booleans()):
            counts[0] += counts.pop()
        levels.append(tuple((count, draw(st.integers(0, 40))) for count in counts))
    prefix = draw(st.integers(0, 70)) if not levels or draw(st.booleans()) else None
    options: dict[str, Any] = {
        "softmax_scale": draw(st.sampled_from((None, 0.3))),
        "softcap": draw(st.sampled_from((0.0, 2.0))),
    }
    options |= draw(st.sampled_from(({}, {"causal": True}, {"window_size": (None, 2)})))
    if draw(st.booleans()):
        options["sinks"] = np.array([0.5, -1, 2, 0], np.float32)
    keys = tuple(count + each for count, each in zip(queries, more, strict=True))
    return Tree(queries=queries, keys=keys, prefix=prefix, levels=tuple(levels), packed=packed, options=options)


@settings(max_examples=150)
@given(tree=trees())
def test_it_is_attention_over_the_whole_keys(tree: Tree) -> None:
    arrays = tree.arrays()
    tree.check(*cufa.attention_shared_prefix(**arrays, **tree.options, return_lse=True), arrays)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that prefixes of a few keys are cut into parts."""
    for name, value in {"LEAST_PART_KEYS": 3, "FEW_ROWS": (0,), "FEW_TILES": 0}.items():
        monkeypatch.setattr(shared_prefix, name, value)


@pytest.mark.usefixtures("parts")
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees())
def test_parts_of_a_prefix(tree: Tree) -> None:
    arrays = tree.arrays()
    tree.check(*cufa.attention_shared_prefix(**arrays, **tree.options, return_lse=True), arrays)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("keys", "merges"), [(30, 1), (31, 2)])
def test_parts_are_merged_with_own_keys(keys: int, merges: int) -> None:
    """In one call, and those that are left in another."""
    arrays = Tree(queries=(2,) * 4, keys=(6,) * 4, prefix=keys, levels=(), packed=False, options={}).arrays()
    cufa.stats(reset=True)
    cufa.attention_shared_prefix(**arrays)
    assert cufa.stats().launches == {"cpu (attention)": merges + 1, "cpu (merge_states)": merges}


@pytest.mark.parametrize(
    ("queries", "heads", "keys", "count"),
    [
        (64, (32, 8), 8192, 8),
        (64, (32, 8), 8190, 7),  # which divides it
        (64, (32, 8), 8191, 8),  # seven keys are left
        (64, (32, 8), 1535, 1),
        (64, (32, 8), 1536, 3),
        (16, (32, 8), 8192, 1),  # few rows
        (256, (32, 8), 8192, 2),
        (512, (32, 8), 8192, 1),  # tiles enough
        (64, (4, 1), 1 << 17, 1),  # parts would be too few
        (1024, (4, 1), 1 << 17, 4),
        (0, (4, 1), 8192, 1),
    ],
)
def test_how_many_parts(queries: int, heads: tuple[int, int], keys: int, count: int) -> None:
    assert shared_prefix._count_parts(queries, *heads, keys) == count


TREE = Tree(
    queries=(2,) * 4,
    keys=(6,) * 4,
    prefix=30,
    levels=(((3, 20), (1, 5)),),
    packed=False,
    options={"causal": True},
)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("appends", [False, True])
def test_own_keys_in_caches(paged: bool, appends: bool) -> None:
    arrays = TREE.arrays()
    rng, new = np.random.default_rng(1), 2 if appends else 0
    caches = [np.full((4, 16, *arrays[name].shape[2:]), np.nan, np.float32) for name in "kv"]
    for cache, name in zip(caches, "kv", strict=True):
        cache[:, : 6 - new] = arrays[name][:, : 6 - new]
    more: dict[str, Any] = {"cache_seqlens": np.full(4, 6 - new, OFFSETS)}
    if paged:
        order = rng.permutation(16)
        caches = [cache.reshape(16, 4, *cache.shape[2:])[np.argsort(order)] for cache in caches]
        more["block_table"] = order.reshape(4, 4).astype(OFFSETS)
    if appends:
        more |= {f"{name}_new": arrays[name][:, -new:] for name in "kv"}
    given_arrays = arrays | dict(zip("kv", caches, strict=True)) | more
    TREE.check(*cufa.attention_shared_prefix(**given_arrays, **TREE.options, return_lse=True), arrays)


def test_results_go_where_they_are_to_go() -> None:
    arrays = TREE.arrays()
    out = np.full((4, 2, 4, 24), np.nan, np.float32)
    assert cufa.attention_shared_prefix(**arrays, causal=True, out=out) is out
    np.testing.assert_array_equal(out, cufa.attention_shared_prefix(**arrays, causal=True))


ARRAYS = TREE.arrays()
PACKED = {"cu_seqlens_q": np.arange(0, 9, 2, dtype=OFFSETS), "cu_seqlens_k": np.array([0, 6, 7, 18, 24], OFFSETS)}
PACKED |= {name: ARRAYS[name].reshape(-1, *ARRAYS[name].shape[2:]) for name in "qkv"}
WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"v_prefix": None}, TypeError, "k_prefix and v_prefix belong together"),
    ({"k_prefix": None, "v_prefix": None, "levels": ()}, TypeError, "there is no prefix"),
    ({"levels": [ARRAYS["levels"][0][:3]]}, TypeError, r"levels\[0\] is no \(k, v, cu_seqlens_q, cu_seqlens_k\)"),
    ({"k_prefix": ARRAYS["k_prefix"][None]}, ValueError, r"k_prefix has shape \(1, 30, 2, 16\); \(seqlen, num_heads"),
    ({"v_prefix": ARRAYS["v_prefix"][..., 1:]}, ValueError, "v_prefix has shape .* but v has"),
    ({"q": ARRAYS["q"][0]}, ValueError, r"q has shape \(2, 4, 16\); 4 dimensions"),
    ({"q": [1.0]}, TypeError, "q is a list; pass a CuPy"),
    ({"out": np.empty((4, 2, 4, 16), np.float32)}, ValueError, r"out has shape \(4, 2, 4, 16\); \(4, 2, 4, 24\)"),
    ({"out": np.empty((4, 2, 4, 24))}, ValueError, "out has dtype float64 but q has float32"),
    ({"alibi_slopes": np.ones(4, np.float32)}, cufa.UnsupportedError, "alibi_slopes are not supported"),
    ({"window_size": (3, 0)}, cufa.UnsupportedError, "a window that is bounded to the left"),
    ({"k": ARRAYS["k"][:, :0], "v": ARRAYS["v"][:, :0], "causal": True}, ValueError, "sequence 0 has more queries"),
    (
        PACKED | {"causal": True, "seqused_k": np.array([6, 0, 6, 6], OFFSETS)},
        ValueError,
        "sequence 1 has more queries",
    ),
    ({"cache_seqlens": np.array([6, 6, 6, 0], OFFSETS), "causal": True}, ValueError, "sequence 3 has more queries"),
    (
        {name: PACKED[name] for name in ("q", "cu_seqlens_q")}
        | {"cache_seqlens": np.array([6, 6, 0, 6], OFFSETS), "window_size": (None, 0)},
        ValueError,
        "sequence 2 has more",
    ),
    ({"cu_seqlens_q": PACKED["cu_seqlens_q"]}, TypeError, "cu_seqlens_q and cu_seqlens_k belong together"),
    ({"cache_seqlens": np.full(4, 6, OFFSETS), "seqused_k": np.full(4, 6, OFFSETS)}, TypeError, "cu_seqlens_k or seq"),
)


@pytest.mark.parametrize(("changed", "kind", "message"), WRONG, ids=[each[2][:30] for each in WRONG])
def test_what_is_wrong_is_said(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^attention_shared_prefix: {message}"):
        cufa.attention_shared_prefix(**(ARRAYS | changed))


def test_one_key_less_than_queries_will_do() -> None:
    """The first query then sees all of the prefix, and nothing else."""
    tree = Tree(queries=(3, 3), keys=(2, 2), prefix=9, levels=(), packed=False, options={"causal": True})
    arrays = tree.arrays()
    tree.check(*cufa.attention_shared_prefix(**arrays, causal=True, return_lse=True), arrays)


@pytest.mark.usefixtures("parts")
def test_jax_differentiates_parts() -> None:
    test_jax_differentiates_it()


def test_jax_differentiates_it() -> None:
    jax = pytest.importorskip("jax")
    arrays = TREE.arrays()
    given_arrays = {name: jax.numpy.asarray(x) for name, x in arrays.items() if name != "levels"}
    levels = [tuple(map(jax.numpy.asarray, level)) for level in arrays["levels"]]

    def loss(k_prefix: Any, q: Any, k: Any) -> Any:
        more = given_arrays | {"k_prefix": k_prefix, "q": q, "k": k}
        return (cufa.attention_shared_prefix(**more, levels=levels, causal=True) ** 2).sum()

    def whole(k_prefix: Any, q: Any, k: Any) -> Any:
        changed = arrays | {name: np.asarray(given_arrays[name]) for name in "qk"}
        total = jax.numpy.float32(0)
        for b in range(4):
            _, keys, values = TREE.whole(changed, b)
            keys = jax.numpy.concatenate([k_prefix[None], keys[:, 30:-6], k[b : b + 1]], axis=1)
            total += (cufa.attention(q[b : b + 1], keys, jax.numpy.asarray(values), causal=True) ** 2).sum()
        return total

    point = [given_arrays[name] for name in ("k_prefix", "q", "k")]
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(*point)
    for one, other in zip(found, jax.grad(whole, (0, 1, 2))(*point), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.usefixtures("parts")
def test_torch_differentiates_parts() -> None:
    test_torch_differentiates_it()


def test_torch_differentiates_it() -> None:
    torch = pytest.importorskip("torch")
    arrays = {name: None if name == "levels" else torch.tensor(x) for name, x in TREE.arrays().items()}
    arrays["levels"] = [tuple(map(torch.tensor, level)) for level in TREE.arrays()["levels"]]
    for name in ("q", "k_prefix", "v"):
        arrays[name].requires_grad_()
    out, lse = cufa.attention_shared_prefix(**arrays, causal=True, return_lse=True)
    TREE.check(out.detach(), lse.detach(), TREE.arrays())
    gradients = torch.autograd.grad(out.sum(), [arrays[name] for name in ("q", "k_prefix", "v")])
    compiled = torch.compile(cufa.attention_shared_prefix, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**arrays, causal=True), out)
    torch._dynamo.reset()
    step = 1e-3 * torch.ones_like(arrays["v"])
    moved = cufa.attention_shared_prefix(**(arrays | {"v": (arrays["v"] + step).detach()}), causal=True)
    assert abs(float((moved - out).detach().sum()) - float((gradients[2] * step).sum())) < 1e-3
    assert all(x.abs().max() > 1e-3 for x in gradients)
