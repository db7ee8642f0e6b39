"""What is refused and in which words, and the facts that follow from what is accepted."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa import reference, testing
from cufa._call import align as _align
from cufa._call import arrays as _arrays
from cufa._call import options as _options
from cufa._call import overlap as _overlap
from cufa._call import problem as _problem
from cufa._call.arrays import CPU, Adapter, Spec, contiguous
from cufa._call.overlap import Extent
from cufa._call.problem import CHAIN_ROWS, Problem
from cufa._compile import jit as _jit
from cufa._driver import driver as _driver
from cufa._driver import launch as _launch
from cufa._kernels import Plan, align, forward_sm90, tensor_map
from cufa._kernels import backward as backward_kernels
from cufa._kernels import forward as forward_kernels
from cufa._kernels import unit as units
from cufa._kernels.backward import LAST_FIRST, BackwardGrid
from cufa._kernels.backward_split_sm90 import SPLIT_QUERIES
from cufa._kernels.forward_cluster_sm90 import ForwardClusterSm90
from cufa._kernels.params import params_of
from cufa._kernels.record import Record
from cufa._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from cufa._operations.call import planned
from cufa._operations.features import having
from cufa._operations.forward import ATTENTION, ATTENTION_VARLEN
from cufa._terms.mask import mask_features

Call = Callable[..., Any]


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def dense(**changed: Any) -> Any:
    arguments: dict[str, Any] = {name: zeros(2, 8, 4, 16) for name in "qkv"} | changed
    return cufa.attention(**arguments)


OFFSETS = np.array([0, 3, 8], np.int32)


def packed(**changed: Any) -> Any:
    arguments: dict[str, Any] = {name: zeros(8, 4, 16) for name in "qkv"}
    return cufa.attention_varlen(**(arguments | {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS} | changed))


class OnGpu:
    """An array that claims to be on a GPU, so that what would run there can be planned here."""

    def __init__(
        self, *shape: int, dtype: str = "float16", device: int = 0, pointer: int = 1 << 41, strides: Any = None
    ):
        self.shape, self.dtype, self.device, self.pointer = shape, dtype, device, pointer
        self.strides = contiguous(shape) if strides is None else strides


class OnGpuAdapter(Adapter):
    name = "pretended"

    def view(self, array: Any) -> tuple[int, Any]:
        layout = (self, array.shape, array.strides, array.dtype, array.device, array.pointer % 16, True)
        return array.pointer, layout

    def spec(self, layout: Any) -> Spec:
        return Spec(self.name, *layout[1:])


_arrays.register(OnGpu, OnGpuAdapter())


OPTIONS: dict[str, Any] = {"causal": False, "window_size": None, "softmax_scale": None, "softcap": 0.0}
OPTIONS |= {"return_lse": False, "deterministic": False}


def pretend(patch: pytest.MonkeyPatch, arch: int) -> None:
    """Let GPUs have a compute capability; what was chosen for others is forgotten."""
    patch.setattr(_driver, "device", lambda _: _driver.Device(arch, 132))
    _problem._checked.cache_clear()


def problem_of(operation: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Problem:
    """The problem of a call of an operation, by keywords."""
    given = tuple(arrays.get(name) for name in operation.arrays)
    view = _arrays.view(operation.name, operation.arrays, given, operation.written_indices)
    asked = tuple((OPTIONS | options).values())
    return _problem.checked(operation, view, _options.of(operation.name, asked, operation.owned))


def gpu_problem(q: OnGpu, k: OnGpu, v: OnGpu, out: Any = None, **options: Any) -> Problem:
    return problem_of(ATTENTION, {"q": q, "k": k, "v": v, "out": out}, options)


def packed_gpu_problem(q: OnGpu, k: OnGpu, batch: int, **options: Any) -> Problem:
    offsets = OnGpu(batch + 1, dtype="int32")
    return problem_of(ATTENTION_VARLEN, {"q": q, "k": k, "v": k, **offsets_by_name(offsets)}, options)


def offsets_by_name(offsets: Any) -> dict[str, Any]:
    return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets)


def backward_problem(
    q: OnGpu, k: OnGpu, v: OnGpu, batch: int | None = None, *, deterministic: bool = False, **changed: Any
) -> Problem:
    """The problem of the gradients, packed if `batch` is given; `changed` are options, and arrays by name."""
    out, lse = (
        OnGpu(*q.shape[:-1], v.shape[-1], dtype=q.dtype),
        OnGpu(*q.shape[:-3], *q.shape[-2:-4:-1], dtype="float32"),
    )
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "dout": out, "lse": lse}
    operation = ATTENTION_BACKWARD
    if batch is not None:
        operation = ATTENTION_VARLEN_BACKWARD
        arrays |= offsets_by_name(OnGpu(batch + 1, dtype="int32"))
    options = {name: changed.pop(name) for name in OPTIONS if name in changed}
    return problem_of(operation, arrays | changed, options | {"deterministic": deterministic})


PARAMS = tuple(text.decode() for name, text in _jit.headers().items() if name.startswith("attention/"))


def unpacked(what: str | Record, packed: bytes) -> dict[str, Any]:
    """The members of a struct, given itself or by name, those of structs in it in dictionaries of their own."""
    record = units.record.read(what, PARAMS) if isinstance(what, str) else what
    found: dict[str, Any] = {}
    for member in record.members:
        part = packed[member.offset : member.offset + member.size]
        if member.record is not None:
            found[member.name] = unpacked(member.record, part)
        elif member.format:
            values = struct.unpack(f"<{member.elements}{member.format.replace('P', 'Q')}", part)
            found[member.name] = values if member.elements > 1 else values[0]
        else:
            found[member.name] = part
    return found


REFUSED: list[tuple[type[Exception], str, Call, dict[str, Any]]] = [
    (
        TypeError,
        "attention: k is a list, not an array; pass a CuPy, torch, JAX, Numba or NumPy array, or one with __dlpack__.",
        dense,
        {"k": [1]},
    ),
    (
        TypeError,
        "attention: q is a NoneType, not an array; pass a CuPy, torch, JAX, Numba or NumPy array, or one with "
        "__dlpack__.",
        dense,
        {"q": None},
    ),
    (
        TypeError,
        "attention: v is a masked array, whose mask would be ignored; pass its .filled(...).",
        dense,
        {"v": np.ma.masked_array(zeros(2, 8, 4, 16))},
    ),
    (
        TypeError,
        "attention: k is a pretended array but q is a numpy one; pass arrays of one framework.",
        dense,
        {"k": OnGpu(2, 8, 4, 16)},
    ),
    (
        ValueError,
        "attention: q has dtype int64; pass float16, bfloat16, float32 or float64.",
        dense,
        {"q": zeros(2, 8, 4, 16, dtype=np.int64)},
    ),
    (
        ValueError,
        "attention: k has dtype float16 but q has float32; q, k and v must agree.",
        dense,
        {"k": zeros(2, 8, 4, 16, dtype=np.float16)},
    ),
    (
        ValueError,
        "attention: k has shape (8, 4, 16); 4 dimensions (batch, seqlen, num_heads, head_dim) are expected.",
        dense,
        {"k": zeros(8, 4, 16)},
    ),
    (
        ValueError,
        "attention: q, k and v have batch sizes 2, 2 and 3; they must agree.",
        dense,
        {"v": zeros(3, 8, 4, 16)},
    ),
    (ValueError, "attention: v has seqlen 9 but k has 8; k and v must agree.", dense, {"v": zeros(2, 9, 4, 16)}),
    (ValueError, "attention: v has 2 heads but k has 4; k and v must agree.", dense, {"v": zeros(2, 8, 2, 16)}),
    (
        ValueError,
        "attention: k has head_dim 8 but q has 16; q and k must agree.",
        dense,
        {"k": zeros(2, 8, 4, 8)},
    ),
    (
        ValueError,
        "attention: q has 4 heads and k has 3; the heads of q must be a multiple of those of k.",
        dense,
        {"k": zeros(2, 8, 3, 16), "v": zeros(2, 8, 3, 16)},
    ),
    (
        ValueError,
        "attention: q has 4 heads and k has 0; the heads of q must be a multiple of those of k.",
        dense,
        {"k": zeros(2, 8, 0, 16), "v": zeros(2, 8, 0, 16)},
    ),
    (ValueError, "attention: head_dim_v is 0; it must be at least 1.", dense, {"v": zeros(2, 8, 4, 0)}),
    (
        cufa.UnsupportedError,
        "attention: head_dim_v 257 is not supported; it may be 1 to 256.",
        dense,
        {"v": zeros(2, 8, 4, 257)},
    ),
    (
        ValueError,
        "attention: softmax_scale is inf; it must be finite and greater than 0.",
        dense,
        {"softmax_scale": float("inf")},
    ),
    (
        ValueError,
        "attention: softmax_scale is 0.0; it must be finite and greater than 0.",
        dense,
        {"softmax_scale": 0},
    ),
    (TypeError, "attention: softmax_scale is a str; pass a number.", dense, {"softmax_scale": "1"}),
    (TypeError, "attention: softmax_scale is a ndarray; pass a number.", dense, {"softmax_scale": np.ones(1)}),
    (
        ValueError,
        "attention: softcap is -1.0; it must be finite and not negative (0.0 is off).",
        dense,
        {"softcap": -1},
    ),
    (
        ValueError,
        "attention: softcap is 1e-40; it must be a normal float32 number, or 0.0, which is off.",
        dense,
        {"softcap": 1e-40},
    ),
    (
        ValueError,
        "attention: softmax_scale is 1e+39; it must be from 2^-126 to 2^127, as float32 holds it.",
        dense,
        {"softmax_scale": 1e39},
    ),
    (
        ValueError,
        "attention: softmax_scale is 1e-46; it must be from 2^-126 to 2^127, as float32 holds it.",
        dense,
        {"softmax_scale": 1e-46, "out": None} | {name: zeros(2, 8, 4, 16, dtype=np.float64) for name in "qkv"},
    ),
    (
        ValueError,
        "attention: softmax_scale is inf; it must be finite and greater than 0.",
        dense,
        {"softmax_scale": 10**400},
    ),
    (TypeError, "attention: softmax_scale is a complex; pass a number.", dense, {"softmax_scale": 1j}),
    (TypeError, "attention: softmax_scale is a bytearray; pass a number.", dense, {"softmax_scale": bytearray(b"1")}),
    (TypeError, "attention: softcap is a ndarray; pass a number.", dense, {"softcap": np.array("1")}),
    (TypeError, "attention: softcap is a complex64; pass a number.", dense, {"softcap": np.complex64(1)}),
    (TypeError, "attention: return_lse is a str; pass True or False.", dense, {"return_lse": "no"}),
    (
        TypeError,
        "attention: window_size is b'ab'; pass a pair (left, right), each a number of keys or None.",
        dense,
        {"window_size": b"ab"},
    ),
    (
        TypeError,
        "attention: the left side of window_size is a bool; pass an integer or None.",
        dense,
        {"window_size": (True, False)},
    ),
    (
        TypeError,
        "attention: k is the class Array, not an array; pass an array of it.",
        dense,
        {"k": type("Array", (), {"__dlpack__": None, "__dlpack_device__": None})},
    ),
    (TypeError, "attention: causal is a int; pass True or False.", dense, {"causal": 3}),
    (
        TypeError,
        "attention: window_size is 7; pass a pair (left, right), each a number of keys or None.",
        dense,
        {"window_size": 7},
    ),
    (
        TypeError,
        "attention: the right side of window_size is a float; pass an integer or None.",
        dense,
        {"window_size": (1, 0.5)},
    ),
    (
        ValueError,
        "attention: the left side of window_size is -2; pass at least 0, or None (or -1) for unbounded.",
        dense,
        {"window_size": [-2, 0]},
    ),
    (
        ValueError,
        "attention: alibi_slopes has shape (3,); (4,) or (2, 4), that is (num_heads_q,) or (batch, num_heads_q), is "
        "expected.",
        dense,
        {"alibi_slopes": zeros(3)},
    ),
    (
        ValueError,
        "attention: sinks has shape (2, 4); (4,), that is (num_heads_q,), is expected.",
        dense,
        {"sinks": zeros(2, 4)},
    ),
    (
        ValueError,
        "attention: sinks has dtype float16; pass float32.",
        dense,
        {"sinks": zeros(4, dtype=np.float16)},
    ),
    (
        ValueError,
        "attention: out has shape (2, 8, 4, 15); (2, 8, 4, 16) is expected.",
        dense,
        {"out": zeros(2, 8, 4, 15)},
    ),
    (
        ValueError,
        "attention: out has dtype float64 but q has float32; they must agree.",
        dense,
        {"out": zeros(2, 8, 4, 16, dtype=np.float64)},
    ),
    (
        ValueError,
        "attention: out is read-only; pass an array that can be written.",
        dense,
        {"out": np.broadcast_to(np.float32(0), (2, 8, 4, 16))},
    ),
    (
        ValueError,
        "attention_varlen: q has shape (1, 8, 4, 16); 3 dimensions (total, num_heads, head_dim) are expected.",
        packed,
        {"q": zeros(1, 8, 4, 16)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_q has dtype int64; pass int32.",
        packed,
        {"cu_seqlens_q": np.array([0, 3, 8])},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k has shape (0,); (batch + 1,) is expected.",
        packed,
        {"cu_seqlens_k": OFFSETS[:0]},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k has 2 entries but cu_seqlens_q has 3; both need one more than there are "
        "sequences.",
        packed,
        {"cu_seqlens_k": np.array([0, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: seqused_k has 3 entries; one for each of the 2 sequences is expected.",
        packed,
        {"seqused_k": OFFSETS},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_q starts at 1; it must start at 0.",
        packed,
        {"cu_seqlens_q": np.array([1, 3, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k decreases; offsets must not, but for zeros behind the last.",
        packed,
        {"cu_seqlens_k": np.array([0, 8, 3], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_q decreases; offsets must not, but for zeros behind the last.",
        packed,
        {"cu_seqlens_q": np.array([0, 4, 0, 8], np.int32), "cu_seqlens_k": np.array([0, 4, 4, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_k holds 9; offsets must lie between 0 and the 8 rows of k.",
        packed,
        {"cu_seqlens_k": np.array([0, 3, 9], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: cu_seqlens_q holds -1; offsets must lie between 0 and the 8 rows of q.",
        packed,
        {"cu_seqlens_q": np.array([0, -1, 8], np.int32)},
    ),
    (
        ValueError,
        "attention_varlen: seqused_k must lie between 0 and the lengths in cu_seqlens_k.",
        packed,
        {"seqused_k": np.array([4, 5], np.int32)},
    ),
]


@pytest.mark.parametrize(("error", "text", "function", "changed"), REFUSED, ids=[row[1][:70] for row in REFUSED])
def test_refusals(error: type[Exception], text: str, function: Call, changed: dict[str, Any]) -> None:
    shape = (8, 4, 16) if function is packed else (2, 8, 4, 16)
    out = np.full(shape, 9, np.float32)
    with pytest.raises(error) as raised:
        function(**({"out": out} | changed))
    assert str(raised.value) == text
    assert (out == 9).all()


def test_what_a_gpu_does_not_do() -> None:
    array = OnGpu(1, 8, 2, 64, dtype="float64")
    with pytest.raises(cufa.UnsupportedError) as raised:
        gpu_problem(array, array, array)
    assert str(raised.value) == (
        "attention: float64 on a GPU is not supported; pass float16, bfloat16 or float32, or NumPy arrays to compute "
        "on the CPU."
    )
    here, there = OnGpu(1, 8, 2, 64), OnGpu(1, 8, 2, 64, device=1)
    with pytest.raises(
        ValueError, match=r"^attention: k is on cuda:1 but q is on cuda:0; pass arrays on one device\.$"
    ):
        gpu_problem(here, there, here)
    problem = gpu_problem(here, here, here)
    assert problem.static is not None
    with pytest.raises(cufa.UnsupportedError, match=r"^cufa: a GPU of compute capability 7\.5 is not supported; 8\.0"):
        plans.forward(problem.static, 75)


@pytest.mark.parametrize(
    ("seqlen_q", "options", "mask"),
    [
        (8, {}, "none"),
        (8, {"causal": True}, "causal"),
        (8, {"window_size": (None, 0)}, "causal"),
        (8, {"window_size": (-1, 0)}, "causal"),
        (8, {"window_size": (None, None)}, "none"),
        (8, {"window_size": (None, 3)}, "window"),
        (8, {"causal": True, "window_size": (None, 3)}, "causal"),
        (8, {"causal": True, "window_size": (4, 3)}, "window"),
        (1, {"causal": True}, "none"),
        (1, {"causal": True, "window_size": (4, 3)}, "window"),
    ],
)
def test_masks_fold_into_one_kind(seqlen_q: int, options: dict[str, Any], mask: str) -> None:
    problem = gpu_problem(OnGpu(1, seqlen_q, 2, 64), OnGpu(1, 8, 2, 64), OnGpu(1, 8, 2, 64), **options)
    assert problem.static is not None and problem.static.mask == mask


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(-40, 40)), min_size=4, max_size=4),
    st.sampled_from([2, 4]),
    st.integers(0, 7),
)
def test_the_widest_copy_divides_every_row(axes: list[tuple[int, int]], itemsize: int, start: int) -> None:
    shape, strides = tuple(extent for extent, _ in axes), tuple(stride for _, stride in axes)
    pointer = 4096 + start * itemsize
    spec = Spec("any", shape, strides, "float32" if itemsize == 4 else "float16", 0, pointer % 16, True)
    width = _problem.widest_copy(spec, itemsize)
    assert width in (itemsize, 4, 8, 16)
    if width > itemsize:
        assert shape[-1] == 1 or strides[-1] == 1
        for index in np.ndindex(shape[:-1]):
            assert (pointer + itemsize * int(np.dot(index, strides[:-1]))) % width == 0


def elements(extent: Extent, start: int = 0) -> np.ndarray:
    """The address of every element."""
    index = np.indices(extent.shape).reshape(len(extent.shape), -1)
    return start + np.asarray(extent.strides, np.int64) @ index


extents = st.integers(1, 4).flatmap(
    lambda rank: st.builds(
        lambda axes, itemsize: Extent(
            tuple(count for count, _ in axes), tuple(itemsize * step for _, step in axes), itemsize
        ),
        st.lists(st.tuples(st.sampled_from([0, 1, 2, 2, 3, 4]), st.integers(-30, 30)), min_size=rank, max_size=rank),
        st.sampled_from([2, 4]),
    )
)


@settings(max_examples=500)
@given(extents, extents, st.integers(-150, 150))
def test_shared_memory_is_found_exactly(a: Extent, b: Extent, distance: int) -> None:
    where, other = (
        (each[:, None] + np.arange(extent.itemsize)).ravel()
        for each, extent in ((elements(a, distance), a), (elements(b), b))
    )
    assert _overlap.overlap(a, b, distance) == bool(np.intersect1d(where, other).size)
    assert _overlap.overlaps_itself(a) == (len(np.unique(elements(a))) < len(elements(a)))
    first, last = a.span()
    assert where.size == 0 or (where.min(), where.max() + 1) == (distance + first, distance + last)


@given(st.data())
def test_an_out_is_accepted_unless_it_overlaps(data: st.DataObject) -> None:
    memory = np.zeros(4096, np.float32)
    views = []
    for _ in range(2):
        strides = data.draw(st.permutations([1, 8, 32, 96]))
        offset = data.draw(st.integers(0, 600))
        views.append(
            np.lib.stride_tricks.as_strided(memory[offset:], (2, 4, 2, 4), tuple(4 * stride for stride in strides))
        )
    q, out = views
    other = zeros(2, 4, 2, 4)
    own = _overlap.overlaps_itself(Extent(out.shape, out.strides, 4))
    try:
        cufa.attention(q, other, other, out=out)
    except ValueError as error:
        assert ("share memory" if own else "out overlaps q") in str(error)
        assert own or np.shares_memory(q, out)
    else:
        assert not own and not np.shares_memory(q, out)


def test_what_is_too_hard_to_decide_is_refused() -> None:
    """The numbers are those of a test of NumPy's."""
    a, b = Extent((1049,) * 3, (36674, 61119, 85569), 1), Extent((1049, 1049, 1), (12223, 12224, 1), 1)
    assert _overlap.overlap(a, b, -64023025) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "shares_memory", hard)
        memory = zeros(2, 8, 4, 2, 16)
        with pytest.raises(ValueError, match=r"^attention: out lies between the elements of, and may overlap, q; pass"):
            cufa.attention(memory[..., 0, :], zeros(2, 8, 4, 16), zeros(2, 8, 4, 16), out=memory[..., 1, :])
        odd = np.lib.stride_tricks.as_strided(zeros(4096), (2, 2, 2, 4), (44, 28, 20, 4))
        with pytest.raises(ValueError, match=r"of which it is too hard to say whether its elements share memory"):
            cufa.attention(*[zeros(2, 2, 2, 4)] * 3, out=odd)


