"""On a GPU: sequences that are so short, packed ones on average, that they have small tiles to themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gradients import Call
from test_gpu import attend, check, framework, same
from test_gpu_backward import check_with_own_forward, nearly_same

import cufa
from cufa.testing import Case, assert_close, to_numpy

pytestmark = pytest.mark.gpu

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 1)},
    "terms": {"causal": True, "softcap": 5.0, "alibi_ndim": 1, "sinks": True},
    "narrow": {"window_size": (None, 3), "layouts": ("padded", "offset", "strided", "padded")},
}
SIZES = ((16, 16), (64, 64), (128, 128), (256, 256), (40, 200))
LENGTHS = ((1, 1), (2, 2), (16, 16), (17, 15), (7, 33), (32, 32), (31, 64), (1, 64), (20, 3))
"""Of the small tiles, and at their edges."""

# Each kernel takes a second to compile: every feature and every size, but not with one another.
PAIRS = [(size, feature) for i, size in enumerate(SIZES) for j, feature in enumerate(FEATURES) if (i - j) % 5 in (0, 2)]
of_every_kind = pytest.mark.parametrize(("head_dims", "features"), PAIRS, ids=str)


def case_of(head_dims: tuple[int, int], features: str, **sizes: Any) -> Case:
    dtype = "float16" if head_dims[0] in (64, 40) else "bfloat16"
    facts: dict[str, Any] = {"num_heads_q": 4, "num_heads_k": 2, "dtype": dtype, "return_lse": True}
    return Case(head_dim=head_dims[0], head_dim_v=head_dims[1], **facts | FEATURES[features] | sizes)


def lengths_of(head_dims: tuple[int, int], features: str) -> tuple[tuple[int, int], ...]:
    """Every second pair of lengths: the others for the other feature of this size, and the other size of this feature.

    Tiles are as large as lengths need, and each takes a kernel.
    """
    return LENGTHS[(SIZES.index(head_dims) - [*FEATURES].index(features)) % 5 != 0 :: 2]


def packed_sizes(lengths: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Sequences of these lengths of q, and the same of k in another order."""
    other = np.random.default_rng(seed).permutation(lengths)
    return {"batch": len(lengths), "seqlen_q": tuple(lengths.tolist()), "seqlen_k": tuple(other.tolist())}


def few_packed() -> dict[str, Any]:
    return packed_sizes(np.random.default_rng(1).integers(0, 41, 70))


def many_packed() -> dict[str, Any]:
    """One of them long, and enough that a thread block takes some, one after the other."""
    lengths = np.random.default_rng(2).integers(0, 33, 800)
    lengths[[0, 333]] = 500, 0
    return packed_sizes(lengths)


def has_small_tiles(case: Case, xp: Any) -> bool:
    return "so short" in cufa.explain(**case.arrays(xp), **case.options).reason


@of_every_kind
def test_short_dense_sequences(head_dims: tuple[int, int], features: str) -> None:
    cupy = framework("cupy")
    for seqlen_q, seqlen_k in lengths_of(head_dims, features):
        case = case_of(head_dims, features, batch=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        assert has_small_tiles(case, cupy)
        check(case, cupy)


@of_every_kind
def test_short_packed_sequences(head_dims: tuple[int, int], features: str) -> None:
    cupy = framework("cupy")
    for sizes in (few_packed(), many_packed()):
        case = case_of(head_dims, features, **sizes)
        assert has_small_tiles(case, cupy)
        check(case, cupy)


@pytest.mark.parametrize("features", ["full", "terms", "narrow"])
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 40)], ids=str)
def test_short_sequences_of_float32(head_dims: tuple[int, int], features: str) -> None:
    cupy = framework("cupy")
    for seqlen_q, seqlen_k in ((1, 1), (16, 16), (7, 20), (32, 32)):
        case = case_of(head_dims, features, batch=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype="float32")
        assert "so short" in cufa.explain(**case.arrays(cupy), **case.options).reason
        check(case, cupy)
        check_with_own_forward(case)
    case = case_of(head_dims, features, **many_packed(), dtype="float32")
    check(case, cupy)
    check_with_own_forward(case, deterministic=True)


