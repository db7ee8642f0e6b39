"""flash_attn's ``cross_entropy_loss``, by torch's own operations."""

from __future__ import annotations

from typing import Any

import torch

from ....errors import UnsupportedError

__all__ = ["cross_entropy_loss"]

Tensor = Any


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, in float32, and the part of it that keeps logits small.

    Parameters
    ----------
    logits : tensor, (batch, vocab_size)
    labels : int64 tensor, (batch,)
    precomputed_lse : None
        Not supported.
    label_smoothing : float
    logit_scale : float
        Multiplies logits.
    lse_square_scale : float
        Times the square of a row's logsumexp is added to its loss.
    ignore_index : int
        Rows with this label have loss 0.
    inplace_backward : False
        Not supported.
    process_group : None
        Not supported.

    Returns
    -------
    losses, z_losses : float32 tensor, (batch,)
        The second is part of the first, and has no gradient.

    Raises
    ------
    UnsupportedError
        For what is not supported.
    """
    for name, given in (
        ("precomputed_lse", precomputed_lse is not None),
        ("inplace_backward", inplace_backward),
        ("process_group", process_group is not None),
    ):
        if given:
            raise UnsupportedError(f"cross_entropy_loss: {name} is not supported; leave it out.")
    logits = logits.float() * logit_scale
    losses = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    squares = lse_square_scale * logits.logsumexp(-1).square() * (labels != ignore_index)
    return losses + squares, squares.detach()
