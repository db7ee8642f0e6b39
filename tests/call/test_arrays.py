"""Arrays of every kind: what is read in place, what is held until it was read, and what is refused in words."""

from __future__ import annotations

import ctypes
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_attention import Foreign
from test_problem import OnGpu, gpu_problem

import cufa
from cufa import reference
from cufa._call import arrays as _arrays
from cufa._call import dlpack as _dlpack
from cufa._cpu import backward as _cpu_backward
from cufa._cpu import forward as _cpu
from cufa.testing import Case, assert_close

SHAPE = (1, 8, 2, 16)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape or SHAPE, dtype=np.float32)


# --- DLPack -----------------------------------------------------------------------------------------


class Copying(Foreign):
    """Exports copies, as it may: nothing but the capsule keeps them alive."""

    __module__ = Foreign.__module__  # by which messages name a framework
    alive: tuple[weakref.ref[Any], ...] = ()

    def __dlpack__(self, **options: Any) -> Any:
        copy = self.array.copy()
        Copying.alive += (weakref.ref(copy),)
        return copy.__dlpack__()


def test_exported_copies_live_until_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seqlen_q=(9, 3), seqlen_k=(20, 1), batch=2, seqused_k=(20, 0), alibi_ndim=2, sinks=True)
    arrays = case.arrays()
    foreign = {name: Copying(array) for name, array in arrays.items()}
    seen = []

    def watch(module: Any, name: str) -> None:
        compute = getattr(module, name)

        def watched(*given: Any, **options: Any) -> None:
            seen.append(len(Copying.alive))
            assert all(ref() is not None for ref in Copying.alive)
            compute(*given, **options)

        monkeypatch.setattr(module, name, watched)

    watch(_cpu, "varlen_forward")
    watch(_cpu_backward, "varlen_backward")
    monkeypatch.setattr(Copying, "alive", ())
    out, lse = (Foreign(np.zeros(shape, np.float32)) for shape in ((12, 1, 16), (1, 12)))
    cufa.attention_varlen(**foreign, out=out)
    assert_close(out.array, **arrays)
    _, exact = reference.attention_varlen(**arrays, return_lse=True)
    lse.array[...] = exact
    gc.collect()
    assert not any(ref() for ref in Copying.alive)
    Copying.alive = ()
    gradients = cufa.attention_varlen_backward(Copying(out.array), **foreign, out=Copying(out.array), lse=lse)
    expected = reference.attention_varlen_backward(out.array, **arrays)
    for found, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.array, right, rtol=1e-4, atol=1e-5)
    assert seen == [len(arrays), len(arrays) + 2]


LEAKED: list[Any] = []


def capsule_of(tensor: _dlpack._DLTensor) -> Any:
    """A capsule of a tensor; both leak."""
    managed = _dlpack._DLManagedTensor(tensor, None, None)
    LEAKED.append(managed)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(managed), b"dltensor", None)


class Exporter(Foreign):
    """Exports what `export` returns of the array and the options."""

    __module__ = Foreign.__module__

    def __init__(self, export: Callable[..., Any]) -> None:
        super().__init__(random())
        self.export = export

    def __dlpack__(self, **options: Any) -> Any:
        return self.export(self.array, **options)


def without_memory(array: np.ndarray, **_: Any) -> Any:
    shape = (ctypes.c_int64 * 4)(*SHAPE)
    LEAKED.append(shape)
    return capsule_of(_dlpack._DLTensor(None, 1, 0, 4, 2, 32, 1, shape, None, 0))


def of_eight_bits(array: np.ndarray, **_: Any) -> Any:
    shape = (ctypes.c_int64 * 4)(*SHAPE)
    LEAKED.extend((shape, array))
    return capsule_of(_dlpack._DLTensor(array.ctypes.data, 1, 0, 4, 10, 8, 1, shape, None, 0))


def used(array: np.ndarray, **_: Any) -> Any:
    class Holder:
        def __dlpack__(self, **_: Any) -> Any:
            return capsule

        def __dlpack_device__(self) -> Any:
            return array.__dlpack_device__()

    capsule = array.__dlpack__()
    np.from_dlpack(Holder())
    return capsule


def unwilling(array: np.ndarray, **_: Any) -> Any:
    raise BufferError("it is on the moon")


def copying(array: np.ndarray, **options: Any) -> Any:
    return array.__dlpack__(**(options | {"copy": True}))


def copying_if_it_may(array: np.ndarray, copy: bool | None = None, **options: Any) -> Any:
    if copy is False:
        raise BufferError("it only exports copies")
    return array.__dlpack__(copy=True, **options)


