"""The score term that drops probabilities at random, and what it drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._call import options as _options
from ..errors import ArgumentError
from .capture import dtype_of
from .philox import philox, round_key_bytes
from .score_array import Specialised
from .term import Array, Late, Point, Term
from .traced import is_array

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.problem import Check, Problem
    from .._operations.features import Feature

SEEDS = -(2**63), 2**63
"""The integers that int64 holds."""

SEED_DTYPES = {"int32": "i32", "uint32": "u32", "int64": "i64"}
"""Of seeds that are arrays, and their types in C++."""

BITS = 15
"""Of the number by which an entry is kept or not."""


class Rate(NamedTuple):
    """Which numbers of `BITS` bits mean that an entry is kept: those from `bound` on or, if `below`, those below it.

    The bound is at most half of the numbers, as ``ptx::set_abs_lt_f16x2`` wants it.
    """

    bound: int
    below: bool

    @classmethod
    def of(cls, dropout_p: float) -> Rate:
        """The nearest that there is; some entries are kept, however near to 1 `dropout_p` is."""
        numbers = 1 << BITS
        dropped = min(round(dropout_p * numbers), numbers - 1)
        return cls(numbers - dropped, True) if 2 * dropped > numbers else cls(dropped, False)

    @property
    def gain(self) -> float:
        """1 / the probability of being kept."""
        numbers = 1 << BITS
        return numbers / (self.bound if self.below else numbers - self.bound)

    def keeps(self, numbers: Array) -> Array:
        """Which numbers mean that an entry is kept."""
        return numbers < self.bound if self.below else numbers >= self.bound


class Dropout(Term):
    """Source: Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting*, 2014."""

    name = "dropout"
    header = "attention/dropout.cuh"
    type = "attention::Dropout"
    data = "DropoutData"
    option_names = ("dropout_p",)
    late_names: tuple[str, ...] = ("seed",)
    bends = False
    scales = True
    drops = True

    def asked(self, specs: Mapping[str, Any], options: _options.Options) -> bool:
        return True

    def plain(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (plain_rate(function, *values),)

    def plain_late(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (plain_seed(function, *values),)

    def late_members(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_key_bytes(*values),)

    def values(self, problem: Problem) -> dict[str, Any]:
        rate = Rate.of(problem.options.own("dropout_p"))
        return {
            "keys": Late("seed"),
            "bound": rate.bound * 0x00010001,
            "flip": 0 if rate.below else 0xFFFFFFFF,
            "gain": rate.gain,
        }

    def options(self, problem: Problem) -> dict[str, Any]:
        return {name: problem.options.own(name) for name in self.option_names}

    def factor(self, at: Point, given: Mapping[str, Any]) -> Array:
        rate = Rate.of(given["dropout_p"])
        return rate.gain * rate.keeps(numbers(at, given["seed"]))


class SeededDropout(Specialised, Dropout):
    """The same with a seed that is an array of no dimensions, whose value only kernels read.

    Parameters
    ----------
    dtype : str
        Of the seed.
    """

    type = "attention::SeededDropout"
    data = "SeededDropoutData"
    arrays = ("seed",)
    late_names = ()

    def __init__(self, dtype: str = "int64") -> None:
        self.facts = (dtype,)

    def struct(self, element: str) -> str:
        (dtype,) = self.facts
        return f"{self.type}<{SEED_DTYPES[dtype]}>"

    def specialised(self, specs: Mapping[str, Spec], packed: bool) -> SeededDropout:
        return SeededDropout(specs["seed"].dtype)

    def check(self, call: Check) -> None:
        spec = call.specs.get("seed")
        if spec is None:
            call.type_error("seed is None; pass an integer.")
        check_seed(call.function, spec.dtype, spec.shape)

    def values(self, problem: Problem) -> dict[str, Any]:
        return {name: value for name, value in super().values(problem).items() if name != "keys"}

    def factor(self, at: Point, given: Mapping[str, Any]) -> Array:
        return super().factor(at, {**given, "seed": int(given["seed"])})


def plain(function: str, dropout_p: Any, seed: Any) -> tuple[float, int]:
    """The options as plain values, or an error."""
    p = plain_rate(function, dropout_p)
    if seed is None:
        if p > 0.0:
            raise ArgumentError(
                f"{function}: dropout_p is {p}, but there is no seed; pass an integer that int64 holds."
            )
        return p, 0
    return p, plain_seed(function, seed)


def plain_rate(function: str, dropout_p: Any) -> float:
    p = _options.number(function, "dropout_p", dropout_p)
    if not 0.0 <= p < 1.0:
        raise ArgumentError(f"{function}: dropout_p is {p}; it must be from 0, which is off, to less than 1.")
    return p


def plain_seed(function: str, seed: Any) -> int:
    number = _options.integer(function, "seed", seed)
    if not SEEDS[0] <= number < SEEDS[1]:
        raise ArgumentError(f"{function}: seed is {number}; it must be an integer that int64 holds.")
    return number


def check_seed(function: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse an array that is no seed."""
    if dtype not in SEED_DTYPES or shape:
        raise ArgumentError(
            f"{function}: seed has dtype {dtype} and shape {shape}; pass an integer, or an array of no dimensions of "
            f"{' or '.join(SEED_DTYPES)}."
        )


def dropout_features(function: str, dropout_p: Any, seed: Any) -> list[Feature]:
    """What the arguments `dropout_p` and `seed` of a call ask for."""
    from .._operations.features import Feature

    if is_array(seed) and not isinstance(seed, np.ndarray):  # NumPy's is as good as an integer
        p = plain_rate(function, dropout_p)
        if p > 0.0:
            return [Feature(SeededDropout(), (seed,), (p,))]
        check_seed(function, dtype_of(seed), tuple(seed.shape))  # of which nothing else hears
        return []
    values = plain(function, dropout_p, seed)
    return [Feature(Dropout(), options=values)] if values[0] > 0.0 else []


def numbers(at: Point, seed: int) -> Array:
    """The number of `BITS` bits of each entry; `at` are consecutive queries and keys.

    One counter of Philox gives those of eight entries, of a square of 16 queries and 16 keys, which a thread holds: see
    ``cuda_src/attention/dropout.cuh``.
    """
    queries, keys = at.query.ravel(), at.key.ravel()
    if not (at.query.size and at.key.size):
        return np.zeros(np.broadcast_shapes(at.batch.shape, at.head.shape, at.query.shape, at.key.shape), np.uint32)
    first_q, last_q, first_k, last_k = queries[0] // 16, queries[-1] // 16, keys[0] // 16, keys[-1] // 16
    rows = np.arange(8 * first_q, 8 * (last_q + 1))[:, None]
    words = philox((rows, at.head, np.arange(4 * first_k, 4 * (last_k + 1)), at.batch), seed)
    batch, heads, *_ = words[0].shape
    # (batch, heads, squares, row, squares, pair of columns, half of columns, half of rows, column of the pair)
    halves = np.stack(words, axis=-1).reshape(batch, heads, -1, 8, last_k - first_k + 1, 4, 2, 2, 1)
    halves = (halves >> np.array([0, 16], np.uint32) & np.uint32((1 << BITS) - 1)).astype(np.uint16)
    squares = halves.transpose(0, 1, 2, 7, 3, 4, 6, 5, 8).reshape(batch, heads, 2 * len(rows), -1)
    from_q, from_k = queries[0] - 16 * first_q, keys[0] - 16 * first_k
    chosen: Array = squares[..., from_q : from_q + len(queries), from_k : from_k + len(keys)]
    return chosen
