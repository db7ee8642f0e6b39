"""torch differentiates, compiles, exports, maps and distributes calls: with the numbers of the plain ones."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_growth_terms import added as added
from test_growth_terms import problem as added_problem

import cufa
from cufa import UnsupportedError
from cufa._operations import call as _call
from cufa._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from cufa._operations.forward import ATTENTION, ATTENTION_VARLEN

torch: Any = pytest.importorskip("torch")

# torch says of some of its own ways that they will go.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PACKED = [False, True]
SHAPES = pytest.mark.parametrize("packed", PACKED, ids=["dense", "packed"])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Computed:
    """Counts what is computed, by the names of operations."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.problems: list[Any] = []
        compute = _call.compute

        def counted(arrays: Any, problem: Any, *others: Any) -> None:
            self.problems.append(problem)
            compute(arrays, problem, *others)

        patch.setattr(_call, "compute", counted)

    @property
    def names(self) -> list[str]:
        return [problem.function for problem in self.problems]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    return Computed(monkeypatch)


def arrays(packed: bool = False, device: str = "cpu", dtype: Any = None, rows: int = 9, dim: int = 8) -> dict[str, Any]:
    """What a call takes; q, k, v and sinks require grad."""
    rng = torch.Generator().manual_seed(rows + dim)
    dtype = dtype or torch.float32
    keys = rows + 3
    q, k, v = ((2 * rows, 4, dim), (2 * keys, 2, dim), (2 * keys, 2, dim + 1))
    if not packed:
        q, k, v = ((2, rows, 4, dim), (2, keys, 2, dim), (2, keys, 2, dim + 1))
    found = {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in zip("qkv", (q, k, v), strict=True)
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found["sinks"] = torch.randn(4, generator=rng, dtype=torch.float64).to(device, wide).requires_grad_()
    if packed:
        for name, length in (("q", rows), ("k", keys)):
            found[f"cu_seqlens_{name}"] = torch.tensor([0, length - 2, 2 * length], dtype=torch.int32, device=device)
    return found


def attend(given: dict[str, Any], **options: Any) -> Any:
    return (cufa.attention_varlen if "cu_seqlens_q" in given else cufa.attention)(**given, **options)


def leaves(given: dict[str, Any]) -> list[Any]:
    return [given[name] for name in ("q", "k", "v", "sinks") if name in given]


def plain_gradients(given: dict[str, Any], dout: Any, dlse: Any = None, **options: Any) -> list[Any]:
    """By the public gradients, without any of torch's."""
    given = {name: array.detach() for name, array in given.items()}
    out, lse = attend(given, **options, return_lse=True)
    differentiate = cufa.attention_varlen_backward if "cu_seqlens_q" in given else cufa.attention_backward
    deterministic = torch.are_deterministic_algorithms_enabled()
    options |= {"out": out, "lse": lse, "dlse": dlse, "deterministic": deterministic}
    return list(differentiate(dout, **given, **options))


def equal(found: Any, expected: Any) -> bool:
    assert len(found) == len(expected) > 0
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- autograd ---------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.4},
    "window": {"window_size": (5, 2), "softcap": 2.0},
}


@SHAPES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_differences(packed: bool, options: dict[str, Any]) -> None:
    given = arrays(packed, dtype=torch.float64, rows=6, dim=4)
    names = ("q", "k", "v", "sinks")

    def both(*changed: Any) -> Any:
        return attend(given | dict(zip(names, changed, strict=True)), **options, return_lse=True)

    assert torch.autograd.gradcheck(both, leaves(given))
    assert torch.autograd.gradcheck(lambda *changed: both(*changed)[1], leaves(given)[:2] + leaves(given)[2:])
    assert not torch.equal(both(*leaves(given))[0], attend(given)) or not options


