"""A score term without its gradients, for calls that do not want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .term import Array, Point, Term

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.options import Options
    from .._call.problem import Check, Problem

ALIKE = ("name", "header", "data", "headers", "arrays", "option_names", "late_names", "loaded_bytes", "blocks")
FLAGS_ALIKE = ("per_head", "bends", "scales", "hides", "gives_slope", "stages", "boxed", "foldable")


class Constant(Term):
    """What another term is where nobody asks for its gradients: kernels compute none.

    Parameters
    ----------
    term : Term
        The other one. Sums of its gradients are not exact.
    """

    ordered = True

    def __init__(self, term: Term) -> None:
        self.term = term
        self.type = f"attention::Constant<{term.type}>"
        for name in (*ALIKE, *FLAGS_ALIKE):
            setattr(self, name, getattr(term, name))

    def __eq__(self, other: object) -> bool:
        return type(other) is Constant and self.term == other.term

    def __hash__(self) -> int:
        return hash((Constant, self.term))

    def __reduce__(self) -> tuple[type[Constant], tuple[Term]]:
        return Constant, (self.term,)  # headers may be a view of a mapping, which goes to no other process

    def struct(self, element: str) -> str:
        return f"attention::Constant<{self.term.struct(element)}>"

    def specialised(self, specs: Mapping[str, Spec], packed: bool) -> Constant:
        return Constant(self.term.specialised(specs, packed))

    def staged_bytes(self, rows: int, columns: int) -> int:
        return self.term.staged_bytes(rows, columns)

    def asked(self, specs: Mapping[str, Spec], options: Options) -> bool:
        return self.term.asked(specs, options)

    def plain(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.term.plain(function, values)

    def plain_late(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.term.plain_late(function, values)

    def late_members(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.term.late_members(values)

    def check(self, call: Check) -> None:
        self.term.check(call)

    def check_lengths(self, problem: Problem, longest_q: int, longest_k: int) -> None:
        self.term.check_lengths(problem, longest_q, longest_k)

    def values(self, problem: Problem) -> dict[str, Any]:
        return self.term.values(problem)

    def options(self, problem: Problem) -> dict[str, Any]:
        return self.term.options(problem)

    def unit(self, given: Mapping[str, Any]) -> float:
        return self.term.unit(given)

    def fits(self, given: Mapping[str, Any], farthest: int, largest: float) -> bool:
        return self.term.fits(given, farthest, largest)

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        return self.term.score(s, at, given)

    def dscore(self, scored: Array, at: Point, given: Mapping[str, Any]) -> Array | float:
        return self.term.dscore(scored, at, given)

    def factor(self, at: Point, given: Mapping[str, Any]) -> Array | float:
        return self.term.factor(at, given)

    def keeps(self, at: Point, given: Mapping[str, Any]) -> Array | bool:
        return self.term.keeps(at, given)
