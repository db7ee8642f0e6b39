"""torch and JAX turn q and k within their programs, and differentiate that."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from rotary import Call

import cufa
from cufa.testing import to_numpy

CALLS = {
    "dense": Call(places="offsets", head_dim=20, rotary_dim=12),
    "alone": Call(num_heads_k=None, interleaved=False),
    "packed": Call(packed=True, places="cu_seqlens and offsets", dtype="bfloat16", inverse=True),
    "single key head": Call(num_heads_k=1, places="positions"),
}
ALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


def tensor(torch: Any, x: np.ndarray, device: str) -> Any:
    if x.dtype.name == "bfloat16":
        return torch.tensor(x.astype(np.float32), device=device).to(torch.bfloat16)
    return torch.tensor(x, device=device)


def split(arrays: dict[str, Any], call: Call) -> tuple[list[Any], Any]:
    """What is differentiated, and the call as a function of that, which gives a tuple."""
    names = [name for name in "qk" if name in arrays]
    rest = {name: x for name, x in arrays.items() if name not in names}

    def run(*heads: Any) -> tuple[Any, ...]:
        options = {"interleaved": call.interleaved, "inverse": call.inverse}
        found = cufa.rotary(**({"k": None} | dict(zip(names, heads, strict=True)) | rest), **options)
        return found if isinstance(found, tuple) else (found,)

    return [arrays[name] for name in names], run


@ALL
def test_autograd_turns_back(torch: Any, call: Call, device: str) -> None:
    arrays = {name: tensor(torch, x, device) for name, x in call.host().items()}
    heads, run = split(arrays, call)
    heads = [x.requires_grad_() for x in heads]
    results = run(*heads)
    call.check(tuple(x.detach() for x in results))
    dresults = [torch.randn_like(x) for x in results]
    back = dict(zip("qk", dresults, strict=False))
    expected = split({**arrays, **back}, Call(interleaved=call.interleaved, inverse=not call.inverse))[1](*dresults)
    for one, other in zip(torch.autograd.grad(results, heads, dresults), expected, strict=True):
        assert torch.equal(one, other)


def test_by_one_of_the_results_alone(torch: Any, device: str) -> None:
    call = CALLS["dense"]
    arrays = {name: tensor(torch, x, device) for name, x in call.host().items()}
    heads, run = split(arrays, call)
    heads = [x.requires_grad_() for x in heads]
    dq, dk = torch.autograd.grad(run(*heads)[1].sum(), heads, allow_unused=True)
    assert not dq.any() and dk.any()
    dq, dk = torch.autograd.grad(run(*heads)[0].sum(), heads, allow_unused=True)
    assert dq.any() and not dk.any()


def test_differences_are_the_gradients(torch: Any) -> None:
    call = Call(batch=1, seqlen=3, head_dim=6, rotary_dim=4, dtype="float64")
    heads, run = split({name: torch.tensor(x) for name, x in call.host().items()}, call)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in heads])


def test_what_was_turned_is_not_kept(torch: Any) -> None:
    heads, run = split({name: torch.tensor(x) for name, x in CALLS["alone"].host().items()}, CALLS["alone"])
    (out,) = run(*(x.requires_grad_() for x in heads))
    assert {tuple(x.shape) for x in out.grad_fn.saved_tensors if x is not None} == {(16, 8)}


def test_angles_have_no_gradients(torch: Any, device: str) -> None:
    arrays = {name: tensor(torch, x, device) for name, x in Call().host().items()}
    arrays["cos"].requires_grad_()
    with pytest.raises(cufa.UnsupportedError, match="rotary: cos requires grad, but has no gradient"):
        cufa.rotary(**arrays)


def test_compiled_and_mapped(torch: Any, device: str) -> None:
    call = CALLS["dense"]
    heads, run = split({name: tensor(torch, x, device) for name, x in call.host().items()}, call)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(*heads), run(*heads), strict=True):
        assert torch.equal(one, other)
    many = [torch.stack([x, 2 * x]) for x in heads]
    one, other = (run(*(x[index] for x in many)) for index in (0, 1))
    for found, *each in zip(torch.func.vmap(run)(*many), one, other, strict=True):
        assert torch.equal(found, torch.stack(each))
    torch._dynamo.reset()


# --- JAX --------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def jax(request: pytest.FixtureRequest) -> Any:
    module = pytest.importorskip("jax")
    with module.default_device(module.devices(request.param)[0]):
        yield module


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (one, other)))


@ALL
def test_jax_turns_back(jax: Any, call: Call) -> None:
    arrays = {name: jax.numpy.asarray(x) for name, x in call.host().items()}
    heads, run = split(arrays, call)
    results, pull = jax.vjp(jax.jit(run), *heads)
    call.check(tuple(map(to_numpy, results)))
    dresults = tuple(jax.numpy.cos(x) for x in results)
    back = dict(zip("qk", dresults, strict=False))
    expected = split({**arrays, **back}, Call(interleaved=call.interleaved, inverse=not call.inverse))[1](*dresults)
    same(pull(dresults), expected)
    first = jax.grad(lambda *x: (run(*x)[0] * dresults[0]).astype("float32").sum())(*heads)
    same([first], expected[:1])


@ALL
def test_jax_maps_calls(jax: Any, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, run = split({name: jax.numpy.asarray(x) for name, x in call.host().items()}, call)
    many = [jax.numpy.stack([x, 2 * x, 3 * x]) for x in heads]

    def loop(*_: Any, **__: Any) -> Any:
        raise AssertionError("calls are folded, not looped over")

    monkeypatch.setattr(jax.lax, "map", loop)

    def gradients(*x: Any) -> Any:
        results, pull = jax.vjp(run, *x)
        return *results, *pull(results)

    found = jax.vmap(gradients)(*many)
    for index in range(3):
        same([x[index] for x in found], gradients(*(x[index] for x in many)))


def test_jax_refuses_gradients_by_angles(jax: Any) -> None:
    arrays = {name: jax.numpy.asarray(x) for name, x in Call().host().items()}
    call = partial(cufa.rotary, arrays["q"], arrays["k"])
    with pytest.raises(cufa.UnsupportedError, match="rotary: cos is differentiated, but has no gradient"):
        jax.grad(lambda cos: call(cos, arrays["sin"])[0].sum())(arrays["cos"])
