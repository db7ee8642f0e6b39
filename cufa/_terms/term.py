"""What a score term is: a C++ struct for the kernels, and beside it what the host has to know of it.

A term changes scores, one by one, knowing where each is; it may scale probabilities behind the softmax's sum, and what
it reads may have gradients. Its C++ twin is told of in ``cuda_src/attention/term.cuh``, by the same names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from numpy.typing import NDArray

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.options import Options
    from .._call.problem import Check, Problem

Array: TypeAlias = NDArray[Any]

FLAGS = (
    *("per_head", "bends", "scales", "hides", "gives_slope", "reads_score", "has_gradient", "loads", "finishes"),
    *("apart", "stages", "boxed"),
)
"""What a term and its C++ twin both say of it; every translation unit asserts that they say the same."""


class Late(NamedTuple):
    """In place of a member's value: it is filled in at each launch, by the late option of this name."""

    name: str


@dataclass(frozen=True, eq=False)
class Point:
    """Where scores are: arrays of integers that broadcast to the scores', (batch, heads, queries, keys).

    Attributes
    ----------
    batch, head : array
        Which sequence, and which head of q.
    query, key : array
        Of the sequence's own.
    offset : int
        The keys that the sequence has more than queries.
    """

    batch: Array
    head: Array
    query: Array
    key: Array
    offset: int

    @cached_property
    def distance(self) -> Array:
        """How far the key lies before the query's own position. It is not computed unless a term asks for it."""
        return self.query + self.offset - self.key


