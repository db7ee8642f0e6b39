"""torch and JAX merge states within their programs, and differentiate that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from states import NAMES, Call

import cufa
from cufa import reference
from cufa.testing import to_numpy

CALLS = {
    "two": Call(shape=(2, 9, 4, 20), values="apart"),
    "stacked": Call(shape=(2, 9, 4, 20), states=3, values="apart"),
    "packed": Call(shape=(9, 4, 20), values="apart", dtype="bfloat16"),
    "stacked and packed": Call(shape=(9, 4, 20), states=3, values="apart"),
}
ALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


def tensors(torch: Any, call: Call, device: str, requires_grad: bool = True) -> tuple[list[Any], Any, Any]:
    """The states, and the gradients by what is merged."""
    bfloat16 = {name: array.dtype.name == "bfloat16" for name, array in call.host().items()}
    host = {name: array.astype(np.float32) if bfloat16[name] else array for name, array in call.host().items()}
    found = {
        name: torch.tensor(array, device=device).to(torch.bfloat16 if bfloat16[name] else torch.float32)
        for name, array in host.items()
    }
    return [found[name].requires_grad_(requires_grad) for name in NAMES if name in found], found["dout"], found["dlse"]


@ALL
def test_autograd_gives_the_bits_of_the_plain_call(torch: Any, call: Call, device: str) -> None:
    given, dout, dlse = tensors(torch, call, device)
    out, lse = cufa.merge_states(*given)
    call.check_merged(out, lse)
    found = torch.autograd.grad((out, lse), given, (dout, dlse))
    plain = [each.detach() for each in given]
    for one, other in zip(found, cufa.merge_states_backward(dout, *plain, dlse=dlse), strict=True):
        assert torch.equal(one, other)
    call.check_gradients(found)


def test_gradients_by_one_of_the_results_alone(torch: Any, device: str) -> None:
    given, dout, dlse = tensors(torch, CALLS["two"], device)
    plain = [each.detach() for each in given]
    out, lse = cufa.merge_states(*given)
    by_out = torch.autograd.grad(out, given, dout, retain_graph=True)
    for one, other in zip(by_out, cufa.merge_states_backward(dout, *plain), strict=True):
        assert torch.equal(one, other)
    by_lse = torch.autograd.grad(lse, given, dlse)
    nothing = torch.zeros_like(dout)
    for one, other in zip(by_lse, cufa.merge_states_backward(nothing, *plain, dlse=dlse), strict=True):
        assert torch.equal(one, other)


def test_differences_are_the_gradients(torch: Any) -> None:
    call = Call(shape=(3, 2, 4), states=2, dtype="float64")
    arrays = [torch.tensor(call.host()[name]).requires_grad_() for name in NAMES[:2]]
    assert torch.autograd.gradcheck(cufa.merge_states, arrays)
    pair = [arrays[0][0], arrays[1][0], arrays[0][1], arrays[1][1]]
    assert torch.autograd.gradcheck(cufa.merge_states, [each.detach().requires_grad_() for each in pair])


def test_a_graph_of_attention_over_parts(torch: Any, device: str) -> None:
    """Autograd through attention and merging is that of attention over all keys."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 12, 2, 16), generator=rng).to(device).requires_grad_() for _ in range(3))
    parts = [cufa.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(5), slice(5, 12))]
    merged = torch.autograd.grad((cufa.merge_states(*parts[0], *parts[1])[0] ** 2).sum(), (q, k, v))
    whole = torch.autograd.grad((cufa.attention(q, k, v) ** 2).sum(), (q, k, v))
    for one, other in zip(merged, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_compiled_and_mapped(torch: Any, device: str) -> None:
    given, dout, _ = tensors(torch, CALLS["two"], device)
    expected = torch.autograd.grad(cufa.merge_states(*given)[0], given, dout)
    compiled = torch.compile(lambda *x: cufa.merge_states(*x)[0], backend="aot_eager", fullgraph=True)
    for one, other in zip(torch.autograd.grad(compiled(*given), given, dout), expected, strict=True):
        assert torch.equal(one, other)
    many = [torch.stack([each.detach(), each.detach() + 1]) for each in given]
    out, lse = torch.func.vmap(cufa.merge_states)(*many)
    for index in range(2):
        one = cufa.merge_states(*(each[index] for each in many))
        assert torch.equal(out[index], one[0]) and torch.equal(lse[index], one[1])
    torch._dynamo.reset()


# --- JAX --------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def jax(request: pytest.FixtureRequest) -> Any:
    module = pytest.importorskip("jax")
    with module.default_device(module.devices(request.param)[0]):
        yield module


def jax_arrays(jax: Any, call: Call) -> tuple[list[Any], Any, Any]:
    host = {name: jax.numpy.asarray(array) for name, array in call.host().items()}
    return [host[name] for name in NAMES if name in host], host["dout"], host["dlse"]


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (one, other)))


