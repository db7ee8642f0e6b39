"""torch differentiates calls with score functions, biases, masks and dropout: with the numbers of NumPy's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cufa
from cufa import functions, masks
from cufa._masks.host import copied
from cufa._operations import call as _call

torch: Any = pytest.importorskip("torch")
from torch._dynamo.backends.debugging import aot_eager  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ROWS, KEYS, HEADS, DIM = 40, 70, 4, 32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "q": (2, ROWS, HEADS, DIM),
        "k": (2, KEYS, 2, DIM),
        "v": (2, KEYS, 2, DIM),
        "bias": (2, HEADS, ROWS, KEYS),
        "rel_bias": (HEADS, 41),
        "table": (HEADS, 8),
    }
    found = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    found["mask"] = rng.random((1, 1, ROWS, KEYS)) < 0.7
    return found


def gated(score: Any, batch: Any, head: Any, query: Any, key: Any, table: Any) -> Any:
    return score * functions.sigmoid(table[head, key % 8]) + table[head, query % 8]


FEATURES: dict[str, Any] = {
    "bias": lambda of: {"bias": of["bias"]},
    "rel_bias": lambda of: {"rel_bias": of["rel_bias"], "softcap": 5.0},
    "score": lambda of: {"score": (gated, of["table"])},
    "mask": lambda of: {"mask": of["mask"], "causal": True},
    "mask object": lambda _: {"mask": masks.causal() & masks.dilated(3)},
    "dropout": lambda _: {"dropout_p": 0.3, "seed": 5},
    "all": lambda of: {
        "score": (gated, of["table"]),
        "bias": of["bias"],
        "rel_bias": of["rel_bias"],
        "mask": of["mask"],
        "dropout_p": 0.3,
        "seed": 5,
        "causal": True,
    },
}
LEARNED = ("q", "k", "v", "table", "bias", "rel_bias")  # in the order of their gradients


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_those_of_numpy(name: str, device: str) -> None:
    host = arrays()
    options = FEATURES[name](host)
    out, lse = cufa.attention(host["q"], host["k"], host["v"], return_lse=True, **options)
    dout = np.random.default_rng(1).standard_normal(out.shape, dtype=np.float32)
    expected = cufa.attention_backward(dout, host["q"], host["k"], host["v"], out, lse, **options)

    given = {key: torch.as_tensor(x, device=device) for key, x in host.items()}
    used = {id(x) for value in options.values() for x in (value if isinstance(value, tuple) else (value,))}
    leaves = [given[key].requires_grad_() for key in LEARNED if key in "qkv" or id(host[key]) in used]
    found = cufa.attention(given["q"], given["k"], given["v"], **FEATURES[name](given))
    np.testing.assert_allclose(found.detach().cpu(), out, atol=1e-4)
    gradients = torch.autograd.grad(found, leaves, torch.as_tensor(dout, device=device))
    assert len(gradients) == len(expected)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one.cpu(), other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


@pytest.mark.filterwarnings("error::UserWarning")
def test_arrays_of_masks_that_are_read_only_are_copied(device: str) -> None:
    numbers = np.arange(256, dtype=np.int32) // 100
    numbers.flags.writeable = False
    like = torch.zeros(1, device=device)
    placed = copied(numbers, like)
    assert placed.device == like.device and placed.tolist() == numbers.tolist()
    placed[0] = 7
    assert numbers[0] == 0


def test_what_needs_no_gradient_has_none_computed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two biases and two arrays of a function, those that are constants."""

    def scaled(score: Any, batch: Any, head: Any, query: Any, key: Any, factors: Any, shifts: Any) -> Any:
        return score * factors[head] + shifts[head]

    def results(*wanted: str) -> dict[str, Any]:
        of = {name: torch.from_numpy(x).to(device) for name, x in arrays().items()}
        of |= {"factors": of["table"][:, 0].contiguous(), "shifts": of["table"][:, 1].contiguous()}
        for name in ("q", *wanted):
            of[name].requires_grad_()
        more = {name: of[name] for name in ("bias", "rel_bias")}
        out = cufa.attention(*(of[name] for name in "qkv"), score=(scaled, of["factors"], of["shifts"]), **more)
        out.square().sum().backward()
        return {name: of[name].grad for name in ("q", *wanted)}

    whole = results("bias", "rel_bias", "factors", "shifts")
    computed: list[list[str]] = []
    allocate = _call.allocate

    def told(arrays: Any, problem: Any) -> Any:
        computed.append([result.name for result in problem.results])
        return allocate(arrays, problem)

    monkeypatch.setattr(_call, "allocate", told)
    for wanted in ((), ("bias",), ("factors", "rel_bias")):
        for name, each in results(*wanted).items():
            torch.testing.assert_close(each, whole[name])
        names = [f"d{'score_' * (name == 'factors')}{name}" for name in wanted]
        assert computed == [["out", "lse"], ["dq", "dk", "dv", *names]]
        computed.clear()


