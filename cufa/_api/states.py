"""The public functions of states of attention: what they take and give. The way of a call is `_operations.call`."""

from __future__ import annotations

from typing import Any

from .._call.arrays import unscriptable
from .._operations.call import call
from .._operations.states import MERGE_STATES, MERGE_STATES_BACKWARD

Array = Any
"""An array of CuPy, torch, JAX, Numba or NumPy, or any with ``__dlpack__``."""


@unscriptable
def merge_states(
    out_a: Array, lse_a: Array, out_b: Array | None = None, lse_b: Array | None = None, *, out: Array | None = None
) -> Any:
    """Attention over all keys, from what it gave over parts of them.

    Each part is a *state*, the out and lse of `attention` with ``return_lse=True``. Two are given one by one, or
    several behind each other along a first axis of `out_a` and `lse_a`, with one more in `out_b` and `lse_b` or
    without. The parts must not share keys; a sink belongs to one of them.

    Parameters
    ----------
    out_a : array, (batch, seqlen_q, num_heads, head_dim) or, packed, (total_q, num_heads, head_dim)
        CuPy, torch, JAX, Numba or NumPy, or any array with ``__dlpack__``; float16, bfloat16 or float32, on the CPU
        also float64. Any strides. head_dim is 1 to 256. (states, …) where there are several, and without `out_b`.
    lse_a : float32 array, (batch, num_heads, seqlen_q) or, packed, (num_heads, total_q)
        -inf for rows that see no key of the part: what its out holds for them, NaN included, does not count. For
        float64 arrays float64 or float32. (states, …) as `out_a`.
    out_b, lse_b : array, optional
        The last state, shaped like the first without an axis of states.
    out : array, optional
        Shaped like a state's. Written and returned instead of a new array; must not share memory with the inputs.

    Returns
    -------
    out : array
        Of the inputs' framework, dtype and device: what attention over all keys gives, up to rounding. 0 where no state
        has keys.
    lse : float32 array
        The natural logarithm of the sum of the states' exp(lse); -inf where no state has keys. float64 for float64
        arrays.

    Raises
    ------
    TypeError
        If an argument is no array or of another framework than `out_a`, or if one of `out_b` and `lse_b` is missing.
    ValueError
        If shapes, dtypes or devices disagree.
    UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `attention`.

    See Also
    --------
    attention_shared_prefix : Many sequences that begin with the same keys, which are read once.
    merge_states_backward : Its gradients.
    reference.merge_states : The specification, in NumPy float64.

    Notes
    -----
    Sums are float32, of weights that follow from differences to the largest lse, and rounded once; states count in
    their order. A row's result depends on its own states alone, bit for bit. A single state with keys is returned as it
    is. torch's autograd and JAX differentiate it by all four arrays.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 128, 2, 64), dtype=np.float32)
    >>> first = cufa.attention(q, k[:, :100], v[:, :100], return_lse=True)
    >>> second = cufa.attention(q, k[:, 100:], v[:, 100:], return_lse=True)
    >>> out, lse = cufa.merge_states(*first, *second)
    >>> np.allclose(out, cufa.attention(q, k, v), atol=1e-5)
    True
    """
    return call(MERGE_STATES, (out_a, lse_a, out_b, lse_b, out), (False, None, None, 0.0, True, False))


@unscriptable
def merge_states_backward(
    dout: Array,
    out_a: Array,
    lse_a: Array,
    out_b: Array | None = None,
    lse_b: Array | None = None,
    *,
    dlse: Array | None = None,
) -> Any:
    """Gradients of `merge_states` by out and lse of the states.

    Parameters
    ----------
    dout : array
        Gradient by the merged out, in its dtype.
    out_a, lse_a, out_b, lse_b : array
        What `merge_states` was called with.
    dlse : float32 array, optional
        Gradient by the merged lse, for float64 arrays float64 or float32; 0 if None.

    Returns
    -------
    dout_a : array
        Shaped like `out_a`, and in its dtype. The gradients of a state without keys are 0.
    dlse_a : float32 array
        Shaped like `lse_a`: what `attention_backward` takes as dlse of the part. float64 for float64 arrays.
    dout_b, dlse_b : array
        Only with `out_b`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `merge_states`.

    See Also
    --------
    reference.merge_states_backward : The specification.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 128, 2, 64), dtype=np.float32)
    >>> keys = slice(100), slice(100, 128)
    >>> parts = [cufa.attention(q, k[:, each], v[:, each], return_lse=True) for each in keys]
    >>> dout_a, dlse_a, _, _ = cufa.merge_states_backward(dout, *parts[0], *parts[1])
    >>> cufa.attention_backward(dout_a, q, k[:, :100], v[:, :100], *parts[0], dlse=dlse_a)[1].shape
    (1, 100, 2, 64)
    """
    return call(MERGE_STATES_BACKWARD, (out_a, lse_a, out_b, lse_b, dout, dlse), (False, None, None, 0.0, False, False))
