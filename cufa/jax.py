"""For JAX programs: attention by the name and signature that `jax.nn` gives it, and what exporting programs needs.

The functions of cufa itself take JAX arrays, too. A program that was exported with calls of cufa runs in any process
that has imported this module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._api.attention import attention, attention_varlen
from .errors import UnsupportedError
from .interop import jax as _interop

__all__ = ["dot_product_attention", "export_checks"]

_NAME = "dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, computed by cufa.

    Parameters
    ----------
    query : array, (B, T, N, H) or (T, N, H)
    key, value : array, (B, S, K, H) or (S, K, H)
        N is a multiple of K. The last axis of `value` may have another extent.
    bias, mask : None
        Not supported: `cufa.attention` takes them.
    scale : float, optional
        A number that is known when the program is traced; default ``H ** -0.5``.
    is_causal : bool
        Query i sees key j if ``j <= i``, also where T and S differ.
    query_seq_lengths, key_value_seq_lengths : int32 array, (B,), optional
        How many rows of each sequence are live. With `is_causal` or a window, key_value_seq_lengths is supported where
        T is S and the same array is passed as both.
    local_window_size : int or (int, int), optional
        Query i sees keys from ``i - left`` to ``i + right``.
    implementation : None or 'cufa'
    return_residual : bool
        Return the natural logarithm of the sum of exponentials of scores, too: (B, T, N), in the dtype of `key`, and
        without a gradient.

    Returns
    -------
    out : array, shaped like query
        Rows that see no key are 0 (where `jax.nn` has the mean of all values), and so are those that are not live.

    Raises
    ------
    UnsupportedError
        For what is not supported; the message names the argument.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cufa.jax import dot_product_attention
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 4, 2, 8)
    """
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None:
            _refuse(name, "is not supported here; pass it to cufa.attention, or call jax.nn.dot_product_attention")
    if implementation not in (None, "cufa"):
        _refuse("implementation", f"is {implementation!r}, and here is cufa's own only; leave it out")
    query, key, value = (jnp.asarray(array) for array in (query, key, value))
    single = query.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    left, right = _window(local_window_size, is_causal)
    if key_value_seq_lengths is not None:
        masked = left is not None or right is not None
        same = key_value_seq_lengths is query_seq_lengths and query.shape[1] == key.shape[1]
        if masked and not same:
            _refuse(
                "key_value_seq_lengths",
                "is not supported together with is_causal or local_window_size, unless T is S and query_seq_lengths is "
                "the same array",
            )
        lengths = query_seq_lengths, key_value_seq_lengths
        out, lse = _padded(query, key, value, lengths, scale, (left, right) if masked else None)
    else:
        live = None
        if query_seq_lengths is not None:
            live = jnp.arange(query.shape[1]) < jnp.asarray(query_seq_lengths)[:, None]
            query = jnp.where(live[:, :, None, None], query, 0)  # whatever is there, NaN included
        out, lse = _aligned(query, key, value, scale, left, right)
        if live is not None:
            out = jnp.where(live[:, :, None, None], out, 0)
    lse = jax.lax.stop_gradient(jnp.moveaxis(lse, 1, 2)).astype(key.dtype)
    if single:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def export_checks() -> list[Any]:
    """What to pass to `jax.export.export` as ``disabled_checks``, for JAX vouches for targets of its own only.

    Returns
    -------
    list of jax.export.DisabledSafetyCheck

    Examples
    --------
    >>> import jax, jax.export, jax.numpy as jnp
    >>> import cufa.jax
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> program = jax.jit(lambda q: cufa.attention(q, q, q))
    >>> exported = jax.export.export(program, disabled_checks=cufa.jax.export_checks())(x)
    >>> exported.call(x).shape
    (1, 4, 2, 8)
    """
    import jax.export

    return [jax.export.DisabledSafetyCheck.custom_call(_interop.TARGET)]


def _refuse(name: str, text: str) -> None:
    raise UnsupportedError(f"{_NAME}: {name} {text}.")


def _window(size: Any, causal: bool) -> tuple[int | None, int | None]:
    left, right = (None, None) if size is None else size if isinstance(size, (tuple, list)) else (size, size)
    for side in (left, right):
        if side is not None and side < 0:
            _refuse("local_window_size", f"is {size}; sides of at least 0 are supported")
    return left, 0 if causal else right


def _aligned(query: Any, key: Any, value: Any, scale: float | None, left: int | None, right: int | None) -> Any:
    """out and lse under a window that counts rows and keys from the first.

    cufa counts them from the last. Keys that no row sees are left out, and rows that see no key, after which a window
    of cufa's says the same.
    """
    rows, keys = query.shape[1], key.shape[1]
    if right is not None:
        keys = min(keys, rows + right)
        key, value = key[:, :keys], value[:, :keys]
    seeing = rows if left is None else min(rows, keys + left)
    window = (
        None if left is None else left + keys - seeing,
        None if right is None else right - keys + seeing,
    )
    out, lse = attention(query[:, :seeing], key, value, window_size=window, softmax_scale=scale, return_lse=True)
    if seeing < rows:
        out = jnp.pad(out, ((0, 0), (0, rows - seeing), (0, 0), (0, 0)))
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, rows - seeing)), constant_values=-jnp.inf)
    return out, lse


def _padded(
    query: Any, key: Any, value: Any, lengths: tuple[Any, Any], scale: float | None, window: Any
) -> tuple[Any, Any]:
    """out and lse of sequences that are padded: packed, each before one of its padding, which sees no key."""
    batch, rows, heads, _ = query.shape
    keys = key.shape[1]
    offsets = [_offsets(length, batch, extent) for length, extent in zip(lengths, (rows, keys), strict=True)]
    live = offsets[1][1::2] - offsets[1][:-1:2]
    used = jnp.stack([live, jnp.zeros_like(live)], axis=1).reshape(2 * batch)
    packed = (array.reshape(batch * array.shape[1], *array.shape[2:]) for array in (query, key, value))
    out, lse = attention_varlen(
        *packed, *offsets, seqused_k=used, window_size=window, softmax_scale=scale, return_lse=True
    )
    return out.reshape(batch, rows, heads, -1), jnp.moveaxis(lse.reshape(heads, batch, rows), 1, 0)


def _offsets(lengths: Any, batch: int, extent: int) -> Any:
    """Where live rows begin, and padding; at the end of the last, the end of all."""
    first = extent * jnp.arange(batch, dtype=jnp.int32)
    live = jnp.full(batch, extent, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    if live.shape != (batch,):
        raise ValueError(f"{_NAME}: lengths have shape {live.shape}; ({batch},), one for each sequence, is expected.")
    both = jnp.stack([first, first + jnp.clip(live, 0, extent)], axis=1).reshape(2 * batch)
    return jnp.append(both, jnp.int32(batch * extent))