@SHAPES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_are_those_of_the_plain_calls(packed: bool, dtype: str, device: str, deterministic: None) -> None:
    given = arrays(packed, device, getattr(torch, dtype), rows=70, dim=32)
    options: dict[str, Any] = {"causal": True, "softcap": 5.0}
    out, lse = attend(given, **options, return_lse=True)
    with torch.no_grad():
        assert equal((out, lse), attend(given, **options, return_lse=True))
    assert torch.equal(attend(given, **options), out)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    assert equal(
        torch.autograd.grad((out, lse), leaves(given), (dout, dlse)), plain_gradients(given, dout, dlse, **options)
    )
    out = attend(given, **options)
    assert equal(torch.autograd.grad(out, leaves(given), dout), plain_gradients(given, dout, **options))
    assert all(array.grad is None for array in leaves(given))


def test_only_what_requires_grad_has_one(device: str, computed: Computed, deterministic: None) -> None:
    given = arrays(device=device)
    alone = {name: array.detach() for name, array in given.items()}
    expected = dict(zip(("q", "k", "v", "sinks"), plain_gradients(given, torch.ones_like(attend(alone))), strict=True))
    for name in ("q", "k", "v", "sinks"):
        out = attend(alone | {name: given[name]})
        out.backward(torch.ones_like(out))
        torch.testing.assert_close(given[name].grad, expected[name])
    computed.problems.clear()
    assert not attend(alone).requires_grad and computed.names == ["attention"]
    with torch.no_grad():
        assert not attend(given).requires_grad
    with torch.inference_mode():
        assert attend(given).is_inference()


def test_a_loss_of_lse_alone(device: str, deterministic: None) -> None:
    given = arrays(device=device)
    out, lse = attend(given, return_lse=True)
    found = torch.autograd.grad(lse.sum(), leaves(given))
    assert equal(found, plain_gradients(given, torch.zeros_like(out), torch.ones_like(lse)))
    assert found[0].abs().max() > 0.01 and not found[2].any()


def test_strided_tensors(device: str, deterministic: None) -> None:
    """As transformers hands them on: (batch, heads, rows, head_dim), transposed; and a dout that is expanded."""
    given = arrays(device=device, dtype=torch.float16, rows=33, dim=64)
    views = {
        name: array if name == "sinks" else array.detach().transpose(1, 2).contiguous().requires_grad_()
        for name, array in given.items()
    }
    out = attend({name: x if name == "sinks" else x.transpose(1, 2) for name, x in views.items()}, causal=True)
    assert out.is_contiguous()
    found = torch.autograd.grad(out.sum(), leaves(views))
    expected = plain_gradients(given, torch.ones_like(out), causal=True)
    assert equal([x.transpose(1, 2) for x in found[:3]], expected[:3]) and torch.equal(found[3], expected[3])


def test_determinism_is_asked_of_torch(device: str, computed: Computed) -> None:
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            out = attend(arrays(device=device))
            out.backward(torch.ones_like(out))
        finally:
            torch.use_deterministic_algorithms(False)
        assert computed.names[-1] == "attention_backward"
        assert computed.problems[-1].options.deterministic is wanted


