"""Calls like earlier ones: what is known of them leads straight from arrays to a launch.

Nothing that can change between calls is taken for granted: `Likeness` tells arrays, and the state of their framework;
the current GPU, its stream, memory for results and the addresses of arrays are asked for anew. What a call may do
beside computing new results keeps it from being looked for: writing into given arrays, copying some first, late options
and checks of values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .._call.arrays import Likeness, Maker
    from .._call.options import Options
    from .._call.problem import Problem
    from .._driver.launch import Launch
    from .call import Prepared
    from .operation import Operation

MAX_KNOWN = 4
"""So many of one kind: each takes part of a microsecond to find that a call is another."""

MAX_KINDS = 1024
"""Kinds of an operation's calls with arrays of one type, beyond which all are forgotten."""

Kind: TypeAlias = "tuple[Options, bool, Any, Any]"
"""Options, whether the first array requires grad, and shapes of the first two, which are of one type. What is cheaply
asked for, so that few others of a kind are looked at in vain."""

Known: TypeAlias = "dict[Kind, tuple[Repeated, ...]]"
"""An operation's of arrays of one type."""

MAX_TRIES = 8
"""After so many calls of a problem that were like none before, it is left at what is known."""


class Ready:
    """What calls of a problem still do when their arrays have been told: make results, and launch.

    Attributes
    ----------
    problem : Problem
        What is computed.
    device : int
        Which must be current.
    current_device : callable
        Tells whether it is.
    """

    __slots__ = (
        "_address",
        "_empty",
        "_floats",
        "_launch",
        "_made",
        "_parts",
        "_scratch",
        "_stream",
        "current_device",
        "device",
        "problem",
    )

    def __init__(self, problem: Problem, maker: Maker, prepared: Prepared, launch: Launch) -> None:
        self.problem, self.device = problem, problem.device
        self.current_device, self._stream = maker.current_device, maker.stream
        self._empty, self._address, self._scratch = maker.empty, maker.address, maker.scratch
        self._made = [maker.arguments(each.shape, each.dtype) for each in problem.made]
        self._floats, self._parts = prepared.floats, prepared.parts
        self._launch = launch.__call__  # bound, which takes half the time of the object's own call

    def __call__(self, addresses: list[int]) -> list[Any]:
        """The results, computed on the caller's stream. The list of the arrays' addresses becomes that of all."""
        empty, address, device = self._empty, self._address, self.device
        made = []
        for arguments in self._made:
            array = empty(*arguments)
            made.append(array)
            addresses.append(address(array))
        if self._floats:
            # Freed when this returns: the framework hands it out again only to what comes later on the stream.
            _memory, start = self._scratch(self._floats)
            addresses += map(start.__add__, self._parts)
        self._launch(addresses, self._stream(device), device)
        return made


class Repeated(Ready):
    """Calls on a GPU whose arrays are like those of an earlier one, of which none is written.

    Attributes
    ----------
    problem : Problem
        The call's, but with all results that gradients read if autograd records it.
    recorded : bool
        Whether autograd does.
    addresses : callable
        From the arrays of a call to the addresses of those that there are; to None if they are not alike.
    """

    __slots__ = "addresses", "recorded"

    def __init__(self, problem: Problem, alike: Likeness, prepared: Prepared, launch: Launch) -> None:
        super().__init__(problem, alike, prepared, launch)
        self.recorded, self.addresses = alike.recorded, alike.addresses


def kind_of(given: tuple[Any, ...], options: Options) -> Kind | None:
    """None if the first two arrays are not of one type, or if they have no shape."""
    first, second = given[0], given[1]
    if type(first) is not type(second):
        return None
    try:
        return options, first.requires_grad, first.shape, second.shape
    except RuntimeError:  # torch's word for a nested tensor
        return None


def find(known: Known, given: tuple[Any, ...], options: Options) -> tuple[Repeated, list[int]] | None:
    """The earlier calls on the current GPU that one is like, and its arrays' addresses; None if there are none."""
    kind = kind_of(given, options)
    if kind is not None:
        for repeated in known.get(kind, ()):
            addresses = repeated.addresses(given)
            if addresses is not None:
                return (repeated, addresses) if repeated.current_device() == repeated.device else None
    return None


def add(operation: Operation, first: Any, kind: Kind, repeated: Repeated) -> None:
    """Look for such calls first from now on. What is there is replaced, for the sake of other threads."""
    known = operation.repeated.setdefault(type(first), {})
    if len(known) >= MAX_KINDS and kind not in known:
        known.clear()
    others = [each for each in known.get(kind, ()) if each is not repeated]
    known[kind] = (repeated, *others[: MAX_KNOWN - 1])
