"""Solutions of the exercises of docs/learn, which have to pass the checks that stand beside them there."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
from test_learn import PAGES, run

Array = Any


# Chapter 1


def merge_outputs(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    # logaddexp takes the larger one out; of two empty parts it makes -inf, which no number is to be taken from.
    lse = np.logaddexp(lse_a, lse_b)
    base = np.where(lse > -np.inf, lse, 0)
    weights = np.exp(lse_a - base)[:, None], np.exp(lse_b - base)[:, None]
    return weights[0] * out_a + weights[1] * out_b, lse


def lazy_softmax(s: Array, v: Array, block: int, slack: float) -> tuple[Array, int]:
    base, l, o, count = s[:block].max(), 0.0, np.zeros(v.shape[1]), 0
    for j in range(0, len(s), block):
        largest = s[j : j + block].max()
        if largest > base + slack:
            l, o = l * np.exp(base - largest), o * np.exp(base - largest)
            base, count = largest, count + 1
        p = np.exp(s[j : j + block] - base)
        l, o = l + p.sum(), o + p @ v[j : j + block]
    return o / l, count


def scores_gradient(s: Array, v: Array, dout: Array, dlse: float) -> Array:
    p = np.exp(s - s.max())
    p /= p.sum()
    return p * (v @ dout - dout @ (p @ v) + dlse)


def online_with_sink(q_row: Array, k: Array, v: Array, block: int, sink: float) -> Array:
    m, l, o = sink, 1.0, np.zeros(v.shape[1])  # the state of a key with this score and the value 0
    for j in range(0, len(k), block):
        s = k[j : j + block] @ q_row / np.sqrt(len(q_row))
        new = max(m, s.max())
        p = np.exp(s - new)
        l = l * np.exp(m - new) + p.sum()
        o = o * np.exp(m - new) + p @ v[j : j + block]
        m = new
    return o / l


# Chapter 2


def grouped_traffic(seqlen: int, head_dim: int, block_m: int, group: int, packed: bool) -> int:
    # Long sequences gain nothing by packing, as tiles are full either way: it is the L2 that gains. Short ones do.
    tiles = math.ceil(seqlen * group / block_m) if packed else group * math.ceil(seqlen / block_m)
    return tiles * 2 * seqlen * head_dim


def best_tile(head_dim: int, stages: int) -> tuple[int, int]:
    fitting = [
        (block_m, block_n)
        for block_m in (64, 128, 192)
        for block_n in range(16, 513, 16)
        if block_m * (head_dim + block_n + block_n // 2) <= 3 * 65536 // 4
        and 2 * head_dim * (block_m + 2 * stages * block_n) <= 227 * 1024
    ]
    return max(fitting)  # bytes fall with block_m alone


def dealt(n: int) -> list[tuple[int, int]]:
    return [(i, n - 1 - i) for i in range(n // 2)]


def queries_outside(
    q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array, scale: float, block_m: int, block_n: int
) -> tuple[Array, Array, Array]:
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    dk[:], dv[:] = 0, 0
    for i in range(0, len(q), block_m):
        rows = slice(i, i + block_m)
        q_i, dout_i, lse_i, delta_i = q[rows], dout[rows], lse[rows], delta[rows]
        dq_i = np.zeros(q_i.shape)
        for j in range(0, len(k), block_n):
            keys = slice(j, j + block_n)
            k_j = k[keys]
            p = np.exp(scale * (q_i @ k_j.T) - lse_i[:, None])
            ds = p * (dout_i @ v[keys].T - delta_i[:, None])
            dq_i += scale * (ds @ k_j)
            dk[keys] += scale * (ds.T @ q_i)
            dv[keys] += p.T @ dout_i
        dq[rows] = dq_i
    return dq, dk, dv


# Chapter 3


def rounds(addresses: list[int]) -> int:
    words = {address // 4 + word for address in addresses for word in range(4)}
    return max(sum(word % 32 == bank for word in words) for bank in range(32))


def swizzled(row: int, chunk: int, chunks: int) -> int:
    return 16 * (row * chunks + (chunk ^ (row % 8)))


def result_places(lane: int) -> list[tuple[int, int]]:
    g, t = divmod(lane, 4)
    return [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]


# Chapter 4


def decode_bounds(seqlen: int, heads: int, kv_heads: int, head_dim: int) -> tuple[float, float, float]:
    for_bytes = 2 * seqlen * kv_heads * head_dim * 2 / 4.45e12
    for_products = 4 * seqlen * heads * head_dim / 794e12
    return for_bytes, for_products, 794 / 4.45  # 4 bytes and 4 operations for each number of k and v and query head


def tail(blocks: int, sms: int, resident: int) -> float:
    places = sms * resident
    return 1 - blocks / (math.ceil(blocks / places) * places)


def softmax_clocks(rows: int, columns: int, maxima: bool) -> float:
    scores = rows * columns / 128  # of a thread
    return max(scores * (1 + 1 + maxima + 0.5 + 1), scores * 32 / 4)


@pytest.mark.parametrize("page", PAGES[1:])
def test_solutions_pass_the_checks_of_the_page(page: str) -> None:
    names = run(page)
    checks = {name.removeprefix("check_"): check for name, check in names.items() if name.startswith("check_")}
    assert checks
    for name, check in checks.items():
        with pytest.raises(NotImplementedError):
            check(names[name])
        solution = globals()[name]
        assert list(inspect.signature(solution).parameters) == list(inspect.signature(names[name]).parameters)
        check(solution)


@pytest.mark.parametrize(
    ("page", "name", "wrong"),
    [
        (
            "theory",
            "merge_outputs",
            lambda out_a, lse_a, out_b, lse_b: ((out_a + out_b) / 2, np.logaddexp(lse_a, lse_b)),
        ),
        ("theory", "scores_gradient", lambda s, v, dout, dlse: scores_gradient(s, v, dout, 0.0)),
        ("ladder", "swizzled", lambda row, chunk, chunks: 16 * (row * chunks + chunk)),
        ("versions", "dealt", lambda n: [(i, i + 1) for i in range(0, n, 2)]),
    ],
)
def test_checks_refuse_what_is_wrong(page: str, name: str, wrong: Any) -> None:
    with pytest.raises(AssertionError):
        run(page)[f"check_{name}"](wrong)
