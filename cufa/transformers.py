"""Hugging Face transformers: ``attn_implementation="cufa"``, and its flash attention by the kernels package.

Importing this module imports nothing of transformers; `register` does.

Examples
--------
>>> import cufa.transformers  # doctest: +SKIP
>>> cufa.transformers.register()  # doctest: +SKIP
>>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="cufa")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["KERNELS", "NAME", "kernels_path", "register"]

NAME = "cufa"
"""The ``attn_implementation`` of models."""

KERNELS = ("cufa/flash-attn", "cufa/flash-attn2")
"""Names of `kernels_path` as a repository of kernels.

Both are the same functions. By the digit transformers knows a flash attention that takes block tables, so that
continuous batching decodes from its pages in place.
"""


def kernels_path() -> Path:
    """The folder that the ``kernels`` package loads as a repository, from which transformers takes flash attention.

    Returns
    -------
    path : pathlib.Path

    Raises
    ------
    FileNotFoundError
        If the package is not installed as files, as in a zip archive.

    Examples
    --------
    >>> from cufa.transformers import kernels_path
    >>> (kernels_path() / "build").is_dir()
    True
    """
    path = Path(__file__).with_name("_transformers") / "kernels"
    if not path.is_dir():
        raise FileNotFoundError(f"cufa.transformers: {path} is no folder; install cufa as files, not as an archive.")
    return path


def register(*, kernels: bool = True) -> None:
    """Make transformers know cufa: ``attn_implementation="cufa"`` and, by the ``kernels`` package, `KERNELS`.

    Parameters
    ----------
    kernels : bool
        Add `KERNELS` to the environment variable ``LOCAL_KERNELS``, where the ``kernels`` package and processes that
        are started look. What else stands there stays.

    Raises
    ------
    ImportError
        If transformers is not installed, or is older than 5.22.
    ValueError
        If the path of cufa has a colon, which ``LOCAL_KERNELS`` cannot hold.

    Notes
    -----
    Calling it again changes nothing. Processes that are started have to call it too.

    Examples
    --------
    >>> import cufa.transformers  # doctest: +SKIP
    >>> cufa.transformers.register()  # doctest: +SKIP
    >>> model.set_attn_implementation("cufa")  # doctest: +SKIP
    """
    entries = _entries() if kernels else None
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 22):
        raise ImportError(
            f"cufa.transformers: transformers {transformers.__version__} is older than 5.22, whose calls are served."
        )
    from ._transformers.attention import attention_forward
    from ._transformers.masks import attention_mask

    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, attention_mask)
    if entries is not None:
        os.environ["LOCAL_KERNELS"] = entries


def _entries() -> str:
    """``LOCAL_KERNELS``, with `KERNELS`."""
    path = str(kernels_path())
    if ":" in path:
        raise ValueError(
            f"cufa.transformers: {path} has a colon, which ends a path in LOCAL_KERNELS; pass kernels=False."
        )
    given = os.environ.get("LOCAL_KERNELS", "")
    others = [entry for entry in given.split(":") if entry and entry.partition("=")[0] not in KERNELS]
    return ":".join([*others, *(f"{name}={path}" for name in KERNELS)])
