"""What `jax.vmap` does with a call: one launch of a larger problem.

The mapped axis is folded into the batch, or else into the heads: where an array or a result has no axis of the batch,
as sinks and their gradients have none, or sequences are packed. Which axis is which is not written down anywhere: the
checks of the operation say what shapes they would take, and so of arrays of later operations, too. What neither serves,
such as a mapped axis of offsets or a score term that is not `foldable`, is a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import jax

from .._call.arrays import Layout
from .._call.problem import Problem
from .xla import Call, layout_of

Shape = tuple[int, ...]

NEW = -1
"""In place of an axis: there is none, but a new first one would be taken for it."""


@dataclass(frozen=True)
class Axes:
    """Where arrays, and results, have the batch or the heads; None for those that have neither."""

    arrays: tuple[int | None, ...]
    results: tuple[int | None, ...]


def folding(call: Call, device: int, place: Callable[..., tuple[Any, ...]]) -> Any:
    """`place`, which takes the arrays of a call, with what vmap does with it."""
    wrapped = jax.custom_batching.custom_vmap(lambda *arrays: place(*arrays))

    def rule(size: int, mapped: Sequence[bool], *arrays: Any) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
        inner = [array.shape[1:] if each else array.shape for array, each in zip(arrays, mapped, strict=True)]
        layouts = tuple(layout_of(shape, array.dtype, device) for shape, array in zip(inner, arrays, strict=True))
        expected = call.problem(layouts).results
        for kind in ("batch", "heads"):
            axes = axes_of(call, layouts, kind)
            if axes is not None and serves(axes, mapped):
                folded = [_fold(*each, size, layouts) for each in zip(arrays, mapped, axes.arrays, strict=True)]
                results = wrapped(*folded)
                each = zip(results, axes.results, expected, strict=True)
                return tuple(_unfold(x, axis, size, one.shape) for x, axis, one in each), (True,) * len(results)
        return _loop(wrapped, size, mapped, arrays), (True,) * len(expected)

    wrapped.def_vmap(rule)
    return wrapped


def serves(axes: Axes, mapped: Sequence[bool]) -> bool:
    """Whether arrays of which some are mapped can be folded along these axes."""
    arrays = zip(axes.arrays, mapped, strict=True)
    return None not in axes.results and not any(axis is None and each for axis, each in arrays)


def _fold(array: Any, mapped: bool, axis: int | None, size: int, layouts: tuple[Layout, ...]) -> Any:
    """The mapped axis before `axis`, and both as one."""
    if axis is None or (axis == NEW and not mapped):
        return array
    if axis == NEW:
        batch = layouts[0][1][0]
        array = jax.numpy.broadcast_to(array[:, None], (size, batch, *array.shape[1:]))
        axis = 0
    if not mapped:
        array = jax.numpy.broadcast_to(array, (size, *array.shape))
    array = jax.numpy.moveaxis(array, 0, axis)
    shape = array.shape
    return array.reshape(*shape[:axis], size * shape[axis + 1], *shape[axis + 2 :])


def _unfold(array: Any, axis: int | None, size: int, shape: Shape) -> Any:
    """The mapped axis apart from `axis`, and first; `shape` is that of one entry."""
    assert axis is not None
    return jax.numpy.moveaxis(array.reshape(*shape[:axis], size, *shape[axis:]), axis, 0)


def _loop(wrapped: Any, size: int, mapped: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, ...]:
    def one(chosen: list[Any]) -> Any:
        those = iter(chosen)
        return wrapped(*(next(those) if each else array for array, each in zip(arrays, mapped, strict=True)))

    results: tuple[Any, ...] = jax.lax.map(one, [array for array, each in zip(arrays, mapped, strict=True) if each])
    return results


# --- Which axis is which ----------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def axes_of(call: Call, layouts: tuple[Layout, ...], kind: str) -> Axes | None:
    """Where arrays of these layouts, and results, have the ``batch`` or the ``heads``; None if that cannot be told.

    Asked is what the operation says of a problem with so many more of them that no other extent is as large.
    """
    operation = call.operation
    shapes = dict(zip(call.names, (layout[1] for layout in layouts), strict=True))
    given = dict(zip(call.names, layouts, strict=True))
    known = {name: -4 if kind == "batch" else -2 for name in operation.rows if name in shapes}
    if not all(term.foldable for term in call.problem(layouts).terms):
        return None
    if any(-axis > len(shapes[name]) for name, axis in known.items()):  # sequences are packed
        return None
    counts = {shapes[name][axis] for name, axis in known.items()}
    if 0 in counts:
        return None
    forward = operation.of
    of_forward = [] if forward is None else [f"{prefix}{name}" for name in forward.gives for prefix in ("", "d")]
    if any(name in given and name not in known for name in of_forward):
        of_results = _of_results(call, given, kind)
        if of_results is None:
            return None
        known |= of_results
    known = {name: axis % len(shapes[name]) for name, axis in known.items() if name in shapes}
    factor = 1 + max((max(shape, default=1) for shape in shapes.values()), default=1)
    others = [name for name in shapes if name not in known]
    grown = {name: _grow(shapes[name], axis, factor) for name, axis in known.items()}
    for chosen in product(*(_candidates(shapes[name], counts) for name in others)):
        found = {name: _grow(shapes[name], axis, factor) for name, axis in zip(others, chosen, strict=True)}
        problem = _asked(call, layouts, grown | found)
        if problem is None:
            continue
        axes = known | dict(zip(others, chosen, strict=True))
        if kind == "batch":
            for name, axis in zip(others, chosen, strict=True):
                longer = {name: (factor * min(counts), *shapes[name])}
                if axis is None and _asked(call, layouts, grown | found | longer):
                    axes[name] = NEW
        results = _grown(call.problem(layouts), problem, factor)
        if results is None or (operation.of is None and None in results):  # gradients alone are sums over them
            return None
        return Axes(tuple(axes[name] for name in call.names), results)
    return None


def _of_results(call: Call, given: dict[str, Layout], kind: str) -> dict[str, int] | None:
    """The axes of the forward's results, and so of the gradients by them; None if that cannot be told."""
    forward = call.operation.of
    assert forward is not None
    names = [name for name in forward.arrays if name in given and name not in forward.written]
    options = call.options._replace(return_lse=True, deterministic=False)
    inner = Call(forward, tuple(map(forward.arrays.index, names)), options)
    axes = axes_of(inner, tuple(given[name] for name in names), kind)
    if axes is None:
        return None
    found: dict[str, int] = {}
    for name, axis in zip(forward.gives, axes.results, strict=False):
        assert axis is not None
        found |= {name: axis, f"d{name}": axis}
    return found


