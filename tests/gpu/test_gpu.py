"""On a GPU: the specification's properties, on every framework at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import places
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa import reference
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._driver import driver as _driver
from cufa.testing import (
    LAYOUTS,
    Case,
    View,
    assert_close,
    assert_gradients_close,
    dense_cases,
    to_numpy,
    varlen_cases,
)

pytestmark = pytest.mark.gpu

TORCH_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "reversed")


def framework(name: str) -> ModuleType:
    """Import a framework, or skip: what is not installed cannot be tested."""
    module = pytest.importorskip(name)
    if name == "cupy":
        module.cuda.Device(0).use()
    return module


@pytest.fixture
def cupy() -> Any:
    return framework("cupy")


@pytest.fixture
def torch() -> Any:
    return framework("torch")


def attend(case: Case, xp: Any, **changed: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Run a case in a framework; out, lse or None, and the arrays."""
    arrays = case.arrays(xp) | changed
    options: dict[str, Any] = {**case.options, "return_lse": case.return_lse}
    if case.use_out:
        options["out"] = case.output(xp)
    function = cufa.attention_varlen if isinstance(case.seqlen_q, tuple) else cufa.attention
    result = function(**arrays, **options)
    out, lse = result if case.return_lse else (result, None)
    if case.use_out:
        assert out is options["out"]
    return out, lse, arrays


def is_hopper() -> bool:
    return _driver.device(0).arch // 10 == 9


def check(case: Case, xp: Any, host: dict[str, Any] | None = None) -> None:
    """Hold a case to the reference, which reads the same arrays made by NumPy."""
    out, lse, _ = attend(case, xp)
    assert_close(out, lse=lse, **(case.arrays() if host is None else host), **case.options)


of_every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])


@of_every_dtype
@pytest.mark.parametrize("name", ["cupy", "torch"])
@settings(max_examples=14)
@given(data=st.data())
def test_dense_equals_reference(name: str, dtype: str, data: st.DataObject) -> None:
    xp = framework(name)
    check(data.draw(dense_cases(dtypes=(dtype,), layouts=LAYOUTS if name == "cupy" else TORCH_LAYOUTS)), xp)


@of_every_dtype
@pytest.mark.parametrize("name", ["cupy", "torch"])
@settings(max_examples=14)
@given(data=st.data())
def test_varlen_equals_reference(name: str, dtype: str, data: st.DataObject) -> None:
    xp = framework(name)
    check(data.draw(varlen_cases(dtypes=(dtype,), layouts=LAYOUTS if name == "cupy" else TORCH_LAYOUTS)), xp)


@settings(max_examples=20)
@given(case=st.one_of(dense_cases(layouts=("contiguous",)), varlen_cases(layouts=("contiguous",))))
def test_jax_equals_reference(case: Case) -> None:
    jnp = framework("jax").numpy
    case = replace(case, use_out=False)
    check(case, jnp)


@settings(max_examples=20)
@given(case=dense_cases(layouts=("contiguous", "transposed", "padded"), dtypes=("float16", "float32")))
def test_numba_equals_reference(case: Case) -> None:
    cuda = framework("numba.cuda")

    def upload(flat: np.ndarray, view: View) -> Any:
        return cuda.to_device(np.ascontiguousarray(view.on(flat)))

    if 0 in case.view("q").shape or 0 in case.view("k").shape:
        return  # Numba cannot make empty device arrays
    check(case, upload)