@pytest.mark.parametrize("name", ["q", "v", "out"])
def test_what_was_saved_must_not_change(name: str, device: str) -> None:
    given = arrays(device=device)
    named = {each: array * 1.0 for each, array in given.items()}
    named["out"] = attend(named)
    named[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        named["out"].sum().backward()


def test_what_was_saved_may_lie_elsewhere(device: str, deterministic: None) -> None:
    given = arrays(device=device)
    expected = torch.autograd.grad(attend(given).sum(), leaves(given))
    out = attend(given)
    given["k"].data = given["k"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert equal(torch.autograd.grad(out.sum(), leaves(given)), expected)


def test_gradients_of_gradients_are_refused(device: str, deterministic: None) -> None:
    given = arrays(device=device)
    (dq,) = torch.autograd.grad(attend(given).sin().sum(), given["q"], create_graph=True)
    expected = torch.autograd.grad(attend(given).sin().sum(), given["q"])
    torch.testing.assert_close(dq.detach(), expected[0])
    with pytest.raises(UnsupportedError, match=r"^attention_backward: a result is differentiated"):
        dq.sum().backward()
    out, lse = (array.detach() for array in attend(given, return_lse=True))
    dq, *_ = cufa.attention_backward(torch.ones_like(out), **given, out=out, lse=lse)
    with pytest.raises(UnsupportedError, match=r"^attention_backward: a result is differentiated"):
        dq.sum().backward()


def test_what_has_no_gradient_is_refused(device: str) -> None:
    given = arrays(device=device)
    slopes = torch.rand(4, device=device, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"^attention: alibi_slopes requires grad, but has no gradient"):
        attend(given, alibi_slopes=slopes)
    assert attend(given, alibi_slopes=slopes.detach()).requires_grad
    out = torch.empty(2, 9, 4, 9, device=device)
    with pytest.raises(UnsupportedError, match=r"^attention: out is given and a tensor requires grad"):
        attend(given, out=out)
    with torch.no_grad():
        assert attend(given, out=out) is out
    with pytest.raises(TypeError, match=r"^attention: k is a ndarray, and others are torch tensors"):
        attend(given | {"k": np.zeros((2, 12, 2, 8), np.float32)})
    with pytest.raises(TypeError, match=r"^attention: q is a ndarray, and others are torch tensors"):
        attend(given | {"q": np.zeros((2, 9, 4, 8), np.float32)})
    with pytest.raises(ValueError, match=r"^attention: q has 4 heads and k has 3"):
        attend(given | {"k": torch.zeros(2, 12, 3, 8, device=device), "v": torch.zeros(2, 12, 3, 9, device=device)})


def test_what_would_lose_it_is_refused(device: str) -> None:
    given = {name: array.detach() for name, array in arrays(device=device).items()}

    def f(q: Any) -> Any:
        return attend(given | {"q": q})

    with pytest.raises(UnsupportedError, match=r"^attention: torch.jit.trace records"):
        torch.jit.trace(f, (given["q"],))
    with pytest.raises(UnsupportedError, match=r"^attention: torch.jit.script translates Python"):
        torch.jit.script(cufa.attention)
    with pytest.raises(UnsupportedError, match=r"^attention: torch.jit.script translates Python"):
        torch.jit.script(scripted)
    with pytest.raises(UnsupportedError, match=r"^attention: a torch tensor carries a tangent"):
        torch.func.jvp(f, (given["q"],), (given["q"],))
    q = given["q"].clone().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedError, match=r"^attention: a torch tensor carries a tangent"):
            f(dual)


def scripted(q):  # type: ignore[no-untyped-def]
    return cufa.attention(q, q, q)


def test_explain_takes_what_requires_grad(device: str) -> None:
    given = arrays(device=device)
    assert cufa.explain(**given).function == "attention"
    with pytest.raises(UnsupportedError, match=r"^attention: a torch tensor stands for others"):
        torch.func.grad(lambda q: cufa.explain(**given | {"q": q}) and q.sum())(given["q"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, device: str, deterministic: None, computed: Computed) -> None:
    given = arrays(device=device)
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: cufa.attention(*x) * 2, *leaves(given)[:3], use_reentrant=reentrant
    )
    out.sum().backward()
    assert computed.names == ["attention", "attention", "attention_backward"]
    del given["sinks"]
    found = [array.grad for array in leaves(given)]
    assert equal(found, plain_gradients(given, torch.full_like(out, 2.0)))


def test_selective_checkpoints_may_save_it(device: str, computed: Computed) -> None:
    from torch.utils import checkpoint

    given = arrays(device=device)
    saved = [torch.ops.cufa.attention.default]
    out = checkpoint.checkpoint(
        lambda *x: cufa.attention(*x).sin(),
        *leaves(given)[:3],
        use_reentrant=False,
        context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(saved),
    )
    out.sum().backward()
    assert computed.names == ["attention", "attention_backward"]


def test_autocast(device: str, deterministic: None) -> None:
    given = arrays(device=device)
    half = {name: array if name == "sinks" else array.detach().bfloat16() for name, array in given.items()}
    half["sinks"] = half["sinks"].detach()
    expected = attend(half, causal=True)
    compiled = torch.compile(lambda given: attend(given, causal=True), backend="aot_eager", fullgraph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = attend(given, causal=True)
        with torch.no_grad():
            assert torch.equal(attend(given, causal=True), expected)
        assert torch.equal(attend(half | {"q": given["q"].detach()}, causal=True), expected)
        assert torch.equal(compiled(given), expected)
        if device == "cpu":
            assert attend(arrays(dtype=torch.float64)).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert attend(given).dtype == torch.float32
    assert torch.equal(found, expected)
    dq, dsinks = torch.autograd.grad(found.float().sum(), (given["q"], given["sinks"]))
    assert dq.dtype == dsinks.dtype == torch.float32
    torch.testing.assert_close(dq, plain_gradients(half, torch.ones_like(found), causal=True)[0].float())


# --- operators --------------------------------------------------------------------------------------


def operators(packed: bool, device: str) -> dict[str, Any]:
    """Of a forward and its gradients, with arguments."""
    from cufa.interop.torch import operator_of

    given = arrays(packed, device, torch.bfloat16)
    forward, backward = (ATTENTION_VARLEN, ATTENTION_VARLEN_BACKWARD) if packed else (ATTENTION, ATTENTION_BACKWARD)
    out, lse = attend(given, return_lse=True)
    results = {"out": out.detach(), "lse": lse.detach(), "dout": torch.randn_like(out), "dlse": torch.randn_like(lse)}
    plain = {name: array.detach() for name, array in given.items()} | results
    options = True, None, None, 0.5, 0.0
    return {
        "forward": (operator_of(forward), given, (*options, False, False)),
        "with lse": (operator_of(forward), given, (*options, True, False)),
        "gradients": (operator_of(backward), plain, (*options, False, True)),
    }


@SHAPES
@pytest.mark.parametrize("which", ["forward", "with lse", "gradients"])
def test_operators_are_what_torch_asks_of_them(packed: bool, which: str, device: str) -> None:
    operator, given, options = operators(packed, device)[which]
    flat = tuple(given.get(name) for name in operator.inputs)
    found = torch.library.opcheck(operator.overload, (*flat, *options))
    assert {*found.values()} == {"SUCCESS"} and len(found) >= 4


def test_tensors_without_memory_give_some_without(device: str) -> None:
    given = arrays(device=device)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(array) for name, array in given.items()}
        out, lse = attend(fakes, return_lse=True)
    assert type(out) is type(fakes["q"]) and out.shape == (2, 9, 4, 9) and lse.shape == (2, 4, 9)
    assert out.device.type == device and lse.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^attention: v has seqlen 12 but k has 11"), mode:
        attend(fakes | {"k": fakes["k"][:, 1:]})


# --- compilation ------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_functions(packed: bool, dynamic: bool, device: str, deterministic: None) -> None:
    """Their graphs have no breaks, whatever the shapes, and with dynamic ones there is one for all."""

    def f(given: dict[str, Any]) -> Any:
        out, lse = attend(given | {"q": given["q"] * 2.0}, window_size=(5, None), softcap=3.0, return_lse=True)
        return out * 2.0, lse

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for rows in (9, 12, 50):
        given = arrays(packed, device, rows=rows)
        if dynamic:
            for name in "qkv":
                torch._dynamo.mark_dynamic(given[name], 0 if packed else 1)
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            found = compiled(given)
        expected = f(given)
        assert equal(found, expected)
        gradients = [torch.autograd.grad([x.sum() for x in each], leaves(given)) for each in (found, expected)]
        assert equal(*gradients)
        with torch.no_grad():
            if not dynamic:
                assert equal(compiled(given), expected)


def test_compiled_gradients_are_deterministic_if_asked(device: str, computed: Computed) -> None:
    compiled = torch.compile(lambda given: attend(given).sum(), backend="aot_eager", fullgraph=True)
    for wanted in (False, True, False):
        torch.use_deterministic_algorithms(wanted)
        try:
            compiled(arrays(device=device)).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert computed.problems[-1].options.deterministic is wanted


def test_a_new_seed_is_not_compiled_anew(device: str) -> None:
    """But once, when torch learns that it changes; gradients drop what the forward does."""

    def f(given: dict[str, Any], seed: int) -> Any:
        return attend(given, dropout_p=0.3, seed=seed) * 2.0

    compiled, given = torch.compile(f, backend="aot_eager"), arrays(device=device)
    for count, seed in enumerate((3, 4, -5, 2**62, 7)):
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            found = compiled(given, seed)
        expected = f(given, seed)
        assert equal((found,), (expected,))
        assert equal(*(torch.autograd.grad(x.sum(), leaves(given)) for x in (found, expected)))


def test_options_may_change_between_calls(device: str) -> None:
    def f(q: Any, softcap: float, scale: float, left: int) -> Any:
        return cufa.attention(q, q, q, softcap=softcap, softmax_scale=scale, window_size=(left, q.shape[1] // 2))

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for count in range(1, 5):
        q = torch.randn(1, 5 + count, 2, 8, device=device)
        asked = q, 1.0 + count, 0.1 * count, count
        assert torch.equal(compiled(*asked), f(*asked))
    with pytest.raises(TypeError, match=r"^attention: causal is a int; pass True or False"):
        torch.compile(lambda q: cufa.attention(q, q, q, causal=1), backend="eager")(q)


def test_lengths_that_data_decide_are_compiled(device: str) -> None:
    def f(x: Any, chosen: Any, offsets: Any) -> Any:
        x = x[chosen]
        return cufa.attention_varlen(x, x, x, offsets, offsets)

    x = torch.randn(7, 2, 8, device=device)
    chosen = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool, device=device)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(f, backend="aot_eager", fullgraph=True)(x, chosen, offsets)
    assert torch.equal(found, f(x, chosen, offsets))


PROGRAM = """
import torch, cufa
from torch._dynamo.utils import counters
x = [torch.arange(64.0).reshape(1, 4, 2, 8).sin().add(i).requires_grad_() for i in range(3)]
torch.compile(lambda *x: cufa.attention(*x).sin() * 2, fullgraph=True)(*x).sum().backward()
torch.testing.assert_close(x[0].grad, torch.autograd.grad((cufa.attention(*x).sin() * 2).sum(), x[0])[0])
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler for C++")
def test_programs_compiled_before_are_found_again(tmp_path: Path) -> None:
    """In a new process, in which nothing has been traced: operators are there by their names."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        run = [sys.executable, "-W", "ignore", "-c", PROGRAM]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout.split()[-1]))
    assert found[0] == 0 < found[1]


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A projection, attention with learned sinks, and a projection back."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.back = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.sinks = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Any) -> Any:
        q, k, v = self.project(x).chunk(3, -1)
        return self.back(cufa.attention(q, k, v, causal=True, sinks=self.sinks))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict: bool, device: str) -> None:
    layer = Layer().to(device)
    shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")}
    program = torch.export.export(
        layer, (torch.randn(2, 7, 2, 8, device=device),), dynamic_shapes=(shapes,), strict=strict
    )
    assert torch.ops.cufa.attention.default in {node.target for node in program.graph.nodes}
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    x = torch.randn(3, 13, 2, 8, device=device)
    for each in (program, torch.export.load(file), program.run_decompositions()):
        torch.testing.assert_close(each.module()(x), layer(x))
    module = program.module()
    module(x).sum().backward()
    layer(x).sum().backward()
    for found, expected in zip(module.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


# --- transforms -------------------------------------------------------------------------------------


def test_mapped_calls_are_one(device: str, computed: Computed) -> None:
    given = {name: array.detach() for name, array in arrays(device=device).items()}
    many = torch.randn(3, *given["q"].shape, device=device)
    found = torch.vmap(lambda q: attend(given | {"q": q}, return_lse=True))(many)
    assert computed.names == ["attention"]
    expected = [attend(given | {"q": q}, return_lse=True) for q in many]
    assert equal(found, [torch.stack(each) for each in zip(*expected, strict=True)])
    keys = torch.randn(2, 12, 2, 5, 8, device=device)
    qs = torch.ones(5, *given["q"].shape, device=device)
    found = torch.vmap(lambda q, k: attend(given | {"q": q, "k": k}), in_dims=(0, 3), out_dims=1)(qs, keys)
    assert found.shape == (2, 5, 9, 4, 9)
    assert torch.equal(found[:, 2], attend(given | {"q": torch.ones_like(given["q"]), "k": keys[..., 2, :]}))


def test_maps_of_what_is_not_of_the_batch_are_loops(device: str) -> None:
    given = {name: array.detach() for name, array in arrays(device=device).items()}
    many = {"sinks": torch.randn(3, 4, device=device), "alibi_slopes": torch.rand(3, 2, 4, device=device)}
    for name, each in many.items():
        found = torch.vmap(lambda x, name=name: attend(given | {name: x}))(each)
        assert torch.equal(found, torch.stack([attend(given | {name: x}) for x in each]))
    qs, slopes = torch.randn(3, *given["q"].shape, device=device), many["alibi_slopes"][0]
    found = torch.vmap(lambda q: attend(given | {"q": q}, alibi_slopes=slopes))(qs)
    assert torch.equal(found, torch.stack([attend(given | {"q": q}, alibi_slopes=slopes) for q in qs]))


def test_maps_of_packed_sequences_are_refused(device: str) -> None:
    given = {name: array.detach() for name, array in arrays(True, device).items()}
    with pytest.raises(UnsupportedError, match=r"^attention_varlen: torch.func.vmap cannot put packed sequences"):
        torch.vmap(lambda q: attend(given | {"q": q}))(torch.stack([given["q"]] * 2))


@SHAPES
def test_functional_gradients(packed: bool, device: str, deterministic: None) -> None:
    given = arrays(packed, device)
    names = ("q", "k", "v", "sinks")

    def loss(*changed: Any) -> Any:
        return attend(given | dict(zip(names, changed, strict=True)), causal=True).sin().sum()

    expected = torch.autograd.grad(loss(*leaves(given)), leaves(given))
    assert equal(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*leaves(given)), expected)
    assert equal(torch.func.vjp(loss, *leaves(given))[1](torch.ones((), device=device)), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_maps_of_gradients_and_gradients_of_maps(compiled: bool, device: str, deterministic: None) -> None:
    given = {name: array.detach() for name, array in arrays(device=device).items()}
    many = torch.randn(3, *given["q"].shape, device=device)

    def loss(q: Any, sinks: Any) -> Any:
        return attend(given | {"q": q, "sinks": sinks}, causal=True).sin().sum()

    def both(many: Any, sinks: Any) -> Any:
        of_each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(many, sinks)
        summed = torch.func.grad(lambda x: torch.func.vmap(loss, in_dims=(0, None))(x, sinks).sum())(many)
        return *of_each, summed

    run = torch.compile(both, backend="aot_eager", fullgraph=True) if compiled else both
    dq, dsinks, summed = run(many, given["sinks"])
    expected = [torch.func.grad(loss, argnums=(0, 1))(q, given["sinks"]) for q in many]
    assert equal((dq, dsinks), [torch.stack(each) for each in zip(*expected, strict=True)])
    assert torch.equal(summed, dq)


def test_transforms_in_each_other(device: str, deterministic: None) -> None:
    """Each records for itself, and none loses a second derivative."""
    given = arrays(device=device)
    plain = {name: array.detach() for name, array in given.items()}
    out, differentiate = torch.func.vjp(lambda q: attend(given | {"q": q}), plain["q"])
    expected = plain_gradients(given, torch.ones_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), given["k"], retain_graph=True)[0], expected[1])
    (dq,) = differentiate(torch.ones_like(out))
    assert torch.equal(dq.detach(), expected[0])
    with pytest.raises(UnsupportedError, match=r"^attention_backward: a result is differentiated"):
        torch.autograd.grad(dq.sum(), given["k"])

    def first(q: Any) -> Any:
        return torch.func.grad(lambda q: attend(plain | {"q": q}).sin().sum())(q)

    with pytest.raises(UnsupportedError, match=r"^attention_backward: a result is differentiated"):
        torch.func.grad(lambda q: first(q).sum())(plain["q"])
    with pytest.raises(UnsupportedError, match=r"^attention: a torch tensor carries a tangent"):
        torch.func.jvp(first, (plain["q"],), (plain["q"],))
    found = torch.func.grad(lambda k: torch.func.vjp(lambda q: attend(plain | {"q": q, "k": k}), plain["q"])[0].sum())(
        plain["k"]
    )
    assert torch.equal(found, expected[1])


