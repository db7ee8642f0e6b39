"""The arguments of calls that few calls have: from their values to the score terms that they ask for."""

from __future__ import annotations

from typing import Any

from .._call import arrays as _arrays
from .._call import options as _options
from .._operations.call import call
from .._operations.features import Feature, extended
from .._operations.operation import Operation

FEATURES = ("score", "bias", "rel_bias", "mask", "dropout_p", "seed")
"""The arguments, in the order in which functions here take them."""


def call_featured(
    operation: Operation,
    given: tuple[Any, ...],
    asked: tuple[Any, ...],
    score: Any,
    bias: Any,
    rel_bias: Any,
    mask: Any,
    dropout_p: Any,
    seed: Any,
) -> Any:
    """Call an operation, with features if some are asked for."""
    if score is None and bias is None and rel_bias is None and mask is None and seed is None and dropout_p == 0:
        return call(operation, given, asked)
    mask, asked = without_ranges(operation.name, mask, asked)
    if _arrays.compiling(given[0]):
        from ..interop import torch  # which is traced; a cache would not be

        return torch.outside_a_graph(
            call_featured, operation, given, asked, score, bias, rel_bias, mask, dropout_p, seed
        )
    features = features_of(operation.name, score, bias, rel_bias, mask, dropout_p, seed)
    return call(*extended(operation, given, asked, features))


def without_ranges(function: str, mask: Any, asked: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """What is left of a mask of `cufa.masks` without its windows, which become options: kernels know them."""
    from .._masks.mask import Mask, narrowed

    if not isinstance(mask, Mask):
        return mask, asked
    window, rest = mask.ranges()
    if window == (None, None):
        return rest, asked
    causal, given, *others = asked
    _, given, *_ = _options.plain(function, causal, given, *others[:2])
    left, right = (None if side == -1 else side for side in given or (None, None))
    return rest, (causal, narrowed(window, (left, right)), *others)


def features_of(
    function: str, score: Any, bias: Any, rel_bias: Any, mask: Any, dropout_p: Any, seed: Any
) -> list[Feature]:
    """What is asked for, in the order in which it is applied: the score function, biases, the mask, dropout.

    What bends scores comes before what only adds to them, as ``Variant`` in ``cuda_src/attention/variant.cuh`` asks of
    terms with gradients.
    """
    found: list[Feature] = []
    if score is not None:
        from .._terms.function import score_feature

        found.append(score_feature(function, score))
    if bias is not None:
        from .._terms.bias import bias_feature

        found.append(bias_feature(function, bias))
    if rel_bias is not None:
        from .._terms.rel_bias import rel_bias_feature

        found.append(rel_bias_feature(function, rel_bias))
    if mask is not None:
        from .._terms.mask import mask_features

        found += mask_features(function, mask)
    if seed is not None or dropout_p != 0:
        from .._terms.dropout import dropout_features

        found += dropout_features(function, dropout_p, seed)
    return found
