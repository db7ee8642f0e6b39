"""Attention with caches on NumPy arrays: against the reference, in blocks of any size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from test_cpu import BLOCKING, blockings

import cufa
from cufa._cpu import forward as _forward
from cufa._cpu import kvcache as _cpu
from cufa.reference import _rotate
from cufa.testing import DTYPES, KVCacheCase, assert_kvcache_close, kvcache_cases

ANY = kvcache_cases(max_seqlen=80, dtypes=(*DTYPES, "float64"), cache_dtypes=("", "", "float8_e4m3fn"))


@settings(max_examples=200)
@given(ANY, blockings)
def test_cases_agree_with_the_reference(case: KVCacheCase, blocking: tuple[int, ...]) -> None:
    before, after = case.arrays(), case.arrays()
    out = case.output() if case.use_out else None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(BLOCKING, blocking, strict=True):
            patch.setattr(_forward, name, value)
        options = {**case.options, "num_splits": case.num_splits, "return_lse": True}
        result, lse = cufa.attention_with_kvcache(**after, **options, out=out)
    assert out is None or result is out
    assert result.dtype == before["q"].dtype
    caches = after["k_cache"], after["v_cache"]
    assert_kvcache_close(result, caches=caches, lse=lse, **before, **case.options)
    for name in before.keys() - {"k_cache", "v_cache"}:
        assert after[name].tobytes() == before[name].tobytes()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rotations_are_those_of_the_reference(dtype: str, interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((50, 3, 40)).astype(dtype), rng.uniform(-9, 9, (50, 12))
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    found, expected = _cpu.rotate(x, cos, sin, interleaved), _rotate(x, cos, sin, interleaved)
    assert found.dtype == x.dtype and (found[..., 24:] == x[..., 24:]).all()
    assert np.abs(found[..., :24] - x[..., :24]).min(axis=(0, 1)).max() > 0
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=float(np.finfo(dtype).eps), atol=1e-6)
    lengths = np.linalg.norm(found.astype(np.float64), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x.astype(np.float64), axis=-1), rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("page_size", [0, 16])
def test_a_long_cache_is_not_copied_whole(page_size: int) -> None:
    case = KVCacheCase(capacity=1 << 16, page_size=page_size, head_dim=64, head_dim_v=64, num_heads_q=2, num_heads_k=2)
    arrays = case.arrays()
    tracemalloc.start()
    cufa.attention_with_kvcache(**arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < arrays["k_cache"].nbytes / 3
