"""What an operation is: the record behind a public function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

from .._call.options import Option, Owned
from .._call.problem import of_attention

if TYPE_CHECKING:
    from .._call.arrays import Arrays, Spec
    from .._call.options import Options, Owner
    from .._call.problem import Problem
    from .._kernels import Kernel
    from .._terms import Term
    from .repeated import Known


class Result(NamedTuple):
    """An array that a call gives: its name, shape and dtype, and its place among the arrays if it may be given."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: int | None = None


@dataclass(eq=False)  # torch.compile cannot hand on what is frozen
class Operation:
    """A public function; nothing changes it once it is made.

    Attributes
    ----------
    name : str
        As messages name it.
    arrays : tuple of str
        Its array arguments, in the order in which they are handed on. The first is never None.
    written : tuple of str
        Those of them that are results, which a caller may give.
    changed : tuple of str
        Those of them that a call may change in place; the problem says whether it does. They are never copied first.
    tiles : tuple of str
        Those of which kernels read tiles, and which are copied first where their rows are not aligned.
    results : callable
        From a problem to what a call of it gives.
    terms : tuple of Term
        Score terms that calls may have, in the order in which they are applied.
    kernels : tuple of Kernel
        Those that may serve it, fastest first.
    on_cpu : callable
        Computes a problem of arrays in host memory: from it, the arrays by name and the results by name.
    check : callable
        Makes a problem of the arrays that are given, by name, and of the options, or refuses them; addresses and values
        of arrays, which it does not know, must not matter.
    check_values : callable or None
        Refuses values of a problem's arrays of integers, before anything is written. On a GPU, where reading them makes
        the host wait, it is asked with ``CUFA_DEBUG=1`` only, and kernels read any values as something.
    options : tuple of Option
        Those of its own, which come behind the common ones.
    of : Operation or None
        The operation whose gradients it computes. Their names are those of its arrays behind a d: ``dq``, ``dsinks``.
        Of its arrays and results it takes those that it reads, and the gradients by its results: ``dout``, and
        ``dlse``, which may be None.
    rows : tuple of str
        The arrays that end with (rows, heads, columns), behind an axis of the batch where sequences are not packed.
    gives : tuple of str
        Names of the results, in their order; some calls give but the first of them.
    grouped : bool
        Whether query heads share key heads. Where they do, a gradient by a key head that several devices read is a sum.
    """

    name: str
    arrays: tuple[str, ...]
    written: tuple[str, ...]
    tiles: tuple[str, ...]
    results: Callable[[Problem], tuple[Result, ...]]
    terms: tuple[Term, ...]
    kernels: tuple[Kernel, ...]
    on_cpu: Callable[[Problem, Mapping[str, Any], Mapping[str, Any]], None]
    check: Callable[[Operation, dict[str, Spec], Options], Problem] = of_attention
    of: Operation | None = None
    changed: tuple[str, ...] = ()
    check_values: Callable[[Problem, Arrays], None] | None = None
    options: tuple[Option, ...] = ()
    rows: tuple[str, ...] = ("q", "k", "v")
    gives: tuple[str, ...] = ("out", "lse")
    grouped: bool = True

    late_names: ClassVar[tuple[str, ...]] = ()
    """Its own options are not late; those of its terms may be."""

    def __post_init__(self) -> None:
        number = next(_count)
        _MADE[number] = self
        self.key = f"{self.name} {number}"  # within the process
        self.repeated: dict[type, Known] = {}  # by the type of the first array
        if self.of is not None:
            _GRADIENTS.setdefault(self.of, self)  # a copy with other kernels does not take its place

    @cached_property
    def packed(self) -> bool:
        """Whether sequences lie end to end in its arrays, or may do so."""
        return "cu_seqlens_q" in self.arrays

    @cached_property
    def gradient(self) -> bool:
        """Whether it computes the gradients of another."""
        return self.of is not None

    def having(self, *terms: Term, name: str | None = None, of: Operation | None = None) -> Operation:
        """The same operation with further score terms, applied after its own; gradients are those `of` another.

        Their arrays come behind all others, so that those keep their places, and their options behind the others.
        Problems are remembered by operation: make one once, not for every call.

        Raises
        ------
        ValueError
            If two arrays, options or terms have the same name.
        """
        more = tuple(array for term in terms for array in term.arrays)
        if (of is None) != (self.of is None):
            raise ValueError(f"{self.name}: gradients, and they alone, are those of an operation with the same terms.")
        arrays, terms = (*self.arrays, *more), (*self.terms, *terms)
        found = replace(self, name=name or self.name, arrays=arrays, terms=terms, of=of)
        handed_on = (*found.arrays, *found.owned.late_names)
        for names in (handed_on, found.owned.names, [term.name for term in found.terms]):
            if len({*names}) < len(names):
                raise ValueError(f"{found.name}: of {', '.join(names)}, two have the same name.")
        return found

    @cached_property
    def written_indices(self) -> tuple[int, ...]:
        return tuple(map(self.arrays.index, self.written))

    @cached_property
    def uncopied_indices(self) -> tuple[int, ...]:
        """Places of arrays whose own memory is needed, not that of a copy: what is written or changed."""
        return tuple(map(self.arrays.index, (*self.written, *self.changed)))

    @cached_property
    def option_names(self) -> tuple[str, ...]:
        """Of the options of its own."""
        return tuple(option.name for option in self.options)

    def plain(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of its `option_names` as plain ones, or TypeError."""
        return tuple(
            option.plain(function, option.name, value) for option, value in zip(self.options, values, strict=True)
        )

    @cached_property
    def owners(self) -> tuple[Owner, ...]:
        """What has options beside the common ones, in their order: the operation itself, and its terms."""
        return (self, *self.terms) if self.options else self.terms

    @cached_property
    def owned(self) -> Owned:
        """The options that its `owners` have."""
        return Owned(self.owners)

    def result(self, name: str, shape: tuple[int, ...], dtype: str) -> Result:
        """A result, which may be given if it is among the written arrays."""
        return Result(name, shape, dtype, self.arrays.index(name) if name in self.written else None)


_GRADIENTS: dict[Operation, Operation] = {}
_MADE: WeakValueDictionary[int, Operation] = WeakValueDictionary()
_count = count()


def made() -> tuple[Operation, ...]:
    """All operations that there are, in the order in which they were made."""
    _make_all()
    return tuple(operation for _, operation in sorted(_MADE.items()))


def gradients_of(operation: Operation) -> Operation | None:
    """The operation that computes the gradients of another; None if there is none."""
    _make_all()
    return _GRADIENTS.get(operation)


def _make_all() -> None:
    """Import those of cufa, each of which adds itself."""
    from . import backward, kvcache, rotary, states

    assert {backward, kvcache, rotary, states}


def by_key(key: str) -> Operation:
    """The operation of a `key`."""
    return _MADE[int(key.rpartition(" ")[2])]
