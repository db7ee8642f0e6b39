"""The score term that removes the keys for which an array of booleans holds False."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import score_array
from .score_array import Access, Parts, Specialised
from .term import Array, Point

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.problem import Check, Problem
    from .._operations.features import Feature


class MaskArray(Specialised):
    """A mask of any axes; keys beyond its ends are removed.

    Parameters
    ----------
    access : Access
        How kernels read the array.
    """

    name = "mask"
    header = "attention/mask_array.cuh"
    type = "attention::MaskArray"
    data = "MaskArrayData"
    foldable = True
    arrays = ("mask",)
    bends = False
    hides = True

    def __init__(self, access: Access = Access(1)) -> None:  # noqa: B008
        self.facts = (access,)
        self.per_head = access.per_head
        self.loaded_bytes = 2 * access.bytes  # two of them are a register

    def struct(self, element: str) -> str:
        (access,) = self.facts
        return f"{self.type}<{access.arguments()}, {str(access.per_head).lower()}>"

    def specialised(self, specs: Mapping[str, Spec], packed: bool) -> MaskArray:
        return MaskArray(Access.of("mask", specs, packed))

    def check(self, call: Check) -> None:
        spec = call.specs.get("mask")
        if spec is None:
            return
        if spec.dtype not in ("bool", "uint8"):
            call.value_error(f"mask has dtype {spec.dtype}; pass bool or uint8.")
        score_array.check(call, "mask")

    def check_lengths(self, problem: Problem, longest_q: int, longest_k: int) -> None:
        score_array.check_lengths(problem, "mask", longest_q, longest_k)

    def values(self, problem: Problem) -> dict[str, Any]:
        return {"layout": score_array.layout(problem, "mask")}

    def keeps(self, at: Point, given: Mapping[str, Any]) -> Array:
        mask = given["mask"]
        parts = Parts.at(at, mask.shape)
        kept = np.zeros((len(at.batch), len(at.head), len(at.query), len(at.key)), bool)
        kept[parts.of_scores] = mask[parts.of_array] != 0
        return kept


MASK_ARRAY = MaskArray()


def mask_array_feature(function: str, mask: Any) -> Feature:
    """The term of a call with a mask that is an array."""
    from .._operations.features import Feature

    return Feature(MASK_ARRAY, (mask,))
