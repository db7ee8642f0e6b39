"""JAX's transformations: gradients, vmap, division among devices, export; and what replaces `jax.nn`'s attention."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling import paired, sampled
from test_problem import Launched

import cufa
from cufa._call import options as _options
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa.interop import xla

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import cufa.jax  # noqa: E402
from cufa.interop import jax as interop  # noqa: E402

COUNT = 3
"""Entries of mapped axes."""

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("gpu", id="gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where JAX computes. Gradients give the same bits every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true")
        with jax.default_device(jax.devices(request.param)[0]):
            yield request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of q of every call that XLA makes."""
    shapes: list[tuple[int, ...]] = []

    def told(known: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(frame: Any) -> None:
            if frame.stage == xla.EXECUTE:
                shapes.append(frame.kinds()[0][1])
            known(frame)

        return run

    for name in ("run_on_cpu", "run_on_gpu"):
        monkeypatch.setattr(xla, name, told(getattr(xla, name)))
    return shapes


def arrays(batch: int = 2, seqlen: int = 9, dtype: str = "float32") -> list[Any]:
    """q, k, v, sinks and slopes (heads,)."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, seqlen, 4, 16))
    k, v = rng.standard_normal((2, batch, seqlen, 2, 16))
    single = (rng.standard_normal(4), rng.random(4))
    return [*(jnp.asarray(x, dtype) for x in (q, k, v)), *(jnp.asarray(x, jnp.float32) for x in single)]


def offsets() -> dict[str, Any]:
    """Of three packed sequences, in 20 rows."""
    each = jnp.asarray([0, 4, 13, 20], jnp.int32)
    return {"cu_seqlens_q": each, "cu_seqlens_k": each, "seqused_k": jnp.asarray([4, 6, 7], jnp.int32)}


def attend(q: Any, k: Any, v: Any, sinks: Any = None, slopes: Any = None, **more: Any) -> Any:
    options = {"causal": True, "softcap": 3.0, "return_lse": True}
    return cufa.attention(q, k, v, sinks=sinks, alibi_slopes=slopes, **options, **more)


def loss(*given: Any) -> Any:
    out, lse = attend(*given)
    return (out.astype(jnp.float32) ** 2).sum() + (lse * 0.3).sum()


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (one, other)), rtol=tolerance, atol=tolerance)


def same(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (one, other)))


# --- Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_are_the_bits_of_attention_backward(device: str, dtype: str, return_lse: bool) -> None:
    q, k, v, sinks, slopes = arrays(dtype=dtype)
    options: dict[str, Any] = {"window_size": (5, 0), "softcap": 3.0, "alibi_slopes": slopes}

    def call(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        found = cufa.attention(q, k, v, sinks=sinks, return_lse=return_lse, **options)
        return found if return_lse else (found,)

    (out, *_), pull = jax.vjp(call, q, k, v, sinks)
    rng = np.random.default_rng(1)
    dout = jnp.asarray(rng.standard_normal(out.shape), dtype)
    dlse = jnp.asarray(rng.standard_normal((2, 4, 9)), jnp.float32) if return_lse else None
    out, lse = cufa.attention(q, k, v, sinks=sinks, return_lse=True, **options)
    expected = cufa.attention_backward(dout, q, k, v, out, lse, dlse=dlse, sinks=sinks, deterministic=True, **options)
    same(pull((dout, dlse) if return_lse else (dout,)), expected)
    found = jax.jit(lambda *given: jax.vjp(call, *given)[1]((dout, dlse) if return_lse else (dout,)))(q, k, v, sinks)
    same(found, expected)


def test_gradients_of_packed_sequences(device: str) -> None:
    q, k, v, sinks, _ = arrays(1, 20)
    dense, packed = (q, k, v), [x[0] for x in (q, k, v)]

    def one(*given: Any) -> Any:
        return (cufa.attention_varlen(*given[:3], **offsets(), causal=True, sinks=given[3]) ** 2).sum()

    def other(*given: Any) -> Any:
        """Sequence by sequence."""
        total = jnp.float32(0)
        for first, last, used in ((0, 4, 4), (4, 13, 6), (13, 20, 7)):
            q, k, v = given[0][:, first:last], *(x[:, first : first + used] for x in given[1:3])
            total += (cufa.attention(q, k, v, causal=True, sinks=given[3]) ** 2).sum()
        return total

    found = jax.grad(one, (0, 1, 2, 3))(*packed, sinks)
    *expected, dsinks = jax.grad(other, (0, 1, 2, 3))(*dense, sinks)
    close(found, [*(x[0] for x in expected), dsinks])


def test_gradients_equal_jax_and_finite_differences(device: str) -> None:
    q, k, v, sinks, slopes = arrays()

    def ours(*given: Any) -> Any:
        return (cufa.attention(*given, causal=True) ** 2).sum()

    def theirs(*given: Any) -> Any:
        return (jax.nn.dot_product_attention(*given, is_causal=True) ** 2).sum()

    with jax.default_matmul_precision("highest"):
        close(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(theirs, (0, 1, 2))(q, k, v), 5e-5)
    given = q, k, v, sinks
    direction = [jnp.asarray(np.random.default_rng(2).standard_normal(x.shape), x.dtype) for x in given]

    def along(step: float) -> float:
        return float(loss(*(x + step * d for x, d in zip(given, direction, strict=True)), slopes))

    gradients = jax.grad(loss, (0, 1, 2, 3))(*given, slopes)
    slope = sum(float((x * d).sum()) for x, d in zip(gradients, direction, strict=True))
    assert (along(1e-2) - along(-1e-2)) / 2e-2 == pytest.approx(slope, rel=2e-2)


def test_offsets_have_gradients_of_no_type(device: str) -> None:
    def packed(q: Any, k: Any, v: Any, given: Any) -> Any:
        return cufa.attention_varlen(q, k, v, **given).sum()

    *_, none = jax.vjp(packed, *(x[0] for x in arrays(1, 20)[:3]), offsets())[1](jnp.float32(1))
    assert {x.dtype for x in jax.tree.leaves(none)} == {jax.dtypes.float0}


def sharded(call: Callable[..., Any], q: Any, slopes: Any, checked: bool = True) -> Any:
    mesh = jax.sharding.Mesh(np.asarray([jax.config.jax_default_device]), ("x",))
    part = {"in_specs": (jax.P("x"), jax.P()), "out_specs": jax.P(), "check_vma": checked}
    return jax.shard_map(lambda *x: jax.lax.psum(call(*x), "x"), mesh=mesh, **part)(q, slopes)


WAYS: dict[str, Callable[..., Any]] = {
    "plain": lambda call, q, s: call(q, s),
    "jit": lambda call, q, s: jax.jit(call)(q, s),
    "constant": lambda call, q, s: jax.jit(lambda q: call(q, s))(q),
    "checkpoint": lambda call, q, s: jax.checkpoint(call)(q, s),
    "checkpoint of jit": lambda call, q, s: jax.checkpoint(jax.jit(call))(q, s),
    "computed": lambda call, q, s: call(*jax.jit(lambda *x: (2 * x[0], 2 * x[1]))(q, s)),
    "vmap": lambda call, q, s: jax.vmap(call, (0, None))(jnp.stack([q, q]), s).sum(),
    "vmap of both": lambda call, q, s: jax.vmap(call)(jnp.stack([q, q]), jnp.stack([s, s])).sum(),
    "scan": lambda call, q, s: jax.lax.scan(lambda x, _: (x * call(x, s), None), q, None, length=2)[0].sum(),
    "scan of xs": lambda call, q, s: jax.lax.scan(lambda x, s: (x * call(x, s), None), q, jnp.stack([s, s]))[0].sum(),
    "scan of checkpoint": lambda call, q, s: WAYS["scan"](jax.checkpoint(call), q, s),
    "carried": lambda call, q, s: jax.lax.fori_loop(0, 2, lambda _, x: (x[0] * call(*x), x[1]), (q, s))[0].sum(),
    "cond": lambda call, q, s: jax.lax.cond(s[0] > -1, call, lambda q, s: q.sum() + s.sum(), q, s),
    "shard_map": sharded,
    "unchecked shard_map": partial(sharded, checked=False),
}
"""How a function of q and slopes may be called, and still be differentiated by q alone."""


@pytest.mark.parametrize("way, packed", sampled([*((way, False) for way in WAYS), ("jit", True)]))
def test_what_has_no_gradient_is_refused(device: str, way: str, packed: bool) -> None:
    """And nothing is that is not differentiated."""
    q, k, v, _, slopes = arrays(1, 20)

    def call(q: Any, slopes: Any) -> Any:
        if packed:
            return cufa.attention_varlen(q[0], k[0], v[0], **offsets(), alibi_slopes=slopes).mean()
        return cufa.attention(q, k, v, alibi_slopes=slopes).mean()

    def loss(q: Any, slopes: Any) -> Any:
        return WAYS[way](call, q, slopes)

    def stopped(q: Any, slopes: Any) -> Any:
        return WAYS[way](lambda q, slopes: call(q, jax.lax.stop_gradient(slopes)), q, slopes)

    expected = jax.grad(stopped)(q, slopes)
    assert expected.any()
    name = "attention_varlen" if packed else "attention"
    sentence = rf"^{name}: alibi_slopes is differentiated, but .*; pass jax\.lax\.stop_gradient\(alibi_slopes\)\."
    for wrap in sampled((lambda f: f, jax.jit), [*WAYS].index(way) + packed):
        close(wrap(jax.grad(loss))(q, slopes), expected)
        for by in (1, (0, 1)):
            with pytest.raises(cufa.UnsupportedError, match=sentence):
                wrap(jax.grad(loss, by))(q, slopes)
        close(wrap(jax.grad(stopped, (0, 1)))(q, slopes)[0], expected)
        close(wrap(jax.grad(jax.checkpoint(loss)))(q, slopes), expected)  # which traces anew


def test_results_of_one_barrier_are_differentiated_together() -> None:
    """As JAX has it: slopes are told apart behind it."""
    q, k, v, _, slopes = arrays()

    def call(q: Any, stop: Callable[[Any], Any]) -> Any:
        q, behind = jax.lax.optimization_barrier((q, slopes))
        return cufa.attention(q, k, v, alibi_slopes=stop(behind)).sum()

    with pytest.raises(cufa.UnsupportedError, match=r"^attention: alibi_slopes is differentiated"):
        jax.grad(call)(q, lambda x: x)
    assert jax.grad(partial(call, stop=jax.lax.stop_gradient))(q).any()


def test_a_cotangent_of_one_result_only(device: str, calls: list[Any]) -> None:
    given = arrays()
    both = jax.grad(lambda *x: sum(map(jnp.sum, attend(*x))), (0, 1, 2, 3))(*given)
    apart = [jax.grad(lambda *x, i=i: attend(*x)[i].sum(), (0, 1, 2, 3))(*given) for i in (0, 1)]
    close([one + other for one, other in zip(*apart, strict=True)], both)  # which waits
    calls.clear()
    jax.block_until_ready(jax.grad(lambda *x: attend(*x)[0].sum())(*given))
    assert len(calls) == 2


def test_gradients_through_scan_and_checkpoint(device: str) -> None:
    q, k, v, *_ = arrays()
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))

    def layers(q: Any, wrap: Callable[..., Any]) -> Any:
        layer = wrap(lambda x: x + cufa.attention(x, k, v, causal=True))
        return (jax.lax.scan(lambda x, _: (layer(x), None), q, None, length=3)[0] ** 2).sum()

    expected = jax.grad(lambda q: (unrolled(q) ** 2).sum())

    def unrolled(x: Any) -> Any:
        for _ in range(3):
            x = x + jax.nn.dot_product_attention(x, k, v, is_causal=True)
        return x

    with jax.default_matmul_precision("highest"):
        for wrap in (lambda f: f, jax.checkpoint):
            close(jax.jit(jax.grad(lambda q, wrap=wrap: layers(q, wrap)))(q), expected(q), 2e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops --xla_dump_to=x", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ],
)
def test_gradients_are_deterministic_where_xla_is(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert interop._deterministic() is expected


def test_other_derivatives_are_refused() -> None:
    q, k, v, *_ = arrays()

    def call(q: Any) -> Any:
        return cufa.attention(q, k, v).sum()

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(call, (q,), (q,))
    for second in (jax.hessian(call), jax.grad(lambda q: jax.grad(call)(q).sum())):
        with pytest.raises(cufa.UnsupportedError, match=r"computes first derivatives only, in reverse mode"):
            second(q)


# --- vmap -------------------------------------------------------------------------------------------


def stacked(array: Any) -> Any:
    return jnp.stack([array * (1 + 0.1 * index) for index in range(COUNT)])


def mapped(axes: tuple[int | None, ...], per_batch: bool) -> tuple[list[Any], list[list[Any]]]:
    """Arguments of `attend`, of which some have a mapped axis, and those of each entry; slopes may have a batch."""
    given = arrays(seqlen=5)
    if per_batch:
        given[4] = given[4] * jnp.asarray([[1.0], [2.0]])
    given = [x if axis is None else stacked(x) for x, axis in zip(given, axes, strict=True)]
    return given, [[x if axis is None else x[i] for x, axis in zip(given, axes, strict=True)] for i in range(COUNT)]


ALL_AXES = [axes for axes in itertools.product((0, None), repeat=5) if 0 in axes]


@pytest.mark.parametrize("axes", ALL_AXES, ids=str)
def test_vmap_is_one_call(device: str, calls: list[Any], axes: tuple[int | None, ...]) -> None:
    given, each = mapped(axes, per_batch=axes[0] is None)
    expected = jax.block_until_ready([attend(*one) for one in each])
    calls.clear()
    found = jax.block_until_ready(jax.vmap(attend, axes)(*given))
    assert len(calls) == 1
    close(found, [jnp.stack(x) for x in zip(*expected, strict=True)])


@pytest.mark.parametrize("axes", [ALL_AXES[0], ALL_AXES[3], ALL_AXES[13], ALL_AXES[-2], ALL_AXES[-4]], ids=str)
def test_gradients_and_vmap_are_two_calls(device: str, calls: list[Any], axes: tuple[int | None, ...]) -> None:
    given, each = mapped(axes, per_batch=False)
    numbers = (0, 1, 2, 3)
    apart = [jnp.stack(x) for x in zip(*(jax.grad(loss, numbers)(*one) for one in each), strict=True)]
    jax.block_until_ready(apart)
    calls.clear()
    found = jax.block_until_ready(jax.vmap(jax.grad(loss, numbers), axes)(*given))
    assert len(calls) == 2
    close(found, apart, 1e-4)
    calls.clear()
    found = jax.block_until_ready(jax.grad(lambda *x: jax.vmap(loss, axes)(*x).sum(), numbers)(*given))
    assert len(calls) == 2
    close(found, [x.sum(0) if axis is None else x for x, axis in zip(apart, axes, strict=False)], 1e-4)


def test_vmaps_of_vmaps(device: str, calls: list[Any]) -> None:
    q, k, v, *_ = arrays()
    given = [jnp.stack([stacked(x), -stacked(x)]) for x in (q, k, v)]
    expected = [jax.grad(loss, (0, 1, 2))(*(x[i, j] for x in given)) for i in range(2) for j in range(COUNT)]
    jax.block_until_ready(expected)
    calls.clear()
    found = jax.block_until_ready(jax.vmap(jax.vmap(jax.grad(loss, (0, 1, 2))))(*given))
    assert len(calls) == 2
    close(
        [x.reshape(2 * COUNT, *x.shape[2:]) for x in found], [jnp.stack(x) for x in zip(*expected, strict=True)], 1e-4
    )


def test_vmap_of_packed_sequences(device: str, calls: list[Any]) -> None:
    """Arrays fold into the heads. Offsets do not fold: a loop."""
    q, k, v, *_ = (x[0] for x in arrays(1, 20))
    given = [stacked(x) for x in (q, k, v)]

    def call(q: Any, k: Any, v: Any, offsets: Any) -> Any:
        return cufa.attention_varlen(q, k, v, **offsets, causal=True)

    def gradient(*given: Any) -> Any:
        return jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1, 2))(*given)

    for function, count in ((call, 1), (gradient, 2)):
        expected = [function(*(x[i] for x in given), offsets()) for i in range(COUNT)]
        expected = jax.block_until_ready(jax.tree.map(lambda *x: jnp.stack(x), *expected))
        calls.clear()
        found = jax.block_until_ready(jax.vmap(function, (0, 0, 0, None))(*given, offsets()))
        assert len(calls) == count
        close(found, expected, 1e-4)
        calls.clear()
        repeated = {name: jnp.stack([x] * COUNT) for name, x in offsets().items()}
        found = jax.block_until_ready(jax.vmap(function)(*given, repeated))
        assert len(calls) == count * COUNT
        close(found, expected, 1e-4)


def test_vmap_over_other_axes_and_nothing(device: str) -> None:
    q, k, v, *_ = arrays()
    found = jax.vmap(lambda q: cufa.attention(q, k, v), in_axes=2, out_axes=1)(jnp.stack([q, 2 * q], axis=2))
    close(found, jnp.stack([cufa.attention(x, k, v) for x in (q, 2 * q)], axis=1))
    assert jax.vmap(lambda q: cufa.attention(q, k, v))(jnp.zeros((0, *q.shape))).shape == (0, *q.shape)


# --- Where XLA calls --------------------------------------------------------------------------------


def test_errors_within_a_program_are_xlas(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *_ = arrays()
    program = jax.jit(lambda *x: cufa.attention(*x) + 0)
    program(q, k, v)
    for error, text in (
        (cufa.UnsupportedError("attention: not here."), "UNIMPLEMENTED: attention: not here."),
        (ValueError("attention: no."), "INVALID_ARGUMENT: attention: no."),
        (ZeroDivisionError("by 0"), "INTERNAL: cufa: ZeroDivisionError: by 0"),
        (KeyboardInterrupt(), "INTERNAL: cufa: KeyboardInterrupt: "),
    ):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(xla, "compute_on_cpu", fail)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=text):  # JAX has both
            jax.block_until_ready(program(q, k, v))


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where XLA's interface is not known."""
    monkeypatch.setattr(interop, "FOREIGN", False)
    caches = interop._program, interop._raw, interop._once, interop._callback
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_without_foreign_functions(device: str, callbacks: None, calls: list[Any]) -> None:
    given = arrays()
    with pytest.warns(UserWarning, match=r"calls are buffer_callbacks: .* cannot be exported") as told:
        out = attend(*given)
    assert [(each.filename, each.lineno) for each in told] == [(__file__, attend.__code__.co_firstlineno + 2)]
    found = out, jax.grad(loss, (0, 1, 2, 3))(*given), jax.vmap(attend)(*map(stacked, given))  # which warn no more
    assert not calls
    interop.FOREIGN = True
    for each in (interop._program, interop._raw, interop._once):
        each.cache_clear()
    same(found, (attend(*given), jax.grad(loss, (0, 1, 2, 3))(*given), jax.vmap(attend)(*map(stacked, given))))
    assert len(calls) == 4


def test_without_any_functions(callbacks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax.experimental.buffer_callback", None)
    for _ in range(2):
        with pytest.raises(cufa.UnsupportedError, match=r"^cufa: JAX .* neither .* nor .*; install a JAX that has one"):
            attend(*arrays())


def test_no_interface_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(jax, "ffi")
    assert not interop._registered()


OTHER_MAJOR = """
import sys, warnings
import jax, numpy as np
jax.ffi.include_dir = lambda: sys.argv[1]
import cufa.jax
from cufa.interop import jax as interop
assert not interop.FOREIGN
q = jax.numpy.ones((1, 4, 2, 8))  # for which JAX makes its backend
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        assert np.allclose(cufa.attention(q, q, q), 1)
assert len(told) == 1 and told[0].filename == "<string>", told
print("done")
"""


def test_another_major_version_is_left_alone(tmp_path: Path) -> None:
    """What XLA would refuse is not given to it, as JAX could not make its backend then."""
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#pragma once\n#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n")
    assert run_script(OTHER_MAJOR, str(tmp_path)) == "done\n"


def test_another_major_version_is_told_by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own words, for handlers that claim one."""
    jax.devices("cpu")
    monkeypatch.setattr(interop, "TARGET", "cufa.other")
    monkeypatch.setattr(xla, "VERSION", (1, 0))
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: "nowhere")
    assert not interop._registered()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ALREADY_EXISTS: Duplicate FFI handler registration for cufa"),
        RuntimeError("handler's API version (0.3) is incompatible with the framework's API version (0.9)."),
        TypeError("register_ffi_target() got an unexpected keyword argument"),
    ],
    ids=str,
)
def test_other_errors_of_registration_are_seen(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.raises(type(error)) as found:
        interop._registered()
    assert found.value is error


def test_versions_are_those_of_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what XLA is told, if it says none itself; else its own minor version, of the same major."""
    assert interop._version()[0] == xla.VERSION[0] == 0
    handler = xla.handler(lambda _: None, (0, 1))
    for table, expected in ((None, (0, 1)), ((0, 7), (0, 7)), ((1, 0), (0, 1))):
        record = (ctypes.c_uint64 * 5)()
        extension = (ctypes.c_uint64 * 4)(0, 1, 0, ctypes.addressof(record))
        major, minor = table or (0, 0)
        there = (ctypes.c_uint64 * 5)(0, 0, 0, 0, minor << 32 | major)
        frame = (ctypes.c_uint64 * 5)(0, ctypes.addressof(extension), ctypes.addressof(there) if table else 0)
        assert handler(ctypes.addressof(frame)) is None
        assert (record[3] & 0xFFFFFFFF, record[3] >> 32) == expected
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: "nowhere")
    assert interop._version() == xla.VERSION


def test_descriptions_tell_calls_apart() -> None:
    from cufa._call.options import Options
    from cufa._operations.forward import ATTENTION

    layouts = tuple(xla.layout_of((1, 4, 2, 8), np.dtype(np.float32), 0) for _ in range(3))
    options = Options(True, (3, None), 0.1, 2.0, True, False, (("bound", 1.0), ("seed", 1)))
    call = xla.Call(ATTENTION, (0, 1, 2), options)
    found, arrays = xla.described(xla.description_of(call, layouts).encode())
    assert found == call and arrays == (((1, 4, 2, 8), "float32"),) * 3
    assert [type(x) for _, x in found.options.more] == [float, int]
    late = call._replace(options=options._replace(late=(("number", 2.0),)))
    assert xla.described(xla.description_of(late, layouts).encode())[0] == late != call
    text = xla.description_of(call, layouts)
    for cache in (xla.key_of, xla.described):
        cache.cache_clear()
    xla._KEYS.clear()  # as in another process
    assert xla.described(text.encode())[0] == call
    alike = ATTENTION.having()
    assert xla.key_of(alike) != xla.key_of(ATTENTION)
    assert xla.described(xla.description_of(call._replace(operation=alike), layouts).encode())[0].operation is alike
    own = call._replace(options=options._replace(more=(("mask", len),)))
    text = xla.description_of(own, layouts)
    assert xla.described(text.encode())[0] == own and text == xla.description_of(own, layouts)
    xla.described.cache_clear()
    xla._OWN.clear()
    with pytest.raises(cufa.UnsupportedError, match="only the process that made it"):
        xla.described(text.encode())
    with pytest.raises(cufa.UnsupportedError, match="operation that is not here"):
        xla.described(xla.description_of(call, layouts).replace("attention/", "attention/0").encode())


def words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


class FakeXla:
    """A frame as XLA hands it over on a GPU, and the functions of its table."""

    def __init__(self, description: str, shapes: list[tuple[int, ...]], given: int) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.kept: list[Any] = []
        self.table = self.words(24 * 8, *[0] * 23)
        for place, function in {6: self.create, 10: self.stream, 15: self.allocate, 16: self.free}.items():
            self.kept.append(xla.Function(function))
            address = ctypes.cast(self.kept[-1], ctypes.c_void_p).value
            ctypes.c_uint64.from_address(self.table + 8 * place).value = address or 0
        buffers = [
            self.words(48, 0, 10, (1 << 41) + (index << 20), len(shape), self.words(*shape))
            for index, shape in enumerate(shapes)
        ]
        text = ctypes.create_string_buffer(description.encode())
        self.kept.append(text)
        span = self.words(ctypes.addressof(text), len(description.encode()))
        groups = [
            (40, 0, len(each), 0, self.words(*each) if each else 0) for each in (buffers[:given], buffers[given:])
        ]
        head = (21 * 8, 0, self.table, 77, xla.EXECUTE)
        self.frame = self.words(*head, *groups[0], *groups[1], 48, 0, 1, 0, 0, self.words(span))

    def words(self, *values: int) -> int:
        memory = (ctypes.c_uint64 * max(1, len(values)))(*values)
        self.kept.append(memory)
        return ctypes.addressof(memory)

    def create(self, arguments: int) -> int:
        _, _, message, kind = words(arguments, 4)
        self.asked.append(("error", kind & 0xFFFFFFFF, ctypes.string_at(message).decode()))
        return 99

    def stream(self, arguments: int) -> None:
        assert words(arguments, 3) == [32, 0, 77]
        ctypes.c_uint64.from_address(arguments + 24).value = 7

    def allocate(self, arguments: int) -> None:
        self.asked.append(("allocate", *words(arguments, 5)))
        ctypes.c_uint64.from_address(arguments + 40).value = 1 << 42

    def free(self, arguments: int) -> None:
        self.asked.append(("free", *words(arguments, 5)))


@pytest.mark.parametrize("traced", [True, False])
def test_frames_on_a_gpu(monkeypatch: pytest.MonkeyPatch, traced: bool) -> None:
    """Launches on XLA's stream; memory is a result, or if the program was traced elsewhere XLA's."""
    from cufa._operations.backward import ATTENTION_BACKWARD
    from cufa._operations.call import planned

    launched = Launched(monkeypatch)
    monkeypatch.setattr(xla._driver, "count", lambda: 1)
    monkeypatch.setattr(xla, "_READY", {})
    present = tuple(index for index, x in enumerate(ATTENTION_BACKWARD.arrays) if x in ("q", "k", "v", "out", "dout"))
    present = tuple(sorted((*present, ATTENTION_BACKWARD.arrays.index("lse"))))
    shape = (1, 256, 2, 64)
    shapes = [(1, 2, 256) if ATTENTION_BACKWARD.arrays[index] == "lse" else shape for index in present]
    dtypes = ["float32" if ATTENTION_BACKWARD.arrays[index] == "lse" else "float16" for index in present]
    layouts = tuple(xla.layout_of(*each, 0) for each in zip(shapes, map(np.dtype, dtypes), strict=True))
    options = interop.Options(True, None, None, 0.0, False, False)
    call = xla.Call(ATTENTION_BACKWARD, present, options)
    floats = planned(call.problem(layouts)).floats
    assert floats > 0
    fake = FakeXla(xla.description_of(call, layouts), [*shapes, *[shape] * 3, *[(floats,)] * traced], len(present))
    for index, name in enumerate(dtypes):
        if name == "float32":
            place = words(words(fake.frame, 21)[9], len(present))[index]
            ctypes.c_uint64.from_address(place + 16).value = 11
    handler = xla.handler(xla.run_on_gpu)
    assert handler(fake.frame) is None, fake.asked
    size = 4 * floats
    assert fake.asked == ([] if traced else [("allocate", 48, 0, 77, size, 256), ("free", 40, 0, 77, size, 1 << 42)])
    assert len(launched.kernels) >= 2
    memory = (1 << 41) + (len(present) + 3 << 20) if traced else 1 << 42
    assert any(memory.to_bytes(8, "little") in argument for _, argument in launched.kernels)

    def fail(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(xla, "_ready", fail)
    assert handler(fake.frame) == 99
    assert fake.asked[-1] == ("error", 3, "no")


def test_what_is_not_differentiated_has_no_gradient_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *_ = arrays()
    rng = np.random.default_rng(0)
    shape = (1, q.shape[2], q.shape[1], k.shape[1])
    bias, rel_bias = (jnp.asarray(rng.standard_normal(x, dtype=np.float32)) for x in (shape, (q.shape[2], 9)))
    computed: list[list[str]] = []
    compute = xla.compute_on_cpu

    def told(arrays: Any, problem: Any, *others: Any) -> None:
        computed.append([result.name for result in problem.results])
        compute(arrays, problem, *others)

    monkeypatch.setattr(xla, "compute_on_cpu", told)

    def loss(q: Any, bias: Any, rel_bias: Any) -> Any:
        return (cufa.attention(q, k, v, bias=bias, rel_bias=rel_bias) ** 2).sum()

    with jax.default_device(jax.devices("cpu")[0]):
        whole = jax.grad(loss, (0, 1, 2))(q, bias, rel_bias)
        for places in ((0,), (0, 2), (1,)):
            for differentiated in (jax.grad(loss, places), jax.jit(jax.grad(loss, places))):
                computed.clear()
                close(differentiated(q, bias, rel_bias), [whole[place] for place in places])
                names = [name for place, name in ((1, "dbias"), (2, "drel_bias")) if place in places]
                assert computed == [["out", "lse"], ["dq", "dk", "dv", *names]]


def test_a_seed_reaches_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of different seeds are of one problem."""
    from cufa._operations.features import Feature, extended
    from cufa._operations.forward import ATTENTION
    from cufa._terms.dropout import Dropout
    from cufa._terms.philox import round_key_bytes

    launched = Launched(monkeypatch)
    monkeypatch.setattr(xla._driver, "count", lambda: 1)
    monkeypatch.setattr(xla, "_READY", {})
    shape = (1, 256, 2, 64)
    layouts = (xla.layout_of(shape, np.dtype(np.float16), 0),) * 3
    handler = xla.handler(xla.run_on_gpu)
    for seed in (5, -6):
        asked = (True, None, None, 0.0, False, False)
        operation, _, asked = extended(ATTENTION, (), asked, [Feature(Dropout(), options=(0.25, seed))])
        options = _options.of(operation.name, asked, operation.owned)
        fake = FakeXla(xla.description_of(xla.Call(operation, (0, 1, 2), options), layouts), [shape] * 4, 3)
        assert handler(fake.frame) is None, fake.asked
        _, argument = launched.kernels[-1]
        assert argument.count(round_key_bytes(seed)) == 1
    assert len(launched.kernels) == 2 and _problem._checked.cache_info().misses == 1


@pytest.mark.parametrize("current", [0, 1, None])
def test_a_call_runs_on_the_gpu_of_its_stream(monkeypatch: pytest.MonkeyPatch, current: int | None) -> None:
    """That of the stream, whichever is current in XLA's thread."""
    from cufa._operations.forward import ATTENTION

    launched, entered = Launched(monkeypatch), []
    monkeypatch.setattr(xla._driver, "count", lambda: 2)
    monkeypatch.setattr(xla._driver, "current_ordinal", lambda: current)
    monkeypatch.setattr(xla._driver, "current", lambda device: contextlib.nullcontext(entered.append(device)))
    monkeypatch.setattr(xla._driver, "device_of_stream", lambda stream: {7: 1}[stream])
    monkeypatch.setattr(xla, "_READY", {})
    shape = (1, 256, 2, 64)
    layouts = (xla.layout_of(shape, np.dtype(np.float16), 0),) * 3
    call = xla.Call(ATTENTION, (0, 1, 2), interop.Options(True, None, None, 0.0, False, False))
    fake = FakeXla(xla.description_of(call, layouts), [shape] * 4, 3)
    handler = xla.handler(xla.run_on_gpu)
    assert handler(fake.frame) is None, fake.asked
    entered.clear()  # by what was made for the first call
    assert handler(fake.frame) is None, fake.asked
    assert entered == ([] if current == 1 else [1])
    assert len(launched.kernels) == 2
    ((ready),) = xla._READY.values()
    assert ready.problem.device == 1


# --- Several devices, other processes ---------------------------------------------------------------

SHARDED = """
import jax, numpy as np, cufa, os, sys, traceback
from cufa.interop import xla
if jax.device_count() < 2:
    sys.exit(print("one device"))
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, 10, heads, 16), dtype=np.float32) for heads in (4, 2, 2))
sinks = rng.standard_normal(4, dtype=np.float32)
loss = lambda sinks, *x: (cufa.attention(*x, causal=True, sinks=sinks) ** 2).sum()
used, shapes, handler = set(), [], "run_on_cpu" if jax.default_backend() == "cpu" else "run_on_gpu"
known = getattr(xla, handler)
def run(frame):
    if frame.stage == xla.EXECUTE:
        shapes.append(frame.kinds()[0][1])
        if handler == "run_on_gpu":
            used.add(xla.device_of(frame.ask(xla.GET_STREAM, 0)))
    try:
        known(frame)
    except BaseException:  # the other device may wait for this one's part of a sum for ever
        traceback.print_exc()
        os._exit(1)
setattr(xla, handler, run)
def check(call, *given):
    jax.block_until_ready(expected)
    shapes.clear()
    found = jax.block_until_ready(call(*given))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    return found
expected = jax.grad(loss, (0, 1, 2, 3))(sinks, *map(jax.numpy.asarray, (q, k, v)))
P = jax.P
for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    for spec, part in ((P("x"), (2, 10, 4, 16)), (P(None, None, "x"), (4, 10, 2, 16)), (P(None, "x"), (4, 10, 4, 16))):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        placed = [jax.device_put(x, sharding) for x in (q, k, v)]
        _, *found = check(jax.jit(jax.grad(loss, (0, 1, 2, 3))), sinks, *placed)
        assert {*shapes} == {part}, shapes
        if part != (4, 10, 4, 16):
            assert all(x.sharding.is_equivalent_to(sharding, 4) for x in found)
        cufa.attention(*placed).block_until_ready()
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
for spec, part in ((P("x"), (2, 10, 4, 16)), (P(None, None, "x"), (4, 10, 2, 16))):
    for checked in (True, False):
        specs = (P() if spec == P("x") else P("x"), spec, spec, spec)
        inner = lambda *x: jax.lax.psum(loss(*x), "x")
        total = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked)
        check(jax.grad(total, (0, 1, 2, 3)), sinks, q, k, v)
        assert {*shapes} == {part}, shapes
single = k[:, :, :1], v[:, :, :1]  # one head, shared by the devices
expected = jax.grad(loss, (0, 1, 2, 3))(sinks, *map(jax.numpy.asarray, (q, *single)))
heads = jax.sharding.NamedSharding(mesh, P(None, None, "x"))
check(jax.jit(jax.grad(loss, (0, 1, 2, 3))), sinks, jax.device_put(q, heads), *single)
assert {*shapes} == {(4, 10, 2, 16)}, shapes
offsets = jax.numpy.asarray([0, 4, 10], np.int32)
packed = lambda *x: (cufa.attention_varlen(*x, offsets, offsets) ** 2).sum()
rows = [jax.numpy.asarray(x[0]) for x in (q, k, v)]
expected = jax.grad(packed, (0, 1, 2))(*rows)
heads = jax.sharding.NamedSharding(mesh, P(None, "x"))
check(jax.jit(jax.grad(packed, (0, 1, 2))), *(jax.device_put(x, heads) for x in rows))
assert {*shapes} == {(10, 2, 16)}, shapes
each = jax.shard_map(jax.vmap(lambda *x: cufa.attention(*x)), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
shapes.clear()
each(*(x[:, None] for x in (q, k, v))).block_until_ready()
assert {*shapes} == {(2, 10, 4, 16)}, shapes
wide = jax.make_mesh((2, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for checked in (True, False):  # one axis of the mesh is left to the partitioner
    part = {"in_specs": P("x"), "out_specs": P("x"), "axis_names": {"x"}, "check_vma": checked}
    found = jax.jit(jax.shard_map(lambda *x: cufa.attention(*x), mesh=wide, **part))(q, k, v)
    np.testing.assert_allclose(found, cufa.attention(q, k, v), atol=2e-5)
assert used == (set() if handler == "run_on_cpu" else {0, 1}), used
print("done")
"""


MOST_SECONDS = 100
"""Of a script: less than what a watchdog allows a test, which could only say that nothing was launched."""


def run_script(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints in a process of its own. One that hangs says where."""
    watched = f"import faulthandler; faulthandler.dump_traceback_later({MOST_SECONDS}, exit=True)\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", watched, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_devices(platform: str) -> None:
    """Divided by XLA's partitioner, by batch or heads; and by shard_map."""
    flags = "--xla_force_host_platform_device_count=2" if platform == "cpu" else ""
    said = run_script(SHARDED, XLA_FLAGS=flags, JAX_PLATFORMS=platform, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if platform == "cuda" and said == "one device\n":
        pytest.skip("needs two GPUs")
    assert said == "done\n"


EXPORT = """
import sys, jax, numpy as np, cufa.jax
q = np.random.default_rng(0).standard_normal((2, 9, 4, 16), dtype=np.float32)
program = jax.jit(jax.value_and_grad(lambda q: (cufa.attention(q, q, q, causal=True) ** 2).sum()))
exported = jax.export.export(program, disabled_checks=cufa.jax.export_checks())(q)
open(sys.argv[1], "wb").write(exported.serialize())
np.savez(sys.argv[2], *program(q))
"""
LOAD = """
import sys, jax, numpy as np, cufa.jax
q = np.random.default_rng(0).standard_normal((2, 9, 4, 16), dtype=np.float32)
found = jax.export.deserialize(open(sys.argv[1], "rb").read()).call(q)
expected = np.load(sys.argv[2])
assert all(np.array_equal(found[i], expected[f"arr_{i}"]) for i in (0, 1))
print("done")
"""


def test_exported_programs_run_in_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", exc_type=ImportError)
    files = str(tmp_path / "program"), str(tmp_path / "results.npz")
    run_script(EXPORT, *files)
    assert run_script(LOAD, *files) == "done\n"


def test_handlers_are_told_when_a_program_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where kernels are loaded then; the metadata and both stages are of one handler."""
    stages: list[int] = []

    def run(frame: Any) -> None:
        stages.append(frame.stage)
        if frame.stage == xla.INSTANTIATE:
            assert xla.described(frame.description())[1][0] == ((2, 9, 4, 16), "float32")
        xla.run_on_cpu(frame)

    KEPT.append(xla.handler(run, interop._version()))
    capsules = {stage: jax.ffi.pycapsule(interop._address(KEPT[-1])) for stage in ("instantiate", "execute")}
    jax.ffi.register_ffi_target("cufa.told", capsules, platform="cpu")
    monkeypatch.setattr(interop, "TARGET", "cufa.told")
    with jax.default_device(jax.devices("cpu")[0]):
        q, k, v, *_ = arrays()
        jax.block_until_ready(jax.jit(lambda *x: cufa.attention(*x, softmax_scale=0.25, softcap=7.0))(q, k, v))
    assert stages == [xla.INSTANTIATE, xla.EXECUTE]


KEPT: list[Any] = []
"""XLA forgets no handler."""


def test_exports_for_gpus_and_of_unknown_shapes() -> None:
    q, k, v, *_ = arrays()
    checks = cufa.jax.export_checks()
    program = jax.jit(jax.grad(loss))
    exported = jax.export.export(program, platforms=["cuda"], disabled_checks=checks)(q, k, v)
    assert exported.platforms == ("cuda",)
    (batch,) = jax.export.symbolic_shape("b")
    given = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    with pytest.raises(cufa.UnsupportedError, match=r"^attention: q has the symbolic shape"):
        jax.export.export(program, disabled_checks=checks)(*given)


def test_importing_cufa_does_not_import_jax() -> None:
    assert run_script("import sys, cufa; print('jax' in sys.modules, cufa.jax.__name__)") == "False cufa.jax\n"


def test_explain_takes_jax_arrays(device: str) -> None:
    q, k, v, sinks, _ = arrays()
    assert "attention" in str(cufa.explain(q, k, v, sinks=sinks))
    with pytest.raises(TypeError, match="k is a ndarray but q is a jax array"):
        cufa.explain(q, np.asarray(k), v)


# --- As jax.nn has it -------------------------------------------------------------------------------


MASKS = [*itertools.product([False, True], [None, 2, (3, 0), (0, 4), (9, 9)])]
"""Whether a mask is causal, and windows."""


@pytest.mark.parametrize(("lengths", "mask"), sampled(paired([(9, 9), (5, 9), (9, 5), (1, 9)], MASKS), 1, 3), ids=str)
def test_dot_product_attention(device: str, lengths: tuple[int, int], mask: tuple[bool, Any]) -> None:
    (rows, keys), (causal, window) = lengths, mask
    q, k, v, *_ = arrays()
    q, k, v = q[:, :rows], k[:, :keys], v[:, :keys]
    options: dict[str, Any] = {"is_causal": causal, "local_window_size": window, "scale": 0.3}
    left = window[0] if isinstance(window, tuple) else window
    seen = rows if left is None else min(rows, keys + left)  # jax.nn has other rows than 0 where no key is seen

    def both(attend: Any) -> Any:
        def call(*given: Any) -> Any:
            out, lse = attend(*given, return_residual=True, **options)
            return (out[:, :seen] ** 2).sum(), (out[:, :seen], lse[:, :seen])

        return jax.grad(call, (0, 1, 2), has_aux=True)(q, k, v)

    with jax.default_matmul_precision("highest"):
        close(both(cufa.jax.dot_product_attention), both(jax.nn.dot_product_attention), 1e-4)
    assert not cufa.jax.dot_product_attention(q, k, v, **options)[:, seen:].any()
    close(
        cufa.jax.dot_product_attention(q[0], k[0], v[0], **options),
        cufa.jax.dot_product_attention(q, k, v, **options)[0],
    )


@pytest.mark.parametrize("given", ["both", "q", "k", "same"])
def test_dot_product_attention_of_padded_sequences(device: str, given: str) -> None:
    q, k, v, *_ = arrays()
    one, other = jnp.asarray([9, 4], jnp.int32), jnp.asarray([3, 7], jnp.int32)
    lengths = {
        "both": {"query_seq_lengths": one, "key_value_seq_lengths": other},
        "q": {"query_seq_lengths": one},
        "k": {"key_value_seq_lengths": other},
        "same": {"query_seq_lengths": one, "key_value_seq_lengths": one},
    }[given]
    masks: list[dict[str, Any]] = [{}]
    if given in ("q", "same"):
        masks += [{"is_causal": True}, {"local_window_size": (3, 1)}]
    for mask in masks:

        def both(attend: Any, mask: dict[str, Any] = mask) -> Any:
            def call(*x: Any) -> Any:
                out = attend(*x, **lengths, **mask)
                return (out**2).sum(), out

            return jax.jit(jax.grad(call, (0, 1, 2), has_aux=True))(q, k, v)

        with jax.default_matmul_precision("highest"):
            close(both(cufa.jax.dot_product_attention), both(jax.nn.dot_product_attention), 1e-4)


def test_what_lies_in_padding_does_not_matter(device: str) -> None:
    q, k, v, *_ = arrays()
    lengths = jnp.asarray([9, 4], jnp.int32)
    live = (jnp.arange(9) < lengths[:, None])[:, :, None, None]

    def call(*x: Any) -> Any:
        options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "is_causal": True}
        return (cufa.jax.dot_product_attention(*x, **options) ** 2).sum()

    spoilt = [jnp.where(live, x, jnp.nan) for x in (q, k, v)]
    close(jax.value_and_grad(call, (0, 1, 2))(*spoilt), jax.value_and_grad(call, (0, 1, 2))(q, k, v))


@pytest.mark.parametrize(
    "name, value",
    [
        ("bias", np.zeros((1, 1, 9, 9), np.float32)),
        ("mask", np.ones((1, 1, 9, 9), bool)),
        ("implementation", "cudnn"),
        ("local_window_size", (-1, 2)),
        ("key_value_seq_lengths", np.array([3, 4], np.int32)),
    ],
)
def test_dot_product_attention_refuses_by_name(name: str, value: Any) -> None:
    q, k, v, *_ = arrays()
    with pytest.raises(cufa.UnsupportedError, match=rf"^dot_product_attention: {name} is"):
        cufa.jax.dot_product_attention(q, k, v, is_causal=True, **{name: value})


# --- On a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_kernels_are_loaded_before_programs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """At no run of a program is anything loaded, the first included."""
    loaded: list[int] = []
    known = xla.run_on_gpu

    def run(frame: Any) -> None:
        before = len(_jit._kernels)
        known(frame)
        if frame.stage == xla.EXECUTE:
            loaded.append(len(_jit._kernels) - before)

    monkeypatch.setattr(xla, "run_on_gpu", run)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(0).standard_normal((3, 1, 300, 2, 104)))
    program = jax.jit(jax.grad(lambda *x: cufa.attention(*x, window_size=(77, 3)).astype(jnp.float32).sum(), (0, 1, 2)))
    jax.block_until_ready(program(q, k, v))
    assert loaded == [0, 0]


@pytest.mark.gpu
def test_calls_wait_for_what_xla_computes_before_them() -> None:
    """And what comes after waits for them: all on XLA's stream."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2048, 8, 128)), jnp.float16)
    square = jnp.eye(8 * 128, dtype=jnp.float16)

    def slow(x: Any) -> Any:
        flat = x.reshape(2048, -1)
        flat = jax.lax.fori_loop(0, 200, lambda _, y: y @ square, flat)
        return flat.reshape(x.shape)

    @jax.jit
    def program(x: Any) -> Any:
        for _ in range(3):
            x = slow(cufa.attention(slow(x), x, x))
        return x

    expected = x
    for _ in range(3):
        expected = jax.block_until_ready(cufa.attention(expected, expected, expected))
    same(program(x), expected)


@pytest.mark.gpu
def test_programs_of_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 512, 4, 64)), jnp.float16)
    program = jax.jit(lambda x, causal: cufa.attention(x, x, x, causal=causal), static_argnums=1)
    expected = [program(x, causal) for causal in (False, True)]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(lambda i: program(x, i % 2 == 1), range(64))):
            same(found, expected[index % 2])


@pytest.mark.gpu
def test_command_buffers_may_record_calls() -> None:
    """With the trait, and graphs of any size: results are right and nothing is loaded while XLA records."""
    script = (
        "import os\n"
        "import numpy as np\n"
        "from cufa.interop import xla\n"
        "xla.COMMAND_BUFFERS = 1\n"
        "import jax, jax.numpy as jnp, cufa\n"
        "x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256, 4, 64)), jnp.float16)\n"
        "step = lambda x: x + cufa.attention(x, x, x, causal=True)\n"
        "program = jax.jit(lambda x: step(step(step(x))))\n"
        "expected = step(step(step(x)))\n"
        "for _ in range(5):\n"
        "    np.testing.assert_allclose(program(x), expected, atol=2e-2)\n"
        "print('done')\n"
    )
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_graph_min_graph_size=1"
    assert run_script(script, XLA_FLAGS=flags, JAX_PLATFORMS="cuda") == "done\n"