@of_every_kind
def test_gradients_of_short_dense_sequences(head_dims: tuple[int, int], features: str) -> None:
    """Deterministic or not they are the same: one thread block has all that there is to add up."""
    cupy = framework("cupy")
    for seqlen_q, seqlen_k in lengths_of(head_dims, features)[1:]:
        case = case_of(head_dims, features, batch=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        call = Call(case=case)
        found = call.right(cupy)
        arrays = call.arrays(cupy)
        for deterministic in (False, True):
            again = cufa.attention_backward(**arrays, **case.options, deterministic=deterministic)
            assert all(map(same, found, again))


@of_every_kind
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_short_packed_sequences(head_dims: tuple[int, int], features: str, deterministic: bool) -> None:
    for sizes in (few_packed(), many_packed()):
        check_with_own_forward(case_of(head_dims, features, **sizes), deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_short_sequences_are_bitwise_repeatable(head_dim: int) -> None:
    cupy = framework("cupy")
    case = case_of((head_dim, head_dim), "causal", **many_packed())
    out, lse, arrays = attend(case, cupy)
    first = None
    for _ in range(20):
        again, again_lse = cufa.attention_varlen(**arrays, **case.options, return_lse=True)
        assert same(out, again) and same(lse, again_lse)
        for deterministic in (True, False):
            found = cufa.attention_varlen_backward(
                out, arrays["q"], arrays["k"], arrays["v"], out, lse, arrays["cu_seqlens_q"], arrays["cu_seqlens_k"],
                causal=True, deterministic=deterministic,
            )  # fmt: skip
            first = first or found
            assert all(map(same, found[1:], first[1:]))
            assert (same if deterministic else nearly_same)(found[0], first[0])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (9, 2)}], ids=["none", "causal", "window"])
def test_what_lies_beyond_a_short_sequence_never_counts(head_dim: int, mask: dict[str, Any]) -> None:
    """Here rows of no sequence, and keys that are not live, are NaN and infinite."""
    cupy = framework("cupy")
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 24, (2, 300))
    starts_q, starts_k = (np.cumsum([7, *each], dtype=np.int32) for each in lengths)
    used = np.minimum(lengths[1], rng.integers(0, 24, 300)).astype(np.int32)
    totals = starts_q[-1] + 9, starts_k[-1] + 70
    q, k, v = (
        rng.standard_normal((total, heads, head_dim)).astype(np.float16)
        for total, heads in ((totals[0], 4), (totals[1], 2), (totals[1], 2))
    )
    live = np.zeros(len(k), bool)
    for start, count in zip(starts_k, used, strict=False):
        live[start : start + count] = True
    outside = np.ones(len(q), bool)
    outside[starts_q[0] : starts_q[-1]] = False
    k[~live], v[~live], q[outside] = np.nan, np.inf, np.nan
    offsets = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "seqused_k": used}
    host = dict(zip("qkv", (q, k, v), strict=True)) | offsets
    arrays = {name: cupy.asarray(array) for name, array in host.items()}
    assert "so short" in cufa.explain(**arrays, **mask).reason
    out, lse = cufa.attention_varlen(**arrays, **mask, return_lse=True)
    assert np.isfinite(to_numpy(out).astype(np.float32)).all() and not to_numpy(out)[outside].any()
    assert_close(out, lse=lse, **host, **mask)
    dout = cupy.asarray(np.where(outside[:, None, None], np.nan, rng.standard_normal(q.shape)).astype(np.float16))
    for deterministic in (False, True):
        found = cufa.attention_varlen_backward(dout, out=out, lse=lse, **arrays, **mask, deterministic=deterministic)
        for gradient, dead in zip(map(to_numpy, found), (outside, ~live, ~live), strict=True):
            assert np.isfinite(gradient.astype(np.float32)).all() and not gradient[dead].any()


def test_heads_and_slots_of_a_sequence_are_taken_in_a_row() -> None:
    """Whatever number of units a block takes, and wherever it begins: of one, three and many heads."""
    cupy = framework("cupy")
    for heads in ((1, 1), (3, 3), (24, 8)):
        for batch in (257, 3000):
            lengths = np.random.default_rng(batch).choice(
                [0, 1, 15, 16, 17, 40], batch, p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]
            )
            sizes = packed_sizes(lengths) | {"num_heads_q": heads[0], "num_heads_k": heads[1]}
            check(case_of((16, 16), "causal", **sizes), cupy)
