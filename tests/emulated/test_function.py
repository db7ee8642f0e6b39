"""Score and mask functions in kernels, run on the CPU and held to the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import own_functions as own
import pytest
from sampling import sampled

import cufa
import emulated
from cufa import masks
from cufa.testing import to_numpy
from emulated.cases import _word

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

UNITS: dict[Any, float] = {np.float32: 2.0**-18, np.float16: 2.0**-8, ml_dtypes.bfloat16: 2.0**-5}

CASES: dict[str, tuple[int, str | None, str | None, str, dict[str, Any]]] = {
    "float32": (80, "tables", "documents", "sm80", {"dtype": np.float32, "head_dim": 24, "packed": True}),
    "float16": (80, "smooth", None, "sm80", {"dtype": np.float16, "head_dim": 64, "causal": True, "softcap": 2.0}),
    "short": (80, "capped", "sliding", "sm80", {"dtype": np.float16, "head_dim": 32, "rows": 20, "keys": 30}),
    "Hopper": (90, "tables", "sliding", "sm90", {"dtype": np.float16, "head_dim": 64, "sinks": True}),
    "Hopper, packed": (90, "capped", "documents", "sm90", {"dtype": np.float16, "head_dim": 64, "packed": True}),
    "two passes": (90, "shifted", "documents", "split_keys_sm90", {"dtype": ml_dtypes.bfloat16, "head_dim": 192}),
    "reads scores": (90, "tables", None, "sm80", {"dtype": ml_dtypes.bfloat16, "head_dim": 136, "causal": True}),
}
"""Compute capability, functions, a part of the name of the kernel of the gradients, and the problem."""


@pytest.mark.parametrize("name", CASES)
def test_functions_equal_reference(name: str) -> None:
    arch, score, mask, kernel, facts = CASES[name]
    chosen = own.SCORES.get(score or ""), own.MASKS.get(mask or "")
    problem = own.problem(*chosen, **({"rows": 70, "keys": 90, "heads": (2, 1)} | facts))
    with emulated.Gpu(arch=arch, num_sms=3, order=1) as gpu:
        found = [to_numpy(x) for x in problem.on(gpu.array).both()]
        entries = [launched.function.entry for launched in gpu.launches]
    assert f"attention_backward_{kernel}" in entries
    own.check(found, problem.right(), UNITS[facts["dtype"]])


@pytest.mark.parametrize(("arch", "kernel"), [(80, "split_sm80"), (90, "cluster_sm90")])
def test_few_rows(arch: int, kernel: str) -> None:
    """Rows of several heads share a tile, and each has functions of its own."""
    problem = own.problem(
        own.SCORES["tables"], own.MASKS["documents"], dtype=np.float16, rows=2, keys=300, head_dim=64, heads=(4, 2)
    )
    problem.given[1][0][:] = 1
    with emulated.Gpu(arch=arch, num_sms=3, order=1) as gpu:
        found = [to_numpy(x) for x in problem.on(gpu.array).run(False)]
        assert f"attention_forward_{kernel}" in [launched.function.entry for launched in gpu.launches]
    own.check(found, problem.right()[:2], UNITS[np.float16])


@pytest.mark.parametrize("rows", sampled([110, 60]))
def test_masks_with_labels(rows: int) -> None:
    """What lies before the first key and behind the last label is of no document and no range, and no global token."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 2, 32)).astype(np.float16) for n in (rows, 90, 90))
    ids = np.stack([np.arange(50) // 9, np.arange(50) // 20])
    for mask in (masks.document(ids), masks.causal() & masks.image_ranges([[0, 5], [20, 61]]), masks.global_tokens(3)):
        expected = cufa.reference.attention(q, k, v, mask=mask.dense(2, 2, rows, 90), return_lse=True)
        _, rest = mask.ranges()
        assert rest is not None
        with emulated.Gpu(arch=80, num_sms=3, order=1) as gpu:
            there = (rest.call, *map(gpu.array, rest.arrays))
            given = {"mask": there, "causal": rest is not mask, "return_lse": True}
            found = [to_numpy(x) for x in cufa.attention(*map(gpu.array, (q, k, v)), **given)]
        own.check(found, [np.asarray(x) for x in expected], UNITS[np.float16])


@pytest.mark.parametrize("dtype", sampled([np.float16, np.float32]))
def test_functions_in_cuda(dtype: Any) -> None:
    """They are what their twins are, statements and expressions alike."""
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 70, 2, 32)).astype(dtype)

    def twin(score: Any, batch: Any, head: Any, query: Any, key: Any, slopes: Any, cap: Any) -> Any:
        capped = cap * cufa.functions.tanh(score / cap)
        kept = cufa.functions.where(score > 1, cufa.functions.log(score), score - 1)
        return 0.5 * capped + kept - slopes[head] * abs(query.position - key)

    source = """
      const Real capped = cap * tanh(score / cap);
      Real sum = 0.5f * capped - slopes(head) * abs(distance);
      sum += score > 1.0f ? log(score) : score - 1.0f;
      return sum;
    """
    own_slopes = np.array([0.5, 0.25], np.float32)
    score = cufa.cuda_function(source, arrays={"slopes": own_slopes}, scalars={"cap": 2.0}, twin=twin)
    seen = "key % step != 1 || batch + head == 0 || distance < 2.0f"
    mask = cufa.cuda_function(
        seen,
        scalars={"step": 3},
        twin=lambda b, h, query, key, step: (key % step != 1) | (b + h == 0) | (query.position - key < 2),
    )
    options = {"causal": True, "score": score, "mask": mask}
    wide = [x.astype(np.float32) for x in (q, k, v, dout)]
    out, lse = cufa.attention(*wide[:3], **options, return_lse=True)
    right = [out, lse, *cufa.attention_backward(wide[3], *wide[:3], out, lse, **options)]
    with emulated.Gpu(arch=80, num_sms=3, order=1) as gpu:
        options["score"] = dataclasses.replace(score, arrays={"slopes": gpu.array(own_slopes)})
        q, k, v, dout = map(gpu.array, (q, k, v, dout))
        out, lse = cufa.attention(q, k, v, **options, return_lse=True)
        found = [out, lse, *cufa.attention_backward(dout, q, k, v, out, lse, **options)]
        found = [to_numpy(x) for x in found]
    own.check(found, [x.astype(np.float64) for x in right], UNITS[dtype])


def test_slopes_that_are_not_finite_do_not_matter_behind_a_mask() -> None:
    """The logarithm of a distance below 0 is NaN, but keys there are hidden: nothing has to be made again."""
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 70, 2, 32)).astype(np.float16)

    def score(s: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
        return s * cufa.functions.log(query.position - key + 2)

    wide = [x.astype(np.float32) for x in (q, k, v, dout)]
    out, lse = cufa.attention(*wide[:3], causal=True, score=score, return_lse=True)
    right = cufa.attention_backward(wide[3], *wide[:3], out, lse, causal=True, score=score)
    with emulated.Gpu(arch=80, num_sms=3) as gpu:
        q, k, v, dout = map(gpu.array, (q, k, v, dout))
        out, lse = cufa.attention(q, k, v, causal=True, score=score, return_lse=True)
        found = [to_numpy(x) for x in cufa.attention_backward(dout, q, k, v, out, lse, causal=True, score=score)]
        assert _word(gpu, "not_finite") == 0
    own.check(found, [x.astype(np.float64) for x in right], UNITS[np.float16])
