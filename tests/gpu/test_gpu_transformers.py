"""transformers' models on a GPU: 16-bit logits and gradients, generation with static caches, continuous batching."""

from __future__ import annotations

from typing import Any

import pytest

import cufa

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from transformers_models import (  # noqa: E402  # there once transformers is
    PADDING,
    check_continuous_batching,
    close,
    decoder,
    found_kernels,
    padding,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]

WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64, "max_position_embeddings": 256}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_halves_are_as_close_as_eager_ones(name: str, dtype: str) -> None:
    """Of logits and gradients, to the same model in float32: at most twice as far as eager attention is."""
    # Of several experts, rounding might choose another one.
    one = {"num_local_experts": 1} if name == "GptOss" else {}
    models = decoder(name, getattr(torch, dtype), "cuda", **WIDE, **one)
    exact = type(models.eager)(models.eager.config).to("cuda").eval()
    exact.load_state_dict(models.eager.state_dict())
    for kind in PADDING:
        mask = padding(kind, "cuda")
        live = slice(None) if mask is None else mask.bool()
        found = []
        for model in (exact, models.eager, models.cufa):
            model.zero_grad()
            logits = model(tokens(device="cuda"), attention_mask=mask).logits
            assert logits.isfinite().all()
            logits[live].float().square().mean().backward()
            with torch.no_grad():
                again = model(tokens(device="cuda"), attention_mask=mask).logits
            gradient = model.model.layers[0].self_attn.q_proj.weight.grad
            assert gradient.isfinite().all() and gradient.any()
            found.append([each.detach().double() for each in (logits[live], again[live], gradient)])
        for true, eager, mine in zip(*found, strict=True):
            bound = 2.0 * (eager - true).abs().max() + torch.finfo(getattr(torch, dtype)).eps * true.abs().max()
            assert (mine - true).abs().max() <= bound, kind


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GptOss"])
def test_generation_writes_the_same(name: str) -> None:
    """In float32: a dynamic cache, a static one, and a static one whose steps are CUDA graphs."""
    models = decoder(name, torch.float32, "cuda", **WIDE)
    asked = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12, "return_dict_in_generate": True}
    asked |= {"output_logits": True}
    graphs = transformers.CompileConfig(backend="cudagraphs", fullgraph=True, mode=None)
    for kind in ("none", "left"):
        mask = torch.ones_like(tokens(device="cuda")) if kind == "none" else padding(kind, "cuda")
        given = {"inputs": tokens(device="cuda"), "attention_mask": mask}
        expected = models.eager.generate(**given, **asked, cache_implementation="static", disable_compile=True)
        ways: tuple[dict[str, Any], ...] = (
            {"cache_implementation": "dynamic"},
            {"cache_implementation": "static", "disable_compile": True},
            {"cache_implementation": "static", "compile_config": graphs},
        )
        for way in ways:
            torch.compiler.reset()  # a generation has caches of its own; graphs hold those of the one before
            cufa.stats(reset=True)
            found = models.cufa.generate(**given, **asked, **way)
            assert sum(cufa.stats().launches.values()) >= 2
            assert (found.sequences == expected.sequences).all(), (kind, way)
            close(torch.stack(found.logits), torch.stack(expected.logits), 1e-4)


def test_continuous_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without CUDA graphs; steps of decoding append to pages and attend in one call."""
    pytest.importorskip("cufa.flash_attn")
    found_kernels(monkeypatch)
    models = decoder("Llama", torch.float32, "cuda", **WIDE)
    models.cufa.set_attn_implementation("cufa/flash-attn2")
    for graphs in (False, True):
        cufa.stats(reset=True)
        check_continuous_batching(models, "cuda", use_cuda_graph=graphs)
        assert any("cache" in name for name in cufa.stats().launches)