def test_functionalized_calls(device: str) -> None:
    q = torch.randn(1, 8, 2, 16, device=device)
    found = torch.func.functionalize(lambda x: cufa.attention(x, x, x))(q)
    assert torch.equal(found, cufa.attention(q, q, q))


# --- operations that are added ----------------------------------------------------------------------


@SHAPES
def test_operations_with_added_terms(added: Any, packed: bool) -> None:
    """They differentiate, compile and are mapped without a word of their own."""
    from cufa.interop.torch import operator_of

    operation = added.FORWARD[packed]
    given = added_problem(packed, np.float64, rows=6, keys=8, head_dim=4)
    tensors = {name: torch.tensor(array) for name, array in given.arrays.items()}
    names = ("q", "k", "v", "sinks", "table")
    inputs = [tensors[name].requires_grad_() for name in names]

    def both(*changed: Any) -> Any:
        right = given._replace(arrays=tensors | dict(zip(names, changed, strict=True)))
        return right.run(operation, return_lse=True)

    assert torch.autograd.gradcheck(both, inputs)
    out, lse = both(*inputs)
    dout, dlse = tensors["dout"], tensors["dlse"]
    found = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    plain = {name: array.detach() for name, array in tensors.items()} | {"out": out.detach(), "lse": lse.detach()}
    assert equal(found, given._replace(arrays=plain).run(added.BACKWARD[packed]))
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert equal(torch.autograd.grad(compiled(*inputs), inputs, (dout, dlse)), found)
    operator = operator_of(operation)
    assert operator.name == f"{operation.name}_table_checkers" and operator is operator_of(operation)
    flat = [tensors.get(name) for name in operator.inputs]
    torch.library.opcheck(operator.overload, (*flat, False, 40, 15, None, 4.0, True, False, 3.0, 7))


