"""The score term that keeps scores within a softcap: ``softcap · tanh(s / softcap)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .term import Array, Point, Term

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.options import Options
    from .._call.problem import Problem


class Softcap(Term):
    """Source: Gemma Team, *Gemma 2*, 2024."""

    name = "softcap"
    header = "attention/softcap.cuh"
    type = "attention::Softcap<{element}>"
    data = "SoftcapData"
    foldable = True
    per_head = False

    def asked(self, specs: Mapping[str, Spec], options: Options) -> bool:
        return options.softcap > 0.0

    def values(self, problem: Problem) -> dict[str, Any]:
        inverse = 1.0 / problem.softcap
        return {"softcap": problem.softcap, "inverse": inverse, "exponent": 2.0 * inverse / math.log(2.0)}

    def options(self, problem: Problem) -> dict[str, Any]:
        return {"softcap": problem.softcap}

    def unit(self, given: Mapping[str, Any]) -> float:
        return float(given["softcap"])

    def score(self, s: Array, at: Point, given: Mapping[str, Any]) -> Array:
        np.tanh(s, out=s)
        s *= given["softcap"]
        return s

    def dscore(self, scored: Array, at: Point, given: Mapping[str, Any]) -> Array:
        slope: Array = scored / given["softcap"]
        slope *= slope
        np.subtract(1, slope, out=slope)
        return slope