@pytest.mark.parametrize("learned", [(), ("bias",), ("bias", "rel_bias")], ids=str)
def test_features_that_are_tensors_are_part_of_a_graph(learned: tuple[str, ...]) -> None:
    """With lengths and seeds that change; gradients of constants are not computed there either."""
    graphs: list[str] = []

    def step(q: Any, k: Any, v: Any, bias: Any, rel_bias: Any, mask: Any, seed: Any) -> Any:
        more = {"rel_bias": rel_bias, "mask": mask, "dropout_p": 0.25, "seed": seed, "causal": True}
        return cufa.attention(q, k, v, bias=bias, **more).square().sum()

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(str(graph.graph))
        return aot_eager(graph, given)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows, seed in ((ROWS, 3), (ROWS, 4), (30, 4)):
        host = arrays()
        host |= {"q": host["q"][:, :rows]} | {name: host[name][:, :, :rows] for name in ("bias", "mask")}
        names = ("q", "k", "v", "bias", "rel_bias", "mask")
        given = {name: torch.from_numpy(host[name].copy()) for name in names} | {"seed": torch.tensor(seed)}
        leaves = [given[name].requires_grad_() for name in ("q", *learned)]
        expected = torch.autograd.grad(step(**given), leaves)
        for one, other in zip(torch.autograd.grad(compiled(**given), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)
        if rows == ROWS:
            made = len(graphs)
    assert len(graphs) == made and graphs[-1].count("cufa.attention_bias_rel_bias_mask_dropout_seeded") == 1


@pytest.mark.parametrize("biased", [False, True])
def test_a_seed_without_dropout_breaks_no_graph(biased: bool) -> None:
    """As models that do not train have it; what is no seed is refused nevertheless."""
    host = {name: torch.as_tensor(x) for name, x in arrays().items()}
    q, k, v = (host[name] for name in "qkv")
    bias = host["bias"] if biased else None

    def step(seed: Any) -> Any:
        return cufa.attention(q, k, v, bias=bias, dropout_p=0.0, seed=seed)

    expected = cufa.attention(q, k, v, bias=bias)
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(torch.tensor(3)), expected)
    for call in (step, torch.compile(step, backend="eager")):
        for wrong in (torch.tensor([3]), torch.tensor(3.0)):
            with pytest.raises(ValueError, match="seed has dtype"):
                call(wrong)


def test_a_compiled_step_has_other_features() -> None:
    """Beside the graph."""
    host = {name: torch.as_tensor(x) for name, x in arrays().items()}
    q, k, v, bias = (host[name] for name in ("q", "k", "v", "bias"))

    def step(q: Any, bias: Any) -> Any:
        return cufa.attention(q, k, v, bias=bias, dropout_p=0.25, seed=3, causal=True).square().sum()

    leaves = q.requires_grad_(), bias.requires_grad_()
    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaves), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
