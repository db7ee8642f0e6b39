"""flash_attn's ``rms_norm``, by torch's own operation."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RMSNorm", "rms_norm"]

Tensor = Any


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Rows over the root of the mean of their squares, times `weight`.

    Parameters
    ----------
    x : tensor, (..., hidden_size)
    weight : tensor, (hidden_size,)
    epsilon : float
        Added to the mean.

    Returns
    -------
    tensor, shaped like `x`, in its dtype
    """
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), epsilon).to(x.dtype)


class RMSNorm(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """`rms_norm` with a weight of its own, which is 1 at first.

    Parameters
    ----------
    hidden_size : int
    eps : float
    device, dtype : optional
        Of the weight.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Of (..., hidden_size)."""
        return rms_norm(x, self.weight, self.eps)