def hard(*_: Any, **__: Any) -> bool:
    raise np.exceptions.TooHardError


FUSED = ["fused", "fused heads", "fused batch", "fused transposed"]


def parts(layout: str, shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    """Arrays that lie side by side in memory, as slices of one."""
    b, s, h, d = shape
    whole, axis, order = {
        "fused": ((b, s, count, h, d), 2, (0, 1, 2, 3)),
        "fused heads": ((b, s, h, count, d), 3, (0, 1, 2, 3)),
        "fused batch": ((b, count, s, h, d), 1, (0, 1, 2, 3)),
        "fused transposed": ((b, count, h, s, d), 1, (0, 2, 1, 3)),
    }[layout]
    memory = np.random.default_rng(0).standard_normal(whole, dtype=np.float32)
    return [np.moveaxis(memory, axis, 0)[n].transpose(order) for n in range(count)]


@pytest.mark.parametrize("layout", FUSED)
def test_slices_of_a_fused_array_may_be_written(layout: str) -> None:
    q, k, v, out, dout, dq, dk, dv = parts(layout, (2, 8, 4, 16), 8)
    assert not dq.flags.c_contiguous and np.may_share_memory(q, dq)
    copies = [array.copy() for array in (q, k, v)]
    expected, lse = cufa.attention(*copies, return_lse=True)
    for _ in range(2):  # the second time it is remembered
        assert np.array_equal(cufa.attention(q, k, v, out=out), expected)
    gradients = cufa.attention_backward(dout.copy(), *copies, expected, lse)
    cufa.attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    assert all(map(np.array_equal, (dq, dk, dv), gradients))
    with pytest.raises(ValueError, match=r"^attention: out overlaps v; pass one that shares no memory"):
        cufa.attention(q, k, v, out=v)
    with pytest.raises(ValueError, match=r"^attention_backward: dq overlaps dk"):
        cufa.attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dq)


