"""Score and mask functions, problems of them, and what the reference makes of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cufa import functions, reference
from cufa._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from cufa._operations.call import call
from cufa._operations.features import extended
from cufa._operations.forward import ATTENTION, ATTENTION_VARLEN
from cufa._specification.function import Function
from cufa._terms.function import mask_feature, score_feature
from cufa.testing import to_numpy

OPERATIONS = {
    (False, False): ATTENTION,
    (True, False): ATTENTION_VARLEN,
    (False, True): ATTENTION_BACKWARD,
    (True, True): ATTENTION_VARLEN_BACKWARD,
}
"""By whether sequences are packed, and whether it is the gradients."""


def tables(score: Any, batch: Any, head: Any, query: Any, key: Any, slopes: Any, table: Any) -> Any:
    """Its derivatives by arrays depend on the score, and some indices lie outside."""
    return score * slopes[head] + table[head, query.position - key + 4]


def capped(score: Any, batch: Any, head: Any, query: Any, key: Any, slopes: Any) -> Any:
    return 3.0 * functions.tanh(score / 3.0) - slopes[head] * functions.abs(query.position - key)


def smooth(score: Any, batch: Any, head: Any, query: Any, key: Any, weights: Any, alpha: Any) -> Any:
    return (
        functions.log(1 + functions.exp(score)) * functions.sigmoid(weights[batch % 2, key % 3])
        + alpha * (score / 8) ** 3
    )


def stepped(score: Any, batch: Any, head: Any, query: Any, key: Any, positions: Any) -> Any:
    """Nothing in it has a gradient."""
    shift = functions.to_float(positions[key]) * 0.01
    return functions.where((query // 3 + key) % 2 == 0, score * 0.5, score) + shift


def shifted(score: Any, batch: Any, head: Any, query: Any, key: Any, table: Any) -> Any:
    """Its derivative is 1."""
    return score + table[head, query.position - key]


def sliding(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query.position - key < 9) & ((key % 3 != 1) | (query == key))


def documents(batch: Any, head: Any, query: Any, key: Any, numbers: Any, allowed: Any) -> Any:
    """Some queries see no key."""
    return (numbers[query // 4] == numbers[key // 4]) & allowed[head, key % 5]


class Example(NamedTuple):
    """A function, the shapes and dtypes of its arrays, and which of them have gradients."""

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    differentiated: tuple[int, ...] = ()

    def arrays(self, heads: int, wide: Any, rng: np.random.Generator) -> list[np.ndarray]:
        """Axes of extent 0 are as long as there are heads."""
        found = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            shape = tuple(extent or heads for extent in shape)
            if dtype == "float":
                found.append(rng.standard_normal(shape).astype(wide))
            elif dtype == "bool":
                found.append(rng.random(shape) < 0.7)
            else:
                found.append(rng.integers(0, 3, shape).astype(np.int32))
        return found


SCORES = {
    "tables": Example(tables, ((0,), (0, 7)), ("float", "float"), (0, 1)),
    "capped": Example(capped, ((0,),), ("float",), (0,)),
    "smooth": Example(smooth, ((2, 3), ()), ("float", "float"), (0, 1)),
    "stepped": Example(stepped, ((40,),), ("int",)),
    "shifted": Example(shifted, ((0, 9),), ("float",), (0,)),
}
MASKS = {
    "sliding": Example(sliding),
    "documents": Example(documents, ((20,), (0, 5)), ("int", "bool")),
}


class Problem(NamedTuple):
    """Arrays by name, those of functions included, and options."""

    arrays: dict[str, Any]
    score: Example | None
    mask: Example | None
    given: tuple[list[Any], list[Any]]
    options: dict[str, Any]

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.arrays

    def on(self, place: Callable[[Any], Any]) -> Problem:
        """The same with all arrays where a function puts them."""
        arrays = {name: place(x) for name, x in self.arrays.items()}
        scores, masks = ([place(x) for x in given] for given in self.given)
        return self._replace(arrays=arrays, given=(scores, masks))

    def features(self) -> list[Any]:
        found = []
        for example, make, given in zip(
            (self.score, self.mask), (score_feature, mask_feature), self.given, strict=True
        ):
            if example is not None:
                found.append(make("attention", (example.function, *given)))
        return found

    def run(self, gradient: bool, **more: Any) -> Any:
        operation, arrays = OPERATIONS[self.packed, gradient], self.arrays | more
        options = self.options
        asked = options["causal"], options["window_size"], None, options["softcap"], not gradient, False
        given = tuple(arrays.get(name) for name in operation.arrays)
        return call(*extended(operation, given, asked, self.features()))

    def both(self) -> list[Any]:
        """out, lse and all gradients."""
        out, lse = self.run(False)
        return [out, lse, *self.run(True, out=out, lse=lse)]

    def right(self) -> list[np.ndarray]:
        """The same by the reference."""
        arrays = {name: to_numpy(x) for name, x in self.arrays.items()}
        terms: list[Any] = []
        for name, example, given in zip(("score", "mask"), (self.score, self.mask), self.given, strict=True):
            if example is not None:
                function: Any = {name: example.function}
                terms.append(Function(*map(to_numpy, given), **function, differentiated=example.differentiated))
        options: Any = self.options | {"terms": terms}
        options |= {name: arrays.get(name) for name in ("alibi_slopes", "sinks")}
        offsets = [arrays.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")] if self.packed else []
        attend = reference._attend_packed if self.packed else reference._attend
        differentiate = reference._differentiate_packed if self.packed else reference._differentiate
        q, k, v = (arrays[name] for name in "qkv")
        found = [*attend(q, k, v, *offsets, **options)]
        gradients = differentiate(arrays["dout"], q, k, v, *offsets, arrays.get("dlse"), **options)
        return [*found, *gradients[:3], *(gradients[3:] if "sinks" in arrays else gradients[4:])]


def problem(
    score: Example | None,
    mask: Example | None = None,
    *,
    dtype: Any = np.float32,
    packed: bool = False,
    rows: int = 23,
    keys: int = 31,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    sinks: bool = False,
    alibi: bool = False,
    dlse: bool = True,
    seed: int = 0,
    causal: bool = False,
    window_size: Any = None,
    softcap: float = 0.0,
) -> Problem:
    """Two sequences, of one length, or of different ones."""
    rng = np.random.default_rng(seed)
    wide = np.float64 if dtype == np.float64 else np.float32
    arrays: dict[str, Any] = {}
    ends = ((2 * rows,), (2 * keys,), (heads[0], 2 * rows)) if packed else ((2, rows), (2, keys), (2, heads[0], rows))
    if packed:
        starts = {
            "cu_seqlens_q": [0, rows // 2, 2 * rows],
            "cu_seqlens_k": [0, keys, 2 * keys],
            "seqused_k": [keys, min(keys, 9)],
        }
        arrays |= {name: np.array(x, np.int32) for name, x in starts.items()}
    arrays |= {name: rng.standard_normal((*ends[1], heads[1], head_dim)).astype(dtype) for name in "kv"}
    arrays |= {name: rng.standard_normal((*ends[0], heads[0], head_dim)).astype(dtype) for name in ("q", "dout")}
    if dlse:
        arrays["dlse"] = rng.standard_normal(ends[2]).astype(wide)
    if sinks:
        arrays["sinks"] = rng.standard_normal(heads[0]).astype(wide)
    if alibi:
        arrays["alibi_slopes"] = rng.uniform(0, 0.1, heads[0]).astype(wide)
    given = tuple([] if each is None else each.arrays(heads[0], wide, rng) for each in (score, mask))
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    return Problem(arrays, score, mask, given, options)  # type: ignore[arg-type]


def check(found: list[Any], right: list[np.ndarray], unit: float) -> None:
    """Within a few times `unit`, by the norm of each result."""
    assert len(found) == len(right)
    for each, exact in zip(found, right, strict=True):
        each = to_numpy(each).astype(np.float64)
        seen = np.isfinite(exact)  # lse is -inf where no key is seen
        assert each.shape == exact.shape and np.array_equal(np.isfinite(each), seen)
        difference, size = (np.linalg.norm(x) for x in ((each[seen] - exact[seen]), exact[seen]))
        # What is not 0 but for rounding, as the sum of a row's gradients is, errs by what was added up.
        assert difference <= 4 * unit * (size + 0.1), (difference, size)
