"""What XLA's partitioner does with a call on several devices: each computes its own sequences, or its own heads.

It is told so by the same axes that `jax.vmap` folds into (see interop/folding.py). A result that has no such axis, as
the gradient by sinks has no batch, is a sum over it, and added up among the devices. All else is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from .._call.arrays import Layout
from .._call.problem import Problem
from . import folding as _folding
from .xla import Call

Place = Callable[..., tuple[Any, ...]]
KINDS = ("batch", "heads")


def divided(call: Call, layouts: tuple[Layout, ...], place: Place) -> Place:
    """`place`, which takes the arrays of a call, as something that XLA may divide among devices."""
    kinds = KINDS if call.operation.grouped else KINDS[:1]
    axes = {kind: _folding.axes_of(call, layouts, kind) if kind in kinds else None for kind in KINDS}
    if all(each is None for each in axes.values()):
        return place
    from jax.experimental.custom_partitioning import custom_partitioning

    problem = call.problem(layouts)
    shapes = [layout[1] for layout in layouts]
    arrays = [_places(axes, "arrays", index, problem, shape) for index, shape in enumerate(shapes)]
    results = [_places(axes, "results", index, problem, each.shape) for index, each in enumerate(problem.results)]

    def partition(mesh: Any, given: Any, wanted: Any) -> tuple[Any, ...]:
        names = {kind: _names_along(arrays[0].get(kind), given[0]) for kind in KINDS}
        heads = problem.num_heads_q if problem.num_heads_k == 1 else problem.num_heads_k
        if heads % _count(mesh, names["heads"]):
            names["heads"] = ()
        divide = [_sharding(mesh, each, names, len(x.shape)) for each, x in zip(arrays, given, strict=True)]
        joined = [_sharding(mesh, each, names, len(x.shape)) for each, x in zip(results, wanted, strict=True)]

        def lower(*parts: Any) -> tuple[Any, ...]:
            found = []
            for result, each in zip(place(*parts), results, strict=True):
                missing = tuple(name for kind in KINDS if kind not in each for name in names[kind])
                found.append(jax.lax.psum(result, missing) if missing else result)
            return tuple(found)

        return mesh, lower, tuple(joined), tuple(divide)

    dividing = custom_partitioning(lambda *arrays: place(*arrays))
    rule, sizes = _rule(problem, shapes, arrays, results)
    dividing.def_partition(partition=partition, sharding_rule=rule, **sizes)

    def typed(*given: Any) -> tuple[Any, ...]:
        """With the shardings that results have as types, where JAX is told to keep those of arrays."""
        found = dividing(*given)
        if not explicit(given[0]):
            return tuple(found)
        names = {kind: _names_along(arrays[0].get(kind), jax.typeof(given[0])) for kind in KINDS}
        mesh = jax.typeof(given[0]).sharding.mesh
        wanted = [_sharding(mesh, each, names, result.ndim) for each, result in zip(results, found, strict=True)]
        return tuple(jax.sharding.reshard(*each) for each in zip(found, wanted, strict=True))

    return typed


def within_one() -> bool:
    """Whether what is traced runs on one device already, under shard_map."""
    mesh = jax.sharding.get_abstract_mesh() if hasattr(jax.sharding, "get_abstract_mesh") else None
    kinds = getattr(mesh, "axis_types", None) or ()
    return any(kind == jax.sharding.AxisType.Manual for kind in kinds)


def explicit(array: Any) -> bool:
    """Whether its sharding is part of an array's type."""
    sharding = getattr(jax.typeof(array), "sharding", None) if hasattr(jax, "typeof") else None
    return sharding is not None and any(each is not None for each in sharding.spec)


def _places(
    axes: dict[str, _folding.Axes | None], group: str, index: int, problem: Problem, shape: tuple[int, ...]
) -> dict[str, int]:
    """The axis of an array, or of a result, by kind. A single head of k is shared, and its gradient a sum."""
    found = {kind: getattr(each, group)[index] for kind, each in axes.items() if each is not None}
    places = {kind: axis for kind, axis in found.items() if axis is not None and axis != _folding.NEW}
    if "heads" in places and shape[places["heads"]] == 1 < problem.num_heads_q:
        del places["heads"]
    return places


def _names_along(axis: int | None, array: Any) -> tuple[str, ...]:
    """The axes of the mesh along which an axis of an array is divided."""
    spec = getattr(array.sharding, "spec", ())
    if axis is None or axis >= len(spec) or spec[axis] is None:
        return ()
    return spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)


def _count(mesh: Any, names: Iterable[str]) -> int:
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


def _sharding(mesh: Any, axes: dict[str, int], names: dict[str, tuple[str, ...]], rank: int) -> Any:
    return jax.sharding.NamedSharding(mesh, spec_of(axes, names, rank))


def spec_of(axes: dict[str, int], names: dict[str, tuple[str, ...]], rank: int) -> Any:
    """Along which axes of a mesh an array is divided."""
    spec: list[Any] = [None] * rank
    for kind, axis in axes.items():
        spec[axis] = names[kind] or None
    return jax.sharding.PartitionSpec(*spec)


def _rule(
    problem: Problem, shapes: list[tuple[int, ...]], arrays: list[dict[str, int]], results: list[dict[str, int]]
) -> tuple[str, dict[str, int]]:
    """What belongs together, as an einsum says it; and the sizes of parts of an axis. Heads of q are groups."""
    ratio = problem.num_heads_q // problem.num_heads_k if problem.num_heads_k > 1 else 1
    grouped = ratio > 1
    count = iter(range(1 << 20))

    def told(shape: tuple[int, ...], axes: dict[str, int]) -> str:
        words = [f"x{next(count)}" for _ in shape]
        if "batch" in axes:
            words[axes["batch"]] = "b"
        if "heads" in axes:
            whole = grouped and shape[axes["heads"]] != problem.num_heads_k
            words[axes["heads"]] = "(h g)" if whole else "h"
        return " ".join(words)

    left = ", ".join(told(*each) for each in zip(shapes, arrays, strict=True))
    right = ", ".join(told(each.shape, axes) for each, axes in zip(problem.results, results, strict=True))
    return f"{left} -> {right}", {"g": ratio} if grouped and "(h g)" in left + right else {}
