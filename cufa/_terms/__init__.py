"""Score terms: what happens to a score between q·k and the softmax, one file each; `TERMS` are those of cufa."""

from __future__ import annotations

from .alibi import Alibi
from .softcap import LargeSoftcap, Softcap
from .term import Term as Term

TERMS: tuple[Term, ...] = (Softcap(), LargeSoftcap(), Alibi())
"""In the order in which they are applied."""
