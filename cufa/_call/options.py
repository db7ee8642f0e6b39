"""The arguments that are not arrays, as plain Python values: read anew at every call, before anything is looked up.

An array of no dimensions may change in place, and ``True == 1 == 1.0``: neither may be the key by which a problem is
remembered. What `plain` returns has the types bool, int, float, str, tuple and None only, so equal options are the
same.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, Protocol, cast

from ..errors import ArgumentError

MAX_SEQLEN = (1 << 30) - 1
"""Longest sequence, and widest window; positions and their differences then fit 32 bits."""

FLOAT32_RANGE = 2.0**-126, 2.0**128 - 2.0**104
"""Of the normal numbers."""

SCALE_RANGE = 2.0**-126, 2.0**127

Window = tuple[int | None, int | None]

_PAIRS = {(left, right) for left in (int, type(None)) for right in (int, type(None))}


Pairs = tuple[tuple[str, Any], ...]
"""Names and values of options."""

Plain = tuple[bool, Window | None, float | None, float]
"""causal, window_size, softmax_scale and softcap, as `plain` returns them."""


class Options(NamedTuple):
    """The options of a call, plain.

    Attributes
    ----------
    causal : bool
    window_size : (int or None, int or None) or None
    softmax_scale : float or None
    softcap : float
    return_lse : bool
        Forward: whether lse is a result.
    deterministic : bool
        Gradients: whether dq is the same bits in every run. Of a forward that a framework differentiates: whether its
        gradients are.
    more : tuple of (str, object)
        Names and values of those that the operation and its score terms have of their own.
    late : tuple of (str, object)
        The same of late options, whose values kernels are given at each launch: a problem is remembered without them.
    """

    causal: bool
    window_size: Window | None
    softmax_scale: float | None
    softcap: float
    return_lse: bool
    deterministic: bool
    more: Pairs = ()
    late: Pairs = ()

    @property
    def lasting(self) -> Options:
        """Those that are not late."""
        return _tuple(Options, (*self[:-1], ())) if self.late else self

    def with_lse(self) -> Options:
        """The same, where lse is a result."""
        return _tuple(Options, (*self[:4], True, *self[5:]))

    def of_gradients(self, deterministic: bool) -> Options:
        """Those of the gradients, which are `deterministic` at least if that is asked for."""
        if not self.return_lse and self.deterministic >= deterministic:
            return self
        return _tuple(Options, (*self[:4], False, self.deterministic or deterministic, *self[6:]))

    def own(self, name: str) -> Any:
        """The value of an option that the operation, or a score term, has of its own."""
        return dict(self.more)[name]


class Option(NamedTuple):
    """An option that an operation has of its own.

    Attributes
    ----------
    name : str
    plain : callable
        From the function's name, the option's and what is given to a plain value, always of the same type, or
        TypeError: `flag`, `integer` and `number` are such.
    """

    name: str
    plain: Callable[[str, str, Any], Any]


class Owner(Protocol):
    """What has options of its own: an operation, or a score term."""

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of those that are not late."""

    @property
    def late_names(self) -> tuple[str, ...]:
        """Names of late ones, which come behind the others."""

    def plain(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of `option_names` as plain ones, each always of the same type, or TypeError."""


class LateOwner(Owner, Protocol):
    """What has late options."""

    def plain_late(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of `late_names` as plain ones, or TypeError or ValueError; asked at every call."""

    def late_members(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """What kernels are given for the plain values of `late_names`, one for each."""


IMMUTABLE: set[type] = {bool, int, float, str, type(None)}
"""Types of values that never change: what becomes of them is remembered."""


class Owned:
    """The options that the `owners` have of their own, in their order.

    Attributes
    ----------
    names : tuple of str
        In the order in which a call is given their values.
    late_names : tuple of str
        Of the late ones.
    """

    MAX_KNOWN = 64

    def __init__(self, owners: Sequence[Owner]) -> None:
        self.owners = owners
        self.names = tuple(name for owner in owners for name in (*owner.option_names, *owner.late_names))
        self.late_names = tuple(name for owner in owners for name in owner.late_names)
        self._late: list[tuple[LateOwner, slice]] = []
        self._lasting: list[int] = []
        end = 0
        for owner in owners:
            start = end + len(owner.option_names)
            self._lasting += range(end, start)
            end = start + len(owner.late_names)
            if start < end:
                self._late.append((cast(LateOwner, owner), slice(start, end)))
        self._known: dict[tuple[type, ...], Callable[..., Pairs]] = {}

    def of(self, function: str, values: tuple[Any, ...]) -> tuple[Pairs, Pairs]:
        """Names and plain values of those that are not late, and of those that are; or TypeError."""
        late: Pairs = ()
        if self._late:
            values, late = self._apart(function, values)
        types = tuple(map(type, values))
        known = self._known.get(types)
        if known is None:
            if not IMMUTABLE.issuperset(types):
                return self._of(function, values), late
            known = self._known[types] = lru_cache(self.MAX_KNOWN)(self._of)
        return known(function, values), late

    def _apart(self, function: str, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], Pairs]:
        """The values of those that are not late; names and plain values of those that are."""
        if len(values) != len(self.names):
            self._refuse(function, values, self.names)
        late: list[tuple[str, Any]] = []
        for owner, places in self._late:
            late += zip(owner.late_names, owner.plain_late(function, values[places]), strict=True)
        return tuple([values[place] for place in self._lasting]), tuple(late)

    def _of(self, function: str, values: tuple[Any, ...]) -> Pairs:
        self.check(function, values)
        found: list[tuple[str, Any]] = []
        for owner in self.owners:
            own = values[len(found) : len(found) + len(owner.option_names)]
            found += zip(owner.option_names, owner.plain(function, own), strict=True)
        return tuple(found)

    def check(self, function: str, values: tuple[Any, ...]) -> None:
        """Check that there are as many as the owners have that are not late."""
        names = [name for owner in self.owners for name in owner.option_names]
        if len(values) != len(names):
            self._refuse(function, values, names)

    @staticmethod
    def _refuse(function: str, values: tuple[Any, ...], names: Sequence[str]) -> NoReturn:
        wanted = f"those of it and its score terms are {', '.join(names)}" if names else "its score terms have none"
        raise TypeError(f"{function}: {len(values)} further options are given; {wanted}.")

    def given(self, options: Options) -> tuple[Any, ...]:
        """The plain values of all of them, in the order of `names`."""
        if not self.names:
            return ()
        found = dict((*options.more, *options.late))
        return tuple(found[name] for name in self.names)

    def late_members(self, late: Pairs) -> list[Any]:
        """What kernels are given for late options, in the order of `late_names`."""
        values = tuple([value for _, value in late])
        found: list[Any] = []
        end = 0
        for owner, _ in self._late:
            start, end = end, end + len(owner.late_names)
            found += owner.late_members(values[start:end])
        return found


NOTHING_OWNED = Owned(())
"""What operations own whose score terms have no options either."""

COMMON = len(Options._fields) - 2
"""Options that every call has."""

_tuple = tuple.__new__
"""Makes an `Options` several times as fast as its own constructor does."""


def of(function: str, asked: tuple[Any, ...], owned: Owned = NOTHING_OWNED) -> Options:
    """The options of a call, given in the order of `Options`, or TypeError; whether their values will do, `check` says.

    Behind them come those that are `owned`. Plain values come back as they are, in a fraction of a microsecond.
    """
    more: Pairs = ()
    late: Pairs = ()
    if len(asked) > COMMON:
        more, late = owned.of(function, asked[COMMON:])
        asked = asked[:COMMON]
    causal, window_size, softmax_scale, softcap, return_lse, deterministic = asked
    if (
        type(causal) is bool
        and type(softcap) is float
        and type(return_lse) is bool
        and type(deterministic) is bool
        and (softmax_scale is None or type(softmax_scale) is float)
        and (window_size is None or (type(window_size) is tuple and tuple(map(type, window_size)) in _PAIRS))
    ):
        plain_values = causal, window_size, softmax_scale, softcap, return_lse, deterministic, more, late
        return _tuple(Options, plain_values)
    return Options(
        *plain(function, causal, window_size, softmax_scale, softcap),
        flag(function, "return_lse", return_lse),
        flag(function, "deterministic", deterministic),
        more,
        late,
    )


def plain(function: str, causal: Any, window_size: Any, softmax_scale: Any, softcap: Any) -> Plain:
    """Those of them that scores depend on."""
    causal = flag(function, "causal", causal)
    sides = None if window_size is None else _sides(function, window_size)
    scale = None if softmax_scale is None else number(function, "softmax_scale", softmax_scale)
    return causal, sides, scale, number(function, "softcap", softcap)


def flag(function: str, name: str, given: Any) -> bool:
    """A bool, Python's or NumPy's."""
    if given is True or given is False:
        return bool(given)
    if type(given).__name__ not in ("bool", "bool_"):  # NumPy calls its own one or the other, by version
        raise TypeError(f"{function}: {name} is a {type(given).__name__}; pass True or False.")
    return bool(given)


def _sides(function: str, given: Any) -> Window:
    binary = isinstance(given, (str, bytes, bytearray, memoryview))
    if binary or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(
            f"{function}: window_size is {given!r}; pass a pair (left, right), each a number of keys or None."
        )
    return _side(function, "left", given[0]), _side(function, "right", given[1])


def _side(function: str, name: str, given: Any) -> int | None:
    if given is None:
        return None
    return integer(function, f"the {name} side of window_size", given, "an integer or None")


def integer(function: str, name: str, given: Any, wanted: str = "an integer") -> int:
    """The value of an integer, or of an array of no dimensions that holds one."""
    if type(given) is int:
        return given
    try:
        if isinstance(given, bool) or _kind(given) == "bool":
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise TypeError(f"{function}: {name} is a {type(given).__name__}; pass {wanted}.") from None


def number(function: str, name: str, given: Any) -> float:
    """The value of a real number, or of an array of no dimensions."""
    if type(given) is bool or not isinstance(given, (int, float)):
        kind = _kind(given)
        if kind is not None:
            real = kind.startswith(("float", "bfloat", "int", "uint")) and getattr(given, "ndim", 1) == 0
        else:  # texts can be read as numbers too, but have no __float__
            real = hasattr(type(given), "__float__") and type(given) is not bool
        if not real:
            raise TypeError(f"{function}: {name} is a {type(given).__name__}; pass a number.")
        _refuse_what_is_traced(function, name, given)
    try:
        return float(given)
    except OverflowError:  # an int beyond all floats
        return math.inf if given > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError) as error:  # an array that is deleted, on no device, traced, ...
        raise TypeError(
            f"{function}: {name} is a {type(given).__name__} whose value cannot be read ({error}); pass a number."
        ) from error


