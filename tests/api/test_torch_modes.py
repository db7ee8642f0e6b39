"""torch's ways to record, compile and differentiate a call: it works, or is refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cufa
from cufa import UnsupportedError, reference

torch: Any = pytest.importorskip("torch")

# torch says of some of its own ways that they will go.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def q(request: pytest.FixtureRequest) -> Any:
    return torch.randn(1, 12, 2, 8, generator=torch.Generator().manual_seed(0)).to(request.param)


def call(q: Any) -> Any:
    return cufa.attention(q * 1.0, q, q, causal=True) + 1


def right(q: Any) -> np.ndarray:
    x = q.cpu().numpy()
    return reference.attention(x, x, x, causal=True) + 1


def test_compiled_functions_have_it_in_their_graph(q: Any) -> None:
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        for length in range(1, 13):  # more shapes than torch compiles anew for
            part = q[:, :length]
            np.testing.assert_allclose(compiled(part).cpu(), right(part), atol=1e-5)
    itself = torch.compile(cufa.attention, backend="eager", fullgraph=True)
    np.testing.assert_allclose(itself(q, q, q, causal=True).cpu() + 1, right(q), atol=1e-5)
    out, lse = cufa.attention(q, q, q, causal=True, return_lse=True)

    def differentiate(q: Any) -> Any:
        return cufa.attention_backward(q * 1.0, q, q, q, out, lse, causal=True)[1] * 2

    expected = differentiate(q).cpu()
    np.testing.assert_allclose(
        torch.compile(differentiate, backend="eager", fullgraph=True)(q).cpu(), expected, atol=1e-5
    )
    torch._dynamo.reset()


def test_what_only_a_break_can_serve_breaks_the_graph(q: Any) -> None:
    """A given result, a number in a tensor, arrays of NumPy."""

    def into(q: Any, out: Any) -> Any:
        return cufa.attention(q * 1.0, q, q, causal=True, out=out) + 1

    def scaled(q: Any, scale: Any) -> Any:
        return cufa.attention(q * 1.0, q, q, causal=True, softmax_scale=scale) + 1

    torch._dynamo.reset()
    out = torch.zeros_like(q)
    np.testing.assert_allclose(torch.compile(into, backend="eager")(q, out).cpu(), right(q), atol=1e-5)
    np.testing.assert_allclose(out.cpu() + 1, right(q), atol=1e-5)
    scale = torch.tensor(8**-0.5)
    np.testing.assert_allclose(torch.compile(scaled, backend="eager")(q, scale).cpu(), right(q), atol=1e-5)
    if q.device.type == "cpu":
        x = q.numpy()
        np.testing.assert_allclose(torch.compile(call, backend="eager")(x), right(q), atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention: a given array that is written"):
        torch.compile(into, backend="eager", fullgraph=True)(q, out)
    torch._dynamo.reset()


def test_what_is_recorded_holds_the_call(q: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    with pytest.raises(UnsupportedError, match=r"^attention: torch.jit.trace records torch's own operations"):
        torch.jit.trace(call, (q,))
    for options in ({}, {"pre_dispatch": True}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}):
        graph = make_fx(call, **options)(q)
        assert torch.ops.cufa.attention.default in {node.target for node in graph.graph.nodes}
        np.testing.assert_allclose(graph(2 * q).cpu(), right(2 * q), atol=1e-5)
    out = torch.empty_like(q)
    with FlopCounterMode(display=False):  # counts what it sees, and changes nothing
        np.testing.assert_allclose(call(q).cpu(), right(q), atol=1e-5)
        assert cufa.attention(q, q, q, causal=True, out=out) is out
    np.testing.assert_allclose(out.cpu() + 1, right(q), atol=1e-5)
    with pytest.raises(UnsupportedError, match=r"^attention: out is given and the call is traced"):
        make_fx(lambda q: cufa.attention(q, q, q, out=out))(q)


def test_forward_mode_is_refused(q: Any) -> None:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedError, match=r"^attention: a torch tensor carries a tangent"):
            cufa.attention(q, q, dual)
        np.testing.assert_allclose(call(q).cpu(), right(q), atol=1e-5)
        np.testing.assert_allclose(call(forward_ad.unpack_dual(dual).primal).cpu(), right(q), atol=1e-5)
    with pytest.raises(UnsupportedError, match=r"^attention: "):
        torch.func.jvp(call, (q,), (q,))
