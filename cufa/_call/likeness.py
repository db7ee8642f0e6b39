"""Tensors like those of an earlier call, told by one look at all of them.

Reading the facts of tensors one by one is what takes Python most of the time of a call. What torch.compile guards its
programs with compares all of them at once: types, dtypes, devices, shapes, strides, whether they require grad, and
which of torch's layers would see an operation on them, as modes, transforms, autocast, tracing and a negative bit do.
What it does not compare is asked for here, or by whoever has the addresses.

Torch promises nothing of these guards. So only versions are taken that were tried, and of these only one whose guards
refuse what they must refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from .arrays import contiguous

if TYPE_CHECKING:
    from .arrays import Arrays, Likeness

VERSIONS = (2, 11), (2, 13)
"""The oldest torch and the newest of which guards were tried. An error within a guard ends the process, where nothing
can catch it, so that those of other versions are not even tried."""

Guard = Callable[..., bool]
"""Tells whether tensors are like those that it was made of, in their order."""


class Guards(NamedTuple):
    """What of torch's own tells tensors, and makes them without the way through its dispatcher.

    Attributes
    ----------
    guard : callable
        The `Guard` of some tensors, from them, their shapes and their strides.
    empty : callable
        New tensor on the current GPU, from a shape, strides and a dtype.
    """

    guard: Callable[..., Guard]
    empty: Callable[[tuple[int, ...], tuple[int, ...], Any], Any]


class TensorLikeness:
    """The `Likeness` of tensors of which one look, by a `Guard`, tells nearly all but their addresses."""

    __slots__ = (
        "_deterministic",
        "_different",
        "_fills",
        "_forward_ad",
        "_guard",
        "_present",
        "_records",
        "_requires_grad",
        "_torch",
        "_twins",
        "_types",
        "address",
        "current_device",
        "empty",
        "places",
        "recorded",
        "stream",
    )

    def __init__(self, torch: Any, guards: Guards, arrays: Arrays) -> None:
        given = arrays.given
        self.recorded = arrays.recorded
        self.places = tuple(place for place, array in enumerate(given) if array is not None)
        self._present = itemgetter(*self.places)
        # A guard takes a tensor that it is shown twice for another one, so that each is shown where it comes first.
        first = {id(given[place]): place for place in reversed(self.places)}
        shown = sorted(first.values())
        self._different = itemgetter(*shown)
        self._twins = tuple((first[id(given[place])], place) for place in self.places if place not in shown)
        self._types = [*map(type, given)]
        layouts = arrays.layouts
        told = [layout for layout in map(layouts.__getitem__, shown) if layout is not None]
        self._guard = guards.guard(
            self._different(given), [[*layout[1]] for layout in told], [[*layout[2]] for layout in told]
        )
        self._requires_grad = any(given[place].requires_grad for place in shown)
        self._records = torch.is_grad_enabled
        self._forward_ad = torch.autograd.forward_ad
        self._deterministic = torch._C._get_deterministic_algorithms
        self._fills = torch._C._get_deterministic_fill_uninitialized_memory
        self._torch = torch
        adapter = arrays.adapter
        self.current_device, self.stream = adapter.current_device, adapter.current_stream
        self.address = torch.Tensor.data_ptr
        self.empty = guards.empty

    def arguments(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
        return tuple(shape), contiguous(shape), getattr(self._torch, dtype)

    def scratch(self, floats: int) -> tuple[Any, int]:
        memory = self.empty((floats,), (1,), self._torch.float32)
        return memory, self.address(memory)

    def addresses(self, given: tuple[Any, ...]) -> list[int] | None:
        if [*map(type, given)] != self._types:  # None is where there was none
            return None
        for one, other in self._twins:
            if given[one] is not given[other]:
                return None
        different = self._different(given)
        for array in different:
            if array.is_nested:  # it has no strides, and a guard that asks for them ends the process
                return None
        # Forward mode has no layer of its own.
        if not self._guard(*different) or self._forward_ad._current_level >= 0:
            return None
        if self._requires_grad and self._records() is not self.recorded:
            return None
        # What `torch.empty` would fill with NaN is seen where lengths leave rows of a result to nobody.
        if self._deterministic() and self._fills():
            return None
        found = [*map(self.address, self._present(given) if self._twins else different)]
        for address in found:
            if not address or address & 15:
                return None
        return found


def of_tensors(torch: Any, arrays: Arrays) -> Likeness | None:
    """The likeness of plain tensors that are aligned; None of others, and where torch has nothing that tells it."""
    plain = arrays.key[0] is arrays.adapter  # as a view of all at once leaves it
    layouts = [layout for layout in arrays.layouts if layout is not None]
    different = {id(array) for array in arrays.given if array is not None}
    if not plain or len(different) < 2 or any(layout[5] for layout in layouts):
        return None
    # Within a transform layers are hidden from guards, so that its tensors would look like others.
    guards = None if torch._C._are_functorch_transforms_active() else guards_of(torch)
    if guards is None:
        return None
    found = TensorLikeness(torch, guards, arrays)
    right = [address for address in arrays.pointers if address]
    return found if found.addresses(arrays.given) == right else None


@cache
def guards_of(torch: Any) -> Guards | None:
    """Those of this version of torch; None if they are not known to do what is asked of them here."""
    try:
        oldest, newest = VERSIONS
        if not oldest <= tuple(map(int, torch.__version__.split(".")[:2])) <= newest:
            return None
        own = torch._C._dynamo.guards

        def guard(tensors: tuple[Any, ...], shapes: list[list[int]], strides: list[list[int]]) -> Guard:
            made = own.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
            return made.check  # type: ignore[no-any-return]

        found = Guards(guard, own._empty_strided_cuda)
        # That for the CPU is the same function but for its last line.
        return found if _tells(torch, guard) and _makes(torch, own._empty_strided_cpu) else None
    except Exception:  # whatever is missing or different, the ordinary way of a call needs none of it
        return None


def _tells(torch: Any, guard: Callable[..., Guard]) -> bool:
    """Whether a guard takes what is alike, and nothing else of what calls may differ in."""

    def plain(*shape: int, **options: Any) -> Any:
        return torch.zeros(*shape, **{"device": "cpu", "dtype": torch.float32, **options})

    first, second, other = plain(2, 3), plain(4), plain(2, 3)
    check = guard((first, second), [[2, 3], [4]], [[3, 1], [1]])
    others = (
        plain(3, 2),
        plain(2, 3, 1),
        plain(3, 2).t(),
        plain(2, 3, dtype=torch.int32),
        plain(2, 3, device="meta"),
        plain(2, 3, requires_grad=True),
        torch.nn.Parameter(plain(2, 3), requires_grad=False),
        torch._neg_view(other),
        None,
    )
    if check(other, second) is not True or any(check(each, second) is not False for each in others):
        return False
    if check(second, first) is not False:
        return False
    keys, included = torch._C.DispatchKey, torch._C._IncludeDispatchKeyGuard
    for layer in (
        torch.autocast("cpu", torch.bfloat16),
        torch.utils._python_dispatch.TorchDispatchMode(),
        included(keys.FuncTorchDynamicLayerFrontMode),
        included(keys.PreDispatch),
    ):
        with layer:
            if check(other, second) is not False:
                return False
    return check(first, second) is True


def _makes(torch: Any, empty: Callable[..., Any]) -> bool:
    """Whether new tensors are what is asked for."""
    shape = 2, 3
    made = empty(shape, contiguous(shape), torch.float16)
    return type(made) is torch.Tensor and (made.shape, made.stride(), made.dtype) == (shape, (3, 1), torch.float16)