def _kind(given: Any) -> str | None:
    """The name of the dtype, without its framework's; None for what has none."""
    dtype = getattr(given, "dtype", None)
    return None if dtype is None else str(dtype).rpartition(".")[2]


def _refuse_what_is_traced(function: str, name: str, given: Any) -> None:
    """A kernel is given the value, and no gradient by it is ever computed."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and isinstance(given, jax.core.Tracer):
        raise TypeError(
            f"{function}: {name} is traced by JAX, and its value must be known by then; pass a number, or name it in "
            "static_argnames."
        )
    if torch is not None and isinstance(given, torch.Tensor) and given.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{function}: {name} is a torch tensor that requires grad, and would get none; pass a number, as "
            f"{name}.item() is, or call under torch.no_grad()."
        )


def check(function: str, options: tuple[Any, ...], head_dim: int) -> tuple[int | None, int | None, float, float]:
    """Check the values of plain options: the window that causality leaves, softmax_scale and softcap."""
    causal, window_size, softmax_scale, softcap, *_ = options
    left, right = (
        _checked_side(function, name, side)
        for name, side in zip(("left", "right"), window_size or (None, None), strict=True)
    )
    if causal:
        right = 0 if right is None else min(right, 0)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not (math.isfinite(scale) and scale > 0.0):
        raise ArgumentError(f"{function}: softmax_scale is {scale}; it must be finite and greater than 0.")
    if not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
        raise ArgumentError(
            f"{function}: softmax_scale is {scale}; it must be from 2^-126 to 2^127, as float32 holds it."
        )
    if not (math.isfinite(softcap) and softcap >= 0.0):
        raise ArgumentError(f"{function}: softcap is {softcap}; it must be finite and not negative (0.0 is off).")
    if softcap != 0.0 and not FLOAT32_RANGE[0] <= softcap <= FLOAT32_RANGE[1]:
        raise ArgumentError(
            f"{function}: softcap is {softcap}; it must be a normal float32 number, or 0.0, which is off."
        )
    return left, right, scale, softcap


def _checked_side(function: str, name: str, side: int | None) -> int | None:
    if side is None or side == -1:
        return None
    if side < 0:
        raise ArgumentError(
            f"{function}: the {name} side of window_size is {side}; pass at least 0, or None (or -1) for unbounded."
        )
    return min(side, MAX_SEQLEN)
