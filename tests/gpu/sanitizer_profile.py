"""A few calls of every kind, small enough to run under compute-sanitizer; see test_sanitizer.py.

python tests/gpu/sanitizer_profile.py forward|backward|caches|features-float32|features-bfloat16 memcheck|racecheck
"""

from __future__ import annotations

import sys
from typing import Any

import cupy
import numpy as np
import own_functions
from block_masks import ELEMENTS
from block_masks import Problem as BlockProblem
from gradients import Call
from test_gpu_function import UNITS

import cufa
from cufa import masks
from cufa._compile import jit as _jit
from cufa._terms import bias as _bias
from cufa.testing import Case, KVCacheCase, assert_close, assert_kvcache_close, to_numpy

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


CACHES: list[dict[str, Any]] = [
    {},
    {"seqlen_new": 1, "rotary_dim": 32, "leftpad": (3, 0, 70)},
    {"page_size": 16, "seqlen_new": 1, "rotary_dim": 32},
    {"page_size": 7, "seqlen_q": (1, 0, 40), "seqlen_new": 1, "num_splits": 3, "sinks": True},
    {"page_size": 64, "seqlen_q": 200, "seqlen_new": 20, "num_heads_q": 16, "head_dim_v": 128},  # large tiles
    {"dtype": "float32", "head_dim": 33, "head_dim_v": 7, "layouts": ("padded",) * 4},
]
"""What problems with caches differ by."""


FEATURES: list[dict[str, Any]] = [
    {"bias": "xxxx"},  # whose gradient is stored
    {"bias": "x1x1"},  # whose gradient adds up
    {"bias": "x1xx", "seqlen_k": 104},  # which Hopper stages, and whose gradient it makes apart
    {"rel_bias": 20},
    {"mask": "xxxx"},
    {"dropout_p": 0.3},
]
"""What calls with features differ by, beside functions and lists of blocks."""


def attend_with_features(dtype: str) -> None:
    """Forward and backward, by the kernels for every GPU in float32, and by those for Hopper in 16 bits."""
    element, unit = ELEMENTS[dtype]
    sizes: dict[str, Any] = {**COMMON, "seqlen_q": 130, "seqlen_k": 97, "head_dim": 64, "head_dim_v": 64}
    _bias.APART_TILES = 1
    for features in FEATURES:
        case = Case(**sizes | {"dtype": dtype} | features)
        attend(case)
        Call(case=case).right(cupy)
    score, mask = own_functions.SCORES["tables"], own_functions.MASKS["documents"]
    functions = own_functions.problem(score, mask, dtype=element, rows=130, keys=97, head_dim=64)
    own_functions.check([to_numpy(x) for x in functions.on(cupy.asarray).both()], functions.right(), UNITS[element])
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, rows, 1, 64)).astype(element) for rows in (150, 270, 270, 150))
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "dlse": rng.standard_normal((1, 1, 150)).astype(np.float32)}
    listed = cufa.BlockMask.of(masks.chunked(140) | masks.global_tokens(3), 1, 1, 150, 270)
    blocks = BlockProblem(arrays, {}, listed, unit)
    blocks.check(blocks.run(cupy.asarray))


def attend_over_caches(planned: bool, **changed: Any) -> None:
    """With a plan, or without one, as clusters serve, and thread blocks that divide the work for themselves."""
    sizes: dict[str, Any] = {"batch": 3, "lengths": (150, 0, 77), "capacity": 300, "head_dim": 64, "head_dim_v": 64}
    case = KVCacheCase(**{"num_heads_q": 8, "num_heads_k": 2, "dtype": "bfloat16", "causal": True} | sizes | changed)
    arrays, options = case.arrays(cupy), case.options | {"num_splits": case.num_splits}
    if planned:
        names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table", "cache_leftpad", "cu_seqlens_q")
        given = {name: arrays[name] for name in names if name in arrays}
        options["plan"] = cufa.decode_plan(**given, causal=True, num_splits=case.num_splits)
    out = cufa.attention_with_kvcache(**arrays, **options)
    caches = arrays["k_cache"], arrays["v_cache"]
    assert_kvcache_close(out, caches=caches, **case.arrays(), **case.options)


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
    elif direction == "caches":
        for changed in CACHES:
            for planned in (False, True):
                attend_over_caches(planned, **changed)
        attend(Case(**COMMON, seqlen_q=1, seqlen_k=3000, head_dim=64, head_dim_v=64, dtype="float16"))
        attend(Case(**COMMON, batch=70, seqlen_q=3, seqlen_k=3000, head_dim=64, head_dim_v=64, dtype="float16"))
    elif direction.startswith("features-"):
        attend_with_features(direction.removeprefix("features-"))
    else:
        for call in CALLS:
            call.right(cupy)
    print(f"the {direction} agrees with the reference")


if __name__ == "__main__":
    main()