def test_maps_of_terms_that_know_their_sequence_are_loops(added: Any) -> None:
    given = added_problem(packed=False, rows=6, keys=8, head_dim=4)
    tensors = {name: torch.tensor(array) for name, array in given.arrays.items()}

    def attend(q: Any) -> Any:
        return given._replace(arrays=tensors | {"q": q, "table": None}).run(added.FORWARD[False])

    tensors["alibi_slopes"] = None
    qs = torch.randn(2, *tensors["q"].shape)
    assert torch.equal(torch.vmap(attend)(qs), torch.stack([attend(q) for q in qs]))


# --- processes --------------------------------------------------------------------------------------


def one_of_two(rank: int, store: str, kind: str, device: str) -> None:
    """Half of the batch; gradients are the mean of both."""
    from torch.distributed.fsdp import fully_shard

    group = torch.distributed
    backend = "nccl" if device == "cuda" else "gloo"
    group.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    if device == "cuda":
        torch.cuda.set_device(rank)
    try:
        torch.manual_seed(0)
        layer, x = Layer().to(device), torch.randn(4, 7, 2, 8).to(device)
        expected = Layer().to(device)
        expected.load_state_dict(layer.state_dict())
        (expected(x).sin().sum() / 2).backward()
        if kind == "ddp":
            layer = torch.nn.parallel.DistributedDataParallel(layer)
        else:
            mesh = group.device_mesh.init_device_mesh(device, (2,))
            fully_shard(layer, mesh=mesh)
        layer(x[2 * rank : 2 * rank + 2]).sin().sum().backward()
        for found, right in zip(layer.parameters(), expected.parameters(), strict=True):
            gradient = found.grad if kind == "ddp" else found.grad.full_tensor()
            torch.testing.assert_close(gradient, right.grad, rtol=1e-4, atol=1e-5)
    finally:
        group.destroy_process_group()
    # gloo's threads outlive their group while a module's mesh holds it, and with them tensors that Python knows: one
    # that lets go of such a tensor while the interpreter ends aborts the process. What was to be seen has been seen.
    os._exit(0)


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distributed_modules(kind: str, device: str, tmp_path: Path) -> None:
    if device == "cuda":
        need_two_gpus()
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "store"), kind, device), nprocs=2)


