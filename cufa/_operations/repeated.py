"""Calls like earlier ones: what is known of them leads straight from arrays to a launch.

Nothing that can change between calls is taken for granted: `Likeness` tells arrays, and the state of their framework;
the current GPU, its stream, memory for results and the addresses of arrays are asked for anew. What a call may do
beside computing new results keeps it from being looked for: writing into given arrays, copying some first, late options
and checks of values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from .._call.arrays import contiguous

if TYPE_CHECKING:
    from .._call.arrays import Arrays, Likeness
    from .._call.options import Options
    from .._call.problem import Problem
    from .call import Prepared
    from .operation import Operation

MIN_RESULTS = 2
"""Results from which on plain calls are looked for. Gradients took less time so on an H200, and together with forwards
that autograd records, no more. A forward with one result took more, though it takes Python less: it goes the ordinary
way."""

MAX_KNOWN = 4
"""So many with the same options and shapes: each takes part of a microsecond to find that a call is another."""

MAX_KINDS, MAX_SHAPES = 16, 256
"""Kinds of an operation's calls with arrays of one type, and shapes of each, beyond which all are forgotten."""

Shapes: TypeAlias = tuple[Any, Any]
"""Those of the first two arrays, which are of one type."""

Known: TypeAlias = "dict[tuple[Options, bool], dict[Shapes, tuple[Repeated, ...]]]"
"""An operation's of arrays of one type: first by options and whether the first array requires grad, which takes a
fraction of the time of shapes, so that calls of another kind do not look for these in vain."""

MAX_TRIES = 8
"""After so many calls of a problem that were like none before, it is left at what is known."""


class Repeated:
    """Calls on a GPU whose arrays are like those of an earlier one, of which none is written.

    Attributes
    ----------
    problem : Problem
        What is computed: the call's, but with all results that gradients read if autograd records it.
    recorded : bool
        Whether autograd does.
    """

    __slots__ = (
        "_address",
        "_alike",
        "_current_device",
        "_device",
        "_empty",
        "_launch",
        "_made",
        "_parts",
        "_stream",
        "problem",
        "recorded",
    )

    def __init__(self, problem: Problem, alike: Likeness, arrays: Arrays, prepared: Prepared) -> None:
        adapter = arrays.adapter
        self.problem, self.recorded = problem, alike.recorded
        self._alike, self._empty, self._address = alike, alike.empty, alike.address
        self._device, self._current_device, self._stream = problem.device, adapter.current_device, adapter.stream
        self._made = [(tuple(each.shape), contiguous(each.shape), alike.dtype(each.dtype)) for each in problem.made]
        if prepared.floats:
            self._made.append(((prepared.floats,), (1,), alike.dtype("float32")))
        self._parts = prepared.parts if prepared.floats else None
        self._launch = prepared.launch_of(len(arrays.given), alike.places)

    def addresses(self, given: tuple[Any, ...]) -> list[int] | None:
        """Those of the arrays that there are; None if they are not alike, or if another GPU is current."""
        found = self._alike.addresses(given)
        return found if found is not None and self._current_device() == self._device else None

    def __call__(self, addresses: list[int]) -> list[Any]:
        """The results, computed on the caller's stream."""
        empty, device = self._empty, self._device
        made = [empty(shape, strides, dtype) for shape, strides, dtype in self._made]
        addresses += map(self._address, made)
        if self._parts is None:
            self._launch(addresses, self._stream(None, device), device)
            return made
        memory = addresses.pop()
        addresses += map(memory.__add__, self._parts)
        self._launch(addresses, self._stream(None, device), device)
        made.pop()  # the framework hands it out again only to what comes later on the stream
        return made


def shapes_of(given: tuple[Any, ...]) -> Shapes | None:
    """None if the first two arrays are not of one type, or if they have no shape."""
    first, second = given[:2]
    if type(first) is not type(second):
        return None
    try:
        return first.shape, second.shape
    except RuntimeError:  # torch's word for a nested tensor
        return None


def find(known: Known, given: tuple[Any, ...], options: Options) -> tuple[Repeated, list[int]] | None:
    """The earlier calls that one is like, and the addresses of its arrays."""
    by_shapes = known.get((options, given[0].requires_grad))
    shapes = None if by_shapes is None else shapes_of(given)
    for repeated in () if by_shapes is None or shapes is None else by_shapes.get(shapes, ()):
        addresses = repeated.addresses(given)
        if addresses is not None:
            return repeated, addresses
    return None


def add(operation: Operation, first: Any, options: Options, shapes: Shapes, repeated: Repeated) -> None:
    """Look for such calls first from now on. What is there is replaced, for the sake of other threads."""
    known, kind = operation.repeated.setdefault(type(first), {}), (options, first.requires_grad)
    if len(known) >= MAX_KINDS and kind not in known:
        known.clear()
    by_shapes = known.setdefault(kind, {})
    if len(by_shapes) >= MAX_SHAPES and shapes not in by_shapes:
        by_shapes.clear()
    others = [each for each in by_shapes.get(shapes, ()) if each is not repeated]
    by_shapes[shapes] = (repeated, *others[: MAX_KNOWN - 1])
