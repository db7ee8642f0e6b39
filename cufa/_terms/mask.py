"""What ``mask=`` asks for: from a mask to the score terms that hide what it hides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._masks.blocks import BlockMask
from .._masks.mask import Mask
from .block_mask import BlockMaskTerm
from .traced import is_array

if TYPE_CHECKING:
    from .._operations.features import Feature


def mask_features(function: str, mask: Any) -> list[Feature]:
    """The features of a mask: of blocks, of `cufa.masks`, a function, or a boolean array."""
    from .._operations.features import Feature  # a room behind this one

    if isinstance(mask, BlockMask):
        by_head = mask.shape[1] > 1
        term = BlockMaskTerm(*mask.block_size, by_head=by_head, bounded=mask.bounded, longest=mask.longest)
        return [Feature(term, mask.arrays, (mask.seqlen_q, mask.seqlen_k))]
    if not is_array(mask):
        from .function import mask_feature
        from .snippet import CudaFunction

        if isinstance(mask, Mask):
            return [mask_feature(function, (mask.call, *mask.placed))]
        if isinstance(mask, (CudaFunction, tuple)) or callable(mask):
            return [mask_feature(function, mask)]
    from .mask_array import mask_array_feature

    return [mask_array_feature(function, mask)]
