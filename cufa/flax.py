"""For Flax: an attention function for the layers of ``flax.linen`` and ``flax.nnx``.

Examples
--------
>>> import cufa.flax  # doctest: +SKIP
>>> layer = flax.linen.MultiHeadDotProductAttention(8, attention_fn=cufa.flax.dot_product_attention)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ._api.attention import attention
from .errors import ArgumentError, UnsupportedError

__all__ = ["dot_product_attention"]

_NAME = "cufa.flax.dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: None = None,
    module: None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    **more: None,
) -> Any:
    """Flax's ``dot_product_attention``, computed by cufa.

    Parameters
    ----------
    query : array, (..., q_length, num_heads, head_dim)
    key, value : array, (..., kv_length, num_heads, head_dim)
    bias : array, (..., num_heads, q_length, kv_length), optional
        Added to scores; axes may be 1.
    mask : boolean array, (..., num_heads, q_length, kv_length), optional
        True where a query sees a key; axes may be 1.
    deterministic : bool
        Without dropout, which is not supported: then neither `broadcast_dropout` nor `dropout_rng` matters.
    dropout_rate : float
        0.0, unless `deterministic`.
    dtype : dtype, optional
        To which query, key and value are converted; by default one that they all fit.
    promote_dtype : callable, optional
        That converts them, as ``flax.nnx`` passes it.
    is_causal : bool
        Query i sees key j if ``j <= i``; for as many queries as keys.
    force_fp32_for_softmax : bool
        The softmax is float32 in any case.
    precision, module, **more : None
        Not supported.

    Returns
    -------
    array, (..., q_length, num_heads, head_dim)
        Rows that see no key are 0 (where Flax has the mean of all values).

    Raises
    ------
    TypeError, ValueError
        As for `cufa.attention`, and if batch axes disagree.
    UnsupportedError
        For what is not supported; the message names the argument.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cufa.flax import dot_product_attention
    >>> x = jnp.ones((2, 4, 2, 8))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (2, 4, 2, 8)
    """
    dropped = dropout_rate != 0.0 and not deterministic
    refused = {"dropout_rate": dropped or None, "precision": precision, "module": module, **more}
    for name, given in refused.items():
        if given is not None:
            raise UnsupportedError(f"{_NAME}: {name} is not supported; leave it out.")
    if is_causal and query.shape[-3] != key.shape[-3]:
        raise UnsupportedError(f"{_NAME}: is_causal is supported for as many queries as keys.")
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    common = dtype or jnp.result_type(query, key, value)
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        raise ArgumentError(
            f"{_NAME}: query, key and value have shapes {query.shape}, {key.shape} and {value.shape}; their axes "
            "before the last three must agree."
        )
    q, k, v = (jnp.asarray(x, common).reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    options = {"causal": is_causal}
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None:
            array = jnp.asarray(array, jnp.promote_types(common, "float32") if name == "bias" else bool)
            array = array.reshape((1,) * (3 - array.ndim) + array.shape)
            if array.ndim > 4 or len(batch) != 1:  # an axis of the batch is one of 1, or that of all
                array = jnp.broadcast_to(array, (*batch, *array.shape[-3:])).reshape(-1, *array.shape[-3:])
            options[name] = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return attention(q, k, v, **options).reshape(*batch, *q.shape[1:-1], v.shape[-1])