def test_distributed_tensors_are_refused_though_they_require_grad() -> None:
    from torch.distributed import tensor

    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        q = torch.randn(1, 8, 2, 16, requires_grad=True)
        spread = tensor.distribute_tensor(q.detach(), group.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(UnsupportedError, match=r"^attention: k is a DTensor, .* as to_local\(\)"):
            cufa.attention(q, spread, q)
    finally:
        group.destroy_process_group()


# --- GPUs -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@SHAPES
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_graphs_hold_forward_and_backward(packed: bool, dtype: str, deterministic: None) -> None:
    given = arrays(packed, "cuda", getattr(torch, dtype), rows=150, dim=64)
    dout = torch.randn_like(attend(given))

    def step() -> Any:
        return torch.autograd.grad(attend(given, causal=True), leaves(given), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for name in "qkv":
            given[name].copy_(torch.randn_like(given[name]))
    graph.replay()
    torch.cuda.synchronize()
    assert equal(found, plain_gradients(given, dout, causal=True))


@pytest.mark.gpu
@SHAPES
def test_gradients_on_a_gpu_that_is_not_current(packed: bool, deterministic: None) -> None:
    need_two_gpus()
    given = arrays(packed, "cuda:1", torch.bfloat16, rows=150, dim=64)
    assert torch.cuda.current_device() == 0
    out = attend(given, causal=True)
    found = torch.autograd.grad(out.square().sum(), leaves(given))
    with torch.cuda.device(1):
        assert equal(found, plain_gradients(given, 2 * out.detach(), causal=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_on_a_gpu(mode: str, deterministic: None) -> None:
    given = arrays(device="cuda", dtype=torch.bfloat16, rows=150, dim=64)
    compiled = torch.compile(lambda given: attend(given, causal=True) * 2, fullgraph=True, mode=mode)
    for _ in range(4):
        out = compiled(given)
        found = [each.clone() for each in torch.autograd.grad(out.sum(), leaves(given))]
        expected = plain_gradients(given, torch.full_like(out, 2.0), causal=True)
        assert equal(found, expected)


@pytest.mark.gpu
def test_streams_are_those_of_the_forward(deterministic: None) -> None:
    """autograd runs the backward on the stream of the forward, in a thread of its own."""
    given = arrays(device="cuda", dtype=torch.float16, rows=500, dim=64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        out = attend({name: array * 1 for name, array in given.items()}, causal=True)
    out.backward(torch.ones_like(out))
    torch.cuda.synchronize()
    assert equal([array.grad for array in leaves(given)], plain_gradients(given, torch.ones_like(out), causal=True))
