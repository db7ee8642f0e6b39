"""transformers' models with ``attn_implementation="cufa"``, held to the same models with eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cufa
import cufa.transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

cufa.transformers.register(kernels=False)

from cufa._transformers import attention as _attention  # noqa: E402  # what transformers brings is asked for above
from cufa._transformers import masks as _masks  # noqa: E402

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 60,
}
ROWS = 13
"""Tokens of a sequence; windows are shorter."""

DECODERS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: transformers.LlamaConfig(**SMALL),
    "Qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "Mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "Gemma2": lambda: transformers.Gemma2Config(**SMALL, sliding_window=5, query_pre_attn_scalar=8),
    "Gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, sliding_window=5, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "GptOss": lambda: transformers.GptOssConfig(
        **SMALL, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
}
"""Softcap and windows in Gemma 2, windows in Mistral and Gemma 3, sinks and windows in GPT-OSS."""

PADDING = {
    "none": None,
    "left": [[0] * 4 + [1] * 9, [1] * ROWS],
    "right": [[1] * 8 + [0] * 5, [1] * ROWS],
    "both": [[0] + [1] * 8 + [0] * 4, [0] * 2 + [1] * 11],
    "holes": [[1, 1, 0, 0] + [1] * 9, [1] * ROWS],
    "nothing": [[0] * ROWS, [0] * 3 + [1] * 10],
}


class Models:
    """A model with eager attention, and the same one with cufa's."""

    def __init__(self, model: Any, dtype: Any = torch.float32) -> None:
        self.eager = model.eval().to(dtype)
        self.eager.set_attn_implementation("eager")
        self.cufa = copy.deepcopy(self.eager)
        self.cufa.set_attn_implementation("cufa")

    def both(self, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        return call(self.eager), call(self.cufa)

    def check(self, call: Callable[[Any], Any], live: Any = None, tolerance: float = 2e-6) -> None:
        """Outputs are equal where tokens are live, and finite everywhere; so are gradients by all parameters."""
        expected, found = self.both(call)
        assert found.isfinite().all()
        live = torch.ones(expected.shape[:2], dtype=torch.bool) if live is None else live
        close(found[live], expected[live], tolerance)
        torch.manual_seed(1)
        weights = torch.randn_like(expected) * live[..., None]
        for model, result in ((self.eager, expected), (self.cufa, found)):
            model.zero_grad()
            (result * weights).sum().backward()
        pairs = list(zip(self.eager.named_parameters(), self.cufa.parameters(), strict=True))
        assert any(mine.grad is not None and mine.grad.any() for _, mine in pairs)
        for (name, its), mine in pairs:
            if its.grad is not None:
                close(mine.grad, its.grad, 20 * tolerance, name)


def close(found: Any, expected: Any, tolerance: float, name: str = "") -> None:
    bound = tolerance * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
    assert (found - expected).abs().max().item() <= bound if expected.numel() else True, name


def decoder(name: str, dtype: Any = torch.float32) -> Models:
    torch.manual_seed(0)
    config = DECODERS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # the usual small start gives softmaxes that are nearly flat
        if parameter.ndim > 1 or "sinks" in str(parameter.shape):
            parameter.data.normal_(0.0, 0.2)
    return Models(model, dtype)


def tokens(batch: int = 2, rows: int = ROWS) -> Any:
    return torch.randint(3, 60, (batch, rows), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Calls of cufa's functions, by name."""
    counts: dict[str, int] = {}
    for name in ("attention", "attention_varlen", "attention_with_kvcache"):
        function = getattr(_attention, name)

        def call(*args: Any, _function: Any = function, _name: str = name, **more: Any) -> Any:
            counts[_name] = counts.get(_name, 0) + 1
            return _function(*args, **more)

        monkeypatch.setattr(_attention, name, call)
    yield counts


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, padding: str) -> None:
    mask = PADDING[padding]
    mask = None if mask is None else torch.tensor(mask)
    models = decoder(name)
    models.check(lambda model: model(tokens(), attention_mask=mask).logits, None if mask is None else mask.bool())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_writes_the_same_tokens(name: str, cache: str) -> None:
    models = decoder(name)
    for mask in (torch.ones(2, ROWS, dtype=torch.long), torch.tensor(PADDING["left"]), torch.tensor(PADDING["right"])):
        asked = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
        expected, found = models.both(lambda model: model.generate(tokens(), attention_mask=mask, **asked))
        assert (expected == found).all() and len(set(expected[:, ROWS:].flatten().tolist())) > 2
