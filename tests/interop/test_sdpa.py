"""torch's own attention on cufa: every override, on the CPU as well, where `Handle` takes torch's key for it."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cufa
from cufa import UnsupportedError
from cufa.errors import ArgumentError

torch: Any = pytest.importorskip("torch")
if not hasattr(torch.library, "get_kernel"):
    pytest.skip("torch is too old", allow_module_level=True)

import cufa.torch as provider  # noqa: E402

aten = torch.ops.aten
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # in a thread of autograd's
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # Inductor's own
]
BACKENDS = ("flash", "cudnn", "efficient")


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    cufa.stats(reset=True)
    yield
    provider.deactivate()


@pytest.fixture
def on_cpu() -> Iterator[None]:
    handle = provider.Handle("CPU")
    yield
    handle.remove()


def random(*shape: int, seed: int, dtype: Any = None, grad: bool = False) -> Any:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype or torch.float32)
    return made.requires_grad_(grad)


def sdpa(backend: str, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """All results of the operation of a backend."""
    given = (q, k, v) if backend == "flash" else (q, k, v, None, True)
    return getattr(aten, f"_scaled_dot_product_{backend}_attention")(*given, **options)


def exact(q: Any, k: Any, v: Any, mask: Any = None, scale: float | None = None) -> Any:
    """out and lse, in float64, spelled out; mask says of rows of q which of k they see."""
    q, k, v = (each.double() for each in (q, k, v))
    ratio = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(ratio, 1) for each in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -float("inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def causal(rows: int, keys: int, shift: int = 0) -> Any:
    return torch.ones(rows, keys, dtype=torch.bool).tril(shift)


def assert_equal_gradients(out: Any, right: Any, inputs: tuple[Any, ...], tolerance: float = 1e-5) -> None:
    dout = random(*out.shape, seed=9, dtype=out.dtype).to(out.device)
    found = torch.autograd.grad(out, inputs, dout)
    wanted = torch.autograd.grad(right, inputs, dout.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, check_dtype=False)


# --- Numbers ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "keys"), [(12, 12), (7, 33), (33, 7), (32, 32), (1, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_backends(backend: str, rows: int, keys: int, is_causal: bool, scale: float | None) -> None:
    q = random(2, rows, 4, 16, seed=1, grad=True)  # rows before heads, as models have them
    k, v = (random(2, 2, keys, 16, seed=seed, grad=True) for seed in (2, 3))
    heads_first = q.transpose(1, 2)
    found = sdpa(backend, heads_first, k, v, is_causal=is_causal, scale=scale)
    # By torch's kernels flash aligns causality to the last key, the others to the first.
    mask = causal(rows, keys, keys - rows if backend == "flash" else 0) if is_causal else None
    if mask is not None and not mask.any(1).all():
        assert torch.isfinite(found[0]).all()
        return  # softmax is of nothing there
    right, lse = exact(heads_first, k, v, mask, scale)
    torch.testing.assert_close(found[0], right, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(found[1].flatten(2)[..., :rows], lse, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert_equal_gradients(found[0], right, (q, k, v))
    assert cufa.stats().launches == {"cpu (attention)": 1, "cpu (attention_backward)": 1}
    assert not cufa.stats().handed_on


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_values_of_another_width(backend: str) -> None:
    q, k = (random(1, 2, 9, 16, seed=seed, grad=True) for seed in (1, 2))
    v = random(1, 2, 9, 8, seed=3, grad=True)
    out = sdpa(backend, q, k, v)[0]
    right, _ = exact(q, k, v)
    torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert_equal_gradients(out, right, (q, k, v))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("window", [(None, None), (-1, 0), (3, 0), (2, 2)])
def test_flash_of_rows_before_heads(window: tuple[Any, Any]) -> None:
    q = random(2, 6, 4, 16, seed=1, grad=True)
    k, v = (random(2, 9, 2, 16, seed=seed, grad=True) for seed in (2, 3))
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, 6, 9, 0.0, False, False, **sides)
    left, right = (100 if side in (None, -1) else side for side in window)
    mask = causal(6, 9, 3 + right) & ~causal(6, 9, 3 - left - 1)
    expected, expected_lse = exact(*(each.transpose(1, 2) for each in (q, k, v)), mask)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert_equal_gradients(out, expected.transpose(1, 2), (q, k, v))
    given = torch.full((2, 6, 8, 16), 7.0)[:, :, ::2]
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        lse = aten._flash_attention_forward_no_dropout_inplace(
            given, q.detach(), k.detach(), v.detach(), None, None, 6, 9, 0.0, False, False, **sides
        )
        torch.testing.assert_close(given, out.detach())
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5, check_dtype=False)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    biased = aten._flash_attention_forward(q, k, v, None, None, 6, 9, 0.0, True, False, alibi_slopes=slopes, **sides)[0]
    wanted = cufa.attention(q.detach(), k.detach(), v.detach(), causal=True, window_size=window, alibi_slopes=slopes)
    torch.testing.assert_close(biased.detach(), wanted)


def packed() -> tuple[Any, ...]:
    q = random(15, 4, 16, seed=1, grad=True)
    k, v = (random(19, 2, 16, seed=seed, grad=True) for seed in (2, 3))
    offsets_q, offsets_k = (torch.tensor(each, dtype=torch.int32) for each in ([0, 4, 4, 12], [0, 7, 9, 19]))
    return q, k, v, offsets_q, offsets_k


@pytest.mark.usefixtures("on_cpu")
def test_varlen_attn() -> None:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, offsets_q, offsets_k = packed()
    arguments = (q, k, v, offsets_q, offsets_k, 8, 10)
    out, lse = aten._flash_attention_forward(*arguments, 0.0, True, False)[:2]
    plain = [each.detach() for each in (q, k, v)]
    wanted, wanted_lse = cufa.attention_varlen(*plain, offsets_q, offsets_k, causal=True, return_lse=True)
    torch.testing.assert_close(out[:12].detach(), wanted[:12])
    torch.testing.assert_close(lse, wanted_lse)
    dout = random(15, 4, 16, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    expected = cufa.attention_varlen_backward(dout, *plain, out.detach(), lse, offsets_q, offsets_k, causal=True)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)
    used = torch.tensor([5, 1, 10], dtype=torch.int32)
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):  # varlen_attn as it is since then
        out = varlen_attn(*arguments, window_size=(-1, 0), enable_gqa=True)
        torch.testing.assert_close(out[:12].detach(), wanted[:12])
        for one, other in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
            torch.testing.assert_close(one, other)
        out = varlen_attn(*plain, *arguments[3:], enable_gqa=True, seqused_k=used)
        wanted = cufa.attention_varlen(*plain, offsets_q, offsets_k, seqused_k=used)
        torch.testing.assert_close(out[:12], wanted[:12])
    assert not cufa.stats().handed_on


@pytest.mark.usefixtures("on_cpu")
def test_deterministic_algorithms_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compute = provider._compute

    def spy(operation: Any, views: Any, asked: Any, given: bool = False) -> Any:
        seen.append((operation.name, asked[-1]))
        return compute(operation, views, asked, given)

    monkeypatch.setattr(provider, "_compute", spy)
    q = random(1, 2, 8, 16, seed=1, grad=True)
    rows = q.transpose(1, 2)
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for backend in BACKENDS:
                sdpa(backend, q, q, q)[0].sum().backward()
            aten._flash_attention_forward(rows, rows, rows, None, None, 8, 8, 0.0, False, False)[0].sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert [asked for name, asked in seen if name == "attention_backward"] == 4 * [deterministic]
        seen.clear()


# --- Shapes and schemas -----------------------------------------------------------------------------


def laid_out(order: tuple[int, ...], shape: tuple[int, ...], device: str) -> Any:
    return torch.empty_permuted(shape, order, device=device).normal_()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
@pytest.mark.parametrize("rows", [32, 40])
@pytest.mark.parametrize("columns", [16, 8])
def test_results_are_as_torch_expects_them(backend: str, order: tuple[int, ...], rows: int, columns: int) -> None:
    """Compiled programs rely on the strides that the functions for the meta device promise."""
    if backend == "flash" and columns != 16:
        return
    found = []
    for device in ("cpu", "meta"):
        q, k, v = (laid_out(order, (2, 3, rows, width), device) for width in (16, 16, columns))
        results = sdpa(backend, q, k, v)
        arguments = [torch.empty_like(results[0]), q, k, v]
        if backend == "flash":
            gradients = aten._scaled_dot_product_flash_attention_backward(
                *arguments, results[0], results[1], None, None, rows, rows, 0.0, False, results[6], results[7]
            )
        elif backend == "cudnn":
            gradients = aten._scaled_dot_product_cudnn_attention_backward(
                *arguments, results[0], results[1], results[6], results[7], None, None, None, rows, rows, 0.0, False
            )
        else:
            gradients = aten._scaled_dot_product_efficient_attention_backward(
                *arguments, None, results[0], results[1], results[2], results[3], 0.0, [True, True, True, False]
            )
        found.append([*results, *gradients])
    for one, other in zip(*found, strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        else:
            assert one == other


@pytest.mark.usefixtures("on_cpu")
def test_results_of_flash_are_as_torch_expects_them() -> None:
    found = []
    for device in ("cpu", "meta"):
        q = torch.empty(2, 16, 6, 8, device=device).normal_()[:, :, ::2]
        results = aten._flash_attention_forward(q, q, q, None, None, 16, 16, 0.0, False, False)
        offsets = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
        results += aten._flash_attention_forward(q[0], q[0], q[0], offsets, offsets, 11, 11, 0.0, False, False)
        found.append(results)
    for one, other in zip(*found, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.usefixtures("on_cpu")
def test_without_log_sumexp() -> None:
    q = random(1, 2, 8, 16, seed=1)
    assert aten._scaled_dot_product_cudnn_attention(q, q, q, None, False)[1] is None
    assert aten._scaled_dot_product_efficient_attention(q, q, q, None, False)[1].shape == (1, 2, 0)


@pytest.mark.parametrize("name", provider.OPERATIONS)
def test_schemas_are_those_that_are_known(name: str) -> None:
    """Here, arguments are passed as they come; elsewhere by name, which takes longer."""
    if not hasattr(aten, name):
        pytest.skip("not in this version of torch")
    function = provider.OPERATIONS[name]
    assert provider._by_schema(function, getattr(aten, name).default._schema) is function


class Argument:
    def __init__(self, name: str, kwarg_only: bool = False) -> None:
        self.name, self.kwarg_only = name, kwarg_only


class Schema:
    name = "aten::attention"

    def __init__(self, *names: str) -> None:
        self.arguments = [Argument(name.lstrip("*"), name.startswith("*")) for name in names]


def test_other_schemas_are_read_by_name() -> None:
    def function(query: Any, key: Any, is_causal: bool = False, *, scale: Any = None, **more: Any) -> Any:
        return query, key, is_causal, scale, more

    other = provider._by_schema(function, Schema("key", "sink", "query", "is_causal", "*scale"))
    assert other(1, None, 2) == (2, 1, False, None, {"sink": None})
    assert other(1, 5, 2, True, scale=3) == (2, 1, True, 3, {"sink": 5})
    assert provider._by_schema(function, Schema("query", "key"))(1, 2) == (1, 2, False, None, {})
    with pytest.raises(UnsupportedError, match=r"an aten::attention without query,"):
        provider._by_schema(function, Schema("key", "is_causal"))


# --- What is handed on ------------------------------------------------------------------------------


class Original:
    """In the place of torch's kernels, which a torch without CUDA has none of."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.within: Callable[[], Any] = lambda: None

    def call_boxed(self, keyset: Any, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        return "torch's", self.within()


def override(name: str) -> Any:
    made = provider.Override(name, provider.OPERATIONS[name], "CPU")
    made.original = Original()
    return made


Q = random(1, 2, 8, 16, seed=1)
WIDE = random(1, 2, 8, 264, seed=1)
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "dropout": ("flash", (Q, Q, Q, 0.1), {}),
    "return_debug_mask": ("flash", (Q, Q, Q, 0.0, False, True), {}),
    "dtype float64": ("flash", (Q.double(), Q.double(), Q.double()), {}),
    "dtype int32": ("efficient", (Q.int(), Q.int(), Q.int(), None, False), {}),
    "head_dim above 256": ("flash", (WIDE, WIDE, WIDE), {}),
    "scale out of range": ("flash", (Q, Q, Q), {"scale": -1.0}),
    "scale out of range ": ("flash", (Q, Q, Q), {"scale": 2.0**128}),
    "scale out of range  ": ("flash", (Q, Q, Q), {"scale": float("nan")}),
    "no elements": ("flash", (Q, Q[:, :, :0], Q[:, :, :0]), {}),
    "head dims of query and value differ": ("flash", (Q, Q, Q[..., :8]), {}),
    "attn_mask": ("cudnn", (Q, Q, Q, torch.zeros(8, 8), False), {}),
    "attn_mask ": ("efficient", (Q, Q, Q, torch.zeros(8, 8), False), {}),
    "argument sink": ("cudnn", (Q, Q, Q, None, False), {"sink": Q}),
    # Causality leaves 2 keys here, of which value has enough: what is read is not all that has to agree.
    "lengths of key and value differ": ("cudnn", (Q[:, :, :2], Q, Q[:, :, :4], None, False, 0.0, True), {}),
    "lengths of key and value differ ": ("efficient", (Q[:, :, :4], Q, Q[:, :, :2], None, False, 0.0, True), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_handed_on(case: str) -> None:
    backend, arguments, options = REFUSED[case]
    own = override(f"_scaled_dot_product_{backend}_attention")
    assert own("keys", *arguments, **options)[0] == "torch's"
    assert own.original.calls == [(arguments, options)]
    assert cufa.stats().handed_on == {case.strip(): 1}
    assert not cufa.stats().launches
    own.original = None
    with pytest.raises(
        NotImplementedError, match=rf"not served \({re.escape(case.strip())}\), and torch has no kernel"
    ):
        own("keys", *arguments, **options)


FLASH = (None, None, 8, 8, 0.0, False, False)
ROWS = Q.transpose(1, 2)
OFFSETS = torch.tensor([0, 8], dtype=torch.int32)


DENSE = (ROWS, ROWS, ROWS, *FLASH)


def of_offsets(offsets_q: Any, offsets_k: Any = OFFSETS) -> tuple[Any, ...]:
    return (ROWS[0], ROWS[0], ROWS[0], offsets_q, offsets_k, *FLASH[2:])


@pytest.mark.parametrize(
    ("reason", "arguments", "options"),
    [
        ("block_table", DENSE, {"block_table": OFFSETS}),
        ("return_debug_mask", (*DENSE[:-1], True), {}),
        ("seqused_k", DENSE, {"seqused_k": OFFSETS[1:]}),
        ("offsets of queries or of keys alone", of_offsets(OFFSETS, None), {}),
        ("offsets of queries or of keys alone", of_offsets(None), {}),
        ("num_splits of packed sequences", of_offsets(OFFSETS), {"num_splits": 1}),
        ("offsets or seqused_k not int32", of_offsets(OFFSETS.long()), {}),
        ("offsets or seqused_k not int32", of_offsets(OFFSETS, OFFSETS.long()), {}),
        ("offsets or seqused_k not int32", of_offsets(OFFSETS), {"seqused_k": OFFSETS[1:].long()}),
        ("shapes of the offsets", of_offsets(OFFSETS[None]), {}),
        ("shapes of the offsets", of_offsets(OFFSETS, OFFSETS[:1]), {}),
        ("shape of seqused_k", of_offsets(OFFSETS), {"seqused_k": OFFSETS}),
        ("alibi_slopes not float32", DENSE, {"alibi_slopes": torch.ones(2).double()}),
        ("shape of alibi_slopes", DENSE, {"alibi_slopes": torch.ones(3)}),
        ("shape of alibi_slopes", of_offsets(OFFSETS), {"alibi_slopes": torch.ones(2, 2)}),
        ("dropout", (ROWS, ROWS, ROWS, *FLASH[:4], 0.5, False, False), {}),
        ("head dims of query and value differ", (ROWS, ROWS, ROWS[..., :8], *FLASH), {}),
        ("query, key or value not of 3 dimensions", (ROWS, *of_offsets(OFFSETS)[1:]), {}),
        ("refused: attention_varlen: cu_seqlens_q holds N", of_offsets(OFFSETS + 1), {}),
    ],
)
def test_what_flash_does_not_serve_is_handed_on(reason: str, arguments: Any, options: Any) -> None:
    own = override("_flash_attention_forward")
    own("keys", *arguments, **options)
    assert cufa.stats().handed_on == {reason: 1}
    own("keys", *DENSE, num_splits=1)
    own("keys", *of_offsets(OFFSETS), alibi_slopes=torch.ones(1, 2), seqused_k=OFFSETS[1:])
    assert cufa.stats().handed_on == {reason: 1}, "rows of dense arrays depend on none of another sequence"


def test_a_result_that_does_not_do_is_handed_on() -> None:
    if not hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        pytest.skip("not in this version of torch")
    own = override("_flash_attention_forward_no_dropout_inplace")
    memory = ROWS.clone()
    for reason, out, q in (
        ("out of another shape or dtype", ROWS[..., :8].clone(), ROWS),
        ("out of another shape or dtype", ROWS.double(), ROWS),
        ("refused: attention: out overlaps q", memory, memory),
        (
            "refused: attention: out has strides (N, N, N, N), by which its elements share memory",
            memory[:, :1].expand(ROWS.shape),
            ROWS,
        ),
    ):
        before = out.clone()
        assert own("keys", out, q, ROWS, ROWS, *FLASH)[0] == "torch's"
        assert cufa.stats(reset=True).handed_on == {reason: 1}
        assert torch.equal(out, before)
    own("keys", memory, ROWS, ROWS, ROWS, *FLASH)
    assert not cufa.stats().handed_on


def test_tensors_of_several_devices_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter:
        """Says that offsets are on another device."""

        def view(self, tensor: Any) -> Any:
            pointer, layout = adapter.view(tensor)
            return pointer, (*layout[:4], torch.device("cuda", 1) if tensor.ndim == 1 else layout[4], *layout[5:])

    adapter = provider._adapter
    monkeypatch.setattr(provider, "_adapter", Adapter())
    override("_flash_attention_forward")("keys", *of_offsets(OFFSETS))
    assert cufa.stats().handed_on == {"tensors on several devices": 1}


@pytest.mark.parametrize("name", ["_scaled_dot_product_cudnn_attention", "_flash_attention_forward"])
def test_tensors_without_memory_are_handed_on(name: str) -> None:
    own = override(name)
    freed = Q.clone()
    freed.untyped_storage().resize_(0)

    def call(x: Any) -> Any:
        own("keys", x, x, x, *((None, False) if "dot" in name else FLASH))
        return x

    call(freed)
    call(torch.empty_like(Q, device="meta"))
    torch.vmap(call)(Q[None])
    assert cufa.stats().handed_on == {"tensors that have no memory of their own": 3}
    assert torch.is_grad_enabled()


def test_what_torch_calls_on_its_way_is_its_own() -> None:
    """Its kernel of one operation calls another, which is not served, and not counted, a second time."""
    outer, inner = override("_scaled_dot_product_flash_attention"), override("_flash_attention_forward")
    outer.original.within = lambda: inner("keys", ROWS, ROWS, ROWS, *FLASH)
    assert outer("keys", Q, Q, Q, 0.5) == ("torch's", ("torch's", None))
    assert cufa.stats().handed_on == {"dropout": 1}
    assert not cufa.stats().launches
    inner("keys", ROWS, ROWS, ROWS, *FLASH)
    assert cufa.stats().launches == {"cpu (attention)": 1}
    outer.original.within = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        outer("keys", Q, Q, Q, 0.5)
    inner("keys", ROWS, ROWS, ROWS, *FLASH)
    assert cufa.stats().launches == {"cpu (attention)": 2}


def test_torch_gets_what_it_had_and_its_kernels_back() -> None:
    """By the one fused operation of which a torch without CUDA has a kernel."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    operation = getattr(aten, name)
    q = random(1, 2, 8, 16, seed=1, grad=True)

    def serve(query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **more: Any) -> Any:
        if is_causal:
            raise provider.NotServed("causal")
        return query * 2, query[..., 0] * 2

    def everything() -> Any:
        out = operation(q, q, q, 0.0, True, scale=0.3)[0]
        return [*torch.autograd.grad(out.sum(), q), out.detach(), operation(q, q, q)[0].detach()]

    before = everything()
    own = provider.Override(name, serve, "CPU")
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings(action="ignore"):  # that a kernel is overridden
        library.impl(name, own, "CPU", with_keyset=True)
    within = everything()
    library._destroy()
    after = everything()
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, before[:2], within[:2]))
    assert torch.equal(within[2], q.detach() * 2)
    assert cufa.stats().handed_on == {"causal": 1}


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("place", ["check", "checked", "compute"])
@pytest.mark.parametrize(
    "error",
    [
        cufa.CompileError("no compiler"),
        TypeError("'NoneType' object is not iterable"),
        ValueError("not enough values to unpack"),
        AssertionError(),
        AttributeError("no attribute"),
        KeyError("q"),
    ],
)
def test_errors_are_not_handed_on(monkeypatch: pytest.MonkeyPatch, place: str, error: Exception) -> None:
    provider._problem_of.cache_clear()
    monkeypatch.setattr(provider if place == "compute" else provider._problem, place, raising(error))
    own = override("_scaled_dot_product_flash_attention")
    with pytest.raises(type(error)) as found:
        own("keys", Q, Q, Q)
    assert found.value is error
    assert not own.original.calls
    assert not cufa.stats().handed_on
    assert torch.is_grad_enabled()
    assert not provider._state.handing_on


@pytest.mark.parametrize("place", ["check", "checked", "compute"])
@pytest.mark.parametrize("kind", [ArgumentError, UnsupportedError])
def test_what_cufa_refuses_beyond_is_counted_in_its_words(
    monkeypatch: pytest.MonkeyPatch, place: str, kind: type[Exception]
) -> None:
    provider._problem_of.cache_clear()
    error = kind("attention: 1.5e+10 float16 tiles (2, 34) of cuda:0 are too many; split the batch.")
    monkeypatch.setattr(provider if place == "compute" else provider._problem, place, raising(error))
    own = override("_scaled_dot_product_flash_attention")
    assert own("keys", Q, Q, Q)[0] == "torch's"
    assert cufa.stats().handed_on == {
        "refused: attention: N float16 tiles (N, N) of cuda:N are too many": 1,
    }


def test_refusals_of_any_sizes_have_one_reason() -> None:
    for rows in range(1, 8):
        _, (name, arguments) = both("flash", Q, Q, Q)
        override(name)("keys", *arguments[:5], torch.zeros(1, 2, rows), *arguments[6:])
    reason = "refused: attention_backward: lse has shape (N, N, N)"
    assert cufa.stats().handed_on == {reason: 7}


def test_what_has_its_negative_bit_set_is_handed_on() -> None:
    override("_scaled_dot_product_flash_attention")("keys", Q, torch.complex(Q, Q).conj().imag, Q)
    assert cufa.stats().handed_on == {"refused: cufa: a torch tensor has its negative bit set": 1}


# --- Both of a forward and its gradients, or neither -------------------------------------------------

OPERATIONS = (*BACKENDS, "dense", "packed")
"""The last two are flash attention of rows before heads."""


def both(
    kind: str,
    q: Any,
    k: Any,
    v: Any,
    dropout: float = 0.0,
    is_causal: bool = False,
    bias: Any = None,
    results: tuple[Any, Any, Any] | None = None,
) -> list[tuple[str, tuple[Any, ...]]]:
    """An operation and that of its gradients, each with its arguments, of tensors with heads before rows.

    `results` are out, lse and the gradient by out.
    """
    rows, keys = q.shape[2], k.shape[2]
    zeros = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    out, lse, dout = results or (zeros, torch.zeros(q.shape[:3]), zeros)
    seed = torch.zeros(())
    if kind in ("dense", "packed"):
        q, k, v, out, dout = (each.transpose(1, 2) for each in (q, k, v, out, dout))
        offsets = [None, None]
        if kind == "packed":
            q, k, v, out, dout, lse = (each[0] for each in (q, k, v, out, dout, lse))
            offsets = [torch.tensor([0, each], dtype=torch.int32) for each in (rows, keys)]
        options = (*offsets, rows, keys, dropout, is_causal)
        return [
            ("_flash_attention_forward", (q, k, v, *options, False)),
            ("_flash_attention_backward", (dout, q, k, v, out, lse, *options, seed, seed)),
        ]
    forward: tuple[Any, ...] = (q, k, v, bias, True, dropout, is_causal)
    backward: tuple[Any, ...] = (dout, q, k, v)
    if kind == "flash":
        forward = (q, k, v, dropout, is_causal)
        backward += (out, lse, None, None, rows, keys, dropout, is_causal, seed, seed)
    elif kind == "cudnn":
        backward += (out, lse[..., None], seed, seed, bias, None, None, rows, keys, dropout, is_causal)
    else:
        backward += (bias, out, lse, seed, seed, dropout, [True, True, True, False], is_causal)
    name = f"_scaled_dot_product_{kind}_attention"
    return [(name, forward), (f"{name}_backward", backward)]


TWO = random(2, 2, 8, 16, seed=1)
THREE = random(1, 3, 8, 16, seed=1)
LONG = Q[:, :, :1, :1].expand(1, 2, 1 << 30, 1)
MISFITS: dict[str, tuple[Any, ...]] = {
    "dropout": (Q, Q, Q, 0.5),
    "dtype float64": (Q.double(), Q.double(), Q.double()),
    "dtypes of query, key and value differ": (Q, Q.half(), Q),
    "dtypes of query, key and value differ ": (Q, Q, Q.half()),
    "head_dim above 256": (WIDE, WIDE, WIDE),
    "no elements": (Q[:, :, :0], Q, Q),
    "no elements ": (Q, Q[:, :0], Q[:, :0]),
    "head dims of query and key differ": (Q, Q[..., :8], Q),
    "batch sizes differ": (TWO, Q, Q),
    "batch sizes differ ": (Q, Q, TWO),
    "lengths of key and value differ": (Q, Q, Q[:, :, :4]),
    "lengths of key and value differ ": (Q[:, :, :2], Q, Q[:, :, :4], 0.0, True),
    "numbers of heads of key and value differ": (Q, Q, Q[:, :1]),
    "heads of query not a multiple of those of key": (THREE, Q, Q),
    "heads of query not a multiple of those of key ": (Q[:, :1], Q, Q),
    "more than 1073741823 rows": (Q[..., :1], LONG, LONG, 0.0, True),
    "attn_mask": (Q, Q, Q, 0.0, False, torch.zeros(8, 8)),
}


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("reason", MISFITS)
def test_gradients_are_handed_on_with_their_forward(kind: str, reason: str) -> None:
    given = MISFITS[reason]
    if (reason == "attn_mask" and kind not in ("cudnn", "efficient")) or (kind == "packed" and "batch" in reason):
        return  # which the operation knows nothing of
    for name, arguments in both(kind, *given):
        assert override(name)("keys", *arguments)[0] == "torch's"
        assert cufa.stats(reset=True).handed_on == {reason.strip(): 1}, name


@pytest.mark.parametrize("kind", OPERATIONS)
def test_tensors_of_another_rank_are_handed_on(kind: str) -> None:
    for first, (name, arguments) in enumerate(both(kind, Q, Q, Q)):  # of gradients, dout comes before query
        for index in range(first, first + 3):
            for other in (arguments[index][None], torch.zeros(())):
                given = [*arguments]
                given[index] = other
                assert override(name)("keys", *given)[0] == "torch's"
        reason = f"query, key or value not of {3 if kind == 'packed' else 4} dimensions"
        assert cufa.stats(reset=True).handed_on == {reason: 6}, name


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("q", "k"),
    [
        (Q, Q),
        (Q, Q[:, :1]),
        (Q[:, :, :3], Q),
        (Q, Q[:, :, :3]),
        (Q[:, :, :1], Q),
        (Q[..., :5], Q[..., :5]),
        (Q[..., ::2], Q[..., ::2]),
        (Q[:, :, ::2], Q[:, :1].expand(1, 2, 8, 16)),
        (random(1, 6, 8, 256, seed=1), random(1, 2, 8, 256, seed=2)),
        (Q.half(), Q.half()),
        (Q.bfloat16(), Q.bfloat16()),
    ],
)
def test_gradients_are_served_with_their_forward(kind: str, is_causal: bool, q: Any, k: Any) -> None:
    for name, arguments in both(kind, q, k, k, 0.0, is_causal):
        assert override(name)("keys", *arguments)[0] != "torch's"
    assert not cufa.stats().handed_on
    assert sum(cufa.stats().launches.values()) == 2


@pytest.mark.parametrize("kind", OPERATIONS)
def test_gradients_are_those_of_any_forward(kind: str) -> None:
    """A forward alone is told some of what it is handed on for, and torch's out and lse say the same as cufa's."""
    q, k, v = (random(1, 2, 8, 16, seed=seed, grad=True) for seed in (1, 2, 3))
    out, lse = exact(q, k, v)
    dout = random(1, 2, 8, 16, seed=9)
    wanted = torch.autograd.grad(out, (q, k, v), dout.double())
    results = out.detach().float(), lse.detach().float(), dout
    _, (name, arguments) = both(kind, q.detach(), k.detach(), v.detach(), results=results)
    for one, other in zip(override(name)("keys", *arguments)[:3], wanted, strict=True):
        if kind == "packed":
            one = one[None]
        if kind in ("dense", "packed"):
            one = one.transpose(1, 2)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_gradients_by_nothing_are_handed_on(kind: str) -> None:
    """torch's kernels answer them with nothing."""
    _, (name, arguments) = both(kind, Q, Q, Q)
    assert override(name)("keys", None, *arguments[1:])[0] == "torch's"
    assert cufa.stats().handed_on == {"no gradient by the result": 1}


# --- Activation -------------------------------------------------------------------------------------


def test_activation() -> None:
    current = torch.nn.attention.current_flash_attention_impl
    assert provider.NAME in torch.nn.attention.list_flash_attention_impls()
    assert current() is None
    provider.deactivate()
    provider.activate()
    provider.activate()
    assert current() == "CUFA"
    provider.deactivate()
    assert current() is None
    with provider.activate():
        assert current() == "CUFA"
        with provider.activate():
            assert current() == "CUFA"
        assert current() == "CUFA"
    assert current() is None
    with pytest.raises(ZeroDivisionError), provider.activate():
        raise ZeroDivisionError
    assert current() is None
    with provider.activate():
        provider.deactivate()
        assert current() is None
    torch.nn.attention.activate_flash_attention_impl("CUFA")
    assert current() == "CUFA"
    with provider.activate():
        torch.nn.attention.restore_flash_attention_impl()
    assert current() == "CUFA", "it was before"
    provider.deactivate()


def test_activation_restores_another_implementation() -> None:
    events: list[str] = []

    class Handle:
        def remove(self) -> None:
            events.append("removed")

    def register() -> Handle:
        events.append("registered")
        return Handle()

    torch.nn.attention.register_flash_attention_impl("another", register_fn=register)
    torch.nn.attention.activate_flash_attention_impl("another")
    with provider.activate():
        assert events == ["registered", "removed"]
        assert torch.nn.attention.current_flash_attention_impl() == "CUFA"
    assert torch.nn.attention.current_flash_attention_impl() == "another"
    provider.deactivate()
    assert torch.nn.attention.current_flash_attention_impl() == "another", "which is not cufa"
    torch.nn.attention.restore_flash_attention_impl()


def test_an_activation_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def impl(self: Any, name: str, *_: Any, **__: Any) -> None:
        done.append(name)
        if len(done) == 4:
            raise RuntimeError("no more")

    done: list[str] = []
    monkeypatch.setattr(torch.library.Library, "impl", impl)
    with pytest.raises(RuntimeError, match="no more"):
        provider.activate()
    monkeypatch.undo()
    assert torch.nn.attention.current_flash_attention_impl() is None
    with provider.activate():
        pass
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(UnsupportedError, match=r"^cufa.torch: torch .* is not supported; a version for CUDA"):
        provider.activate()


def test_without_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_registry", None)
    assert provider._current() is None
    with provider.activate():
        assert provider._current() == "CUFA"
    assert provider._current() is None
    provider.activate()
    provider.deactivate()
    assert provider._current() is None


def test_overrides_come_and_go() -> None:
    q = random(1, 2, 8, 16, seed=1)
    held: list[list[weakref.ref[Any]]] = []
    for _ in range(3):
        handle = provider.Handle("CPU")
        assert sdpa("flash", q, q, q)[0].shape == q.shape
        handle.remove()
        handle.remove()
        with pytest.raises(NotImplementedError):
            sdpa("flash", q, q, q)
        held.append([weakref.ref(each) for each in (handle, *handle.overrides)])
        del handle
    gc.collect()
    # torch itself keeps the function that an operation had last, and nothing before it.
    assert not any(each() for each in (*held[0], *held[1], held[2][0]))
    assert cufa.stats().launches == {"cpu (attention)": 3}


@pytest.mark.usefixtures("on_cpu")
def test_threads() -> None:
    q = random(1, 2, 8, 16, seed=1)
    right, _ = exact(q, q, q)
    found: list[Any] = []

    def work() -> None:
        for _ in range(20):
            found.append(sdpa("cudnn", q, q, q)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.allclose(out.double(), right, atol=1e-5) for out in found)
    assert cufa.stats().launches == {"cpu (attention)": 80}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop:UserWarning")
def test_in_what_torch_compiles_records_and_transforms(backend: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def program(q: Any) -> Any:
        return sdpa(backend, q, q * 2.0, q, is_causal=True)[0] * 2.0

    q = random(2, 2, 8, 16, seed=1, grad=True)
    right = program(q)
    (wanted,) = torch.autograd.grad(right.sum(), q)
    plain, right = q.detach(), right.detach()
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)(q)
    torch._dynamo.reset()
    for found in (compiled.detach(), make_fx(program)(plain)(plain)):
        torch.testing.assert_close(found, right)
    if backend == "efficient":  # the operations of the others torch cannot trace by themselves
        torch.testing.assert_close(torch.jit.trace(program, (plain,))(plain), right)
    with torch.inference_mode():
        torch.testing.assert_close(program(plain), right)
    for gradient in (
        *torch.autograd.grad(compiled.sum(), q),
        *torch.autograd.grad(torch.utils.checkpoint.checkpoint(program, q, use_reentrant=False).sum(), q),
        torch.func.grad(lambda q: program(q).sum())(plain),
    ):
        torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(torch.vmap(program)(torch.stack([plain, plain]))[1], right)
    assert not cufa.stats().handed_on


# --- On a GPU ---------------------------------------------------------------------------------------


def on_gpu(*shape: int, seed: int, dtype: Any = None, grad: bool = True) -> Any:
    return random(*shape, seed=seed, dtype=dtype or torch.float16).cuda().requires_grad_(grad)


def launched() -> tuple[int, int]:
    """How many forwards and how many gradients cufa computed since it was last asked."""
    found = cufa.stats(reset=True).launches
    starts = ("attention_forward", "attention_backward")
    first, second = (sum(count for name, count in found.items() if name.startswith(start)) for start in starts)
    return first, second


@contextlib.contextmanager
def chosen(backend: str) -> Iterator[None]:
    """Let torch choose a backend, or its own order if that is the default."""
    if backend == "default":
        yield
        return
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, names[backend])):
        yield


