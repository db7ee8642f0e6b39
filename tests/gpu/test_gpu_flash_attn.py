"""`cufa.flash_attn` on a GPU: 16-bit tensors against float64 on the CPU, packed gradients, seeds, graphs, and CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cufa
import cufa.flash_attn as flash_attn
from cufa import UnsupportedError

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window, softcap": {"window_size": (30, 5), "softcap": 3.0},
    "slopes": {"causal": True, "alibi_slopes": True},
    "dropout": {"dropout_p": 0.25, "causal": True},
    "deterministic": {"deterministic": True, "dropout_p": 0.25, "softcap": 3.0},
}


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return found


def random(torch: Any, *shape: int, grad: bool = False) -> Any:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    return made.requires_grad_(grad)


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_tensors_and_their_gradients(torch: Any, name: str, varlen: bool) -> None:
    """Slices of one tensor, read and written by the kernels, as tensors of their own are in float64 on the CPU.

    Packed rows behind the last sequence have neither result nor gradient.
    """
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = 0.1 * torch.arange(1.0, 5, device="cuda")
    qkv = random(torch, *((300,) if varlen else (2, 150)), 3, 4, 64, grad=True)
    offsets = torch.tensor([0, 100, 100, 290], dtype=torch.int32, device="cuda")
    seed = None
    torch.manual_seed(7)
    if "dropout_p" in options:
        from cufa.flash_attn._torch import next_seed

        seed = next_seed(qkv)
        torch.manual_seed(7)
    if varlen:
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, offsets, 190, **options)
    else:
        out = flash_attn.flash_attn_qkvpacked_func(qkv, **options)
    dout = random(torch, *out.shape)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    assert gradient.is_contiguous() and gradient.dtype is torch.bfloat16

    exact = qkv.detach().cpu().double().requires_grad_()
    own = {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in options.items() if key != "deterministic"}
    parts = exact.unbind(-3)
    if varlen:
        wanted = cufa.attention_varlen(*parts, offsets.cpu(), offsets.cpu(), seed=seed, **own)
    else:
        wanted = cufa.attention(*parts, seed=seed, **own)
    (right,) = torch.autograd.grad(wanted, exact, dout.cpu().double())
    for one, other in ((out, wanted), (gradient, right)):
        error = (one.detach().cpu().double() - other).abs().max() / other.abs().max()
        assert float(error) < 2e-2


def test_seeds_move_on_with_the_generator_of_the_gpu(torch: Any) -> None:
    q = random(torch, 1, 64, 2, 64)

    def attend() -> Any:
        return flash_attn.flash_attn_func(q, q, q, dropout_p=0.5)

    torch.cuda.manual_seed(3)
    first, second = attend(), attend()
    state = torch.cuda.get_rng_state()
    third = attend()
    torch.cuda.set_rng_state(state)
    assert torch.equal(third, attend()) and not torch.equal(first, second)
    torch.cuda.manual_seed(3)
    assert torch.equal(first, attend())
    torch.rand(4, device="cuda")  # whatever draws numbers moves the generator on
    assert not torch.equal(second, attend())


def test_mapped_calls_drop_the_same_only_if_asked_to(torch: Any) -> None:
    """Here a seed is drawn without a word of torch's, and is one for all calls."""
    q = random(torch, 1, 64, 2, 64).expand(2, 1, 64, 2, 64)

    def mapped(randomness: str) -> Any:
        return torch.func.vmap(lambda x: flash_attn.flash_attn_func(x, x, x, 0.5), randomness=randomness)(q)

    with pytest.raises(UnsupportedError, match="vmap"):
        mapped("different")
    assert torch.equal(*mapped("same"))


def test_graphs(torch: Any) -> None:
    q, cache = random(torch, 2, 1, 4, 64), random(torch, 2, 2, 64, 2, 64)
    lengths = torch.tensor([5, 40], dtype=torch.int32, device="cuda")
    flash_attn.flash_attn_func(q, q, q)
    flash_attn.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = flash_attn.flash_attn_func(q, q, q)
        cached = flash_attn.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths)
        with pytest.raises(UnsupportedError, match="capture of a CUDA graph"):
            flash_attn.flash_attn_func(q, q, q, dropout_p=0.5)
    lengths += 3
    graph.replay()
    torch.testing.assert_close(dense, flash_attn.flash_attn_func(q, q, q))
    wanted = flash_attn.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths)
    torch.testing.assert_close(cached, wanted)


def test_probabilities_and_rows_without_keys(torch: Any) -> None:
    q, k = random(torch, 1, 300, 4, 64), random(torch, 1, 290, 2, 64)
    torch.manual_seed(1)
    out, lse, signed = flash_attn.flash_attn_func(q, k, k, 0.25, causal=True, return_attn_probs=True)
    assert bool((lse[:, :, :10] == torch.inf).all()) and bool(lse[:, :, 10:].isfinite().all())
    rows = signed.float().abs().sum(-1)
    torch.testing.assert_close(rows[:, :, 10:], torch.ones_like(rows[:, :, 10:]), atol=2e-2, rtol=0)
    kept = signed.float().clamp(min=0) / 0.75
    wanted = torch.einsum("bhij,bjhd->bihd", kept, k.float().repeat_interleave(2, 2))
    torch.testing.assert_close(out.float(), wanted, atol=5e-2, rtol=5e-2)


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((2, 40, 3, 4, 32)).astype(np.float16)
    found = flash_attn.flash_attn_qkvpacked_func(cupy.asarray(qkv), causal=True, return_attn_probs=True)
    wanted = flash_attn.flash_attn_qkvpacked_func(qkv.astype(np.float64), causal=True, return_attn_probs=True)
    for one, other, limit in zip(found[:2], wanted[:2], (5e-3, 1e-4), strict=True):
        assert isinstance(one, cupy.ndarray)
        np.testing.assert_allclose(cupy.asnumpy(one), other, atol=limit)
    caches = (cupy.asarray(rng.standard_normal((3, 16, 2, 32)).astype(np.float16)) for _ in "kv")
    assert flash_attn.flash_attn_with_kvcache(cupy.asarray(qkv[:, :1, 0]), *caches, cache_seqlens=5).shape == (
        2,
        1,
        4,
        32,
    )