def test_slices_that_share_some_heads_are_refused() -> None:
    fused = np.zeros((2, 8, 4 * 3, 16), np.float32)
    with pytest.raises(ValueError, match="out overlaps v"):
        cufa.attention(fused[:, :, :3], fused[:, :, 3:6], fused[:, :, 6:9], out=fused[:, :, 8:11])


def test_options_of_every_kind_of_number() -> None:
    plain = dense(window_size=(3, 2), softmax_scale=0.5, softcap=2.0, causal=True)
    for half, two in [(np.float32(0.5), np.array(2)), (Fraction(1, 2), 2), (np.array(0.5), Decimal(2))]:
        other = dense(window_size=[np.int64(3), 2], softmax_scale=half, softcap=two, causal=np.bool_(True))
        assert np.array_equal(plain, other)


def test_what_was_called_before_does_not_decide_what_is_refused() -> None:
    q = np.random.default_rng(0).standard_normal((1, 8, 2, 16), dtype=np.float32)
    cufa.attention(q, q, q, causal=True, window_size=(2, 0), softmax_scale=1.0, softcap=1.0)
    for wrong in (
        {"causal": 1},
        {"causal": 1.0},
        {"window_size": (2.0, 0.0)},
        {"window_size": (2, False)},
        {"softmax_scale": True},
        {"softcap": np.True_},
        {"return_lse": 1},
    ):
        with pytest.raises(TypeError, match=r"^attention: .*; pass"):
            cufa.attention(q, q, q, **({"causal": True, "window_size": (2, 0), "softcap": 1.0} | wrong))


def test_numbers_in_arrays_are_read_at_every_call() -> None:
    q, scale = np.random.default_rng(0).standard_normal((1, 8, 2, 16), dtype=np.float32), np.array(0.5)
    for value in (0.5, 2.0):
        scale[...] = value
        expected = cufa.attention(q, q, q, softmax_scale=value, softcap=value)
        assert np.array_equal(cufa.attention(q, q, q, softmax_scale=scale, softcap=scale), expected)


def test_numbers_in_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    q = jax.numpy.asarray(np.random.default_rng(0).standard_normal((1, 8, 2, 16), dtype=np.float32))
    half = jax.numpy.float32(0.5) * jax.numpy.ones(())
    expected = cufa.attention(q, q, q, softmax_scale=0.5, softcap=0.5)
    assert np.array_equal(cufa.attention(q, q, q, softmax_scale=half, softcap=half), expected)
    with pytest.raises(TypeError, match=r"^attention: softmax_scale is traced by JAX, and its value must be known"):
        jax.jit(lambda q, scale: cufa.attention(q, q, q, softmax_scale=scale))(q, 0.5)


PADDINGS: list[tuple[list[int], list[int]]] = [
    ([0, 3, 8], [0, 5, 8]),
    ([0, 3, 6], [0, 5, 5]),  # the last rows belong to no sequence
    ([0, 3, 8, 8, 8], [0, 5, 8, 0, 0]),
    ([0, 0, 3, 0, 0], [0, 8, 8, 8, 8]),
    ([0, 0, 0], [0, 0, 0]),
]


@pytest.mark.parametrize(("rows", "keys"), PADDINGS, ids=str)
def test_offsets_that_are_padded_are_accepted(rows: list[int], keys: list[int]) -> None:
    q = np.random.default_rng(0).standard_normal((8, 4, 16), dtype=np.float32)
    given = {"cu_seqlens_q": np.array(rows, np.int32), "cu_seqlens_k": np.array(keys, np.int32)}
    out, lse = cufa.attention_varlen(q, q, q, **given, return_lse=True)
    testing.assert_close(out, q, q, q, lse=lse, **given)


EVERYONE: list[Callable[..., Any]] = [
    cufa.attention,
    cufa.explain,
    reference.attention,
    testing.tolerance,
    testing.lse_tolerance,
    lambda q, k, v, **options: testing.assert_close(q, q, k, v, **options),
]


@pytest.mark.parametrize("function", EVERYONE, ids=["call", "explain", "reference", "tolerance", "lse", "close"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"window_size": (-5, 0)},
        {"window_size": (True, False)},
        {"softmax_scale": -1.0},
        {"softmax_scale": 1e-46},
        {"softmax_scale": "1"},
        {"softcap": 1e-40},
        {"causal": 1},
        {"alibi_slopes": zeros(3)},
        {"sinks": zeros(2, 4)},
    ],
    ids=str,
)
def test_one_set_of_checks_serves_all(function: Callable[..., Any], wrong: dict[str, Any]) -> None:
    q = zeros(2, 8, 4, 16)
    with pytest.raises((TypeError, ValueError)) as expected:
        cufa.attention(q, q, q, **wrong)
    with pytest.raises(type(expected.value)) as raised:
        function(q, q, q, **wrong)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cu_seqlens_k": np.array([0.0, 3.0, 8.0])},
        {"cu_seqlens_k": OFFSETS[:2]},
        {"seqused_k": OFFSETS},
        {"alibi_slopes": zeros(3, 4)},
    ],
    ids=str,
)
def test_one_set_of_checks_serves_all_of_packed_sequences(wrong: dict[str, Any]) -> None:
    q = zeros(8, 4, 16)
    given = {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS} | wrong
    with pytest.raises(ValueError) as expected:
        cufa.attention_varlen(q, q, q, **given)
    for function in (cufa.explain, reference.attention_varlen, testing.tolerance):
        with pytest.raises(ValueError) as raised:
            function(q, q, q, **given)
        assert str(raised.value) == str(expected.value)
    with pytest.raises(ValueError) as raised:
        reference.attention_varlen_backward(q, q, q, q, **given)
    assert str(raised.value) == str(expected.value).replace("varlen", "varlen_backward")


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_k"])
def test_explain_refuses_the_offsets_that_the_call_refuses(name: str) -> None:
    q = zeros(8, 4, 16)
    given = {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, name: np.array([0, 9, 8], np.int32)}
    if name == "seqused_k":
        given[name] = np.array([4, 5], np.int32)
    with pytest.raises(ValueError, match=f"^attention_varlen: {name}") as expected:
        cufa.attention_varlen(q, q, q, **given)
    with pytest.raises(ValueError) as raised:
        cufa.explain(q, q, q, **given)
    assert str(raised.value) == str(expected.value)


def test_explain_refuses_results_as_the_call_does() -> None:
    q = np.zeros((2, 8, 4, 16), np.float32)
    for wrong in ({"out": q}, {"out": q[:, :4]}, {"return_lse": "no"}):
        with pytest.raises((TypeError, ValueError)) as expected:
            cufa.attention(q, q, q, **wrong)
        with pytest.raises(type(expected.value)) as raised:
            cufa.explain(q, q, q, **wrong)
        assert str(raised.value) == str(expected.value)


def test_params_are_packed_as_they_are_declared() -> None:
    q = OnGpu(2, 100, 6, 64, strides=(1, 2, 3, 1))
    problem = gpu_problem(
        q, OnGpu(2, 70, 3, 64), OnGpu(2, 70, 3, 64), softmax_scale=0.25, softcap=3.0, window_size=(5, None)
    )
    assert problem.static is not None and problem.device != CPU
    record = units.record.read("Params", PARAMS).holding("terms", {"softcap": units.record.read("SoftcapData", PARAMS)})
    named = unpacked(record, record.pack(params_of(problem, m_blocks=7, m_units=4, heads_per_section=9)))
    assert tuple(named["q_strides"].values()) == (1, 2, 3, 1)
    assert tuple(named["out_strides"].values()) == (100 * 6 * 64, 6 * 64, 64, 1)
    assert (named["lse_batch_stride"], named["lse_head_stride"]) == (600, 100)
    assert (named["batch"], named["seqlen_q"], named["seqlen_k"]) == (2, 100, 70)
    assert (named["num_heads_q"], named["qheads_per_khead"]) == (6, 2)
    assert (named["m_blocks"], named["m_units"], named["heads_per_section"]) == (7, 4, 9)
    assert (named["window_left"], named["window_right"]) == (5, _problem.MAX_SEQLEN)
    assert named["softmax_scale"] == 0.25
    assert named["terms"]["softcap"] == pytest.approx({"softcap": 3.0, "inverse": 1 / 3, "exponent": 2 / 3 / np.log(2)})
    assert not any(named[name] for name in ("q", "out", "seqused_k"))


def test_records_are_packed_by_name() -> None:
    record = units.record.read("Strides", PARAMS)
    values = {"batch": 1, "seqlen": 2, "head": 3, "dim": 4}
    assert record.pack(values) == struct.pack("<4q", 1, 2, 3, 4) and record.size == 32
    with pytest.raises(ValueError, match=r"Strides: values are missing for \['dim'\], and there are no"):
        record.pack({"batch": 1, "seqlen": 2, "head": 3, "dims": 4})
    with pytest.raises(ValueError, match="no header declares a struct Nothing"):
        units.record.read("Nothing", PARAMS)
    strange = ("struct Strange {\n  i32 x : 3;\n};\n",)
    with pytest.raises(ValueError, match="Strange: what is declared by 'i32 x : 3' is not known here"):
        units.record.read("Strange", strange)


# --- grids; which tile is whose then, test_schedule.py says ------------------------------------------


def usual(static: _problem.Static) -> _problem.Static:
    """The same, but that sequences may not have small tiles, however short they are, nor few rows."""
    return static._replace(short_rows=0, short_keys=0, few_rows=0)


batches, totals = st.integers(0, 12), st.sampled_from([0, 1, 63, 64, 128, 300]) | st.integers(0, 20000)