def functional(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


def math(q: Any, k: Any, v: Any, **options: Any) -> Any:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return functional(q.double(), k.double(), v.double(), **options)


def assert_as_math(backend: str, q: Any, k: Any, v: Any, tolerance: float = 5e-3, **options: Any) -> None:
    with chosen(backend):
        try:
            out = functional(q, k, v, **options)
        except RuntimeError as error:
            if "No available kernel" in str(error) and not cufa.stats().launches:
                pytest.skip(f"torch has no {backend} here")
            raise
    right = math(q, k, v, **options)
    torch.testing.assert_close(out, right, atol=tolerance, rtol=tolerance, check_dtype=False)
    assert_equal_gradients(out, right, (q, k, v), 4 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["default", *BACKENDS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_runs_on_cufa(backend: str, dtype: str, is_causal: bool) -> None:
    q, k, v = (on_gpu(2, 4, 200, 64, seed=seed, dtype=getattr(torch, dtype)) for seed in (1, 2, 3))
    with provider.activate():
        assert_as_math(backend, q, k, v, 5e-3 if dtype == "float16" else 4e-2, is_causal=is_causal)
    assert not cufa.stats().handed_on
    assert launched() == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "keys"), [(70, 200), (200, 70), (1, 64)])
@pytest.mark.parametrize("backend", ["default", "cudnn", "efficient"])
def test_sdpa_aligns_causality_to_the_first_key(backend: str, rows: int, keys: int) -> None:
    q = on_gpu(2, 4, rows, 64, seed=1)
    k, v = (on_gpu(2, 4, keys, 64, seed=seed) for seed in (2, 3))
    with provider.activate():
        assert_as_math(backend, q, k, v, is_causal=True)
    assert backend == "default" or launched() == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_sdpa_of_grouped_heads(backend: str) -> None:
    q = on_gpu(2, 8, 100, 64, seed=1)
    k, v = (on_gpu(2, 2, 100, 64, seed=seed) for seed in (2, 3))
    with provider.activate():
        assert_as_math(backend, q, k, v, enable_gqa=True, is_causal=True)
    assert launched() == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [50, 128, 256])
