"""Errors of cufa and of every peer that can be imported, forward and backward, against float64.

    python benchmarks/errors.py [--seqlen N] [--heads N] [--dtype NAME] [--kernel sm80] [--model]

Standard normal numbers, the same for all; errors are relative, in the Frobenius norm. A ratio is to the least of the
peers. With ``--model`` no GPU is needed: NumPy does what changes the error of a kernel, and nothing else. That is where
probabilities are rounded relative to what, and how often dS is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cufa._call import problem as _problem

Array = np.ndarray[Any, np.dtype[Any]]
Errors = dict[str, dict[str, float]]

NAMES = ("out", "dq", "dk", "dv")
BITS = {"bfloat16": 8, "float16": 11}
HEAD_DIMS = (64, 128, 256)

# --- the model ----------------------------------------------------------------------------------------


def rounded(x: Array, bits: int) -> Array:
    """To so many significant bits, to nearest even, as if there were no subnormal numbers."""
    mantissa, exponent = np.frexp(x)
    found: Array = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return found


def bases(scores: Array, block: int, follows: Callable[[Array, Array], Array]) -> Array:
    """What each score's exponent is relative to, where blocks of keys go from last to first."""
    found = np.empty_like(scores)
    base = np.full((len(scores), 1), -np.inf)
    for begin in reversed(range(0, scores.shape[1], block)):
        keys = slice(begin, begin + block)
        top = scores[:, keys].max(1, keepdims=True)
        base = np.where(follows(top, base), top, base)
        found[:, keys] = np.where(np.isneginf(base), 0, base)
    return found


RULES: dict[str, Callable[[Array, int], Array]] = {
    "the running maximum": lambda scores, block: bases(scores, block, np.greater),
    "the first block's maximum": lambda scores, block: bases(scores, block, lambda top, base: top > base + 8),
    "the row's maximum": lambda scores, block: np.broadcast_to(scores.max(1, keepdims=True), scores.shape),
}


class Forward:
    """Attention in float64, but for what is rounded to so many `bits`."""

    def __init__(self, q: Array, k: Array, v: Array, causal: bool, bits: int) -> None:
        scores = q @ k.T * (q.shape[1] ** -0.5 * math.log2(math.e))
        if causal:
            scores[np.triu_indices(len(scores), 1)] = -np.inf
        self.scores, self.v, self.bits = scores, v, bits
        self.top = scores.max(1, keepdims=True)
        weights = np.exp2(scores - self.top)
        self.total = weights.sum(1, keepdims=True)
        self.p = weights / self.total
        self.out = self.p @ v

    def approximate(self, rule: str, block: int, sums_rounded: bool = False) -> Array:
        """Out of rounded probabilities, relative to what a rule says; of a sum of them before or after rounding."""
        base = RULES[rule](self.scores, block)
        weights = rounded(np.exp2(self.scores - base), self.bits) * np.exp2(base - self.top)
        total = weights.sum(1, keepdims=True) if sums_rounded else self.total
        return rounded(weights @ self.v / total, self.bits)


