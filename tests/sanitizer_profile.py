"""A few calls of every kind, small enough to run under compute-sanitizer; see test_sanitizer.py."""

from __future__ import annotations

import cupy

import cufa
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
        layouts=("padded",) * 4,
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


def main() -> None:
    for case in CASES:
        function = cufa.attention_varlen if isinstance(case.seqlen_q, tuple) else cufa.attention
        result = function(**case.arrays(cupy), **case.options, return_lse=case.return_lse)
        out, lse = result if case.return_lse else (result, None)
        assert_close(out, lse=lse, **case.arrays(), **case.options)
    print(f"{len(CASES)} cases agree with the reference")


if __name__ == "__main__":
    main()
