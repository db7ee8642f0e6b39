"""Diffusers' attention on cufa: a backend that models are told to use.

Diffusers has no public way to add one; this was written for its version 0.42.

Examples
--------
>>> import cufa.diffusers  # doctest: +SKIP
>>> cufa.diffusers.register()  # doctest: +SKIP
>>> pipeline.transformer.set_attention_backend("cufa")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

from ._api.attention import attention
from .errors import ArgumentError, UnsupportedError

__all__ = ["NAME", "register"]

NAME = "cufa"
"""The name of the backend."""

Tensor = Any


def register() -> None:
    """Let Diffusers know the attention backend `NAME`: for ``set_attention_backend`` and ``attention_backend``.

    It serves masks, boolean or added to scores, dropout, grouped heads and gradients; not context parallelism.

    Raises
    ------
    ImportError
        If there is no diffusers.
    UnsupportedError
        If this version of it keeps its backends otherwise.

    Examples
    --------
    >>> import cufa.diffusers  # doctest: +SKIP
    >>> cufa.diffusers.register()  # doctest: +SKIP
    """
    import diffusers
    from diffusers.models import attention_dispatch

    names: Any = getattr(attention_dispatch, "AttentionBackendName", None)
    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    if not hasattr(names, "_value2member_map_") or not hasattr(registry, "register"):
        raise UnsupportedError(
            f"cufa.diffusers: diffusers {diffusers.__version__} keeps its attention backends otherwise than 0.42 does."
        )
    if NAME in names._value2member_map_:
        return
    member = str.__new__(names, NAME)  # an Enum has no other way to get a member
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    names._member_names_.append(member._name_)
    registry.register(member)(attend)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: None = None,
) -> Any:
    """The backend: what Diffusers calls, with (batch, seqlen, heads, columns); out, and lse (batch, heads, seqlen)."""
    if _parallel_config is not None:
        raise UnsupportedError("cufa.diffusers: context parallelism is not supported; choose another backend.")
    if is_causal and query.shape[1] != key.shape[1]:
        raise UnsupportedError(
            f"cufa.diffusers: is_causal is given for {query.shape[1]} queries and {key.shape[1]} keys; equally many "
            "are supported."
        )
    if not enable_gqa and query.shape[2] != key.shape[2]:
        raise ArgumentError(
            f"cufa.diffusers: query has {query.shape[2]} heads and key {key.shape[2]}; pass enable_gqa=True."
        )
    options: dict[str, Any] = {"causal": is_causal, "softmax_scale": scale, "return_lse": return_lse}
    if attn_mask is not None:
        if attn_mask.ndim == 2:  # (batch, keys)
            attn_mask = attn_mask[:, None, None]
        options["bias" if attn_mask.is_floating_point() else "mask"] = attn_mask
    if dropout_p:
        from .flash_attn._torch import next_seed

        options |= {"dropout_p": dropout_p, "seed": next_seed(query, "cufa.diffusers")}
    return attention(query, key, value, **options)
