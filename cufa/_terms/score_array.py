"""Arrays with a number for each score, (batch, num_heads_q, seqlen_q, seqlen_k), of which any axis may be 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .._call.arrays import CPU
from .._call.problem import ITEMSIZE, MAX_MAP_STRIDE
from ..errors import ArgumentError
from .term import Array, Point, Term

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.problem import Check, Problem

AXES = ("batch", "num_heads_q", "seqlen_q", "seqlen_k")

MAX_STRIDE = (1 << 31) - 1
"""Of queries and keys, in bytes: kernels multiply these by 32-bit numbers."""

UNBOUNDED = (1 << 31) - 1
"""The extent of an axis of which one element is for all."""


class Access(NamedTuple):
    """How kernels read such an array: ``ScoreArray`` in ``cuda_src/attention/score_array.cuh``.

    Attributes
    ----------
    bytes : int
        Of an element.
    step : int
        The stride of keys if it is 0 or 1, else -1.
    paired : bool
        Whether two keys, the first an even one, can be read at once.
    bounded : bool
        Whether there may be queries or keys beyond its ends, as in packed sequences.
    per_head : bool
        Whether it differs from one query head to the next.
    shared : tuple of bool
        Whether all sequences, heads, queries and keys share its elements.
    wide : bool
        Whether 16 aligned bytes of keys can be read at once.
    mapped : bool
        Whether, if so, a tensor map describes it.
    """

    bytes: int = 4
    step: int = -1
    paired: bool = False
    bounded: bool = False
    per_head: bool = True
    shared: tuple[bool, bool, bool, bool] = (False, False, False, False)
    wide: bool = False
    mapped: bool = False

    @classmethod
    def of(cls, name: str, specs: Mapping[str, Spec], packed: bool) -> Access:
        """To the array of a name."""
        spec, extents = specs[name], extents_of(specs, packed)
        size = size_of(spec)
        strides = strides_of(spec)
        # Of packed sequences it is not known whether they have a single query or key; each may have more.
        shared = tuple(n == 1 and extent != 1 for n, extent in zip(spec.shape, extents, strict=True))

        def together(keys: int) -> bool:
            """Whether so many keys, the first a multiple of them, lie side by side, aligned and all there."""
            rows = (*strides[:3], spec.shape[3])
            aligned = all(n % keys == 0 for n in rows) and spec.misalignment % (keys * size) == 0
            return strides[3] == 1 and aligned

        return cls(
            size,
            strides[3] if strides[3] in (0, 1) else -1,
            together(2),
            packed,
            spec.shape[1] > 1,
            shared,  # type: ignore[arg-type]
            together(16 // size),
            all(0 <= n * size < MAX_MAP_STRIDE for n in strides) and (strides[2] > 0 or spec.shape[2] == 1),
        )

    def arguments(self) -> str:
        """Those of ``ScoreArray`` behind the bytes of an element, in C++."""
        return ", ".join([str(self.step), *(str(flag).lower() for flag in (self.paired, self.wide, self.bounded))])


def extents_of(specs: Mapping[str, Spec], packed: bool) -> tuple[int | None, ...]:
    """How many sequences, query heads, queries and keys a call has; of packed ones the latter are not known."""
    q, k = specs["q"].shape, specs["k"].shape
    if packed:
        return specs["cu_seqlens_q"].shape[0] - 1, q[1], None, None
    return q[0], q[2], q[1], k[1]


def size_of(spec: Spec) -> int:
    """Bytes of an element."""
    return ITEMSIZE.get(spec.dtype, 1)


def strides_of(spec: Spec) -> tuple[int, ...]:
    """In elements; 0 where one element is for all."""
    return tuple(0 if n == 1 else stride for n, stride in zip(spec.shape, spec.strides, strict=True))


def check(call: Check, name: str) -> None:
    """Refuse an array of a shape that does not broadcast to scores, or whose strides are too large for kernels."""
    spec = call.specs[name]
    extents = extents_of(call.specs, call.varlen)
    fits = len(spec.shape) == 4 and all(
        n == 1 or extent is None or n == extent for n, extent in zip(spec.shape, extents, strict=True)
    )
    if not fits:
        expected = ", ".join("longest" if extent is None else str(extent) for extent in extents)
        call.value_error(
            f"{name} has shape {spec.shape}; ({expected}), that is ({', '.join(AXES)}), is expected, and any axis may "
            "be 1."
        )
    size = size_of(spec)
    if spec.device != CPU and any(size * abs(stride) > MAX_STRIDE for stride in strides_of(spec)[2:]):
        call.unsupported(
            f"{name} has strides {spec.strides}; those of queries and keys must be less than 2^31 bytes. Pass a copy "
            "of it."
        )


def check_lengths(problem: Problem, name: str, longest_q: int, longest_k: int) -> None:
    """Refuse an array that does not reach over the longest of packed sequences."""
    shape = problem.specs[name].shape
    if any(1 != n < longest for n, longest in zip(shape[2:], (longest_q, longest_k), strict=True)):
        raise ArgumentError(
            f"{problem.function}: {name} has shape {shape}, but the longest sequences have {longest_q} queries and "
            f"{longest_k} keys; its last two axes must be as long, or 1."
        )


def layout(problem: Problem, name: str) -> dict[str, int]:
    """``ScoreArrayLayout`` of an array."""
    spec = problem.specs[name]
    batch, head, query, key = (size_of(spec) * stride for stride in strides_of(spec))
    queries, keys = (UNBOUNDED if n == 1 else n for n in spec.shape[2:])
    strides = {"batch_stride": batch, "head_stride": head, "query_stride": query, "key_stride": key}
    return strides | {"queries": queries, "keys": keys}


class Parts(NamedTuple):
    """What of an array belongs to scores, and what of these to it: all, unless they lie beyond its ends."""

    of_array: tuple[slice, ...]
    of_scores: tuple[slice, ...]

    @classmethod
    def at(cls, at: Point, shape: tuple[int, ...]) -> Parts:
        """Of the scores at consecutive places."""
        own, others = [], []
        for places, extent in zip((at.batch, at.head, at.query, at.key), shape, strict=True):
            first = int(places.flat[0]) if places.size else 0
            own.append(slice(0, 1) if extent == 1 else slice(first, first + places.size))
            others.append(slice(None) if extent == 1 else slice(0, max(0, extent - first)))
        return cls(tuple(own), tuple(others))

    def sums(self, scores: Array, shape: tuple[int, ...]) -> Array:
        """Sums of numbers for scores over those that share an element of the array of that shape, in float64."""
        axes = tuple(axis for axis, extent in enumerate(shape) if extent == 1)
        found: Array = scores[self.of_scores].sum(axis=axes, keepdims=True, dtype="float64")
        return found


class Specialised(Term):
    """A term that is compared by what decides its kernels, its `facts`, too."""

    facts: tuple[Any, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Specialised) and type(self) is type(other) and self.facts == other.facts

    def __hash__(self) -> int:
        return hash((type(self), self.facts))
