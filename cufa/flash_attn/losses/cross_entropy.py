"""flash_attn's ``CrossEntropyLoss``, for torch."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ArgumentError
from ..ops.triton.cross_entropy import cross_entropy_loss

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Cross entropy, in float32.

    Parameters
    ----------
    ignore_index : int
        Rows with this label have loss 0, and do not count in the mean.
    reduction : {'mean', 'none', 'sum'}
    label_smoothing, logit_scale, lse_square_scale, inplace_backward, process_group, return_z_loss
        As `cross_entropy_loss` takes them; with `return_z_loss` the part of the loss that `lse_square_scale` is, too.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise ArgumentError(f"CrossEntropyLoss: reduction is {reduction!r}; pass 'mean', 'none' or 'sum'.")
        self.ignore_index, self.reduction, self.return_z_loss = ignore_index, reduction, return_z_loss
        self.options = {
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index,
            "inplace_backward": inplace_backward,
            "process_group": process_group,
        }

    def forward(self, input: Any, target: Any, precomputed_lse: Any = None) -> Any:
        """The loss of (batch, vocab_size) logits and (batch,) labels: (batch,) where `reduction` is 'none', else ()."""
        found = cross_entropy_loss(input, target, precomputed_lse, **self.options)
        if self.reduction != "none":
            count = (target != self.ignore_index).sum() if self.reduction == "mean" else 1
            found = tuple(each.sum() / count for each in found)
        return found if self.return_z_loss else found[0]