@ALL
def test_jax_gives_the_bits_of_the_plain_call(jax: Any, call: Call) -> None:
    given, dout, dlse = jax_arrays(jax, call)
    for run in (lambda function: function, jax.jit):
        results, pull = jax.vjp(run(cufa.merge_states), *given)
        call.check_merged(*results)
        found = pull((dout, dlse))
        same(found, cufa.merge_states_backward(dout, *given, dlse=dlse))
        call.check_gradients(found)
    by_out = jax.grad(lambda *x: (cufa.merge_states(*x)[0] * dout).astype("float32").sum(), tuple(range(len(given))))
    same(by_out(*given), cufa.merge_states_backward(dout, *given))


@ALL
@pytest.mark.parametrize("mapped", ["all", "the first"])
def test_jax_maps_calls(jax: Any, call: Call, mapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, dout, _ = jax_arrays(jax, call)
    axes = [0 if mapped == "all" or index == 0 else None for index in range(len(given))]
    many = [jax.numpy.stack([x, 2 * x, 3 * x]) if axis == 0 else x for x, axis in zip(given, axes, strict=True)]

    def gradients(*arrays: Any) -> Any:
        results, pull = jax.vjp(cufa.merge_states, *arrays)
        return *results, *pull((dout, results[1]))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: calls.append(function) or function(*arguments, **options)

    calls: list[Any] = []
    monkeypatch.setattr(jax.lax, "map", counted(jax.lax.map))
    found = jax.vmap(gradients, axes)(*many)
    assert not calls  # folded into the batch or the heads, not called one by one
    for index in range(3):
        one = gradients(*(x[index] if axis == 0 else x for x, axis in zip(many, axes, strict=True)))
        for each, expected in zip(found, one, strict=True):
            np.testing.assert_allclose(np.asarray(each[index], np.float32), np.asarray(expected, np.float32), rtol=1e-6)


def test_jax_second_derivatives_are_refused(jax: Any) -> None:
    given, _, _ = jax_arrays(jax, CALLS["two"])
    once = jax.grad(lambda x: cufa.merge_states(x, *given[1:])[0].sum())
    with pytest.raises(cufa.UnsupportedError, match=r"^merge_states: JAX asks for the derivative of a gradient"):
        jax.grad(lambda x: once(x).sum())(given[0])


def test_jax_and_others_do_not_mix(jax: Any) -> None:
    given, _, _ = jax_arrays(jax, CALLS["two"])
    with pytest.raises(TypeError, match="lse_a is a ndarray but out_a is a jax array"):
        cufa.merge_states(given[0], np.asarray(given[1]), *given[2:])
    with pytest.raises(TypeError, match="lse_a is a jax array but out_a is not one"):
        cufa.merge_states(np.asarray(given[0]), *given[1:])
    assert np.allclose(to_numpy(cufa.merge_states(*given)[1]), reference.merge_states(*map(np.asarray, given))[1], 1e-6)
