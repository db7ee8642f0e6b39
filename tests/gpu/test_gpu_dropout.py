"""On a GPU: every kernel drops what `cufa.dropout_mask` says, and gives what the reference does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dropping import problem, telling, told
from test_gpu import framework

import cufa

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy() -> Any:
    return framework("cupy")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("rows", "keys", "head_dims"),
    [(100, 120, (64, 128)), (250, 200, (128, 256)), (30, 50, (32, 64)), (7, 256, (64, 256))],
    ids=["one pass", "two passes", "short", "few"],
)
def test_every_kernel_keeps_what_the_mask_says(
    cupy: Any, dtype: str, rows: int, keys: int, head_dims: tuple[int, int]
) -> None:
    given = telling(dtype, rows, keys, head_dims)
    kept = cufa.dropout_mask((2, 2, rows, keys), given.dropout_p, given.seed)
    for found in told(given, given.run(cupy.asarray)):
        np.testing.assert_array_equal(found, kept)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "sinks": True, "dropout_p": 0.75},
    "window": {"window_size": (300, 5), "alibi": True, "seed": -(2**63)},
    "softcap": {"causal": True, "softcap": 3.0, "alibi": True, "sinks": True},
    "packed": {"causal": True, "packed": True},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("dtype", "head_dims"),
    [
        ("bfloat16", (64, 64)),
        ("float16", (128, 128)),
        ("bfloat16", (192, 128)),
        ("float16", (256, 256)),
        ("float32", (64, 64)),
        ("float16", (33, 57)),
    ],
    ids=str,
)
def test_results_equal_the_reference(cupy: Any, dtype: str, head_dims: tuple[int, int], features: str) -> None:
    given = problem(dtype, rows=333, keys=450, head_dims=head_dims, **FEATURES[features])
    given.check(given.run(cupy.asarray))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_few_rows_equal_the_reference(cupy: Any, rows: int) -> None:
    given = problem("bfloat16", rows=rows, keys=3000, heads=(8, 2), head_dims=(128, 128), causal=True)
    given.check(given.run(cupy.asarray))


def test_long_rows_equal_the_reference(cupy: Any) -> None:
    """Sums over as many keys as these are made in chains."""
    given = problem("float16", batch=1, rows=300, keys=9000, heads=(2, 1), head_dims=(128, 128), causal=True)
    given.check(given.run(cupy.asarray))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_frameworks_differentiate(name: str) -> None:
    """With autograd and JAX's vjp the gradients are those of `cufa.attention_backward`."""
    given = problem("float32", rows=100, keys=130, head_dims=(64, 64), causal=True)
    q, k, v, dout = (given.arrays[each] for each in ("q", "k", "v", "dout"))
    options: dict[str, Any] = {"causal": True, "dropout_p": given.dropout_p, "seed": given.seed}
    framework(name)
    if name == "torch":
        import torch

        leaves = [torch.tensor(x, device="cuda", requires_grad=True) for x in (q, k, v)]
        cufa.attention(*leaves, **options).backward(torch.tensor(dout, device="cuda"))
        found = [x.grad.cpu().numpy() for x in leaves]
    else:
        import jax

        _, pull = jax.vjp(lambda *qkv: cufa.attention(*qkv, **options), *map(jax.numpy.asarray, (q, k, v)))
        found = [np.asarray(x) for x in jax.jit(pull)(jax.numpy.asarray(dout))]
    out, lse = cufa.attention(q, k, v, return_lse=True, **options)
    for one, other in zip(found, cufa.attention_backward(dout, q, k, v, out, lse, **options), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-16 * float(np.abs(other).max()))


def test_a_graph_draws_anew_where_its_seed_has_changed() -> None:
    framework("torch")
    import torch

    given = problem("bfloat16", rows=200, keys=300, head_dims=(64, 64), causal=True)
    q, k, v, dout = (torch.tensor(given.arrays[name].astype(np.float32), device="cuda").bfloat16()
                     for name in ("q", "k", "v", "dout"))  # fmt: skip
    seed = torch.tensor(3, device="cuda")

    def step(seed: Any) -> Any:
        options = {"causal": True, "dropout_p": 0.3, "seed": seed}
        out, lse = cufa.attention(q, k, v, return_lse=True, **options)
        return out, *cufa.attention_backward(dout, q, k, v, out, lse, **options, deterministic=True)

    step(seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(seed)
        seed += 1
    for number in (3, 4):
        graph.replay()
        torch.cuda.synchronize()
        assert int(seed) == number + 1
        assert all(map(torch.equal, found, step(number)))