class Term:
    """A score term. What a call gives it comes as `given`: its arrays and options, by name.

    It has no state, unless it is `specialised`: then it compares by that, too.

    Attributes
    ----------
    name : str
        What the term is called.
    header : str
        Where ``cuda_src``, or `headers`, has its C++ struct.
    type : str
        The struct, a C++ type; ``{element}`` stands for the type of q's elements.
    data : str
        The C++ struct of what its kernels are given. Its pointers have the names of arrays, or of results.
    headers : dict of str to str
        Sources beside those of ``cuda_src``, by the path by which they are included.
    arrays : tuple of str
        The arguments of an operation that are its own.
    option_names : tuple of str
        The options of an operation that are its own; their values are in `Options.more`.
    late_names : tuple of str
        Further ones, behind them, that change from call to call: no more than the argument of a launch depends on
        their values, which are in `Options.late`.
    gradients : tuple of str
        The results of an operation's gradients that are its own.
    per_head : bool
        Whether it differs from one query head to the next.
    bends : bool
        Whether its derivative by the score may be another than 1.
    scales : bool
        Whether it has a `factor`.
    drops : bool
        Whether that is 0 or 1, by numbers that kernels draw beside the exponentials.
    hides : bool
        Whether it has `keeps`.
    gives_slope : bool
        Whether its derivative does not follow from what it made of a score: `dscore` is then given the scores that it
        was applied to as well, ``score``.
    reads_score : bool
        Whether `gradient` is given them.
    loaded_bytes : int
        What its C++ twin loads for a score before there is one (``load``), as far as it takes registers.
    blocks : (int, int) or None
        Of a term that lists the blocks that its kernels go over: queries and keys of each. It keeps all of the blocks
        that are said to be seen whole. ``ListedMask`` in ``cuda_src/attention/block_mask.cuh`` reads its lists.
    spans : (int, int) or None
        Of a term that lists blocks: as many keys as any query has of them, at least, and as many queries as any key.
    bounded : bool
        Whether of its other blocks bounds say what is seen, which takes no more registers than a mask of ranges does.
    ordered : bool
        Whether its gradients are the same bits in every run on a GPU.
    finishes : bool
        Whether its gradients are made of what was added up by a kernel behind the main ones.
    stages : bool
        Whether what its C++ twin loads may be brought to shared memory before, in `staged_bytes`.
    boxed : bool
        Whether that is boxes of an array of scores, copied by a tensor map.
    pairs : bool
        Whether its C++ twin takes scores two by two, in few registers, in kernels of 16-bit elements.
    apart : bool
        Whether its gradient is made by a kernel of its own, so that to the others it has none: see `set_apart`.
    foldable : bool
        Whether the numbers of a sequence and of a head matter to it only as places in its arrays, so that a call may
        become part of a larger one, or parts of it calls of their own.
    """

    name: str
    header: str
    type: str
    data: str
    headers: Mapping[str, str] = MappingProxyType({})
    arrays: tuple[str, ...] = ()
    option_names: tuple[str, ...] = ()
    late_names: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    per_head: bool = True
    bends: bool = True
    scales: bool = False
    drops: bool = False
    hides: bool = False
    gives_slope: bool = False
    reads_score: bool = False
    loaded_bytes: int = 0
    blocks: tuple[int, int] | None = None
    spans: tuple[int, int] | None = None
    bounded: bool = False
    ordered: bool = False
    finishes: bool = False
    stages: bool = False
    boxed: bool = False
    pairs: bool = False
    apart: bool = False
    foldable: bool = False

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return self.name

    def struct(self, element: str) -> str:
        """Its C++ struct where q's elements are of a type."""
        return self.type.format(element=element)

    @property
    def has_gradient(self) -> bool:
        """Whether it has `gradients` of which kernels tell it."""
        return bool(self.gradients) and not self.apart

    @property
    def loads(self) -> bool:
        """Whether its C++ twin has a ``load``."""
        return self.loaded_bytes > 0

    def specialised(self, specs: Mapping[str, Spec], packed: bool) -> Term:
        """Itself with what decides its kernels of such arrays, which `struct` and the flags may depend on."""
        return self

    def in_order(self) -> Term:
        """What takes its place where gradients are to be the same bits in every run: it is `ordered` if it can be."""
        return self

    def wanting(self, gradients: Collection[str]) -> Term:
        """What takes its place where only these gradients are wanted; itself, if it cannot compute fewer."""
        if not self.gradients or any(name in gradients for name in self.gradients):
            return self
        from .constant import Constant

        return Constant(self)

    def staged_bytes(self, rows: int, columns: int) -> int:
        """Shared memory that it takes for a tile of so many queries and keys: ``Staged::bytes`` of its C++ twin."""
        return 0

    def set_apart(self) -> Term:
        """What takes its place beside a kernel that makes its gradient tile by tile, if one pays; else itself."""
        return self

    def asked(self, specs: Mapping[str, Spec], options: Options) -> bool:
        """Whether a call with these arrays and options has the term."""
        return any(name in specs for name in self.arrays)

    def plain(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of its `option_names` as plain ones, each always of the same type, or TypeError.

        Problems are remembered by them, and True, 1 and 1.0 are the same key.
        """
        return values

    def plain_late(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of its `late_names` as plain ones, checked; or TypeError or ValueError. Every call asks."""
        return values

    def late_members(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """What becomes of its members of C++ data that are `Late`, from the plain values of its `late_names`.

        For each name a number or, where the member is an array, its bytes.
        """
        return values

    def check(self, call: Check) -> None:
        """Refuse arrays of its own that will not do; called whether the term is asked for or not."""

    def check_lengths(self, problem: Problem, longest_q: int, longest_k: int) -> None:
        """Refuse arrays of its own that do not reach over the longest of packed sequences; asked on the CPU only."""

    def check_order(self, call: Check) -> None:
        """Refuse a call that is too large for gradients that are the same bits in every run."""

    def results(self, problem: Problem) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of its `gradients`."""
        return {}

    def values(self, problem: Problem) -> dict[str, Any]:
        """The members of its C++ data but for addresses: values, or `Late`."""
        return {}

    def scratch(self, problem: Problem) -> Mapping[str, int]:
        """The device memory that its gradients take, in float32 numbers, by the name of its data's pointer to it."""
        return {}

    def options(self, problem: Problem) -> dict[str, Any]:
        """What it is given on the CPU beside its arrays and late options."""
        return {}

    def unit(self, given: Mapping[str, Any]) -> float:
        """By how much scores are divided before `score` takes them: q is cheaper to divide than scores are."""
        return 1.0

    def fits(self, given: Mapping[str, Any], farthest: int, largest: float) -> bool:
        """Whether what it adds to scores stays below `largest` at distances up to `farthest`."""
        return True

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        """What becomes of scores, which come divided by its `unit` and may be overwritten; in their dtype."""
        return s

    def dscore(self, scored: Array, at: Point, given: Mapping[str, Any]) -> Array | float:
        """The derivative by the score it was applied to, which was not divided, from what it made of that."""
        return 1.0

    def factor(self, at: Point, given: Mapping[str, Any]) -> Array | float:
        """What probabilities are multiplied by once they are divided by their sum, to which they count as they were.

        In C++ this is the product of `factor` and `gain`, which is the same for all entries.
        """
        return 1.0

    def keeps(self, at: Point, given: Mapping[str, Any]) -> Array | bool:
        """Which keys queries keep; the others are removed, as by a mask, whatever terms make of their scores."""
        return True

    def gradient(self, dscored: Array, at: Point, given: Mapping[str, Any], into: Mapping[str, Array]) -> None:
        """Add what follows from the gradient by what it made of scores to float64 arrays, by its `gradients`' names.

        That gradient is 0 where a query does not see the key.
        """
