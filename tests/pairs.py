"""Every pair of features in some problem: a small set of problems that covers them, and how results are held to the
reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gradients import lay_out

import cufa
from cufa import functions, masks
from cufa.testing import Case, View, assert_close, assert_gradients_close, to_numpy

Row = dict[str, Any]
"""A value for each feature."""

FEATURES: Row = {
    "mask": (None, "array", "object", "function", "blocks"),
    "layout": ("contiguous", "transposed", "fused", "padded", "strided"),
    "head_dims": ((64, 64), (16, 24), (33, 57), (128, 96), (192, 256)),
    "score": (None, "captured", "hiding"),
    "bias": (None, "xxxx", "1x1x", "x1x1"),
    "window": ({}, {"causal": True}, {"window_size": (60, 20)}),
    "lengths": ((130, 200), (20, 30), (3, 300)),
    "heads": ((2, 2), (4, 2), (4, 1)),
    "dtype": ("float16", "bfloat16", "float32"),
    "alibi_ndim": (0, 1, 2),
    "rel_bias": (None, 20),
    "softcap": (0.0, 5.0),
    "dropout_p": (0.0, 0.3),
    "sinks": (False, True),
    "packed": (False, True),
    "dlse": (False, True),
    "deterministic": (False, True),
}
"""What there is of each; lengths are those of q and k."""

REFUSED: tuple[tuple[Row, str], ...] = (
    ({"mask": "blocks", "packed": True}, "a BlockMask serves sequences of one length alone"),
    ({"score": "captured", "deterministic": True}, "the gradients of score add up in no fixed order on a GPU"),
)
"""The pairs that kernels refuse, and why."""

PLAIN: Row = {name: values[0] for name, values in FEATURES.items()}


def refused(row: Row) -> bool:
    """Whether a row, of which some features may not be chosen yet, has a pair that is refused."""
    return any(pair.items() <= row.items() for pair, _ in REFUSED)


def pairs_of(row: Row) -> set[tuple[Any, ...]]:
    """The pairs of a row's features, which are told by the places of their values."""
    placed = [(name, FEATURES[name].index(value)) for name, value in row.items()]
    return {tuple(sorted(pair)) for pair in itertools.combinations(placed, 2)}


def cover(seed: int = 0) -> list[Row]:
    """Rows in which every pair occurs that is not refused.

    Greedily: a row begins with a pair that is left, and takes the features in a random order, of each the value that
    covers most of what is left.
    """
    rng, rows = np.random.default_rng(seed), list[Row]()
    left = set[tuple[Any, ...]]()
    for one, other in itertools.combinations(FEATURES, 2):
        for values in itertools.product(FEATURES[one], FEATURES[other]):
            pair = {one: values[0], other: values[1]}
            left |= set() if refused(pair) else pairs_of(pair)
    while left:
        row = {name: FEATURES[name][place] for name, place in min(left)}
        for name in rng.permutation([name for name in FEATURES if name not in row]).tolist():
            options = [row | {name: value} for value in FEATURES[name]]
            row = max((each for each in options if not refused(each)), key=lambda each: len(pairs_of(each) & left))
        rows.append({name: row[name] for name in FEATURES})
        left -= pairs_of(row)
    return rows


ROWS = tuple(cover())


def name_of(row: Row) -> str:
    """What differs from a plain call."""
    return "-".join(f"{name}={value}" for name, value in row.items() if value != PLAIN[name])


def captured(score: Any, batch: Any, head: Any, query: Any, key: Any, table: Any) -> Any:
    return score * table[head] - functions.tanh(table[(query.position - key) % 4])


