"""Tiny models of transformers, with eager attention and with cufa's, for tests with and without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import cufa.transformers

cufa.transformers.register(kernels=False)

from cufa._transformers import attention as _attention  # noqa: E402  # there once it is registered

LAYERS = 2
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
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

WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

DECODERS: dict[str, Callable[..., Any]] = {
    "Llama": transformers.LlamaConfig,
    "Qwen3": transformers.Qwen3Config,
    "Mistral": lambda **small: transformers.MistralConfig(**small, sliding_window=5),
    "Gemma2": lambda **small: transformers.Gemma2Config(**small, **WINDOWS, query_pre_attn_scalar=8),
    "Gemma3": lambda **small: transformers.Gemma3TextConfig(**small, **WINDOWS, query_pre_attn_scalar=8),
    "GptOss": lambda **small: transformers.GptOssConfig(**WINDOWS | EXPERTS | small),
}
"""Softcap and windows in Gemma 2, windows in Mistral and Gemma 3, sinks and windows in GPT-OSS."""

PADDING: dict[str, Any] = {
    "none": None,
    "left": [[0] * 4 + [1] * 9, [1] * ROWS],
    "right": [[1] * 8 + [0] * 5, [1] * ROWS],
    "both": [[0] + [1] * 8 + [0] * 4, [0] * 2 + [1] * 11],
    "holes": [[1, 1, 0, 0] + [1] * 9, [1] * ROWS],
    "everything": [[0] * ROWS, [0] * 3 + [1] * 10],
}


def padding(kind: str, device: str = "cpu") -> Any:
    return None if PADDING[kind] is None else torch.tensor(PADDING[kind], device=device)


def tokens(batch: int = 2, rows: int = ROWS, device: str = "cpu") -> Any:
    return torch.randint(3, 60, (batch, rows), generator=torch.Generator().manual_seed(7)).to(device)


class Models:
    """A model with eager attention, and the same one with cufa's.

    Weights are larger than those that models begin with, whose softmaxes are nearly flat.
    """

    def __init__(self, model: Any, dtype: Any = torch.float32, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2, generator=generator) if parameter.ndim > 1 else None
        self.eager = model.eval().to(device, dtype)
        self.eager.set_attn_implementation("eager")
        self.cufa = copy.deepcopy(self.eager)
        self.cufa.set_attn_implementation("cufa")

    def both(self, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        return call(self.eager), call(self.cufa)

    def check(self, call: Callable[[Any], Any], live: Any = None, tolerance: float = 3e-6) -> None:
        """Outputs are equal where tokens are live, and finite everywhere; so are gradients by all parameters."""
        expected, found = self.both(call)
        assert found.isfinite().all()
        live = torch.ones(expected.shape[:2], dtype=torch.bool, device=expected.device) if live is None else live.bool()
        close(found[live], expected[live], tolerance)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected) * live[..., None]
        for model, result in ((self.eager, expected), (self.cufa, found)):
            model.zero_grad()
            (result * weights).sum().backward()
        changed = 0
        for (name, its), mine in zip(self.eager.named_parameters(), self.cufa.parameters(), strict=True):
            if its.grad is not None:
                changed += bool(its.grad.any())
                close(mine.grad, its.grad, 10 * tolerance, name)
        assert changed > 5


def close(found: Any, expected: Any, tolerance: float, name: str = "results") -> None:
    """Differences are at most `tolerance` times the largest number."""
    difference = (found.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), f"{name} differ by {difference}"


def decoder(name: str, dtype: Any = torch.float32, device: str = "cpu", **other: Any) -> Models:
    config = DECODERS[name](**SMALL | other)
    return Models(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), dtype, device)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of cufa's functions by the attention function, by name."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., Any]:
        function = getattr(_attention, name)

        def call(*args: Any, **more: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **more)

        return call

    names = ("attention", "attention_varlen", "attention_with_kvcache")
    with mock.patch.multiple(_attention, **{name: count(name) for name in names}):
        yield counts


def found_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels package, if it is there, with cufa's folder, and whatever its version in transformers' eyes."""
    package = pytest.importorskip("kernels")
    from transformers.integrations import hub_kernels

    cufa.transformers.register()
    if not hub_kernels.is_kernels_available():  # 5.24 wants 0.18.2, and would load the folder by the same call
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        monkeypatch.setattr(hub_kernels, "get_kernel_hub", package.get_kernel, raising=False)
    return package


def check_continuous_batching(models: Models, device: str = "cpu", **config: Any) -> None:
    """Prompts of several lengths, some with a common beginning, are answered as each is alone."""
    ids = tokens(3, 40).tolist()
    prompts = [ids[0], ids[1][:7], ids[1], ids[0][:17] + ids[2]]
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    config = {"page_size": 16, "num_blocks": 32, "max_batch_tokens": 64} | config
    out = models.cufa.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(**asked, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**config),
        progress_bar=False,
    )
    found = [out[key].generated_tokens for key in sorted(out, key=lambda key: int(key.rpartition("_")[2]))]
    for prompt, mine in zip(prompts, found, strict=True):
        alone = models.eager.generate(torch.tensor([prompt], device=device), **asked, eos_token_id=None)
        assert alone[0, len(prompt) :].tolist() == mine
