"""The public function of rotary embeddings: what it takes and gives. The way of a call is `_operations.call`."""

from __future__ import annotations

from typing import Any

from .._call.arrays import unscriptable
from .._operations.call import call
from .._operations.rotary import ROTARY

Array = Any
"""An array of CuPy, torch, JAX, Numba or NumPy, or any with ``__dlpack__``."""


@unscriptable
def rotary(
    q: Array,
    k: Array | None,
    cos: Array,
    sin: Array,
    *,
    positions: Array | None = None,
    offsets: Array | None = None,
    cu_seqlens: Array | None = None,
    interleaved: bool = True,
    inverse: bool = False,
    q_out: Array | None = None,
    k_out: Array | None = None,
) -> Any:
    """Rotary embedding: pairs of columns of q and k, turned by angles that grow with the position of a row.

    Of a pair of columns x and y ``x cos - y sin`` and ``x sin + y cos`` are made. q and k are turned in one launch.

    Parameters
    ----------
    q : array, (batch, seqlen, num_heads_q, head_dim) or, packed, (total, num_heads_q, head_dim)
        CuPy, torch, JAX, Numba or NumPy, or any array with ``__dlpack__``; float16, bfloat16 or float32, on the CPU
        also float64. Any strides.
    k : array, (batch, seqlen, num_heads_k, head_dim) or (total, num_heads_k, head_dim), or None
        As many heads as it may have, independent of q's.
    cos, sin : array, (max_position, rotary_dim / 2)
        Of the angles of a position's pairs; in q's dtype or float32. The first rotary_dim columns of a row are turned,
        and the others stay as they are.
    positions : int32 array, (batch, seqlen) or, packed, (total,), optional
        The position of each row. They must be in the table: checked on the CPU, and with ``CUFA_DEBUG=1``. On a GPU,
        where reading them makes the host wait, they are else clamped into it.
    offsets : int32 array, (batch,), optional
        In place of `positions`: row i of a sequence has position ``offsets + i``; 0 if None.
    cu_seqlens : int32 array, (batch + 1,), optional
        In place of `positions`: packed sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``, as
        `attention_varlen` has them. Without, packed rows are those of one sequence. Rows that are no sequence's stay as
        they are.
    interleaved : bool
        Whether pairs are columns ``(2i, 2i + 1)``, as GPT-J has them; else ``(i, i + rotary_dim /
        2)``, as GPT-NeoX and Llama in transformers do.
    inverse : bool
        Turn back: by the negative angles.
    q_out, k_out : array, optional
        Shaped like q and k. Written and returned instead of new arrays; must not share memory with each other or with
        the inputs.

    Returns
    -------
    q_out : array
        Of q's framework, dtype and device. Products are float32 (float64 for float64 arrays), and sums rounded once.
    k_out : array
        Only with `k`.

    Raises
    ------
    TypeError
        If an argument is no array or of another framework than q, or if `positions` are given beside `offsets` or
        `cu_seqlens`.
    ValueError
        If shapes, dtypes, devices or values disagree.
    UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `attention`.

    See Also
    --------
    reference.rotary : The specification, in NumPy float64.

    Notes
    -----
    Its gradient by q and k is the same with the other `inverse`, of the gradients by the results: torch's autograd and
    JAX know that, and refuse to differentiate by cos and sin.

    Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 128, 4, 64), dtype=np.float32)
    >>> angles = np.arange(128)[:, None] * 10000.0 ** (-np.arange(32) / 32)
    >>> cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    >>> q_out, k_out = cufa.rotary(q, k, cos, sin)
    >>> np.allclose(cufa.rotary(q_out, None, cos, sin, inverse=True), q, atol=1e-6)
    True
    """
    given = (q, k, cos, sin, positions, offsets, cu_seqlens, q_out, k_out)
    return call(ROTARY, given, (False, None, None, 0.0, False, False, interleaved, inverse))
