"""The score term that keeps scores within a softcap: ``softcap · tanh(s / softcap)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .term import Term

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
    per_head = False

    def asked(self, specs: Mapping[str, Spec], options: Options) -> bool:
        return options.softcap > 0.0

    def values(self, problem: Problem) -> dict[str, Any]:
        inverse = 1.0 / problem.softcap
        return {"softcap": problem.softcap, "inverse": inverse, "exponent": 2.0 * inverse / math.log(2.0)}
