"""Views of arrays for kernels that no framework knows of."""

from __future__ import annotations

from typing import Any

from .._call import arrays as _arrays
from .._call.arrays import Arrays, Spec
from ..errors import UnsupportedError


def view(
    function: str, names: tuple[str, ...], given: tuple[Any, ...], written: tuple[int, ...] = ()
) -> tuple[Arrays, list[Spec]]:
    """View the arrays `names` of `function`, of which none is None; `written` are the indices of results.

    Raises
    ------
    TypeError
        If one is no array.
    UnsupportedError
        If one is JAX's, or torch records what becomes of it.
    """
    for name, array in zip(names, given, strict=True):
        if _arrays.is_jax(array):
            raise UnsupportedError(
                f"{function}: {name} is a jax array, whose memory XLA alone may hand to a kernel; pass a CuPy, torch "
                "or Numba array."
            )
    try:
        found = _arrays.view(function, names, given, written)
    except _arrays.Recorded:
        raise UnsupportedError(
            f"{function}: torch records what becomes of an array, and does not know this kernel; call it under "
            "torch.no_grad(), or with tensor.detach()."
        ) from None
    return found, [layout[0].spec(layout) for layout in found.layouts if layout is not None]