def hiding(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Some scores are -infinity, and in some rows all."""
    return functions.where(((query + key) % 5 == 0) | (query % 16 == 2), -math.inf, score)


def allowing(batch: Any, head: Any, query: Any, key: Any, allowed: Any) -> Any:
    """Some queries see no key."""
    return (allowed[head, key % 5] | (query.position == key)) & (query % 16 != 2)


class Problem(NamedTuple):
    """A call: its case, and arrays beside those of the case by name."""

    case: Case
    row: Row
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, row: Row, seed: int = 0) -> Problem:
        rows, keys = row["lengths"]
        (heads_q, heads_k), (head_dim, head_dim_v) = row["heads"], row["head_dims"]
        same = {
            name: row[name] for name in ("bias", "rel_bias", "alibi_ndim", "sinks", "softcap", "dropout_p", "dtype")
        }
        case = Case(
            batch=2,
            seqlen_q=(rows, rows // 2) if row["packed"] else rows,
            seqlen_k=(keys // 2, keys) if row["packed"] else keys,
            num_heads_q=heads_q,
            num_heads_k=heads_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask="xxxx" if row["mask"] == "array" else None,
            layouts=(row["layout"],) * 4,
            seed=seed,
            **row["window"],
            **same,
        )
        rng = np.random.default_rng([seed, 3])
        arrays = {name: x for name, x in case.arrays().items() if name not in ("q", "k", "v")}
        if "mask" in arrays:
            arrays["mask"][:, :, 2::16] = False
        arrays["table"] = rng.uniform(0.5, 1, heads_q).astype(np.float32)
        arrays["allowed"] = rng.random((heads_q, 5)) < 0.7
        arrays["dout"] = rng.standard_normal(case.view("out").shape).astype(case.arrays()["q"].dtype)
        leading = (heads_q, case.view("q").shape[0]) if row["packed"] else (2, heads_q, rows)
        if row["dlse"]:
            arrays["dlse"] = rng.standard_normal(leading).astype(np.float32)
        return cls(case, row, arrays)

    @property
    def blocks(self) -> cufa.BlockMask:
        rows, keys = self.row["lengths"]
        by_head = masks.from_function(lambda batch, head, query, key: (key + head) % 7 == 0)
        mask = (masks.chunked(64) | by_head) & masks.from_function(lambda batch, head, query, key: query % 16 != 2)
        return cufa.BlockMask.of(mask, 1, self.row["heads"][1], rows, keys)

    def options(self, place: Callable[[np.ndarray], Any] | None = None) -> dict[str, Any]:
        """The keywords of a call on arrays that a function puts somewhere; those of the reference without one."""
        put = place or (lambda array: array)
        apart = ("table", "allowed", "dout", "dlse")
        given: dict[str, Any] = {name: put(x) for name, x in self.arrays.items() if name not in apart}
        given |= self.case.options
        table, allowed = put(self.arrays["table"]), put(self.arrays["allowed"])

        def closure(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
            return captured(score, batch, head, query, key, table)

        scores = {None: None, "captured": closure if place else (captured, table), "hiding": hiding}
        given["score"] = scores[self.row["score"]]
        if self.row["mask"] == "object":
            given["mask"] = masks.dilated(3) | masks.chunked(32)
        elif self.row["mask"] == "function":
            given["mask"] = allowing, allowed
        elif self.row["mask"] == "blocks":
            given["mask"] = self.blocks._copied(place) if place else self.blocks
        return given

    def run(self, xp: Any = np) -> list[Any]:
        """Out, lse and the gradients; `xp` is as for `View.on`."""

        def place(array: np.ndarray) -> Any:
            return View.of(array.shape).on(np.ascontiguousarray(array).ravel(), xp)

        q, k, v = (self.case.view(name).on(self.case.flat(name), xp) for name in "qkv")
        dout, layout = self.arrays["dout"], self.row["layout"]
        given = self.options(place)
        offsets = [given.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k") if name in given]
        attend = cufa.attention_varlen if offsets else cufa.attention
        differentiate = cufa.attention_varlen_backward if offsets else cufa.attention_backward
        out, lse = attend(q, k, v, *offsets, **given, return_lse=True)
        dlse = place(self.arrays["dlse"]) if "dlse" in self.arrays else None
        more = {"dlse": dlse, "deterministic": self.row["deterministic"]}
        return [out, lse, *differentiate(lay_out(dout, layout, xp), q, k, v, out, lse, *offsets, **given, **more)]

    def spoiled(self) -> Problem:
        """The same with NaN in dout of the queries that its array, function or blocks let see no key."""
        arrays = {name: x.copy() for name, x in self.arrays.items()}
        starts = (0, self.case.seqlen_q[0]) if self.row["packed"] else (0,)
        ends = (*starts[1:], len(arrays["dout"])) if self.row["packed"] else (self.case.seqlen_q,)
        for start, end in zip(starts, ends, strict=True):
            arrays["dout"][..., start + 2 : end : 16, :, :] = np.nan
        return self._replace(arrays=arrays)

    def check(self, found: list[Any]) -> None:
        out, lse, *gradients = (to_numpy(x) for x in found)
        q, k, v = (self.case.arrays()[name] for name in "qkv")
        options = self.options()
        assert_close(out, q, k, v, lse=lse, **options)
        dout, dlse = self.arrays["dout"], self.arrays.get("dlse")
        assert_gradients_close(tuple(gradients), dout, q, k, v, dlse=dlse, **options)