@settings(max_examples=300)
@given(
    batches,
    totals,
    st.sampled_from([(1, 1), (4, 2), (6, 6)]),
    st.sampled_from([64, 256]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 16, 32]),
)
def test_packed_grids(
    batch: int,
    total: int,
    heads: tuple[int, int],
    head_dim: int,
    causal: bool,
    hopper: bool,
    short_rows: int,
) -> None:
    """Units are tiles or, of long sequences under a causal mask on Hopper, pairs of them."""
    q, k = (OnGpu(total, each, head_dim) for each in heads)
    problem = packed_gpu_problem(q, k, batch, causal=causal)
    assert problem.static is not None
    static = problem.static._replace(short_rows=short_rows, short_keys=short_rows)
    plan = plans.forward(static, 90 if hopper else 80)
    grid = plans.grid(plan, problem, 2)
    assert not short_rows or plan.config.block_m == short_rows
    pairs = grid.m_units < grid.m_blocks
    assert grid.round_units == grid.m_units * heads[0]
    assert not pairs or (causal and hopper)
    assert grid.num_blocks > 0 or total == 0


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads", "blocks", "section"),
    [
        (2, 300, 300, 4, 2 * 4 * 3, 8),
        (2, 300, 1 << 15, 4, 2 * 4 * 3, 4),  # K and V of a key head take 8 MB: two of four fit
        (1, 300, 1 << 15, 6, 6 * 3, 4),  # two of three fit, so sections of two
        (5, 300, 1 << 14, 2, 10 * 3, 6),  # four of five fit: sections of three and two, not of four and one
        (1, 300, 1 << 20, 4, 4 * 3, 2),  # not even one fits: the two query heads that share it
        (0, 300, 300, 4, 0, 1),
        (1, 0, 300, 4, 0, 4),
    ],
)
def test_grids(batch: int, seqlen_q: int, seqlen_k: int, heads: int, blocks: int, section: int) -> None:
    k = OnGpu(batch, seqlen_k, heads // 2, 64)
    problem = gpu_problem(OnGpu(batch, seqlen_q, heads, 64), k, k)
    assert problem.static is not None
    grid = plans.grid(plans.forward(usual(problem.static), 80), problem, 108)
    assert (grid.num_blocks, grid.heads_per_section) == (blocks, section)
    assert grid.m_units == grid.m_blocks


@pytest.mark.parametrize(
    ("seqlen", "head_dim", "ratio", "causal", "section"),
    [
        (512, 64, 1, True, 16),  # 2 MB
        (2048, 64, 1, True, 16),
        (1 << 14, 64, 1, True, 4),  # 16 MB
        (2048, 64, 4, True, 16),  # query heads: K and V of four key heads, 2 MB
        (2048, 64, 1, False, 4),
        (2048, 128, 1, True, 2),
    ],
)
def test_sections_of_narrow_heads(seqlen: int, head_dim: int, ratio: int, causal: bool, section: int) -> None:
    q, k = OnGpu(1, seqlen, 64, head_dim), OnGpu(1, seqlen, 64 // ratio, head_dim)
    problem = gpu_problem(q, k, k, causal=causal)
    assert problem.static is not None
    config, section_bytes = plans.forward(problem.static, 90).config, forward_sm90.L2_SECTION
    assert forward_kernels.heads_per_section(config, problem, section_bytes) == section


def test_windows_of_many_heads_are_side_by_side() -> None:
    """As many as 16 MB hold the keys of that a window shows."""
    q = OnGpu(1, 1 << 15, 64, 128)
    windows = ((1000, 23), 32), ((4095, 0), 8), ((1024, None), 1), ((None, 0), 1), ((1 << 15, 0), 1)
    for window, section in windows:
        problem = gpu_problem(q, q, q, window_size=window)
        assert problem.static is not None
        assert plans.grid(plans.forward(problem.static, 90), problem, 132).heads_per_section == section


def test_a_grid_too_large_is_refused() -> None:
    q, k = OnGpu(1 << 20, 128 * 128, 64, 64), OnGpu(1 << 20, 1, 64, 64)
    problem = gpu_problem(q, k, k)
    assert problem.static is not None
    with pytest.raises(cufa.UnsupportedError, match=r"8589934592 tiles of queries are more than one launch holds"):
        plans.grid(plans.forward(problem.static, 80), problem, 108)


@given(
    st.integers(1, 4),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(1, 1), (4, 2), (6, 6)]),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([{}, {"causal": True}, {"window_size": (300, 0)}, {"window_size": (None, 200)}]),
    st.sampled_from([16, 132]),
)
def test_persistent_blocks_share_all_tiles(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: tuple[int, int],
    head_dim: int,
    mask: dict[str, Any],
    num_sms: int,
) -> None:
    """Every unit goes round or has its tiles listed, once."""
    k = OnGpu(batch, seqlen_k, heads[1], head_dim)
    problem = gpu_problem(OnGpu(batch, seqlen_q, heads[0], head_dim), k, k, **mask)
    assert problem.static is not None
    plan = plans.forward(usual(problem.static), 90)
    causal = problem.static.mask == "causal"
    grid = plans.grid(plan, problem, num_sms)
    packed = batch * heads[0] // plan.config.pack
    units = grid.m_units * packed
    assert grid.num_blocks == min(grid.m_blocks * packed, num_sms)
    assert grid.m_units == (-(-grid.m_blocks // 2) if causal else grid.m_blocks)
    assert grid.round_units == units or (mask and grid.round_units % grid.num_blocks == 0 and grid.listed)
    pairs = grid.m_units < grid.m_blocks
    assert sum(map(len, grid.listed)) <= 4 * grid.num_blocks
    listed = [tile for tiles in grid.listed for tile in tiles]
    firsts, seconds = ({tile // 2 for tile in listed if tile % 2 == which} for which in (0, 1))
    assert len(firsts) + len(seconds) == len(listed)
    assert firsts == set(range(units - grid.round_units))
    assert seconds <= firsts if pairs else not seconds


@pytest.mark.parametrize(
    ("seqlen_q", "heads", "pack"),
    [
        (1, (8, 2), 4),
        (128, (8, 2), 1),
        (129, (8, 2), 4),
        (100, (8, 1), 1),
        (64, (8, 1), 8),
        (5, (6, 2), 1),
        (5, (6, 6), 1),
    ],
)
def test_heads_share_tiles_where_rows_are_few(seqlen_q: int, heads: tuple[int, int], pack: int) -> None:
    k = OnGpu(2, 300, heads[1], 64)
    problem = gpu_problem(OnGpu(2, seqlen_q, heads[0], 64), k, k)
    assert problem.static is not None and problem.static.pack == pack
    plan = plans.forward(usual(problem.static), 90)
    assert plans.grid(plan, problem, 132).m_blocks == -(-seqlen_q * pack // plan.config.block_m)


def test_what_tensor_maps_cannot_describe_is_served_without_them() -> None:
    q = OnGpu(2, 100, 4, 64)
    for other, tma in (
        (OnGpu(2, 100, 4, 64), True),
        (OnGpu(2, 100, 4, 64, strides=(25600, 256, 0, 1)), True),
        (OnGpu(2, 100, 4, 64, strides=(25600, -256, 64, 1)), False),
        (OnGpu(2, 100, 4, 64, strides=(26000, 260, 65, 1)), False),
        (OnGpu(2, 100, 4, 64, strides=(1 << 40, 256, 64, 1)), False),
        (OnGpu(2, 100, 4, 64, strides=(100, 256, 25600, 400)), False),
    ):
        problem = gpu_problem(q, other, q)
        assert problem.static is not None and problem.static.tma is tma
        plan = plans.forward(problem.static, 90)
        assert plan.name == f"attention_forward_sm{90 if tma else 80}"
        if not tma:
            assert "tensor memory accelerator" in plan.reason


# --- copies of arrays that are not aligned ------------------------------------------------------------


UNALIGNED: dict[str, tuple[OnGpu, int, bool]] = {
    "one off": (OnGpu(2, 100, 4, 64, pointer=(1 << 41) + 2), 2, False),
    "four off": (OnGpu(2, 100, 4, 64, pointer=(1 << 41) + 4), 4, False),
    "odd": (OnGpu(2, 100, 4, 64, strides=(26000, 260, 65, 1)), 2, False),
    "even": (OnGpu(2, 100, 4, 64, strides=(27200, 272, 68, 1)), 8, False),
    "negative": (OnGpu(2, 100, 4, 64, strides=(25600, -256, 64, 1)), 16, False),
    "far": (OnGpu(2, 100, 4, 64, strides=(1 << 40, 256, 64, 1)), 16, False),
    "columns apart": (OnGpu(2, 100, 4, 64, strides=(51200, 512, 128, 2)), 2, False),
    "columns last": (OnGpu(2, 100, 4, 64, strides=(100, 1, 12800, 200)), 2, False),
    "one head": (OnGpu(2, 100, 4, 64, strides=(6500, 65, 0, 1)), 2, True),
}
"""Arrays, their `widest_copy`, and whether an axis is repeated."""


@pytest.mark.parametrize("layout", UNALIGNED)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "out"])
def test_what_is_copied(name: str, layout: str) -> None:
    """Nothing but what keeps the fastest kernel away, or is copied in single elements."""
    array, copy_bytes, _ = UNALIGNED[layout]
    given = {each: OnGpu(2, 100, 4, 64) for each in "qkv"} | {name: array}
    for problem in (backward_problem(**given), *([gpu_problem(**given)] if name in "qkv" else [])):
        assert problem.static is not None
        for arch in (80, 90, 120):
            copies = _align.copies_of(problem, arch)
            if name == "out" or (arch != 90 and copy_bytes > 2):
                assert copies is None
                continue
            assert copies is not None and [each.name for each in copies.made] == [name]
            assert copies.made[0].copy_bytes == copy_bytes
            # All else is as it was, and what the kernel is specialised by.
            copied, static = copies.problem, copies.problem.static
            assert static == problem.static._replace(tma=True, copy_bytes=16)
            assert {**copied.specs, name: None} == {**problem.specs, name: None}
            kept = {key: value for key, value in vars(copied).items() if key not in ("static", "specs", "memo")}
            assert kept.items() <= vars(problem).items() and copied.memo is not problem.memo
            plan = plans.forward(static, arch)
            assert plan.name == f"attention_forward_sm{90 if arch == 90 else 80}"


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "options", "pays"),
    [
        (2048, 2048, (4, 4), {}, True),
        (64, 1 << 20, (4, 4), {}, True),
        (63, 1 << 20, (4, 4), {}, False),
        (1, 4096, (32, 4), {}, False),
        (8, 4096, (32, 4), {}, True),
        (64, 0, (4, 4), {}, False),
        (0, 64, (4, 4), {}, False),
        (2048, 2048, (4, 4), {"window_size": (0, 0)}, True),  # tiles read 128 keys, and each key once
        (64, 1 << 16, (4, 4), {"window_size": (127, 0)}, False),  # one key in 256 is read
        (64, 1 << 16, (4, 4), {"window_size": (None, 0)}, True),
    ],
)
def test_copies_are_made_where_they_pay(
    seqlen_q: int, seqlen_k: int, heads: tuple[int, int], options: dict[str, Any], pays: bool
) -> None:
    q, k = OnGpu(2, seqlen_q, heads[0], 33), OnGpu(2, seqlen_k, heads[1], 33)
    assert _align.pays(gpu_problem(q, k, k, **options)) == pays
    assert (_align.copies_of(gpu_problem(q, k, k, **options), 90) is not None) == pays
    # Packed, by the average of the sequences.
    packed_q, packed_k = OnGpu(16 * seqlen_q, heads[0], 33), OnGpu(16 * seqlen_k, heads[1], 33)
    assert _align.pays(packed_gpu_problem(packed_q, packed_k, 16, **options)) == pays


def test_keys_that_may_be_dead_count_as_the_queries() -> None:
    offsets, used = OnGpu(9, dtype="int32"), OnGpu(8, dtype="int32")
    for total_k, pays in ((8 * 512, True), (8 * 512 * 64, False)):
        q, k = OnGpu(8 * 512, 4, 33), OnGpu(total_k, 4, 33)
        arrays = {"q": q, "k": k, "v": k, **offsets_by_name(offsets), "seqused_k": used}
        assert _align.pays(problem_of(ATTENTION_VARLEN, arrays, {})) == pays


def test_float32_is_not_copied() -> None:
    q = OnGpu(2, 2048, 4, 33, dtype="float32")
    assert all(_align.copies_of(gpu_problem(q, q, q), arch) is None for arch in (80, 90))


def run_align(copies: _align.Copies, memories: dict[str, np.ndarray], threads: int) -> np.ndarray:
    """What the kernel in align.cuh does, of arrays that begin at element 0 of memories with negative indices too."""
    packed = align.argument_of(units.record.read("AlignParams", PARAMS), copies).content
    members = unpacked("AlignParams", packed)
    named = {name: np.reshape(values, (align.COPIED_ARRAYS, -1)) for name, values in members.items()}
    assert not named["sources"].any() and not named["copies"].any()
    written = np.full(2 * copies.floats, -1, np.int64)
    for array, each in enumerate(copies.made):
        extents = named["extents"][array].tolist()
        source_steps, copy_steps = named["source_steps"][array], named["copy_steps"][array]

        def digits(number: int, extents: list[int] = extents) -> list[int]:
            found = []
            for extent in extents[:-1]:
                number, digit = divmod(number, extent)
                found.append(digit)
            return [*found, number]

        step = digits(threads)
        for thread in range(threads):
            index = digits(thread)
            while index[-1] < extents[-1]:
                chunk = index[named["chunk_axes"][array, 0]]
                columns = named["columns"][array, 0] - 8 * chunk
                source, copy = int(np.dot(index, source_steps)), 2 * each.offset + int(np.dot(index, copy_steps))
                assert copy % 8 == 0 and (written[copy : copy + 8] == -1).all()  # whole, and once
                written[copy : copy + 8] = [
                    memories[each.name][source + i * named["column_strides"][array, 0]] if i < columns else 0
                    for i in range(8)
                ]
                carry = 0
                for axis, extent in enumerate(extents[:-1]):
                    index[axis] += step[axis] + carry
                    carry = int(index[axis] >= extent)
                    index[axis] -= carry * extent
                index[-1] += step[-1] + carry
        assert (extents[0] == 0) == (array >= len(copies.made))
    assert not named["extents"][len(copies.made) :].any()
    return written


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*testing.LAYOUTS, "columns last"]), min_size=3, max_size=3),
    st.sampled_from([1, 7, 8, 33, 65, 100]),
    st.sampled_from([(1, 70, 1), (2, 64, 3), (3, 65, 2)]),
    st.booleans(),
    st.sampled_from([1, 5, 64, 10000]),
)
def test_copies_hold_what_the_arrays_do(
    layouts: list[str], head_dim: int, extents: tuple[int, int, int], packed: bool, threads: int
) -> None:
    """As the main kernels read them, with zeros behind the last column; repeated axes are not."""
    shape = (*extents, head_dim)[packed:]
    arrays, memories, positions = {}, {}, {}
    for name, layout in zip("qkv", layouts, strict=True):
        if layout == "columns last":
            view = testing.View.of((*shape[:-3], shape[-1], *shape[-3:-1]))
            strides = (*view.strides[:-3], *view.strides[-2:], view.strides[-3])
            view = testing.View(shape, strides, 0, view.size)
        else:
            view = testing.View.of(shape, layout)
        arrays[name] = OnGpu(*shape, strides=view.strides, pointer=(1 << 41) + 2 * view.offset)
        memories[name] = np.roll(np.arange(1, view.size + 1), -view.offset)  # element 0 is at view.offset
        positions[name] = view.on(np.arange(1, view.size + 1))
    offsets = OnGpu(2, dtype="int32")
    operation, given = (ATTENTION_VARLEN, arrays | offsets_by_name(offsets)) if packed else (ATTENTION, arrays)
    problem = problem_of(operation, given, {})
    copies = _align.copies_of(problem, 90)
    if copies is None:
        assert problem.static is not None and problem.static.tma
        return
    written = run_align(copies, memories, threads)
    for each in copies.made:
        strides = each.copy.strides
        size = 1 + sum(stride * (extent - 1) for stride, extent in zip(strides, each.copy.shape, strict=True))
        begin = 2 * each.offset
        read = testing.View(each.copy.shape, strides, begin, begin + size).on(written)
        assert np.array_equal(read, positions[each.name])
        assert _problem.has_tensor_map(each.copy, 2) and each.offset % _align.WORKSPACE_ALIGNMENT == 0
        wide = testing.View((*shape[:-1], -(-head_dim // 8) * 8), strides, begin, written.size).on(written)
        assert not wide[..., head_dim:].any()
        for extent, own, stride in zip(shape, each.source.strides, strides, strict=True):
            assert own or not stride or extent == 1
    assert (written != -1).sum() <= sum(8 * -(-each.size // 8) * 8 for each in positions.values())


def test_copies_take_memory_of_the_framework() -> None:
    """Of the forward in all, and of the gradients behind what they need anyway."""
    q = OnGpu(2, 2048, 4, 33)
    copies = _align.copies_of(gpu_problem(q, q, q), 90)
    assert copies is not None and copies.floats == 3 * 2 * 2048 * 4 * 40 // 2
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, 90)
        problem = backward_problem(q, q, q)
        whole = planned(problem)
        copies = _align.copies_of(problem, 90)
        assert copies is not None
        without = planned(copies.problem)
    assert whole.scratch == without.scratch and without.floats == without.scratch.floats
    assert whole.floats == without.floats + 4 * 2 * 2048 * 4 * 40 // 2


class Launched:
    """What a call on a pretended Hopper allocates and enqueues."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.allocated: list[tuple[tuple[int, ...], str]] = []
        self.kernels: list[tuple[str, bytes]] = []
        self.overlapping: list[bool] = []
        self.plans: dict[str, Any] = {}
        pretend(patch, 90)
        patch.setattr(_driver, "current", lambda _: contextlib.nullcontext())
        patch.setattr(_driver, "enter", lambda _: False)
        patch.setattr(_driver, "driver", lambda: self)
        patch.setattr(_driver, "overlaps", lambda _: True)
        patch.setattr(_jit, "load_kernel", lambda plan, *_: self.plans.update({plan.name: plan}) or plan.entries)
        patch.setattr(tensor_map, "_driver_encode", lambda shape, address: address.to_bytes(8, "little") + bytes(120))
        patch.setattr(OnGpuAdapter, "empty", self.empty)
        patch.setattr(OnGpuAdapter, "stream", lambda *_: 7)
        _problem._checked.cache_clear()

    CUlaunchConfig = SimpleNamespace
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)

    @staticmethod
    def CUlaunchAttribute() -> SimpleNamespace:
        return SimpleNamespace(value=SimpleNamespace())

    def cuLaunchKernelEx(self, config: Any, function: str, *_: Any) -> tuple[int]:
        self.kernels.append((function, _launch._scratch.argument.tobytes()))
        attributes = getattr(config, "attrs", [])
        self.overlapping.append(
            [(each.id, each.value.programmaticStreamSerializationAllowed) for each in attributes] == [(6, 1)]
        )
        return (0,)

    def empty(self, shape: tuple[int, ...], dtype: str, like: OnGpu) -> tuple[OnGpu, int]:
        self.allocated.append((shape, dtype))
        pointer = (1 << 40) * len(self.allocated)
        return OnGpu(*shape, dtype=dtype, pointer=pointer), pointer


def test_a_call_makes_copies_and_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (OnGpu(2, 200, 4, dim, pointer=i << 44) for i, dim in ((1, 64), (2, 64), (3, 33)))
    k.pointer += 2
    floats = {"k": 2 * 200 * 4 * 64 // 2, "v": 2 * 200 * 4 * 40 // 2}
    with monkeypatch.context() as patch:
        launched = Launched(patch)
        for time in range(2):
            cufa.attention(q, k, v)
            (copying, copied), (attending, argument) = launched.kernels[-2:]
            assert (copying, attending) == ("attention_align", "attention_forward_sm90")
            assert len(launched.kernels) == len(launched.allocated) == 2 * (time + 1)
            assert launched.allocated[-1] == ((sum(floats.values()),), "float32")
            memory = (1 << 40) * len(launched.allocated)
            copies = memory, memory + 4 * floats["k"]
            assert struct.unpack_from("8Q", copied) == (k.pointer, v.pointer, 0, 0, *copies, 0, 0)
            named = unpacked("TmaParams", argument)
            params = named["params"]
            assert [params[name] for name in "qkv"] == [q.pointer, *copies]
            assert [struct.unpack_from("Q", named[name])[0] for name in "qkv"] == [q.pointer, *copies]
            strides = [tuple(params[f"{name}_strides"].values()) for name in "qkv"]
            assert strides == [(51200, 256, 64, 1)] * 2 + [(200 * 160, 160, 40, 1)]
        # Arrays that are aligned launch and take no more than before.
        before = len(launched.kernels), len(launched.allocated)
        cufa.attention(q, q, q)
        assert (len(launched.kernels), len(launched.allocated)) == (before[0] + 1, before[1] + 1)
    _problem._checked.cache_clear()


VARYING = {"Q": 8, "f": 4, "i": 4, "12s": 12}
"""Bytes of what differs from launch to launch, by its format."""


@given(
    st.lists(st.tuples(st.sampled_from(["", *VARYING]), st.integers(0, 3)), min_size=1),
    st.binary(min_size=8, max_size=8),
)
def test_an_argument_is_packed_with_what_lies_between_its_addresses(words: list[tuple[str, int]], odd: bytes) -> None:
    """Each part is an address or a late option, and which, up to a word's end; or the same word for every launch."""
    items: dict[str, list[Any]] = {}
    for kind, size in VARYING.items():
        held = [bytes([index + 1]) * size for index in range(4)]
        items[kind] = held if kind == "12s" else [struct.unpack(kind, each)[0] for each in held]
    content, expected, places = b"", b"", []
    for kind, which in words:
        size = VARYING.get(kind, 0)
        between = (odd * 2)[: (-size % 8) or (0 if kind else 8)]
        if kind:
            places.append((len(content), kind, 4 * [*VARYING].index(kind) + which))
        content, expected = content + bytes(size) + between, expected + bytes([which + 1]) * size + between
    content, expected = content + odd[:4], expected + odd[:4]
    given = [item for kind in VARYING for item in items[kind]]
    pack_into, constants, chosen = _launch._packing(content, places[::-1], len(given))
    packed = bytearray(len(content) + 8)
    pack_into(packed, 0, *chosen([*given, *constants]))
    assert packed == expected + bytes(8)


def test_gradients_make_copies_and_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, out = (OnGpu(2, 200, 4, 64, pointer=i << 44) for i in (1, 2, 3))
    lse, dout = OnGpu(2, 4, 200, dtype="float32"), OnGpu(2, 200, 4, 64, pointer=(4 << 44) + 2)
    with monkeypatch.context() as patch:
        launched = Launched(patch)
        cufa.attention_backward(dout, q, k, k, out, lse)
        (copying, copied), *others = launched.kernels
        assert copying == "attention_align"
        # The first of the gradients' kernels begins when all before it has ended, the others while it ends.
        assert launched.overlapping == [False, False, True, True]
        assert [name for name, _ in others] == [
            name for name in launched.plans["attention_backward_sm90"].entries if "finish" not in name
        ]
        ((size,), _), memory = launched.allocated[-1], (1 << 40) * 4
        copy = memory + 4 * (size - 2 * 200 * 4 * 64 // 2)
        assert struct.unpack_from("8Q", copied) == (dout.pointer, 0, 0, 0, copy, 0, 0, 0)
        for _, argument in others:
            named = unpacked("BackwardArgument", argument)
            params, forward = named["params"], named["params"]["forward"]
            pointers = [q.pointer, k.pointer, k.pointer, out.pointer]
            assert [forward[name] for name in ("q", "k", "v", "out")] == pointers
            assert params["dout"] == struct.unpack_from("Q", named["dout"])[0] == copy
    _problem._checked.cache_clear()


def test_explain_says_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)
    aligned, odd = OnGpu(2, 2048, 4, 64), OnGpu(2, 2048, 4, 64, pointer=(1 << 41) + 2)
    few, short = OnGpu(2, 63, 4, 64), OnGpu(2, 300, 4, 64, pointer=(1 << 41) + 2)
    many, long = OnGpu(40, 1, 4, 64), OnGpu(40, 2048, 4, 64)
    for q, k, v, kernel, reason in (
        (aligned, aligned, aligned, "sm90 (sm_90a)", "it is the fastest for this GPU"),
        (
            aligned,
            odd,
            odd,
            "sm90 (sm_90a)",
            "it is the fastest for this GPU; k and v are copied first, into rows aligned to 16 bytes, for which it "
            "takes 4 MiB while it runs",
        ),
        (few, short, short, "sm80 (sm_90)", "q, k and v are copied 2 bytes at a time; 16-byte aligned rows would let "),
        (few, aligned, aligned, "cluster_sm90 (sm_90)", "q has few rows, in so few tiles that the thread blocks of a "),
        (few, odd, aligned, "cluster_sm90 (sm_90)", f"{ForwardClusterSm90.few}; q, k and v are copied 2 bytes at a "),
        (many, long, long, "split_sm80 (sm_90)", "q has few rows, or tiles of them, and there are many"),
    ):
        told = cufa.explain(q, k, v)
        assert told.kernel == f"attention_forward_{kernel}" and told.reason.startswith(reason)
        assert str(told).count(reason) == 1  # also where it is why another kernel does not serve


# --- the gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "head_dims", "arch", "kernel"),
    [
        ("float16", (64, 64), 90, "attention_backward_sm90"),
        ("bfloat16", (128, 128), 90, "attention_backward_sm90"),
        ("bfloat16", (40, 128), 90, "attention_backward_sm90"),
        ("bfloat16", (192, 128), 90, "attention_backward_split_sm90"),
        ("float16", (64, 256), 90, "attention_backward_split_sm90"),
        ("float16", (57, 64), 90, "attention_backward_sm80"),  # rows of 114 bytes
        ("float32", (64, 64), 90, "attention_backward_sm80"),
        ("float16", (64, 64), 80, "attention_backward_sm80"),
        ("float16", (256, 256), 86, "attention_backward_sm80"),
        ("bfloat16", (128, 128), 100, "attention_backward_sm80"),
        ("bfloat16", (128, 128), 120, "attention_backward_sm80"),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_which_kernel_gives_the_gradients(
    dtype: str, head_dims: tuple[int, int], arch: int, kernel: str, deterministic: bool
) -> None:
    q, v = (OnGpu(2, 100, 4, head_dim, dtype=dtype) for head_dim in head_dims)
    static = backward_problem(q, q, v).static
    assert static is not None
    plan = plans.backward(static, arch, deterministic)
    assert plan.name == kernel and plan.arch == arch
    assert (plan.entries[0], plan.entries[-1]) == ("attention_backward_prepare", "attention_backward_repair")
    assert len(plan.steps) == (5 if "split" in kernel else 4)
    # What adds nothing up in memory is deterministic in any order.
    assert plan.config.deterministic == (deterministic and "split" not in kernel)  # type: ignore[attr-defined]
    with pytest.raises(cufa.UnsupportedError, match=r"compute capability 7\.5 is not supported"):
        plans.backward(static, 75, deterministic)


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv"])
def test_gradients_are_served_as_alignment_allows(name: str) -> None:
    shape, dtype = ((2, 4, 100), "float32") if "lse" in name else ((2, 100, 4, 64), "float16")
    array = OnGpu(*shape, dtype=dtype, pointer=(1 << 40) + 4)
    given = {each: OnGpu(2, 100, 4, 64) for each in "qkv"} | {name: array}
    static = backward_problem(**given).static
    assert static is not None
    assert static.copy_bytes == (4 if name in ("q", "k", "v", "dout") else 16)
    assert static.out_copy_bytes == (4 if name == "out" else 16)
    assert static.tma == (name not in ("q", "k", "v", "dout"))
    assert static.store_bytes == (4 if name in ("dq", "dk", "dv") else 16)
    assert static.pack == 1


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "store_bytes"), [(64, 64, 16), (64, 20, 8), (30, 64, 4), (64, 7, 2)]
)
def test_gradients_are_stored_as_widths_allow(head_dim: int, head_dim_v: int, store_bytes: int) -> None:
    q, v = OnGpu(2, 100, 4, head_dim), OnGpu(2, 100, 4, head_dim_v)
    static = backward_problem(q, q, v).static
    assert static is not None and static.store_bytes == store_bytes


def plan_backward(problem: Problem, kernel: str, deterministic: bool) -> tuple[Plan, BackwardGrid]:
    """Plan and grid with one of the kernels, and few heads side by side."""
    assert problem.static is not None
    static = usual(problem.static)
    if kernel == "short":
        static = static._replace(short_rows=16, short_keys=next(n for n in (16, 32, 64) if n >= problem.seqlen_k % 65))
    plan = plans.backward(static, 80 if kernel == "sm80" else 90, deterministic)
    assert plan.name == f"attention_backward_{kernel.replace('short', 'sm80')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_kernels, "SECTION", 1 << 19)
        return plan, plans.grid(plan, problem, NUM_SMS)


NUM_SMS = 132
KERNELS = [("sm80", 64), ("sm80", 200), ("sm90", 64), ("sm90", 128), ("split_sm90", 256), ("short", 64), ("short", 200)]
backward_lengths = st.sampled_from([0, 1, 64, 65, 128, 2048, 2049]) | st.integers(0, 3000)
backward_heads = st.sampled_from([(1, 1), (4, 2), (6, 6), (8, 1)])
masks = st.sampled_from([{}, {"causal": True}, {"window_size": (300, 0)}])


@settings(max_examples=300)
@given(
    st.integers(0, 3),
    backward_lengths,
    backward_lengths,
    backward_heads,
    st.sampled_from(KERNELS),
    masks,
    st.booleans(),
    st.booleans(),
)
def test_grids_of_gradients(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: tuple[int, int],
    kernel: tuple[str, int],
    mask: dict[str, Any],
    deterministic: bool,
    sinks: bool,
) -> None:
    """Every kernel of the gradients has a block for each tile of queries or block of keys, or several for a block."""
    if kernel[0] == "short":
        seqlen_q, seqlen_k = seqlen_q % 33, seqlen_k % 65
    q, k = OnGpu(batch, seqlen_q, heads[0], kernel[1]), OnGpu(batch, seqlen_k, heads[1], kernel[1])
    given = {"sinks": OnGpu(heads[0], dtype="float32")} if sinks else {}
    problem = backward_problem(q, k, k, **given, **mask)
    plan, grid = plan_backward(problem, kernel[0], deterministic)
    config = plan.config
    assert (grid.m_blocks, grid.n_blocks) == (-(-seqlen_q // config.block_m), -(-seqlen_k // config.block_n))
    prepare, main, *others, repair = grid.blocks
    tiles, units = batch * heads[0] * grid.m_blocks, batch * heads[1] * grid.n_blocks
    assert repair == (min(max(tiles, units), NUM_SMS) if tiles else 0)
    # Thread blocks of the kernels for Hopper take one unit after the other, which are counted from 0, and those of one
    # pass then write dq.
    groups = -(-tiles // config.row_tiles)  # type: ignore[attr-defined]
    assert prepare == max(groups, kernel[0].endswith("sm90") and main > 0)
    most = {"sm90": min(max(units, tiles), NUM_SMS), "split_sm90": min(units, NUM_SMS)}
    assert main == most.get(kernel[0], units)
    # Other keys than the first come first only where blocks wait for each other under a mask.
    in_order = deterministic and kernel[0] != "split_sm90"
    assert not grid.middle or (in_order and bool(mask))
    ends = heads[0] if sinks else 0
    queries = min(batch * heads[0] * -(-seqlen_q // SPLIT_QUERIES), NUM_SMS)
    if kernel[0] != "short":
        assert others == {"split_sm90": [queries, ends], "sm90": [ends], "sm80": [ends + tiles]}[kernel[0]]
        return
    # One block of keys has them all and writes dq, but for the tiles that see none, which are the last kernel's.
    assert grid.n_blocks <= 1
    diagonal, (left, right) = seqlen_k - seqlen_q, mask.get("window_size", (seqlen_q + seqlen_k, None))
    right = 0 if mask.get("causal") and seqlen_q > 1 else seqlen_q + seqlen_k if right is None else right
    seen = {
        row // config.block_m
        for row in range(seqlen_q)
        if max(0, row + diagonal - left) <= min(seqlen_k - 1, row + diagonal + right)
    }
    assert others in ([ends + groups], [ends])
    assert others != [ends] or not tiles or seen == set(range(grid.m_blocks))


def grid_in_turn(problem: Problem) -> BackwardGrid:
    """The grid where blocks of keys add to dq in turn, in one pass on Hopper."""
    plan, _ = plan_backward(problem, "sm90", True)
    grid: BackwardGrid = plans.grid(plan, problem, NUM_SMS)
    return grid


@pytest.mark.parametrize(
    ("seqlen", "heads", "mask", "heads_per_section", "middle"),
    [
        (2048, (128, 128), {}, 9, 0),  # some 15 blocks of each run at a time
        (512, (512, 512), {}, 32, 0),
        (100, (512, 512), {}, 128, 0),
        (2048, (128, 128), {"causal": True}, 9, LAST_FIRST),
        (2048, (128, 32), {"causal": True}, 3, LAST_FIRST),
        (8192, (32, 32), {"causal": True}, 8, 32),  # from last to first, blocks would end unevenly
        (8192, (1, 1), {"causal": True}, 1, 32),  # as with more heads, for the same bits
        (8192, (64, 32), {"causal": True}, 4, 32),  # no more than the L2 holds
        (16384, (16, 16), {"causal": True}, 4, 64),
        (8192, (96, 32), {"causal": True}, 4, 32),  # the blocks before the middle fill the SMs
        (4096, (128, 32), {"causal": True}, 8, 16),
        (16384, (16, 16), {"window_size": (1024, 0)}, 8, LAST_FIRST),
        (32768, (64, 16), {"causal": True}, 16, 0),
    ],
)
def test_blocks_that_take_turns(
    seqlen: int, heads: tuple[int, int], mask: dict[str, Any], heads_per_section: int, middle: int
) -> None:
    q, k = (OnGpu(1, seqlen, count, 128) for count in heads)
    grid = grid_in_turn(backward_problem(q, k, k, **mask))
    assert (grid.heads_per_section, grid.middle) == (heads_per_section, middle)


@pytest.mark.parametrize(
    ("lengths", "heads", "mask", "heads_per_section"),
    [
        ((64, 4050), (8, 8), {"causal": True}, 4),  # as many heads as the L2 holds
        ((64, 4050), (8, 8), {}, 8),
        ((64, 4050), (32, 8), {"causal": True}, 1),
        ((16, 512), (16, 16), {"causal": True}, 16),
    ],
)
def test_blocks_of_packed_sequences_that_take_turns(
    lengths: tuple[int, int], heads: tuple[int, int], mask: dict[str, Any], heads_per_section: int
) -> None:
    q, k = (OnGpu(lengths[0] * lengths[1], count, 128) for count in heads)
    grid = grid_in_turn(backward_problem(q, k, k, batch=lengths[0], **mask))
    assert grid.heads_per_section == heads_per_section


@pytest.mark.parametrize(
    ("seqlen", "heads", "head_dim", "mask", "heads_per_section"),
    [
        (16384, (32, 32), 64, {"window_size": (1024, 0)}, 32),
        (32768, (64, 8), 64, {"window_size": (1024, 0)}, 8),
        (16384, (32, 32), 64, {"window_size": (8192, 100)}, 4),
        (16384, (32, 32), 64, {"window_size": (1024, None)}, 4),
        (16384, (32, 32), 64, {"causal": True}, 4),
        (16384, (16, 16), 128, {"window_size": (1024, 0)}, 4),
    ],
)
def test_sections_by_what_a_window_shows(
    seqlen: int, heads: tuple[int, int], head_dim: int, mask: dict[str, Any], heads_per_section: int
) -> None:
    """Where its heads are counted in parts, more of them lie side by side; each part has a count."""
    q, k = (OnGpu(1, seqlen, each, head_dim) for each in heads)
    problem = backward_problem(q, k, k, **mask)
    plan, grid = plan_backward(problem, "sm90", False)
    assert grid.heads_per_section == heads_per_section
    parts = plan.kernel.scratch(plan.config, problem, grid).parts
    counts = heads[1] * (grid.n_blocks // 16 if head_dim == 64 and "window_size" in mask else 1)
    assert parts["offsets_q"] - parts["heads_done"] == -(-counts // 64) * 64


@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim", "given", "beside"),
    [
        (32, 512, 32, 64, {}, 2),  # two blocks of each of 64 heads run at a time
        (32, 512, 32, 64, {"causal": True}, 0),  # few blocks
        (32, 513, 32, 64, {"causal": True}, 2),
        (64, 1024, 8, 64, {"causal": True}, 4),
        (64, 1024, 8, 64, {"window_size": (256, 0)}, 0),
        (32, 512, 16, 128, {}, 0),
        (32, 512, 128, 64, {}, 0),  # a sequence has heads enough
        (64, 4096, 8, 64, {}, 1),
        (100, 100, 1, 64, {}, 32),
        (1, 512, 1, 64, {}, 1),
    ],
)
def test_packed_sequences_side_by_side(
    batch: int, length: int, heads: int, head_dim: int, given: dict[str, Any], beside: int
) -> None:
    """0: a section has no heads of a second sequence."""
    q = OnGpu(batch * length, heads, head_dim)
    grid = grid_in_turn(backward_problem(q, q, q, batch=batch, **given))
    assert grid.heads_per_section == beside * heads if beside else grid.heads_per_section <= heads


@pytest.mark.parametrize(
    ("kernel", "seqlen", "given", "times"),
    [
        ("sm90", 8192, {"causal": True}, 2),
        ("sm90", 2048, {"causal": True}, 1),  # few blocks of keys
        ("sm90", 8192, {}, 1),
        ("sm90", 8192, {"window_size": (1024, 0)}, 1),
        ("sm90", CHAIN_ROWS + 1, {"causal": True}, 1),  # a chain may have a part of a head's tiles
        ("sm80", 8192, {"causal": True}, 1),
    ],
)
def test_late_blocks_have_sums_of_their_own(kernel: str, seqlen: int, given: dict[str, Any], times: int) -> None:
    q = OnGpu(2, seqlen, 4, 128)
    problem = backward_problem(q, q, q, **given)
    plan, grid = plan_backward(problem, kernel, True)
    parts = plan.kernel.scratch(plan.config, problem, grid).parts
    tiles = 2 * 4 * grid.m_blocks
    assert plan.kernel.tiles_before_late(problem, grid) == tiles * (times - 1)  # type: ignore[attr-defined]
    floats = tiles * plan.config.block_m * 128  # type: ignore[attr-defined]
    assert parts["turns"] - parts["dq_sum"] == times * floats
    assert parts["next_unit"] - parts["turns"] >= times * tiles


OTHERS = [("float16", 256, True), ("float16", 64, False), ("float32", 128, True)]


@settings(max_examples=300)
@given(batches, totals, backward_heads, st.sampled_from(KERNELS), masks, st.booleans())
def test_grids_of_packed_gradients(
    batch: int,
    total: int,
    heads: tuple[int, int],
    kernel: tuple[str, int],
    mask: dict[str, Any],
    deterministic: bool,
) -> None:
    """The same of packed sequences."""
    q, k = (OnGpu(total, each, kernel[1]) for each in heads)
    problem = backward_problem(q, k, k, batch=batch, **mask)
    plan, grid = plan_backward(problem, kernel[0], deterministic)
    offsets, prepare, main, *_, finish, _ = grid.blocks
    units, tiles = grid.n_blocks * heads[1], grid.m_blocks * heads[0]
    assert offsets == 2
    assert prepare >= -(-tiles // plan.config.row_tiles)  # type: ignore[attr-defined]
    assert main == (min(units, NUM_SMS) if kernel[0].endswith("sm90") else units)
    # Someone has to clear the rows of no sequence.
    assert finish >= max(1, 0 if kernel[0] == "split_sm90" else prepare)
    assert grid.workspace_rows % 4 == 0


@pytest.mark.parametrize(
    ("batch", "total"),
    [(1 << 16, 1 << 16), (1 << 14, 1 << 18), (1 << 12, 1 << 18), (1 << 10, 1 << 18), (1 << 20, 100), (1, 1 << 16)],
)
@pytest.mark.parametrize(("dtype", "head_dim", "hopper"), [("float16", 64, True), ("float16", 128, True), *OTHERS])
def test_gradients_of_short_sequences_take_little_memory(
    batch: int, total: int, dtype: str, head_dim: int, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile for each of them would take hundreds of times the memory of q."""
    q = OnGpu(total, 4, head_dim, dtype=dtype)
    pretend(monkeypatch, 90 if hopper else 80)
    for deterministic in (False, True):
        floats = planned(backward_problem(q, q, q, batch=batch, deterministic=deterministic)).floats
        elements = total * 4 * head_dim
        numbers, table = 2 * 4 * (total + 4 * min(batch, total)), 4 * (batch + 1)
        turns = 4 * (total // 16 + 2 * min(batch, total))
        chains = 132 * 128 * 2 * head_dim if hopper and total > 1 << 15 else 0  # of sums that may be long
        short = 1 << 9 <= batch <= 1 << 16 and total <= 32 * batch
        sums = 1 if short and (dtype != "float32" or head_dim <= 128) else 5 if hopper else 2
        assert floats <= sums * elements + numbers + table + turns + chains + 1024


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (2, 2), (16, 16), (32, 64), (1, 64)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_short_dense_sequences_add_up_nothing(
    seqlen_q: int, seqlen_k: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = OnGpu(1 << 14, seqlen_q, 8, 64), OnGpu(1 << 14, seqlen_k, 8, 64)
    pretend(monkeypatch, 90)
    floats = planned(backward_problem(q, k, k, deterministic=deterministic)).floats
    tiles = -(-seqlen_q // 16)
    assert floats <= (1 << 14) * 8 * (2 * 32 * -(-seqlen_q // 32) + tiles + 1) + 1024


# --- short sequences --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "tile"),
    [
        (1, 1, (16, 16)),
        (16, 16, (16, 16)),
        (16, 17, (16, 32)),
        (17, 16, (32, 16)),
        (32, 32, (32, 32)),
        (32, 33, (32, 64)),
        (1, 64, (16, 64)),
        (33, 16, (0, 0)),
        (1, 65, (0, 0)),  # a query over many keys is another matter
        (300, 300, (0, 0)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_short_sequences_have_small_tiles(seqlen_q: int, seqlen_k: int, tile: tuple[int, int], packed: bool) -> None:
    """Packed ones by their average lengths."""
    if packed:
        extra = 4  # rows that leave the average as it is
        q, k = (OnGpu(5 * seqlen + extra, 4, 64) for seqlen in (seqlen_q, seqlen_k))
        problem, gradients = packed_gpu_problem(q, k, 5), backward_problem(q, k, k, batch=5)
    else:
        q, k = (OnGpu(5, seqlen, 4, 64) for seqlen in (seqlen_q, seqlen_k))
        problem, gradients = gpu_problem(q, k, k), backward_problem(q, k, k)
    for static in (problem.static, gradients.static):
        assert static is not None and (static.short_rows, static.short_keys) == tile
    assert problem.static is not None and gradients.static is not None
    for arch in (80, 90, 120):
        plan = plans.forward(problem.static, arch)
        backward = plans.backward(gradients.static, arch, False, gradients.static.average_rows)
        if tile == (0, 0):
            least = problem.static.few_rows or 64
            assert plan.config.block_m >= least and "so short that small tiles" not in plan.reason
            continue
        assert (plan.name, backward.name) == ("attention_forward_sm80", "attention_backward_sm80")
        assert (plan.config.block_m, plan.config.block_n) == (tile[0], min(tile[1], 32))
        assert plan.config.num_threads == 2 * tile[0]  # a warp for 16 rows
        assert backward.config.block_n == tile[1] and backward.config.block_m <= tile[0]
        assert backward.config.num_threads == 2 * tile[1]
        for each in (plan, backward):
            assert "so short that small tiles" in each.reason and ("on average" in each.reason) == packed


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "few"),
    [
        (1, 64, (4, 4), 0),  # which has a small tile
        (1, 65, (4, 4), 16),
        (1, 1 << 20, (16, 1), 16),
        (3, 144, (6, 1), 32),
        (3, 143, (6, 1), 0),
        (33, 5000, (2, 2), 64),
        (1, 2048, (65, 1), 64),  # several tiles, in all too few for a GPU
        (1, 2047, (65, 1), 0),
        (640, 2560, (2, 2), 64),  # 30 tiles of 128 rows
        (640, 2560, (6, 3), 0),
        (1280, 5120, (1, 1), 64),
        (1280, 5119, (1, 1), 0),
        (0, 5000, (2, 2), 0),
    ],
)
def test_few_rows_have_a_kernel_of_their_own(seqlen_q: int, seqlen_k: int, heads: tuple[int, int], few: int) -> None:
    """Rows of all heads that share a key head count, whatever their number and their score terms, and their tiles."""
    q, k = OnGpu(3, seqlen_q, heads[0], 64), OnGpu(3, seqlen_k, heads[1], 64)
    slopes = OnGpu(heads[0], dtype="float32")
    with_terms = {"alibi_slopes": slopes, "sinks": slopes}
    for arch, terms in ((80, {}), (90, with_terms), (90, {}), (120, with_terms)):
        problem = problem_of(ATTENTION, {"q": q, "k": k, "v": k, **terms}, {})
        assert problem.static is not None and problem.static.few_rows == few
        plan = plans.forward(problem.static, arch)
        assert (plan.name in ("attention_forward_split_sm80", "attention_forward_cluster_sm90")) == (few > 0)
        assert arch >= 90 or "cluster" not in plan.name
        assert few == 0 or plan.config.block_m == few
        assert few > 0 or "few rows" not in plan.reason  # why it does not serve is no reason for another
    gradients = backward_problem(q, k, k).static
    assert gradients is not None and gradients.few_rows == 0


def test_many_rows_of_wide_float32_are_not_few() -> None:
    plan = plans.forward(plans.few("f32", (64, 192), 64, {}), 90)
    assert plan.name == "attention_forward_sm80" and plan.reason.startswith("float32 takes three tf32 products for one")
    assert ("attention_forward_split_sm80", "so many rows of float32 leave no shared memory for keys") in plan.refusals


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "options", "empty"),
    [
        (300, 300, {}, False),
        (300, 200, {}, False),
        (300, 0, {}, True),
        (300, 300, {"causal": True}, False),
        (300, 299, {"causal": True}, True),
        (300, 299, {"window_size": (5, 0)}, True),
        (300, 299, {"window_size": (0, 1)}, False),
        (300, 200, {"window_size": (5, None)}, False),
        (300, 200, {"window_size": (5, 99)}, True),
        (300, 200, {"window_size": (5, 100)}, False),
    ],
)
def test_which_problems_have_rows_without_keys(
    seqlen_q: int, seqlen_k: int, options: dict[str, Any], empty: bool
) -> None:
    q, k = OnGpu(2, seqlen_q, 4, 64), OnGpu(2, seqlen_k, 4, 64)
    static = gpu_problem(q, k, k, **options).static
    assert static is not None and static.empty_rows == empty
    keep = reference._keep(seqlen_q, seqlen_k, options.get("causal", False), options.get("window_size"))
    assert empty == (not keep.any(axis=1).all())


@pytest.mark.parametrize(("arch", "head_dim", "exact"), [(90, 256, True), (90, 128, False), (80, 256, False)])
def test_gradients_that_are_deterministic_on_hopper_stay_so(arch: int, head_dim: int, exact: bool) -> None:
    q = OnGpu(800, 4, head_dim)
    static = backward_problem(q, q, q, batch=50).static
    assert static is not None
    for deterministic in (False, True):
        config = plans.backward(static, arch, deterministic, 16).config
        assert config.deterministic == (exact or deterministic)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seqlen_q", "heads", "kernel"),
    [
        (16, (8, 8), "attention_forward_sm80"),
        (16, (8, 2), "attention_forward_sm80"),
        (16, (8, 1), "attention_forward_sm90"),  # a tile takes the place of eight small ones
        (17, (8, 2), "attention_forward_sm90"),
        (1, (8, 1), "attention_forward_sm90"),
        (1, (4, 1), "attention_forward_sm80"),
    ],
)
def test_heads_that_share_tiles_instead(seqlen_q: int, heads: tuple[int, int], kernel: str) -> None:
    q, k = (OnGpu(5, rows, each, 64) for rows, each in zip((seqlen_q, 20), heads, strict=True))
    static = gpu_problem(q, k, k).static
    assert static is not None
    assert plans.forward(static, 90).name == kernel
    assert plans.forward(static, 80).name == "attention_forward_sm80"
    assert plans.forward(static, 80).config.block_m == 16 * -(-seqlen_q // 16)


def test_float32_has_few_small_tiles() -> None:
    for head_dim, keys, small in ((64, 16, True), (128, 32, True), (64, 33, False), (129, 16, False)):
        q, k = OnGpu(5, 16, 4, head_dim, dtype="float32"), OnGpu(5, keys, 4, head_dim, dtype="float32")
        static = gpu_problem(q, k, k).static
        assert static is not None
        assert (plans.forward(static, 90).config.block_m == 16) == small
        assert (plans.backward(static, 90, False).config.num_threads < 256) == small


@pytest.mark.parametrize(
    ("window", "ratio", "chains", "of_gradients"),
    [
        ((1024, 0), 1, False, False),
        ((8000, 384), 2, False, True),  # a key has queries of two heads
        ((1 << 14, 0), 1, True, True),
        ((None, 0), 1, True, True),
        ((1024, None), 1, True, True),
    ],
)
def test_sums_over_windows_are_as_long_as_these(
    window: tuple[int | None, int | None], ratio: int, chains: bool, of_gradients: bool
) -> None:
    q, k = OnGpu(1, 1 << 15, ratio, 64), OnGpu(1, 1 << 15, 1, 64)
    forward, gradients = (make(q, k, k, window_size=window).static for make in (gpu_problem, backward_problem))
    assert forward is not None and forward.chains == chains
    assert gradients is not None and gradients.chains == of_gradients


@pytest.mark.parametrize(
    ("size", "ratio", "chains", "of_gradients"),
    [(8064, 1, False, False), (8064, 2, False, False), (8064, 4, False, True), (20000, 1, True, True)],
)
def test_sums_over_lists_are_as_long_as_these(size: int, ratio: int, chains: bool, of_gradients: bool) -> None:
    seqlen = 1 << 15
    mask = cufa.BlockMask.of(cufa.masks.chunked(size), 1, 1, seqlen, seqlen)
    (feature,) = mask_features("attention", mask)
    q, k = OnGpu(1, seqlen, ratio, 64), OnGpu(1, seqlen, 1, 64)
    out, lse = q, OnGpu(1, ratio, seqlen, dtype="float32")
    given = {
        name: OnGpu(*each.shape, dtype="int32") for name, each in zip(feature.term.arrays, mask.arrays, strict=True)
    }
    given |= {"q": q, "k": k, "v": k, "dout": out, "lse": lse}
    options = dict(zip(feature.term.option_names, feature.options, strict=True))
    for plain, expected in ((ATTENTION, chains), (ATTENTION_BACKWARD, of_gradients)):
        operation = having(plain, feature.term)
        written = {"out": out} if operation.gradient else {}
        static = problem_of(operation, given | written, options).static
        assert static is not None and static.chains == expected


@pytest.mark.parametrize(
    ("batch", "rows", "keys", "heads", "many"),
    [(64, 1024, 1024, 2, True), (64, 1024, 1024, 1, False), (64, 1023, 1024, 8, False), (64, 1024, 1023, 8, False)],
)
def test_packed_tiles_that_are_many_and_long_are_taken(
    batch: int, rows: int, keys: int, heads: int, many: bool
) -> None:
    q, k = OnGpu(batch * rows, heads, 128), OnGpu(batch * keys, heads, 128)
    problem = packed_gpu_problem(q, k, batch)
    assert problem.static is not None and problem.static.many_tiles == many
    plan = plans.forward(problem.static, 90)
    assert plan.name == ("attention_forward_packed_sm90" if many else "attention_forward_sm90")
    if many:
        grid = plans.grid(plan, problem, 132)
        assert grid.blocks == (1, 132) and grid.units == (batch * rows // 128 + batch) * heads


def test_sequences_that_one_launch_cannot_hold_have_usual_tiles() -> None:
    for batch, small in ((1 << 29, True), ((1 << 29) + 1, False)):
        q = OnGpu(batch, 20, 1, 8)
        problem = gpu_problem(q, q, q)
        assert problem.static is not None and (problem.static.short_rows == 32) == small
        plans.grid(plans.forward(problem.static, 90), problem, 132)


@pytest.mark.parametrize(
    ("batch", "heads", "units"), [(200, 8, 1), (1 << 14, 8, 62), (1 << 14, 1, 7), (1 << 18, 8, 992), (300, 8, 1)]
)
def test_blocks_of_short_sequences_take_several(batch: int, heads: int, units: int) -> None:
    """So that few of them go through all offsets, but enough to fill the GPU."""
    q = OnGpu(16 * batch, heads, 64)
    problem = packed_gpu_problem(q, q, batch)
    assert problem.static is not None
    grid = plans.grid(plans.forward(problem.static, 90), problem, 132)
    assert grid.units_per_block == units
    assert grid.num_blocks == -(-grid.m_blocks * heads // units)
