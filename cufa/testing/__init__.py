"""Tools for testing and timing attention: tolerances, cases, and a clock.

- `assert_close` compares a result, of any framework and on any device, with the float64 reference, and
  `assert_gradients_close` gradients;
- `tolerance` and `lse_tolerance` are the bounds that `assert_close` holds an element to;
- `Case`, `dense_cases` and `varlen_cases` are problems over the whole space of features and memory layouts,
  the latter two as Hypothesis strategies (``pip install 'cufa[test]'``); for calls with caches there are
  `KVCacheCase`, `kvcache_cases` and `assert_kvcache_close`;
- `bench` measures how long a call takes.

**How close is close.** A flash-attention kernel rounds in few places, so the size of its error can be told
from the problem: scores carry the rounding of a float32 dot product, probabilities and output that of the
storage dtype. The root mean square of the error to expect, element by element, is the *noise*. In units of
the noise, the root mean square error over any n elements may be at most ``2 + 6 / sqrt(n)``: 8 for a single
element, 2 for a large array. Elements, rows and the whole array are held to that, so that a large error in
one place and a small one everywhere are both seen.

The noise of gradients is about what the same mathematics errs by where it rounds p, ds (step 9 of
`cufa.reference`), out and the gradients to the storage dtype. Errors along a row of a gradient have too much
in common to tell anything, so elements and whole arrays are held to it, and rows are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "LAYOUTS",
    "OFFSETS",
    "VALUES",
    "BenchResult",
    "Case",
    "KVCacheCase",
    "View",
    "assert_close",
    "assert_gradients_close",
    "assert_kvcache_close",
    "bench",
    "dense_cases",
    "kvcache_cases",
    "lse_tolerance",
    "to_numpy",
    "tolerance",
    "varlen_cases",
]

if TYPE_CHECKING:
    from ._cases import DTYPES, HEAD_DIMS, LAYOUTS, OFFSETS, VALUES, Case, View, dense_cases, varlen_cases
    from ._compare import assert_close, lse_tolerance, to_numpy, tolerance
    from ._gradients import assert_gradients_close
    from ._kvcache import KVCacheCase, assert_kvcache_close, kvcache_cases
    from ._timing import BenchResult, bench

_HOMES = {
    "BenchResult": "_timing",
    "KVCacheCase": "_kvcache",
    "assert_close": "_compare",
    "assert_gradients_close": "_gradients",
    "assert_kvcache_close": "_kvcache",
    "bench": "_timing",
    "kvcache_cases": "_kvcache",
    "lse_tolerance": "_compare",
    "to_numpy": "_compare",
    "tolerance": "_compare",
}
"""Of what is public and not in _cases."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that who only wants a clock does not load the reference."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'cufa.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cufa.testing.{_HOMES.get(name, '_cases')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
