"""``CUFA_DEBUG=1``: what is wrong in arrays on a GPU is refused as on the CPU, with nothing launched or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cufa
import emulated
from cufa._driver import driver as _driver
from cufa._operations import call as _call
from cufa.testing import KVCacheCase, assert_kvcache_close
from emulated.gpu import Gpu

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


@pytest.fixture(autouse=True)
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DEBUG", "1")
    monkeypatch.setattr(_call, "debugging", _call.debugging.__wrapped__)  # which remembers what it read


def int32(*values: Any) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def caches(page_size: int = 0) -> dict[str, NDArray[Any]]:
    """A right call: 3 sequences of 20, 0 and 9 keys with room for 24, to which 2 are appended."""
    case = KVCacheCase(
        batch=3, lengths=(20, 0, 9), capacity=24, seqlen_q=2, seqlen_new=2, page_size=page_size, rotary_dim=32,
        dtype="float16", num_heads_q=2, num_heads_k=1, head_dim=32, head_dim_v=32, causal=True,
    )  # fmt: skip
    arrays = case.arrays()
    if page_size:
        assert len(arrays["k_cache"]) >= 9
        arrays["block_table"] = np.arange(9, dtype=np.int32).reshape(3, 3)
    for name in ("rotary_cos", "rotary_sin"):
        arrays[name] = np.ones((24, 16), np.float16)
    return arrays


def packed(page_size: int = 0) -> dict[str, NDArray[Any]]:
    arrays = caches(page_size)
    own = {name: arrays[name].reshape(6, *arrays[name].shape[2:]) for name in ("q", "k", "v")}
    return arrays | own | {"cu_seqlens_q": int32(0, 2, 3, 6)}


def varlen() -> dict[str, NDArray[Any]]:
    x = np.ones((6, 1, 32), np.float16)
    return {"q": x, "k": x, "v": x, "cu_seqlens_q": int32(0, 2, 6), "cu_seqlens_k": int32(0, 4, 6)}


def turned() -> dict[str, NDArray[Any]]:
    x, table = np.ones((1, 6, 1, 32), np.float16), np.ones((6, 16), np.float16)
    return {"q": x, "k": x, "cos": table, "sin": table, "positions": int32([0, 1, 2, 3, 4, 5])}


def paged() -> dict[str, NDArray[Any]]:
    return caches(8)


def decode_plan(**arrays: Any) -> Any:
    return cufa.decode_plan(**{name: each for name, each in arrays.items() if not name.startswith("rotary")})


KVCACHE, VARLEN = cufa.attention_with_kvcache, cufa.attention_varlen
WRONG: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, Any], str]] = [
    (KVCACHE, caches, {"cache_seqlens": int32(20, 0, -1)}, "cache_seqlens is -1 for sequence 2"),
    (KVCACHE, caches, {"cache_seqlens": int32(20, 25, 9)}, "cache_seqlens is 25 for sequence 1"),
    (KVCACHE, caches, {"cache_seqlens": int32(23, 0, 9)}, "sequence 0 has 23 keys in its cache, and 2 are appended"),
    (KVCACHE, caches, {"cache_leftpad": int32(0, 3, 0)}, "cache_leftpad is 3 for sequence 1"),
    (KVCACHE, caches, {"cache_batch_idx": int32(0, 3, 1)}, "cache_batch_idx is 3 for sequence 1"),
    (KVCACHE, caches, {"cache_batch_idx": int32(0, 1, 1), "cache_seqlens": int32(0, 5, 6)}, "more than one sequence"),
    (KVCACHE, caches, {"rotary_cos": np.ones((21, 16), np.float16), "rotary_sin": np.ones((21, 16), np.float16)},
     "rotary_cos has 21 positions, but one of 21"),
    (KVCACHE, paged, {"block_table": int32([0, 1, 2], [3, -9, -9], [4, 99, -9])}, r"block_table\[2, 1\] is 99"),
    (KVCACHE, paged, {"block_table": int32([0, 1, -1], [3, 4, 5], [6, 7, 8])[::-1, ::-1]}, r"\[2, 0\] is -1, a page"),
    (KVCACHE, paged, {"block_table": np.full((3, 6), -1, np.int32)[:, ::2]}, r"block_table\[0, 0\] is -1"),
    (KVCACHE, packed, {"cu_seqlens_q": int32(0, 2, 1, 6)}, "cu_seqlens_q decreases"),
    (decode_plan, caches, {"cache_seqlens": int32(23, 0, 9)}, "decode_plan: sequence 0 has 23 keys"),
    (VARLEN, varlen, {"cu_seqlens_q": int32(0, 2, 7)}, "cu_seqlens_q holds 7"),
    (VARLEN, varlen, {"cu_seqlens_k": int32(1, 2, 6)}, "cu_seqlens_k starts at 1"),
    (VARLEN, varlen, {"seqused_k": int32(5, 1)}, "seqused_k must lie between 0 and"),
    (cufa.rotary, turned, {"positions": int32([0, 1, 2, 3, 4, 6])}, "positions from 0 to 6"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "make", "changed", "words"), WRONG)
def test_what_is_refused_on_the_cpu_is_on_a_gpu(
    function: Callable[..., Any], make: Callable[[], dict[str, Any]], changed: dict[str, Any], words: str
) -> None:
    arrays = make() | changed
    options = {"causal": True} if function is KVCACHE else {}
    with pytest.raises(ValueError, match=words) as expected:
        function(**arrays, **options)
    with Gpu() as gpu:
        placed = gpu.arrays(arrays)
        with pytest.raises(ValueError) as found:
            function(**placed, **options)
        assert str(found.value) == str(expected.value)
        assert not gpu.launches
        assert all(placed[name].numpy().tobytes() == array.tobytes() for name, array in arrays.items())


@pytest.mark.parametrize("make", [caches, paged, packed])
def test_what_is_right_is_computed(make: Callable[[], dict[str, Any]]) -> None:
    arrays = make()
    if "block_table" in arrays:  # a part of a larger table that lies backwards
        wide = np.full((3, 9), -1, np.int32)
        wide[:, 8:2:-2] = arrays["block_table"]
        arrays["block_table"] = wide[:, 8:2:-2]
    with Gpu() as gpu:
        placed = gpu.arrays(arrays)
        out = cufa.attention_with_kvcache(**placed, causal=True).numpy()
        changed = placed["k_cache"].numpy(), placed["v_cache"].numpy()
    assert_kvcache_close(out, caches=changed, **arrays, causal=True)


def test_lengths_are_read_behind_what_changes_them() -> None:
    """The first call makes the keys that the second finds; its lengths are read when the first has run."""
    arrays = caches()
    with Gpu() as gpu:
        placed = gpu.arrays(arrays)
        cufa.attention_with_kvcache(**placed, causal=True)
        assert gpu._waiting
        cufa.attention_with_kvcache(**placed, causal=True)
        assert len(gpu._waiting) < len(gpu.launches)


def test_captures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gpu() as gpu:
        placed = gpu.arrays(caches())
        monkeypatch.setattr(_driver, "is_capturing", lambda _: True)
        with pytest.raises(cufa.UnsupportedError, match="attention_with_kvcache: with CUFA_DEBUG=1 the host reads"):
            cufa.attention_with_kvcache(**placed, causal=True)
        assert not gpu.launches


def test_what_the_variable_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DEBUG", "yes")
    with Gpu() as gpu:
        placed = gpu.arrays(caches())
        for _ in range(2):
            with pytest.raises(ValueError, match="CUFA_DEBUG: expected 0 or 1, got 'yes'"):
                cufa.attention_with_kvcache(**placed, causal=True)
        assert not gpu.launches
