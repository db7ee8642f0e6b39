"""A few calls of every kind, small enough to run under compute-sanitizer; see test_sanitizer.py.

python tests/sanitizer_profile.py forward|backward memcheck|racecheck
"""

from __future__ import annotations

import sys
from typing import Any

import cupy
from gradients import Call

import cufa
from cufa._compile import jit as _jit
from cufa.testing import Case, assert_close

COMMON = {"num_heads_q": 2, "num_heads_k": 1}
CASES = [
    Case(**COMMON, seqlen_q=130, seqlen_k=257, head_dim=64, head_dim_v=64, dtype="float16", causal=True),
    Case(**COMMON, seqlen_q=65, seqlen_k=97, head_dim=128, head_dim_v=128, dtype="bfloat16", return_lse=True),
    Case(
        **COMMON,
        seqlen_q=65,
        seqlen_k=97,
        head_dim=256,
        head_dim_v=200,
        dtype="bfloat16",
        window_size=(40, 3),
    ),
    Case(
        **COMMON,
        seqlen_q=65,
        seqlen_k=97,
        head_dim=33,
        head_dim_v=7,
        dtype="float16",
        layouts=("padded",) * 4,  # which are copied first
    ),
    Case(
        **COMMON,
        seqlen_q=30,
        seqlen_k=97,
        head_dim=33,
        head_dim_v=7,
        dtype="float16",
        layouts=("padded",) * 4,  # whose queries are too few for that
    ),
    Case(
        **COMMON,
        seqlen_q=70,
        seqlen_k=70,
        head_dim=64,
        head_dim_v=64,
        dtype="float32",
        softcap=5.0,
        alibi_ndim=1,
    ),
    Case(**COMMON, seqlen_q=33, seqlen_k=70, head_dim=200, head_dim_v=256, dtype="float32", sinks=True),
    Case(
        **COMMON,
        seqlen_q=33,
        seqlen_k=70,
        head_dim=31,
        head_dim_v=65,
        dtype="float32",
        layouts=("strided",) * 4,
    ),
    Case(
        **COMMON,
        batch=4,
        seqlen_q=(0, 130, 1, 40),
        seqlen_k=(3, 60, 0, 129),
        seqused_k=(1, 60, 0, 100),
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
        causal=True,
    ),
]


def gradients_of(head_dim: int, head_dim_v: int, dtype: str, deterministic: bool, **features: Any) -> list[Call]:
    """Dense, and packed."""
    common = {**COMMON, **features, "head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
    packed = {"batch": 4, "seqlen_q": (0, 130, 1, 40), "seqlen_k": (3, 60, 0, 129), "seqused_k": (1, 60, 0, 100)}
    cases = (Case(**common, seqlen_q=130, seqlen_k=97), Case(**common, **packed))
    return [Call(case=case, deterministic=deterministic) for case in cases]


# Of every kernel, with and without a fixed order.
CALLS = [
    *gradients_of(64, 64, "float16", False, causal=True),
    *gradients_of(64, 64, "float16", True, causal=True),
    *gradients_of(128, 96, "bfloat16", False, window_size=(40, 3), sinks=True),
    *gradients_of(128, 96, "bfloat16", True, softcap=5.0),
    *gradients_of(256, 192, "bfloat16", False, causal=True),
    *gradients_of(64, 40, "float32", False, causal=True),
    *gradients_of(33, 7, "float16", True, layouts=("padded",) * 4),
]


def attend(case: Case) -> None:
    function = cufa.attention_varlen if isinstance(case.seqlen_q, tuple) else cufa.attention
    result = function(**case.arrays(cupy), **case.options, return_lse=case.return_lse)
    out, lse = result if case.return_lse else (result, None)
    assert_close(out, lse=lse, **case.arrays(), **case.options)


def main() -> None:
    direction, tool = sys.argv[1:]
    if tool == "racecheck":
        # See cuda_src/tile/pipeline.cuh. Options are part of what names a cubin.
        options_of = _jit.options_of
        _jit.options_of = lambda target: [*options_of(target), "--define-macro=CUFA_RACECHECK"]
    if direction == "forward":
        for case in CASES:
            attend(case)
    else:
        for call in CALLS:
            call.right(cupy)
    print(f"the {direction} agrees with the reference")


if __name__ == "__main__":
    main()