def test_sdpa_of_other_widths(head_dim: int) -> None:
    q, k, v = (on_gpu(1, 2, 100, head_dim, seed=seed) for seed in (1, 2, 3))
    with provider.activate():
        assert_as_math("flash", q, k, v, is_causal=True)
    assert launched() == (1, 1)


@pytest.mark.gpu
def test_sdpa_of_float32() -> None:
    q, k, v = (on_gpu(1, 2, 100, 64, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    with provider.activate():
        assert_as_math("efficient", q, k, v, 1e-4)
    assert launched() == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_masks_are_handed_on(backend: str) -> None:
    q, k, v = (on_gpu(2, 4, 64, 64, seed=seed) for seed in (1, 2, 3))
    mask = (torch.rand(2, 1, 64, 64, device="cuda") < 0.7) | torch.eye(64, dtype=torch.bool, device="cuda")
    with provider.activate():
        assert_as_math(backend, q, k, v, attn_mask=mask)
    found = cufa.stats()
    assert found.handed_on == {"attn_mask": 2}
    assert not found.launches


@pytest.mark.gpu
def test_dropout_is_handed_on() -> None:
    q, k, v = (on_gpu(2, 4, 64, 64, seed=seed) for seed in (1, 2, 3))
    with provider.activate(), chosen("flash"):
        functional(q, k, v, dropout_p=0.5).sum().backward()
    assert cufa.stats().handed_on == {"dropout": 2}
    assert launched() == (0, 0)


@pytest.mark.gpu
def test_torch_has_its_kernels_back() -> None:
    q, k, v = (on_gpu(2, 4, 64, 64, seed=seed) for seed in (1, 2, 3))
    before = functional(q, k, v)
    with provider.activate():
        functional(q, k, v)
        assert launched() == (1, 0)
    assert torch.equal(functional(q, k, v), before)
    assert launched() == (0, 0)
    for backend in BACKENDS:  # gradients by the kernels of the other
        with contextlib.suppress(pytest.skip.Exception):
            with provider.activate(), chosen(backend):
                try:
                    out = functional(q, k, v, is_causal=True)
                except RuntimeError:
                    continue
            assert_equal_gradients(out, math(q, k, v, is_causal=True), (q, k, v), 2e-2)
            assert launched() == (1, 0)
            with chosen(backend):
                out = functional(q, k, v, is_causal=True)
            with provider.activate():
                assert_equal_gradients(out, math(q, k, v, is_causal=True), (q, k, v), 2e-2)
            assert launched() == (0, 1)


@pytest.mark.gpu
def test_multihead_attention() -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(256, 4, batch_first=True, device="cuda", dtype=torch.float16)
    x = on_gpu(2, 100, 256, seed=1)
    right = layer(x, x, x, need_weights=False)[0]
    (wanted,) = torch.autograd.grad(right.sum(), x)
    with provider.activate():
        out = layer(x, x, x, need_weights=False)[0]
        (found,) = torch.autograd.grad(out.sum(), x)
        assert launched() == (1, 1)
        layer.eval()
        with torch.no_grad():
            quiet = layer(x, x, x, need_weights=False)[0]
        assert launched()[0] == 1
    for one, other in ((out, right), (found, wanted), (quiet, right)):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_varlen_attn_on_a_gpu() -> None:
    varlen: Any = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v, offsets_q, offsets_k = packed()
    q, k, v = (each.detach()[: 12 if each is q else 19].half().cuda().requires_grad_() for each in (q, k, v))
    k, v = (each.detach().repeat_interleave(2, 1).requires_grad_() for each in (k, v))
    arguments = (q, k, v, offsets_q.cuda(), offsets_k.cuda(), 8, 10)
    right = varlen.varlen_attn(*arguments)
    wanted = torch.autograd.grad(right.sum(), (q, k, v))
    with provider.activate():
        out = varlen.varlen_attn(*arguments)
        found = torch.autograd.grad(out.sum(), (q, k, v))
    assert launched() == (1, 1)
    for one, other in zip((out, *found), (right, *wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_jagged_tensors() -> None:
    parts = [on_gpu(length, 4, 64, seed=length, grad=False) for length in (5, 40, 17)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with chosen("flash"):
        right = functional(nested, nested, nested)
        with provider.activate():
            out = functional(nested, nested, nested)
    assert launched() == (1, 0)
    torch.testing.assert_close(out.values(), right.values(), atol=5e-3, rtol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["default", *BACKENDS])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    q = on_gpu(2, 100, 4, 64, seed=1)
    k, v = (on_gpu(2, 4, 100, 64, seed=seed) for seed in (2, 3))

    def program(q: Any, k: Any, v: Any) -> Any:
        return functional(q.transpose(1, 2) * 1.0, k, v, is_causal=True) * 2.0

    compiled = torch.compile(program, fullgraph=True)
    with chosen(backend):
        with provider.activate():
            try:
                out = compiled(q, k, v)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    pytest.skip(f"torch has no {backend} here")
                raise
            right = math(q.transpose(1, 2), k, v, is_causal=True) * 2.0
            torch.testing.assert_close(out, right, atol=1e-2, rtol=1e-2, check_dtype=False)
            assert_equal_gradients(out, right, (q, k, v), 2e-2)
        assert launched() == (1, 1)
        compiled(q, k, v)
        assert launched() == (0, 0)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    q, k, v = (on_gpu(2, 4, 128, 64, seed=seed, grad=False) for seed in (1, 2, 3))
    with provider.activate():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            functional(q, k, v)
        torch.cuda.current_stream().wait_stream(stream)
        assert launched() == (1, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = functional(q, k, v)
        assert launched() == (1, 0)
    q.copy_(on_gpu(2, 4, 128, 64, seed=7, grad=False))
    graph.replay()
    torch.testing.assert_close(out, math(q, k, v), atol=5e-3, rtol=5e-3, check_dtype=False)


@pytest.mark.gpu
def test_deterministic_gradients_on_a_gpu() -> None:
    q, k, v = (on_gpu(2, 4, 500, 64, seed=seed) for seed in (1, 2, 3))
    torch.use_deterministic_algorithms(True)
    try:
        with provider.activate(), chosen("flash"):
            runs = [torch.autograd.grad(functional(q, k, v).sum(), (q, k, v)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for run in runs for one, other in zip(run, runs[0], strict=True))
    assert any("deterministic" in name for name in cufa.stats(reset=True).launches)
