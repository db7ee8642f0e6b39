"""Operations with features that a call asks for: score terms beside those that every call may have."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .operation import Operation, gradients_of

if TYPE_CHECKING:
    from .._terms import Term


class Feature(NamedTuple):
    """A score term that a call asks for, with the values of its arrays and of its options, in their order."""

    term: Term
    arrays: tuple[Any, ...] = ()
    options: tuple[Any, ...] = ()


def extended(
    operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...], features: Sequence[Feature]
) -> tuple[Operation, tuple[Any, ...], tuple[Any, ...]]:
    """The operation that has the features, and what it is called with."""
    if not features:
        return operation, given, asked
    arrays = (array for feature in features for array in feature.arrays)
    options = (option for feature in features for option in feature.options)
    return having(operation, *(feature.term for feature in features)), (*given, *arrays), (*asked, *options)


def wanting(gradients: Operation, names: Collection[str]) -> Operation:
    """The operation of gradients without those of score terms that are not among the names."""
    own = (name for term in gradients.terms for name in term.gradients)
    return _wanting(gradients, frozenset(name for name in own if name in names))


@cache
def _wanting(gradients: Operation, names: frozenset[str]) -> Operation:
    terms = tuple(term.wanting(names) for term in gradients.terms)
    return gradients if terms == gradients.terms else replace(gradients, terms=terms)


@cache  # problems are remembered by operation
def having(operation: Operation, *terms: Term) -> Operation:
    """The operation with further terms, and with it that of its gradients, or the one whose gradients it computes."""
    if operation.of is not None:
        forward = having(operation.of, *terms)
        found = gradients_of(forward)
        assert found is not None
        return found
    gradients = gradients_of(operation)
    assert gradients is not None
    forward = operation.having(*terms, name=operation.name)
    gradients.having(*terms, name=gradients.name, of=forward)
    return forward