def _candidates(shape: Shape, counts: set[int]) -> Iterator[int | None]:
    yield None
    yield from (axis for axis, extent in enumerate(shape) if extent in counts)


def _grow(shape: Shape, axis: int | None, factor: int) -> Shape:
    return shape if axis is None else (*shape[:axis], factor * shape[axis], *shape[axis + 1 :])


def _asked(call: Call, layouts: tuple[Layout, ...], shapes: dict[str, Shape]) -> Problem | None:
    """The problem of arrays of other shapes; None if the operation refuses them."""
    changed = tuple(
        layout_of(shapes[name], layout[3], layout[4]) for name, layout in zip(call.names, layouts, strict=True)
    )
    try:
        return call.problem(changed)
    except (TypeError, ValueError, NotImplementedError):
        return None


def _grown(one: Problem, other: Problem, factor: int) -> tuple[int | None, ...] | None:
    """The axis of each result that is `factor` times as long in the other problem; None if anything else differs."""
    axes: list[int | None] = []
    for before, after in zip(one.results, other.results, strict=True):
        changed = [axis for axis, extent in enumerate(before.shape) if after.shape[axis] != extent]
        if any(after.shape[axis] != factor * before.shape[axis] for axis in changed) or len(changed) > 1:
            return None
        axes.append(changed[0] if changed else None)
    return tuple(axes)
