"""Calls with further score terms: cases of `cufa.testing`, and gradients of them, on NumPy arrays or elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from gradients import Call

from cufa._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from cufa._operations.call import call
from cufa._operations.features import Feature, extended, wanting
from cufa._operations.forward import ATTENTION, ATTENTION_VARLEN
from cufa._operations.operation import Operation
from cufa._terms.bias import bias_feature
from cufa._terms.mask_array import mask_array_feature
from cufa._terms.rel_bias import rel_bias_feature
from cufa.testing import Case, assert_close, to_numpy

MAKERS = {"bias": bias_feature, "rel_bias": rel_bias_feature, "mask": mask_array_feature}


def run(operation: Operation, arrays: dict[str, Any], options: Any, *more: bool, wanted: Any = None) -> Any:
    """Call an operation with arrays by name, those of features included; `more` is return_lse and deterministic.

    `wanted` are the gradients by features that are computed, all if it is None.
    """
    features: list[Feature] = [
        make(operation.name, arrays[name]) for name, make in MAKERS.items() if arrays.get(name) is not None
    ]
    given = tuple(arrays.get(name) for name in operation.arrays)
    asked = tuple(options.get(name) for name in ("causal", "window_size", "softmax_scale", "softcap"))
    operation, *others = extended(operation, given, (*asked, *more), features)
    return call(operation if wanted is None else wanting(operation, wanted), *others)


def forward(case: Case, xp: Any = np) -> tuple[Any, Any]:
    """Out and lse, held to the reference."""
    packed = isinstance(case.seqlen_q, tuple)
    found = run(ATTENTION_VARLEN if packed else ATTENTION, case.arrays(xp), case.options, True, False)
    out, lse = (to_numpy(x) for x in found)
    assert_close(out, lse=lse, **case.arrays(), **case.options)
    return out, lse


def run_backward(made: Call, xp: Any = np, wanted: Any = None) -> tuple[Any, ...]:
    operation = ATTENTION_VARLEN_BACKWARD if made.packed else ATTENTION_BACKWARD
    found: tuple[Any, ...] = run(
        operation, made.arrays(xp), made.case.options, False, made.deterministic, wanted=wanted
    )
    return found


def backward(made: Call, xp: Any = np) -> tuple[Any, ...]:
    """Gradients, held to the reference."""
    results = tuple(to_numpy(x) for x in run_backward(made, xp))
    made.check(results)
    return results
