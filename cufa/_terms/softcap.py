"""The score term that keeps scores within a softcap: ``softcap · tanh(s / softcap)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .score_array import Specialised
from .term import Array, Point

if TYPE_CHECKING:
    from .._call.arrays import Spec
    from .._call.options import Options
    from .._call.problem import Problem


LOWEST, LOW = 2.0**-32, 128.0
"""Softcaps up to the latter are so low that 2^-22 of one is little: in kernels of 16-bit elements scores may err by so
much. By one of at least the former a scale up to `LARGE_SCALE` can be divided."""

LARGE_SCALE = 2.0**64


class Softcap(Specialised):
    """Source: Gemma Team, *Gemma 2*, 2024.

    Parameters
    ----------
    low : bool
        Whether the softcap is low: see `LOW`.
    """

    name = "softcap"
    header = "attention/softcap.cuh"
    type = "attention::Softcap<{element}>"
    data = "SoftcapData"
    foldable = True
    per_head = False

    def __init__(self, low: bool = True) -> None:
        self.facts = (low,)
        self.pairs = low

    def struct(self, element: str) -> str:
        (low,) = self.facts
        return f"attention::Softcap<{element}>" if low else f"attention::Softcap<{element}, false>"

    def specialised(self, specs: Mapping[str, Spec], packed: bool, options: Options) -> Softcap:
        return Softcap(LOWEST <= options.softcap <= LOW and abs(options.softmax_scale or 0.0) <= LARGE_SCALE)

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