class Foreign:
    """An array that shows nothing but DLPack and a namespace."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.device = array.device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        import cupy

        class Namespace:
            float16, float32 = cupy.float16, cupy.float32

            @staticmethod
            def empty(shape: tuple[int, ...], dtype: Any, device: Any) -> Foreign:
                return Foreign(cupy.empty(shape, dtype))

        return Namespace


def test_foreign_arrays_through_dlpack(cupy: Any) -> None:
    case = Case(
        batch=2,
        seqlen_q=70,
        seqlen_k=130,
        num_heads_q=4,
        num_heads_k=2,
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
    )
    arrays = case.arrays(cupy)
    cupy.cuda.Device().synchronize()
    out, lse = cufa.attention(**{name: Foreign(array) for name, array in arrays.items()}, return_lse=True)
    assert type(out) is Foreign
    cupy.cuda.Device().synchronize()
    assert_close(out.array, lse=lse.array, **case.arrays())


class Copying(Foreign):
    """Exports copies, as it may: the pool takes them back with the capsule."""

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.copy().__dlpack__(stream=options["stream"])


def test_exported_copies_are_read_before_they_are_gone(cupy: Any) -> None:
    """The result, which is as large as they are, takes the memory of the first that is given back."""
    case = Case(seqlen_q=300, seqlen_k=300, num_heads_q=2, num_heads_k=2, head_dim=64, head_dim_v=64, dtype="float16")
    arrays = case.arrays(cupy)
    with cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
        out, lse = cufa.attention(**{name: Copying(array) for name, array in arrays.items()}, return_lse=True)
        assert_close(out.array, lse=lse.array, **case.arrays())
        given = {name: Copying(array) for name, array in (arrays | {"dout": arrays["q"]}).items()}
        gradients = cufa.attention_backward(**given, out=Copying(out.array), lse=Copying(lse.array))
        expected = cufa.attention_backward(**arrays, dout=arrays["q"], out=out.array, lse=lse.array)
    for gradient, other in zip(gradients[1:], expected[1:], strict=True):
        assert same(gradient.array, other)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_elements_at_odd_addresses_are_refused(cupy: Any, dtype: str) -> None:
    shape = (1, 8, 2, 16)
    q, memory = cupy.zeros(shape, dtype), cupy.zeros(4 * 256 + 1, cupy.uint8)
    odd = memory[1 : 1 + q.nbytes].view(dtype).reshape(shape)
    assert odd.data.ptr % 2
    for name, wrap in (("q", None), ("v", None), ("out", None), ("k", Foreign)):
        each = dict.fromkeys("qkv", q) | {name: odd}
        arrays = each if wrap is None else {key: wrap(array) for key, array in each.items()}
        with pytest.raises(cufa.UnsupportedError, match=f"^attention: {name} begins at an address that is no multiple"):
            cufa.attention(**arrays)
    assert not cupy.any(cufa.attention(q, q, q))  # the context lives


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_numbers_on_a_gpu_are_read_at_every_call(name: str) -> None:
    xp = framework(name)
    q = Case(dtype="float16", seqlen_q=33, seqlen_k=33, head_dim=64, head_dim_v=64).arrays(xp)["q"]
    scale = xp.ones((), dtype=xp.float32) if name == "cupy" else xp.ones((), device="cuda")
    for value in (0.5, 2.0):
        scale[...] = value
        expected = cufa.attention(q, q, q, softmax_scale=value, softcap=value)
        assert same(cufa.attention(q, q, q, softmax_scale=scale, softcap=scale), expected)


@pytest.mark.parametrize("layout", ["fused", "fused heads", "fused batch", "fused transposed"])
@pytest.mark.parametrize("head_dim", [64, 60])
def test_slices_of_one_fused_array(cupy: Any, layout: str, head_dim: int) -> None:
    """Inputs, outputs and gradients side by side in memory."""
    b, s, h, d = 2, 70, 4, head_dim
    whole, axis, order = {
        "fused": ((b, s, 8, h, d), 2, (0, 1, 2, 3)),
        "fused heads": ((b, s, h, 8, d), 3, (0, 1, 2, 3)),
        "fused batch": ((b, 8, s, h, d), 1, (0, 1, 2, 3)),
        "fused transposed": ((b, 8, h, s, d), 1, (0, 2, 1, 3)),
    }[layout]
    host = np.random.default_rng(0).standard_normal(whole).astype(np.float16)
    parts = [part.transpose(order) for part in np.moveaxis(host, axis, 0)]
    q, k, v, out, dout, dq, dk, dv = (part.transpose(order) for part in cupy.moveaxis(cupy.asarray(host), axis, 0))
    _, lse = cufa.attention(q, k, v, out=out, causal=True, return_lse=True)
    assert_close(out, *parts[:3], lse=lse, causal=True)
    cufa.attention_backward(dout, q, k, v, out, lse, causal=True, dq=dq, dk=dk, dv=dv)
    assert_gradients_close((dq, dk, dv), parts[4], *parts[:3], causal=True)
    with pytest.raises(ValueError, match="out overlaps v"):
        cufa.attention(q, k, v, out=v)


@settings(max_examples=20)
@given(case=dense_cases(values=("normal", "large rows", "garbage")))
def test_memory_around_out_is_not_written(case: Case) -> None:
    cupy = framework("cupy")
    case = replace(case, use_out=True)
    view = case.view("out")
    memory = cupy.asarray(case.flat("out"))
    strides = [stride * memory.itemsize for stride in view.strides]
    out = cupy.lib.stride_tricks.as_strided(memory[view.offset :], view.shape, strides)
    cufa.attention(**case.arrays(cupy), **case.options, out=out)
    flat = to_numpy(memory)
    assert np.isnan(flat[view.outside()].astype(np.float32)).all()
    if out.size:  # all of it is, and NaN only where garbage that a row sees makes it so
        assert_close(out, **case.arrays(), **case.options)


def same(a: Any, b: Any) -> bool:
    """Whether two results agree bit for bit."""
    return to_numpy(a).tobytes() == to_numpy(b).tobytes()


PLAIN: dict[str, Any] = {"use_out": False, "layouts": ("contiguous",) * 4}
# Rows that are repaired, for what lies beside them, are rounded at other moments.
STEADY_VALUES = ("normal", "large rows", "tiny")
PROPERTY_CASES = dense_cases(layouts=("contiguous",), head_dims=(40, 64, 128, 256), values=STEADY_VALUES)


def plain(case: Case) -> Case:
    return replace(case, **PLAIN, return_lse=True)


@settings(max_examples=20)
@given(case=PROPERTY_CASES)
def test_future_keys_do_not_change_a_causal_prefix(case: Case) -> None:
    cupy = framework("cupy")
    case = plain(replace(case, causal=True, seqlen_k=case.seqlen_q))
    out, lse, arrays = attend(case, cupy)
    cut = case.seqlen_q // 2
    changed = {name: arrays[name].copy() for name in ("k", "v")}
    for array in changed.values():
        array[:, cut:] = 7
    other, other_lse, _ = attend(case, cupy, **changed)
    assert same(out[:, :cut], other[:, :cut])
    assert same(lse[..., :cut], other_lse[..., :cut])


@settings(max_examples=20)
@given(case=PROPERTY_CASES)
def test_grouped_heads_equal_repeated_ones(case: Case) -> None:
    cupy = framework("cupy")
    case = plain(case)
    if not case.num_heads_k:
        return
    out, lse, arrays = attend(case, cupy)
    ratio = case.num_heads_q // case.num_heads_k
    repeated = {name: cupy.repeat(arrays[name], ratio, axis=2) for name in ("k", "v")}
    other, other_lse, _ = attend(case, cupy, **repeated)
    if explain(case, arrays) == explain(case, arrays | repeated) and not is_split(case, arrays):
        assert same(out, other)
        assert same(lse, other_lse)
    else:  # short sequences have small tiles, unless heads fill larger ones together; and see `is_split`
        assert_close(out, lse=lse, **case.arrays(), **case.options)
        assert_close(other, lse=other_lse, **case.arrays(), **case.options)


@settings(max_examples=20)
@given(case=varlen_cases(layouts=("contiguous",), head_dims=(40, 64, 128, 256), values=STEADY_VALUES))
def test_packed_sequences_equal_dense_ones(case: Case) -> None:
    cupy = framework("cupy")
    case = plain(replace(case, seqused_k=None))
    out, lse, arrays = attend(case, cupy)
    assert isinstance(case.seqlen_q, tuple) and isinstance(case.seqlen_k, tuple)
    starts_q, starts_k = np.cumsum((0, *case.seqlen_q)), np.cumsum((0, *case.seqlen_k))
    assert_close(out, lse=lse, **case.arrays(), **case.options)
    together = explain(case, arrays)
    for b in range(case.batch):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        slopes = arrays.get("alibi_slopes")
        if case.alibi_ndim == 2:
            slopes = slopes[b]
        own = {name: arrays[name][None, rows] for name, rows in (("q", rows_q), ("k", rows_k), ("v", rows_k))}
        own |= {"alibi_slopes": slopes, "sinks": arrays.get("sinks")}
        one, one_lse = cufa.attention(**own, return_lse=True, **case.options)
        if explain(case, own) == together:
            assert same(out[rows_q], one[0])
            assert same(lse[:, rows_q], one_lse[0])
        else:  # tiles are smaller where all sequences are short, or, packed, the average one is
            assert_close(one, lse=one_lse, **own, **case.options)


@settings(max_examples=20)
@given(case=PROPERTY_CASES, seed=st.integers(0, 99))
def test_batch_and_heads_can_be_permuted(case: Case, seed: int) -> None:
    cupy = framework("cupy")
    case = plain(replace(case, num_heads_k=case.num_heads_q))
    out, lse, arrays = attend(case, cupy)
    rng = np.random.default_rng(seed)
    batch, heads = rng.permutation(case.batch), rng.permutation(case.num_heads_q)
    changed = {name: cupy.ascontiguousarray(arrays[name][batch][:, :, heads]) for name in "qkv"}
    for name in ("alibi_slopes", "sinks"):
        if name in arrays:
            array = arrays[name][..., heads]
            changed[name] = cupy.ascontiguousarray(array[batch] if array.ndim == 2 else array)
    other, other_lse, _ = attend(case, cupy, **changed)
    if is_split(case, arrays):
        assert_close(out, lse=lse, **arrays, **case.options)
        assert_close(other, lse=other_lse, **arrays | changed, **case.options)
        return
    assert same(out[batch][:, :, heads], other)
    assert same(lse[batch][:, heads], other_lse)


@settings(max_examples=20)
@given(case=dense_cases(head_dims=(40, 64, 128, 256)))
def test_views_equal_contiguous_copies(case: Case) -> None:
    cupy = framework("cupy")
    case = replace(case, use_out=False)
    out, lse, arrays = attend(case, cupy)
    copies = {name: cupy.ascontiguousarray(arrays[name]) for name in "qkv"}
    other, other_lse, _ = attend(case, cupy, **copies)
    assert_close(out, lse=lse, **case.arrays(), **case.options)
    assert_close(other, lse=other_lse, **case.arrays(), **case.options)
    # Rows that are not aligned may be served by another kernel or in smaller tiles, which sum in another order.
    served = {explain(case, arrays | changed) for changed in ({}, copies)}
    if len(served) == 1:
        assert same(out, other)
        assert lse is None or same(lse, other_lse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("causal", [False, True])
def test_results_are_bitwise_repeatable(cupy: Any, dtype: str, causal: bool) -> None:
    case = Case(
        batch=2,
        seqlen_q=700,
        seqlen_k=700,
        num_heads_q=8,
        num_heads_k=2,
        head_dim=128,
        head_dim_v=128,
        dtype=dtype,
        causal=causal,
        return_lse=True,
    )
    first, first_lse, arrays = attend(case, cupy)
    for _ in range(50):
        out, lse = cufa.attention(**arrays, causal=causal, return_lse=True)
        assert same(out, first)
        assert same(lse, first_lse)


def test_a_row_does_not_depend_on_its_batch(cupy: Any) -> None:
    case = Case(
        batch=5,
        seqlen_q=300,
        seqlen_k=300,
        num_heads_q=4,
        num_heads_k=4,
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
    )
    out, _, arrays = attend(case, cupy)
    for b in range(5):
        alone = cufa.attention(*(arrays[name][b : b + 1] for name in "qkv"))
        assert same(out[b : b + 1], alone)


EDGES = (1, 63, 64, 65, 79, 80, 81, 127, 128, 129, 175, 176, 177, 191, 192, 193, 256, 351, 352, 353, 385, 448, 512)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.tuples(st.sampled_from((0, *EDGES)), st.sampled_from((0, *EDGES))), min_size=1, max_size=8),
    dead=st.lists(st.integers(0, 200), min_size=8, max_size=8),
    head_dim=st.sampled_from((64, 96, 128, 192, 256)),
    mask=st.sampled_from(({}, {"causal": True}, {"window_size": (100, 7)})),
)
def test_what_lies_beyond_a_sequence_never_counts(
    lengths: list[tuple[int, int]], dead: list[int], head_dim: int, mask: dict[str, Any]
) -> None:
    """Rows past a sequence's live ones, and its neighbours', share its boxes and tiles: here they are NaN and Inf."""
    cupy = framework("cupy")
    used = np.array([max(0, k - gone) for (_, k), gone in zip(lengths, dead, strict=False)], np.int32)
    starts_q, starts_k = (np.cumsum([0, *(pair[side] for pair in lengths)], dtype=np.int32) for side in (0, 1))
    rng = np.random.default_rng(len(lengths))
    q, k, v = (
        rng.standard_normal((starts[-1], heads, head_dim)).astype(np.float16)
        for starts, heads in ((starts_q, 4), (starts_k, 2), (starts_k, 2))
    )
    live = np.zeros(len(k), bool)
    for start, count in zip(starts_k, used, strict=False):
        live[start : start + count] = True
    k[~live], v[~live] = np.nan, np.inf
    offsets = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "seqused_k": used}
    arrays = {name: cupy.asarray(array) for name, array in (*zip("qkv", (q, k, v), strict=True), *offsets.items())}
    out, lse = cufa.attention_varlen(**arrays, **mask, return_lse=True)
    assert np.isfinite(to_numpy(out).astype(np.float32)).all()
    assert_close(out, q, k, v, lse=lse, **offsets, **mask)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (50, 10)}], ids=["none", "causal", "window"])
def test_many_packed_sequences(cupy: Any, head_dim: int, mask: dict[str, Any]) -> None:
    """So many that blocks work through several, each its share of rounds that go back and forth."""
    lengths = np.random.default_rng(0).choice([0, 1, 17, 63, 64, 65, 129, 200], (2, 700)).tolist()
    sizes = {"seqlen_q": tuple(lengths[0]), "seqlen_k": tuple(lengths[1]), "batch": 700}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "num_heads_q": 4, "num_heads_k": 2}
    case = Case(**sizes, dtype="bfloat16", return_lse=True, **mask)
    if is_hopper():
        assert cufa.explain(**case.arrays(cupy), **case.options).num_blocks < 200
    check(case, cupy)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (200, 100)}], ids=["none", "causal", "window"])
def test_edges_of_tiles(cupy: Any, head_dim: int, mask: dict[str, Any]) -> None:
    for seqlen_q, seqlen_k in zip(EDGES, (*EDGES[12:], *EDGES[:12]), strict=True):
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "head_dim_v": head_dim}
        check(Case(**sizes, num_heads_q=3, num_heads_k=1, dtype="bfloat16", return_lse=True, **mask), cupy)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_windows(cupy: Any, head_dim: int) -> None:
    """Blocks go through many tiles, whose warpgroups leave out each other's keys; the same bits in every run."""
    case = Case(
        seqlen_q=1500,
        seqlen_k=1400,
        num_heads_q=32,
        num_heads_k=4,
        window_size=(300, 9),
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype="bfloat16",
        sinks=True,
        return_lse=True,
    )
    check(case, cupy)
    first, first_lse, _ = attend(case, cupy)
    for _ in range(20):
        out, lse, _ = attend(case, cupy)
        assert same(out, first) and same(lse, first_lse)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (300, 0)}], ids=["none", "causal", "window"])
