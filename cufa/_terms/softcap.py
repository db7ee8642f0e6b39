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

LOWEST, LOW = 2.0**-32, 128.0
"""Softcaps up to the latter are so low that 2^-22 of one is little: in kernels of 16-bit elements scores may err by so
much. By one of at least the former a scale up to `LARGE_SCALE` can be divided."""

LARGE_SCALE = 2.0**64


class Softcap(Term):
    """Source: Gemma Team, *Gemma 2*, 2024. In kernels of 16-bit elements it errs in proportion to the softcap."""

    name = "softcap"
    header = "attention/softcap.cuh"
    type = "attention::Softcap<{element}>"
    data = "SoftcapData"
    foldable = True
    per_head = False
    pairs = True

    def asked(self, specs: Mapping[str, Spec], options: Options) -> bool:
        return options.softcap > 0.0 and is_low(specs["q"].dtype, options)

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


class LargeSoftcap(Softcap):
    """The same where a softcap is so large that small scores have to err in proportion to themselves."""

    name = "large_softcap"
    type = "attention::Softcap<{element}, false>"
    pairs = False

    def asked(self, specs: Mapping[str, Spec], options: Options) -> bool:
        return options.softcap > 0.0 and not is_low(specs["q"].dtype, options)


def is_low(dtype: str, options: Options) -> bool:
    """Whether a softcap is low, or elements have more than 16 bits, of which kernels leave nothing out."""
    if dtype not in ("float16", "bfloat16"):
        return True
    return LOWEST <= options.softcap <= LOW and (options.softmax_scale or 0.0) <= LARGE_SCALE
