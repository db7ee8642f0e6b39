"""The arguments of calls that few calls have: from their values to the score terms that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._call import arrays as _arrays
from .._call import options as _options
from .._operations.call import call
from .._operations.features import Feature, extended
from .._operations.operation import Operation
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from .._masks.mask import Mask

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
    if _arrays.compiling(given[0]):
        from ..interop import torch

        own = score, bias, rel_bias, mask, dropout_p, seed
        return torch.compiled_with_features(call_featured, operation, given, asked, *own)
    mask, asked = without_ranges(operation, given, mask, asked)
    features = features_of(operation.name, score, bias, rel_bias, mask, dropout_p, seed)
    return call(*extended(operation, given, asked, features))


def without_ranges(
    operation: Operation, given: tuple[Any, ...], mask: Any, asked: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """What is left of a mask of `cufa.masks` without its windows, which become options: kernels know them.

    One that is for other sequences, heads or lengths is refused.
    """
    from .._masks.mask import Mask, narrowed

    if not isinstance(mask, Mask):
        return mask, asked
    _check_mask(operation, given, mask)
    window, rest = mask.ranges()
    if window == (None, None):
        return rest, asked
    causal, sides, *others = asked
    _, sides, *_ = _options.plain(operation.name, causal, sides, *others[:2])
    left, right = (None if side == -1 else side for side in sides or (None, None))
    return rest, (causal, narrowed(window, (left, right)), *others)


def _check_mask(operation: Operation, given: tuple[Any, ...], mask: Mask) -> None:
    named = dict(zip(operation.arrays, given, strict=False))
    packed = "cu_seqlens_q" in operation.arrays
    q, k = (tuple(getattr(named[name], "shape", ())) for name in "qk")
    if not len(q) == len(k) == 4 - packed:
        return  # as the checks of the call itself will say
    if not packed:
        mask.check(q[0], q[2])
        mask.check_lengths(q[1], k[1])
        return
    if mask.lengths != (None, None):
        raise UnsupportedError(
            f"{operation.name}: masks.from_array serves sequences of one length alone, and not packed ones; pass the "
            "array itself as mask, of the longest sequence."
        )
    offsets = tuple(getattr(named["cu_seqlens_q"], "shape", ()))
    if len(offsets) == 1:
        mask.check(offsets[0] - 1, q[1])


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