def test_packed_tiles_are_taken_as_they_come(cupy: Any, head_dim: int, mask: dict[str, Any]) -> None:
    """By other blocks in every run, and with the same bits."""
    lengths = (1, 900, 0, 333, 700, 63)
    sizes = {"batch": 6, "seqlen_q": lengths, "seqlen_k": lengths, "num_heads_q": 16, "num_heads_k": 4}
    case = Case(**sizes, head_dim=head_dim, head_dim_v=head_dim, dtype="bfloat16", return_lse=True, **mask)
    with places.bounds(_problem, MANY_ROWS=0, TAKEN_ROWS=0):
        if is_hopper():
            assert "packed_sm90" in cufa.explain(**case.arrays(cupy), **case.options).kernel
        check(case, cupy)
        first, first_lse, _ = attend(case, cupy)
        for _ in range(20):
            out, lse, _ = attend(case, cupy)
            assert same(out, first) and same(lse, first_lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (20, 3)}], ids=["none", "causal", "window"])
def test_heads_that_share_tiles(cupy: Any, head_dim: int, mask: dict[str, Any]) -> None:
    # Each of these has a kernel of its own: every second one, and all of them with every head_dim, and every mask.
    shapes = ((8, 2, 1), (8, 1, 7), (64, 1, 3), (16, 8, 40), (4, 1, 33), (32, 2, 130))
    for heads_q, heads_k, seqlen_q in shapes[(head_dim // 64 + len(mask) + ("causal" in mask)) % 2 :: 2]:
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": 200, "head_dim": head_dim, "head_dim_v": head_dim}
        case = Case(
            **sizes, batch=2, num_heads_q=heads_q, num_heads_k=heads_k, dtype="float16", return_lse=True, **mask
        )
        check(case, cupy)
        check(replace(case, layouts=("transposed",) * 4, use_out=True), cupy)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_that_grow_without_end(cupy: Any, scale: float) -> None:
    """The maximum steps up in block after block, in some rows by far and in others by little."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 900, 2, 64), dtype=np.float32).astype(np.float16)
    k *= (np.linspace(0.1, 3.0, 900, dtype=np.float32) ** 2)[None, :, None, None].astype(np.float16)
    q[:, ::3] *= np.float16(4)
    q[:, 1::3] *= np.float16(0.01)
    for order in (slice(None), slice(None, None, -1)):
        given = (q, np.ascontiguousarray(k[:, order]), np.ascontiguousarray(v[:, order]))
        for mask in ({}, {"causal": True}):
            options = {"softmax_scale": scale * 64**-0.5, **mask}
            out, lse = cufa.attention(*(cupy.asarray(array) for array in given), **options, return_lse=True)
            assert_close(out, *given, lse=lse, **options)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_is_as_exact_as_numpy(cupy: Any, head_dim: int, causal: bool) -> None:
    case = Case(
        seqlen_q=1024,
        seqlen_k=1024,
        num_heads_q=2,
        num_heads_k=2,
        head_dim=head_dim,
        head_dim_v=head_dim,
        causal=causal,
    )
    host = case.arrays()
    exact = cufa.reference.attention(**host, causal=causal)
    q, k, v = (host[name].transpose(0, 2, 1, 3) for name in "qkv")
    scores = (q @ k.swapaxes(-1, -2)) * np.float32(head_dim**-0.5)
    if causal:
        scores = np.where(np.tri(1024, dtype=bool), scores, np.float32(-np.inf))
    p = np.exp(scores - scores.max(-1, keepdims=True))
    numpy_out = ((p / p.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3)
    out = to_numpy(cufa.attention(**case.arrays(cupy), causal=causal))

    def error(x: np.ndarray) -> float:
        return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))

    assert error(out) <= 2 * error(numpy_out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_sequences(cupy: Any, dtype: str) -> None:
    case = Case(
        seqlen_q=16500,
        seqlen_k=16500,
        num_heads_q=2,
        num_heads_k=1,
        head_dim=128,
        head_dim_v=128,
        dtype=dtype,
        causal=True,
    )
    out, _, _ = attend(case, cupy)
    host = case.arrays()
    for rows in (slice(0, 200), slice(8100, 8300), slice(16400, 16500)):
        assert_close(
            out[:, rows],
            host["q"][:, rows],
            host["k"][:, : rows.stop],
            host["v"][:, : rows.stop],
            causal=True,
        )


def test_more_than_two_to_the_31_elements(cupy: Any) -> None:
    batch, seqlen, heads, head_dim = (1 << 15) + 3, 64, 16, 64  # 2.1e9 elements, 4.3 GB each
    if cupy.cuda.Device().mem_info[0] < 20 << 30:
        pytest.skip("needs 20 GB of device memory")
    small = cupy.random.default_rng(0).standard_normal((3, 1 << 20), dtype=cupy.float32).astype(cupy.float16)
    shape = (batch, seqlen, heads, head_dim)
    size = batch * seqlen * heads * head_dim
    q, k, v = (cupy.tile(each, -(-size // each.size))[:size].reshape(shape) for each in small)
    for array in (q, k, v):
        array += (cupy.arange(batch, dtype=cupy.float16) % 7)[:, None, None, None] * cupy.float16(0.1)
    out = cufa.attention(q, k, v)
    for b in (0, batch // 2, batch - 1):
        one = slice(b, b + 1)
        assert_close(out[one], q[one], k[one], v[one])
    # The same memory as one long packed array, whose last rows lie beyond 2**31 elements.
    offsets = cupy.arange(batch + 1, dtype=cupy.int32) * seqlen
    packed = (array.reshape(-1, heads, head_dim) for array in (q, k, v))
    assert same(cufa.attention_varlen(*packed, offsets, offsets)[-seqlen:], out[-1])
    del q, k, v, out
    cupy.get_default_memory_pool().free_all_blocks()


# --- arrays that are not aligned ----------------------------------------------------------------------


COPIED: dict[str, dict[str, Any]] = {
    "33": {"head_dim": 33, "head_dim_v": 33},
    "65": {"head_dim": 65, "head_dim_v": 65, "causal": True},
    "129": {"head_dim": 129, "head_dim_v": 129},
    "1 and 100": {"head_dim": 1, "head_dim_v": 100},
    "one off": {"head_dim": 64, "head_dim_v": 64, "layouts": ("offset",) * 4},
    "only k": {"head_dim": 64, "head_dim_v": 64, "layouts": ("contiguous", "offset", "contiguous", "contiguous")},
    "apart": {"head_dim": 64, "head_dim_v": 40, "layouts": ("strided", "strided", "padded", "contiguous")},
    "reversed": {"head_dim": 128, "head_dim_v": 128, "layouts": ("reversed",) * 4, "window_size": (100, 0)},
    "one head": {"head_dim": 65, "head_dim_v": 65, "layouts": ("broadcast", "broadcast", "broadcast", "contiguous")},
    "transposed": {"head_dim": 33, "head_dim_v": 65, "layouts": ("transposed",) * 4, "causal": True},
    "many terms": {"head_dim": 33, "head_dim_v": 33, "softcap": 5.0, "alibi_ndim": 1, "sinks": True, "causal": True},
}


def copied_case(kind: str, dtype: str, packed: bool, **changed: Any) -> Case:
    lengths: dict[str, Any] = {"batch": 2, "seqlen_q": 200, "seqlen_k": 333}
    if packed:
        lengths = {"batch": 3, "seqlen_q": (129, 0, 300), "seqlen_k": (200, 70, 301)}
    heads = {"num_heads_q": 4, "num_heads_k": 2}
    return Case(dtype=dtype, return_lse=True, **lengths | heads | COPIED[kind] | changed)


def aligned(array: Any) -> Any:
    """The same in rows that are aligned, whatever their width, between NaN."""
    import cupy

    wide = cupy.full((*array.shape[:-1], -(-array.shape[-1] // 8) * 8), cupy.nan, array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide[..., : array.shape[-1]]


@pytest.mark.parametrize(
    ("kind", "dtype", "packed"),
    [
        (kind, "bfloat16" if packed ^ number % 2 else "float16", packed)
        for number, kind in enumerate(COPIED)
        for packed in (False, True)
    ],
)
def test_arrays_that_are_not_aligned(cupy: Any, kind: str, dtype: str, packed: bool) -> None:
    """They are copied, and then the very same is computed as of aligned ones. Memory between their elements is NaN."""
    case = copied_case(kind, dtype, packed)
    check(case, cupy)
    check(replace(case, use_out=True, values="garbage"), cupy)
    out, lse, arrays = attend(case, cupy)
    if is_hopper():
        told = cufa.explain(**arrays, **case.options)
        assert told.kernel.startswith("attention_forward_sm90") and "copied first" in told.reason
    if dtype == "float16":  # CuPy makes no views of bfloat16 in other memory
        other, other_lse, _ = attend(case, cupy, **{name: aligned(arrays[name]) for name in "qkv"})
        assert same(out, other) and same(lse, other_lse)


def test_rows_whose_elements_are_far_apart(cupy: Any) -> None:
    """The last axis is not the last in memory."""
    shape, order = (2, 65, 4, 300), (0, 3, 2, 1)  # (batch, head_dim, heads, seqlen) in memory
    q, k, v = (
        cupy.random.default_rng(seed).standard_normal(shape, dtype=cupy.float32).astype(cupy.float16).transpose(order)
        for seed in range(3)
    )
    for arrays in ((q, k, v), (q, k[:, ::-1], v[..., ::-1]), (q[..., ::2], k[..., ::2], v)):
        for causal in (False, True):
            out, lse = cufa.attention(*arrays, causal=causal, return_lse=True)
            assert_close(out, *arrays, lse=lse, causal=causal)
            assert same(out, cufa.attention(*map(aligned, arrays), causal=causal))


@pytest.mark.parametrize("head_dim", [33, 65, 129])
def test_copies_give_the_same_bits_every_time(cupy: Any, head_dim: int) -> None:
    case = copied_case("33", "float16", False, head_dim=head_dim, head_dim_v=head_dim, seqlen_q=700, seqlen_k=700)
    first, first_lse, arrays = attend(case, cupy)
    out = cupy.empty_like(first)
    for _ in range(50):
        _, lse = cufa.attention(**arrays, return_lse=True, out=out)
        assert same(out, first) and same(lse, first_lse)


@pytest.mark.parametrize("head_dim", [33, 129])
def test_copies_are_captured_and_replayed(cupy: Any, head_dim: int) -> None:
    """With memory of the capture's own, which nobody else is given in the meantime."""
    case = copied_case("33", "float16", False, head_dim=head_dim, head_dim_v=head_dim)
    arrays, out = case.arrays(cupy), case.output(cupy)
    others = replace(case, seed=1).arrays(cupy)
    expected, first = cufa.attention(**others), cufa.attention(**arrays, out=out).copy()
    assert not same(expected, first)
    cupy.cuda.Device().synchronize()
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    with stream:
        with cupy.cuda.using_allocator(pool.malloc):
            cufa.attention(**arrays, out=out)  # leaves memory in the pool for the next
            stream.begin_capture()
            cufa.attention(**arrays, out=out)
            graph = stream.end_capture()
        for name in "qkv":
            arrays[name][...] = others[name]
        out[...] = 0
        graph.launch(stream)
    stream.synchronize()
    assert same(out, expected)


def test_copies_are_captured_and_replayed_by_torch(torch: Any) -> None:
    q, other = torch.randn(2, 2, 300, 4, 65, device="cuda", dtype=torch.bfloat16)
    expected = cufa.attention(other, other, other)
    given = q.clone()
    cufa.attention(given, given, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cufa.attention(given, given, given)
    given.copy_(other)
    busy = [torch.full_like(q, float("nan")) for _ in range(8)]  # memory that is handed out in the meantime
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected) and all(each.isnan().all() for each in busy)


@pytest.mark.parametrize("head_dim", [33, 129])
def test_jax_has_memory_for_copies(head_dim: int) -> None:
    jax = framework("jax")
    case = copied_case("33", "bfloat16", False, head_dim=head_dim, head_dim_v=head_dim)
    check(case, jax.numpy)
    arrays = case.arrays(jax.numpy)
    plain = cufa.attention(**arrays)
    assert same(jax.jit(lambda q, k, v: cufa.attention(q, k, v))(**arrays), plain)


# --- streams, graphs, threads -----------------------------------------------------------------------


def test_runs_on_the_current_stream_without_waiting(cupy: Any) -> None:
    case = Case(
        batch=2,
        seqlen_q=2048,
        seqlen_k=2048,
        num_heads_q=8,
        num_heads_k=8,
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
    )
    arrays = case.arrays(cupy)
    expected = cufa.attention(**arrays)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        late = {name: cupy.zeros_like(array) for name, array in arrays.items()}
        for _ in range(200):  # keeps the stream busy, so that a launch elsewhere would read zeros
            cufa.attention(**late)
        for name, array in arrays.items():
            late[name][...] = array
        out = cufa.attention(**late)
        busy = not stream.done
    stream.synchronize()
    assert busy, "the call waited for the GPU"
    assert same(out, expected)


@pytest.mark.parametrize("head_dim", [64, 65])
def test_torch_stream_is_honoured(torch: Any, head_dim: int) -> None:
    """By what copies arrays that are not aligned, too."""
    q = torch.randn(2, 1024, 8, head_dim, device="cuda", dtype=torch.float16)
    expected = cufa.attention(q, q, q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        for _ in range(200):
            cufa.attention(late, late, late)
        late.copy_(q)
        found = [cufa.attention(late, late, late) for _ in range(3)]
    stream.synchronize()
    assert all(torch.equal(out, expected) for out in found)


def test_capture_and_replay(cupy: Any) -> None:
    case = Case(
        batch=2,
        seqlen_q=256,
        seqlen_k=256,
        num_heads_q=4,
        num_heads_k=4,
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
    )
    arrays, out = case.arrays(cupy), case.output(cupy)
    cufa.attention(**arrays, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cufa.attention(**arrays, out=out)
        graph = stream.end_capture()
        arrays["v"][...] = 3
        out[...] = 0
        graph.launch(stream)
    stream.synchronize()
    assert np.allclose(to_numpy(out).astype(np.float32), 3, atol=2e-2)


def test_capture_of_a_kernel_that_is_not_loaded_says_what_to_do(cupy: Any) -> None:
    q = cupy.zeros((1, 16, 1, 23), cupy.float16)
    out = cupy.empty_like(q)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(cufa.MissingKernelError, match="make the same call once before the capture"):
                cufa.attention(q, q, q, softcap=3.0, causal=True, out=out)
        finally:
            stream.end_capture()
    cufa.attention(q, q, q, softcap=3.0, causal=True, out=out)


def test_threads(cupy: Any) -> None:
    cases = [
        Case(
            seqlen_q=100 + i,
            seqlen_k=90,
            num_heads_q=2,
            num_heads_k=2,
            head_dim=48 + i % 2,
            head_dim_v=33,
            dtype="float16",
            seed=i,
        )
        for i in range(16)
    ]
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                for _ in range(5):
                    out, _, _ = attend(case, cupy)
                stream.synchronize()
                assert_close(out, **case.arrays())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


# --- what is refused, and what is said --------------------------------------------------------------


def test_refusals_leave_out_untouched(cupy: Any, torch: Any) -> None:
    q = cupy.ones((1, 8, 2, 64), cupy.float16)
    out = cupy.full_like(q, 9)
    host = np.ones((1, 8, 2, 64), np.float16)
    other = torch.ones(1, 8, 2, 64, dtype=torch.float16, device="cuda")
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            TypeError,
            "attention: k is a numpy array but q is a cupy one; pass arrays of one framework.",
            lambda: cufa.attention(q, host, q, out=out),
        ),
        (
            TypeError,
            "attention: k is a torch array but q is a cupy one; pass arrays of one framework.",
            lambda: cufa.attention(q, other, q, out=out),
        ),
        (
            ValueError,
            "attention: k is on the CPU but q is on cuda:0; pass arrays on one device.",
            lambda: cufa.attention(other, other.cpu(), other),
        ),
        (
            ValueError,
            "attention: out overlaps q; pass one that shares no memory with the others.",
            lambda: cufa.attention(q, q.copy(), q.copy(), out=q),
        ),
        (
            ValueError,
            "attention: softmax_scale is nan; it must be finite and greater than 0.",
            lambda: cufa.attention(q, q, q, softmax_scale=float("nan"), out=out),
        ),
        (
            cufa.UnsupportedError,
            "attention: float64 on a GPU is not supported; pass float16, bfloat16 or float32, or NumPy arrays to "
            "compute on the CPU.",
            lambda: cufa.attention(*[q.astype(cupy.float64)] * 3, out=None),
        ),
        (
            cufa.UnsupportedError,
            "attention: out is given and a tensor requires grad, but what is written there has no history; leave it "
            "out, or call under torch.no_grad().",
            lambda: cufa.attention(*[other.clone().requires_grad_()] * 3, out=torch.empty_like(other)),
        ),
    ]
    for error, text, refused in calls:
        with pytest.raises(error) as raised:
            refused()
        assert str(raised.value) == text
    assert (out == 9).all()
    assert (q == 1).all()
    with torch.no_grad():
        cufa.attention(*[other.clone().requires_grad_()] * 3)


def test_torch_tensors_on_the_cpu_are_computed_there(torch: Any) -> None:
    q, k, v = (torch.randn(2, 33, 4, 40, dtype=torch.bfloat16) for _ in range(3))
    out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    assert out.device.type == "cpu" and out.dtype == torch.bfloat16
    assert_close(out, q, k, v, lse=lse, causal=True)


def test_offsets_outside_the_arrays_touch_nothing_else(cupy: Any) -> None:
    memory = cupy.full((64 + 40 + 64, 2, 64), 5, cupy.float16)
    out = memory[64:104]
    q = cupy.ones((40, 2, 64), cupy.float16)
    for offsets in ([0, 20, 1000], [-7, 20, 40], [30, 10, 40], [0, 2**31 - 1, 40]):
        bad = cupy.asarray(offsets, dtype=cupy.int32)
        cufa.attention_varlen(q, q, q, bad, bad, out=out)
    cupy.cuda.Device().synchronize()
    assert (memory[:64] == 5).all() and (memory[104:] == 5).all()


OFFSETS: dict[str, tuple[list[int], int]] = {
    "padded with zeros": ([0, 100, 300, 0, 0, 0], 300),
    "padded with the last": ([0, 100, 300, 300, 300], 300),
    "ends early": ([0, 100, 129], 300),
    "begins late": ([37, 100, 129], 300),
    "decreases": ([0, 200, 0, 200, 300], 300),
    "beyond": ([-9, 64, 1000, 5, 2**31 - 1], 300),
    "before": ([-(2**31), -5, 3, 2], 70),
    "nothing": ([0, 0, 0], 50),
    "no sequence": ([7], 50),
    "many": ([*range(0, 700, 2), *[0] * 9, *range(650, 1500, 5)], 1600),
    "short": ([*range(0, 1200, 3)], 1300),
}
"""Offsets of any content, and how many rows there are."""


def running(offsets: list[int], total: int) -> np.ndarray[Any, Any]:
    """What kernels make of them: the largest up to each, within the array."""
    return np.maximum.accumulate(np.clip(np.asarray(offsets, np.int64), 0, total)).astype(np.int32)


@pytest.mark.parametrize(
    ("content", "dtype", "given"),
    [
        (content, dtype, bool((number + of_dtype) % 2))
        for number, content in enumerate(OFFSETS)
        for of_dtype, dtype in enumerate(("float16", "float32"))
    ],
)
def test_offsets_of_any_content(cupy: Any, content: str, dtype: str, given: bool) -> None:
    """Rows that are no sequence's are 0 in a new `out`, and left alone in a given one; their lse is -infinity."""
    offsets, total = OFFSETS[content]
    mirrored = [total - offset if 0 <= offset <= total else offset for offset in reversed(offsets)]
    rng = np.random.default_rng(0)
    for offsets_k, mask, head_dims in (
        (offsets, {"causal": True}, (64, 64)),
        (mirrored, {}, (128, 40)),
        (offsets, {"window_size": (30, 5)}, (128, 128)),
    ):
        q, k, v = (
            rng.standard_normal((total, heads, dim)).astype(dtype)
            for heads, dim in ((4, head_dims[0]), (2, head_dims[0]), (2, head_dims[1]))
        )
        starts, starts_k = running(offsets, total), running(offsets_k, total)
        expected, expected_lse = reference.attention_varlen(q, k, v, starts, starts_k, **mask, return_lse=True)
        inside = np.zeros(total, bool)
        inside[starts[0] : starts[-1]] = True
        wide = [np.stack([np.asarray(each, np.int64).astype(np.int32)] * 3, axis=1) for each in (offsets, offsets_k)]
        strided = [cupy.asarray(each)[:, 1] for each in wide]
        # What was in the memory of new results before must not matter.
        dirty = [cupy.full(total * 4 * max(head_dims) * 4, 0xFF, cupy.uint8) for _ in range(2)]
        del dirty
        out = cupy.full((total, 4, head_dims[1]), 5, dtype) if given else None
        found, lse = cufa.attention_varlen(*map(cupy.asarray, (q, k, v)), *strided, **mask, return_lse=True, out=out)
        found, lse = to_numpy(found), to_numpy(lse)
        assert (found[~inside] == (5 if given else 0)).all()
        assert (lse[:, ~inside] == -np.inf).all()
        if inside.any():
            tolerance = 4e-3 if dtype == "float16" else 1e-5
            np.testing.assert_allclose(found[inside], expected[inside], rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(lse[:, inside], expected_lse[:, inside], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim_v", [40, 57, 128])
def test_rows_without_keys(cupy: Any, dtype: str, head_dim_v: int) -> None:
    """Whole tiles of them, which no product is made for."""
    sizes = {"batch": 2, "seqlen_q": 1100, "seqlen_k": 70, "num_heads_q": 4, "num_heads_k": 2}
    case = Case(**sizes, head_dim=64, head_dim_v=head_dim_v, dtype=dtype, causal=True)
    arrays = case.arrays(cupy)
    memory = cupy.full((2, 1100, 4, head_dim_v + 3), 5, dtype)
    out, lse = cufa.attention(**arrays, **case.options, return_lse=True, out=memory[..., :-3])
    assert_close(out, **case.arrays(), lse=lse, **case.options)
    assert (out[:, :1030] == 0).all() and (lse[:, :, :1030] == -np.inf).all()
    assert (memory[..., -3:] == 5).all()
    sinks = cupy.asarray([0.5, -1.0, 2.0, 0.0], cupy.float32)
    out, lse = cufa.attention(**arrays, **case.options, sinks=sinks, return_lse=True)
    assert (out[:, :1030] == 0).all() and (lse[:, :, :1030] == sinks[None, :, None]).all()


def explain(case: Case, arrays: dict[str, Any]) -> tuple[str, int]:
    told = cufa.explain(**arrays, **case.options)
    return told.kernel, told.block_n


def is_split(case: Case, arrays: dict[str, Any]) -> bool:
    """Whether thread blocks may share keys, at places that depend on how many tiles there are in all."""
    return explain(case, arrays)[0].startswith(("attention_forward_split", "attention_forward_cluster"))


def test_explain_tells_the_kernel(cupy: Any) -> None:
    q = cupy.zeros((1, 300, 4, 96), cupy.float16)
    told = cufa.explain(q, q, q, causal=True)
    newest = "attention_forward_sm90 (sm_90a)" if is_hopper() else "attention_forward_sm80"
    assert told.kernel.startswith(newest) and told.config is not None
    assert 0 < told.num_blocks <= 4 * -(-300 // told.block_m)
    assert told.smem_bytes > 0 and 0 < told.registers <= 255 and told.spill_bytes == 0
    cufa.attention(q, q, q, causal=True)
    assert cufa.explain(q, q, q, causal=True).state == "loaded"
    assert "sm_" in str(told)


def test_explain_says_why_a_kernel_is_not_the_fastest(cupy: Any) -> None:
    memory = cupy.zeros(1 << 16, cupy.float16)
    for array, why in (  # of so few queries that copies do not pay
        (memory[1:][: 48 * 2 * 64].reshape(1, 48, 2, 64), "copied 2 bytes at a time"),
        (memory[: 48 * 2 * 64].reshape(1, 48, 2, 64)[:, ::-1], "negative"),
        (memory[: 48 * 2 * 64].reshape(1, 48, 2, 64).astype(cupy.float32), "tf32"),
    ):
        told = cufa.explain(array, array, array)
        assert told.kernel.startswith("attention_forward_sm80")
        assert why in told.reason or not is_hopper()
        assert_close(cufa.attention(array, array, array), array, array, array)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernel_for_every_gpu(cupy: Any, head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper too, where no array has a tensor map: its largest tiles, and what they hold twice or in registers."""
    monkeypatch.setattr(_problem, "has_tensor_map", lambda *_: False)
    sizes: dict[str, Any] = {"batch": 3, "seqlen_q": 333, "seqlen_k": 517, "num_heads_q": 3, "num_heads_k": 3}
    for values in ("normal", "large rows"):
        case = Case(**sizes, head_dim=head_dim, head_dim_v=head_dim, causal=causal, dtype="bfloat16", values=values)
        assert explain(case, case.arrays(cupy))[0].startswith("attention_forward_sm80")
        check(replace(case, return_lse=True), cupy)


def test_config_shows_the_gpu() -> None:
    assert cufa.is_available()
    report = cufa.show_config("dicts")
    assert "compute capability" in report["gpu"]["cuda:0"]
    assert report["nvrtc"]["version"] == "{}.{}".format(*_jit.nvrtc().version)


def test_second_gpu(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    case = Case(
        batch=2,
        seqlen_q=100,
        seqlen_k=100,
        num_heads_q=4,
        num_heads_k=4,
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
    )
    with cupy.cuda.Device(1):
        arrays = case.arrays(cupy)
    out = cufa.attention(**arrays)  # device 0 is current
    assert out.device.id == 1
    with cupy.cuda.Device(1):
        assert_close(out, **case.arrays())
    with pytest.raises(ValueError, match="v is on cuda:0 but q is on cuda:1"):
        cufa.attention(arrays["q"], arrays["k"], case.arrays(cupy)["v"])