def modelled(seqlen: int, head_dim: int, causal: bool, bits: int, seed: int = 0, block: int = 128) -> Errors:
    """Errors by what is done: of out by what probabilities are relative to, of gradients by how often dS is rounded."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rounded(rng.standard_normal((seqlen, head_dim)), bits) for _ in range(4))
    forward = Forward(q, k, v, causal, bits)
    errors: Errors = {}
    for rule in RULES:
        for sums_rounded, words in ((False, rule), (True, f"{rule}, rounded ones summed")):
            errors[words] = {"out": relative(forward.approximate(rule, block, sums_rounded), forward.out)}
    p, out, dp = forward.p, forward.out, dout @ v.T
    delta, rounded_delta = ((dout * each).sum(1, keepdims=True) for each in (out, rounded(out, bits)))
    ds = p * (dp - delta)
    rounded_p = rounded(p, bits)
    for name, factor in {"dS rounded once": p, "P and dS rounded": rounded_p}.items():
        rounded_ds = rounded(factor * (dp - rounded_delta), bits)
        errors[name] = {
            "dq": relative(rounded(rounded_ds @ k, bits), ds @ k),
            "dk": relative(rounded(rounded_ds.T @ q, bits), ds.T @ q),
            "dv": relative(rounded(rounded_p.T @ dout, bits), p.T @ dout),
        }
    return errors


def relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- cufa and its peers -------------------------------------------------------------------------------


def exact(torch: Any, causal: bool, q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, ...]:
    """Out and gradients in float64, head by head; from (batch, seqlen, heads, head_dim)."""
    results = [torch.empty_like(each, dtype=torch.float64) for each in (q, q, k, v)]
    for batch, head in np.ndindex(q.shape[0], q.shape[2]):
        own = [each[batch, :, head].double() for each in (q, k, v)]
        leaves = [each.requires_grad_() for each in own]
        scores = leaves[0] @ leaves[1].T * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        out = scores.softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(out, leaves, dout[batch, :, head].double())
        for result, of_head in zip(results, (out.detach(), *gradients), strict=True):
            result[batch, :, head] = of_head
    return tuple(results)


def measured(seqlen: int, head_dim: int, causal: bool, heads: int, dtype: str) -> Errors:
    import torch

    from cufa._bench.frameworks import Torch, results_of
    from cufa._bench.peers import BACKWARD, FORWARD
    from cufa._bench.reports import Row

    framework = Torch()
    row = Row(head_dim, seqlen, 1, heads, heads, causal, dtype=dtype)
    given = framework.inputs(row, 0)
    expected = exact(torch, causal, *given)
    errors: Errors = {}
    for peers, arrays, names in ((FORWARD, given[:3], NAMES[:1]), (BACKWARD, given, NAMES[1:])):
        for peer, make in peers.items():
            try:
                found = [framework.view(each).double() for each in results_of(make(framework, row, *arrays)())]
            except (ImportError, NotImplementedError):  # it is not there, or does not serve the row
                continue
            except Exception as reason:
                print(f"# {peer} fails on {row}: {type(reason).__name__}: {str(reason)[:120]}")
                continue
            for name, array, true in zip(names, found, expected[NAMES.index(names[0]) :], strict=False):
                errors.setdefault(peer, {})[name] = float((array - true).norm() / true.norm())
    return errors


# --- both ---------------------------------------------------------------------------------------------


def lines(errors: Errors) -> Iterator[str]:
    """A line of a Markdown table for each name, whose cells have ratios to the least of all but cufa."""
    others = {name: own for name, own in errors.items() if name != "cufa"}
    least = {of: min((own[of] for own in others.values() if of in own), default=math.nan) for of in NAMES}
    for name, own in errors.items():
        cells = (f"{own[of]:.3e} ({own[of] / least[of]:.3f})" if of in own else "–" for of in NAMES)
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=BITS, default="bfloat16")
    parser.add_argument("--kernel", choices=("best", "sm80"), default="best", help="sm80: that which serves every GPU")
    parser.add_argument("--model", action="store_true", help="what NumPy makes of it, of one head")
    arguments = parser.parse_args()
    if arguments.kernel == "sm80":  # which serves inputs of which no tensor map can be made
        _problem.has_tensor_map = lambda *_: False
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            if arguments.model:
                errors = modelled(arguments.seqlen, head_dim, causal, BITS[arguments.dtype])
            else:
                errors = measured(arguments.seqlen, head_dim, causal, arguments.heads, arguments.dtype)
            print(f"\nhead_dim {head_dim}, {'causal' if causal else 'full'}, {arguments.seqlen}, {arguments.dtype}\n")
            print(f"| | {' | '.join(NAMES)} |\n|---|{'---|' * len(NAMES)}")
            print("\n".join(lines(errors)), flush=True)


if __name__ == "__main__":
    main()