def read_only(array: np.ndarray, **options: Any) -> Any:
    array.flags.writeable = False
    return array.__dlpack__(**options)


@pytest.mark.parametrize(
    ("export", "name", "error", "text"),
    [
        (lambda *_, **__: None, "k", TypeError, "k has a __dlpack__ that returned a NoneType, and not a capsule that"),
        (used, "k", TypeError, "k has a __dlpack__ that returned a PyCapsule, and not a capsule that is unused"),
        (unwilling, "k", cufa.UnsupportedError, r"k is not exported by its __dlpack__ \(it is on the moon\)"),
        (without_memory, "v", ValueError, r"v has shape \(1, 8, 2, 16\) but no memory \(its address is 0\)"),
        (of_eight_bits, "v", ValueError, "v has dtype float8_e4m3fn; pass float16"),
        (copying, "out", ValueError, "out exports a copy of its memory, so that what is written there would be lost"),
        (copying_if_it_may, "out", cufa.UnsupportedError, "out is not exported by its __dlpack__ .it only exports cop"),
        (read_only, "out", ValueError, "out is read-only"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("ask", [cufa.attention, cufa.explain], ids=["call", "explain"])
def test_exports_that_cannot_serve(
    export: Callable[..., Any], name: str, error: type[Exception], text: str, ask: Callable[..., Any]
) -> None:
    arrays = {each: Foreign(random()) for each in "qkv"} | {name: Exporter(export)}
    with pytest.raises(error, match=f"^attention: {text}"):
        ask(**arrays)


def test_exports_that_may_be_copies_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whose results are of a type that was never seen."""
    monkeypatch.setattr(_arrays, "_OTHERS", weakref.WeakKeyDictionary())
    expected = cufa.attention(random(), random(), random())
    for export in (copying, copying_if_it_may, read_only):
        assert np.array_equal(cufa.attention(*(Exporter(export) for _ in range(3))).array, expected)


@pytest.mark.parametrize("export", [copying, read_only])
def test_a_namespace_that_makes_nothing_to_write(export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q = Foreign(random())

    class Namespace:
        float32 = np.float32

        @staticmethod
        def empty(*_: Any, **__: Any) -> Exporter:
            return Exporter(export)

    monkeypatch.setattr(Foreign, "__array_namespace__", lambda self: Namespace)
    with pytest.raises(TypeError, match=r"^cufa: Foreign has an __array_namespace__ whose empty\(\) makes no array"):
        cufa.attention(q, q, q)


# --- types ------------------------------------------------------------------------------------------


def test_types_of_arrays_are_forgotten() -> None:
    def use() -> list[weakref.ref[type]]:
        class Array(Foreign):
            pass

        class Subclass(np.ndarray):
            pass

        for arrays in (Array(random()), random().view(Subclass)):
            cufa.attention(arrays, arrays, arrays)
        return [weakref.ref(Array), weakref.ref(Subclass)]

    types = use()
    gc.collect()
    assert [each() for each in types] == [None, None]


class Odd(np.ndarray):
    """A subclass with an arithmetic and with facts of its own."""

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("computed by a subclass")

    def __getitem__(self, _: Any) -> Any:
        raise AssertionError("indexed by a subclass")

    def __setitem__(self, *_: Any) -> None:
        raise AssertionError("written by a subclass")


def test_subclasses_are_read_and_written_as_plain_arrays() -> None:
    case = Case(seqlen_q=5, seqlen_k=7, num_heads_q=4, num_heads_k=2, alibi_ndim=2, sinks=True, batch=2, causal=True)
    plain = case.arrays()
    odd = {name: array.view(Odd) for name, array in plain.items()}
    odd["alibi_slopes"] = plain["alibi_slopes"].view(np.matrix)
    out = np.zeros((2, 5, 4, 16), np.float32)
    result = cufa.attention(**odd, causal=True, out=(given := out.view(Odd)))
    assert result is given
    assert_close(out, **plain, causal=True)
    out, lse = cufa.attention(**plain, causal=True, return_lse=True)
    into = {f"d{name}": np.zeros_like(plain[name]) for name in "qkv"}
    views = {name: array.view(Odd) for name, array in into.items()}
    cufa.attention_backward(out.view(Odd), **odd, out=out.view(Odd), lse=lse.view(Odd), causal=True, **views)
    expected = cufa.attention_backward(out, **plain, out=out, lse=lse, causal=True)
    assert all(map(np.array_equal, into.values(), expected))


@pytest.mark.parametrize("name", ["k", "dq"])
def test_masked_arrays_are_refused_before_anything_is_written(name: str) -> None:
    q = random()
    out, lse = cufa.attention(q, q, q, return_lse=True)
    dv = np.full(SHAPE, 9, np.float32)
    with pytest.raises(TypeError, match=f"^attention_backward: {name} is a masked array, whose mask would be ignored"):
        cufa.attention_backward(
            **{"dout": out, "q": q, "k": q, "v": q, "out": out, "lse": lse, "dv": dv, name: np.ma.masked_array(q)}
        )
    assert (dv == 9).all()


# --- addresses --------------------------------------------------------------------------------------


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same a byte further."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert view.__array_interface__["data"][0] % 2
    return view


@pytest.mark.parametrize("foreign", [False, True])
def test_numpy_reads_and_writes_what_is_not_aligned(foreign: bool) -> None:
    case = Case(seqlen_q=(5, 30), seqlen_k=(7, 40), batch=2, alibi_ndim=1, sinks=True, causal=True)
    arrays = case.arrays()
    out = unaligned(np.zeros((35, 1, 16), np.float32))
    given = {name: unaligned(array) for name, array in arrays.items()} | {"out": out}
    if foreign:
        given = {name: Foreign(array) for name, array in given.items()}
    cufa.attention_varlen(**given, causal=True)
    assert_close(out, **arrays, causal=True)


@pytest.mark.parametrize(("dtype", "pointer", "itemsize"), [("float16", 3, 2), ("float32", 2, 4), ("float32", 5, 4)])
@pytest.mark.parametrize("name", ["q", "v", "out"])
def test_a_gpu_needs_whole_elements(name: str, dtype: str, pointer: int, itemsize: int) -> None:
    arrays = {each: OnGpu(1, 8, 2, 64, dtype=dtype) for each in "qkv"}
    arrays[name] = OnGpu(1, 8, 2, 64, dtype=dtype, pointer=(1 << 40) + pointer)
    with pytest.raises(cufa.UnsupportedError) as raised:
        gpu_problem(**arrays)
    assert str(raised.value) == (
        f"attention: {name} begins at an address that is no multiple of its {itemsize}-byte elements, which a GPU "
        "cannot read; pass a copy of it."
    )
    arrays[name] = OnGpu(1, 8, 2, 64, dtype=dtype, pointer=(1 << 40) + 16 + itemsize)
    gpu_problem(**arrays)


def test_arrays_without_memory() -> None:
    q, gone, empty = OnGpu(1, 8, 2, 64), OnGpu(1, 8, 2, 64, pointer=0), OnGpu(1, 0, 2, 64, pointer=0)
    with pytest.raises(ValueError, match=r"^attention: v has shape \(1, 8, 2, 64\) but no memory \(its address is 0\)"):
        gpu_problem(q, q, gone)
    assert gpu_problem(q, empty, empty).seqlen_k == 0


# --- torch ------------------------------------------------------------------------------------------


def torch_tensors(torch: Any) -> dict[str, tuple[Callable[[Any], Any], str]]:
    """Tensors that are not simply what lies in memory: how to make them, and what is said."""
    wrapped = r"is a {}, whose elements are not simply what lies in memory; pass a plain torch tensor"

    def resized(x: Any) -> Any:
        x = x.clone()
        x.untyped_storage().resize_(0)
        return x

    return {
        "meta": (lambda x: x.to("meta"), "cannot be used: torch tensors on meta are not supported"),
        "sparse": (lambda x: x.to_sparse(), "is a torch tensor of layout sparse_coo; pass a strided one"),
        "csr": (lambda x: x[0, 0].to_sparse_csr(), "is a torch tensor of layout sparse_csr; pass a strided one"),
        "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "has dtype qint8"),
        "nested": (lambda x: torch.nested.nested_tensor([x[0], x[0]]), "is a nested torch tensor; pass its values"),
        "jagged": (
            lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged),
            wrapped.format("NestedTensor"),
        ),
        "resized": (resized, r"has shape \(1, 8, 2, 16\) but no memory"),
        "zero": (lambda x: torch._efficientzerotensor(SHAPE), r"has shape \(1, 8, 2, 16\) but no memory"),
    }


TENSORS = ("meta", "sparse", "csr", "quantized", "nested", "jagged", "resized", "zero")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", ["q", "v", "out"])
def test_tensors_that_are_not_memory_are_refused(kind: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    make, text = torch_tensors(torch)[kind]
    plain = torch.randn(SHAPE)
    with pytest.raises((cufa.UnsupportedError, ValueError), match=f"^attention: {name} {text}"):
        cufa.attention(**dict.fromkeys("qkv", plain) | {name: make(plain)})


def test_distributed_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    tensor = pytest.importorskip("torch.distributed.tensor")
    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        mesh = group.device_mesh.init_device_mesh("cpu", (1,))
        q = torch.randn(SHAPE)
        distributed = tensor.distribute_tensor(q, mesh, [tensor.Replicate()])
        with pytest.raises(cufa.UnsupportedError, match=r"^attention: k is a DTensor, .* as to_local\(\) of a DTensor"):
            cufa.attention(q, distributed, q)
        assert torch.equal(cufa.attention(q, distributed.to_local(), q), cufa.attention(q, q, q))
    finally:
        group.destroy_process_group()


def test_plain_subclasses_of_tensors_are_read() -> None:
    torch = pytest.importorskip("torch")

    class Named(torch.Tensor):  # type: ignore[misc, name-defined]
        pass

    q = torch.randn(SHAPE)
    expected = cufa.attention(q, q, q)
    found = cufa.attention(q.as_subclass(Named), q, q)
    assert torch.equal(found, expected) and type(found) is torch.Tensor
    with torch.no_grad():
        assert torch.equal(cufa.attention(torch.nn.Parameter(q), q, q), expected)
    assert Named not in _arrays._ADAPTERS and torch.nn.Parameter in _arrays._ADAPTERS


def test_results_are_contiguous_whatever_they_are_like() -> None:
    torch = pytest.importorskip("torch")
    rows, other = torch.randn(SHAPE), torch.randn(SHAPE).transpose(1, 2).contiguous().transpose(1, 2)
    for q, k in itertools.product((rows, other, rows.expand(3, -1, -1, -1)), (rows, other)):
        k = k.expand(q.shape)
        out, lse = cufa.attention(q, k, k, return_lse=True)
        gradients = cufa.attention_backward(out, q, k, k, out, lse)
        results, like = (out, *gradients), (q, q, k, k)
        assert all(result.is_contiguous() and result.shape == x.shape for result, x in zip(results, like, strict=True))


def test_tensors_are_viewed_together_as_one_by_one() -> None:
    torch = pytest.importorskip("torch")
    tensors = torch.randn(SHAPE), torch.randn(SHAPE)[:, 1:], torch.zeros(3, dtype=torch.int32), torch.empty(0, 2)
    learned = torch.nn.Parameter(torch.randn(4))
    names = tuple("abcdef")
    with torch.no_grad():
        for shift, count in itertools.product(range(len(tensors)), (3, 4)):
            given: list[Any] = [*tensors[shift:count], *tensors[:shift]]
            given[1:1] = [None, learned]
            arrays = _arrays.view("f", names, tuple(given), (2,))
            assert (arrays.key[0] is arrays.adapter) == all(array is None or array.numel() for array in given)
            for array, pointer, layout in zip(given, arrays.pointers, arrays.layouts, strict=True):
                alone = (0, None) if array is None else arrays.adapter.view(array)
                assert (pointer, layout) == alone and pointer == (0 if array is None else array.data_ptr())
    negative = torch.randn(4, dtype=torch.complex64).conj().imag
    with pytest.raises(cufa.UnsupportedError, match="negative bit"):
        _arrays.view("f", names[:2], (tensors[0], negative))
    with pytest.raises(_arrays.Recorded):
        _arrays.view("f", names[:2], (tensors[0], learned))


def test_numbers_in_tensors_are_read_at_every_call() -> None:
    torch = pytest.importorskip("torch")
    q, scale = torch.randn(SHAPE), torch.tensor(0.5)
    before = cufa.attention(q, q, q, softmax_scale=scale, softcap=scale)
    scale.fill_(2.0)
    after = cufa.attention(q, q, q, softmax_scale=scale, softcap=scale)
    assert torch.equal(after, cufa.attention(q, q, q, softmax_scale=2.0, softcap=2.0))
    assert not torch.equal(before, after)
    learned = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"^attention: softmax_scale is a torch tensor that requires grad, and would"):
        cufa.attention(q, q, q, softmax_scale=learned)
    with torch.no_grad():
        assert torch.equal(cufa.attention(q, q, q, softmax_scale=learned, softcap=0.5), before)
    for wrong in (torch.tensor(True), torch.tensor(1j), torch.tensor([1.0])):
        with pytest.raises(TypeError, match=r"^attention: softcap is a Tensor; pass a number"):
            cufa.attention(q, q, q, softcap=wrong)
    with pytest.raises(TypeError, match="value cannot be read"):
        cufa.attention(q, q, q, softcap=torch.tensor(1.0, device="meta"))
