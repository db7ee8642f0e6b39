"""A Llama-shaped model of transformers with cufa's attention, beside the same one with torch's.

    python benchmarks/transformers_models.py [--out DIR] [--only REGEX] [--quick] [--compile] [--tiny]

Eight layers of 32 heads over 8 key heads of 128, in bfloat16, with random weights, which both models share. Calls take
turns in one process; medians are of the host's clock around a call and the wait for the GPU. Prefills and steps of
training are held to each other: logits, or gradients, differ by what bfloat16 rounds. ``--out`` receives a table
(Markdown). Continuous batching is left out where transformers does not take the installed version of the kernels
package: 5.22 takes 0.17.2, 5.24 takes 0.18.2. ``--compile`` lets transformers compile the steps of decoding with a
static cache, as it does by itself; that takes a minute or two more. ``--tiny`` is a small model in float32, on the CPU
too, and tests this file.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from common import stem_of
from transformers.utils.import_utils import is_kernels_available

import cufa.transformers
from cufa._bench.frameworks import Torch
from cufa._bench.measure import setting

OURS, THEIRS = cufa.transformers.NAME, "sdpa"
FLASH = cufa.transformers.KERNELS[1]
"""cufa's attention where requests are batched continuously."""

MAX_DIFFERENCE = 0.05
"""Of logits and gradients of both, relatively in the Frobenius norm: eight layers of bfloat16."""


class Size(NamedTuple):
    """The model, and the tokens that cases have."""

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    prefill: int
    padded: tuple[int, ...]
    train: int
    prompts: tuple[int, int]
    requests: int
    longest: int
    new: int


LARGE = Size(8, 32, 8, 128, 14336, 8192, (4096, 3000, 2000, 1000), 4096, (8, 1024), 64, 1024, 64)
TINY = Size(2, 4, 2, 8, 48, 32, (16, 9), 24, (2, 12), 4, 12, 4)


class Case(NamedTuple):
    """What is measured: a call for each implementation, how many tokens it brings, and what has to agree."""

    name: str
    tokens: int
    calls: dict[str, Callable[[], Any]]
    compared: bool = False


class Found(NamedTuple):
    """Seconds of a case by implementation, and how far their results are apart."""

    case: Case
    seconds: dict[str, float]
    difference: float | None


def model_of(size: Size, device: str, dtype: Any) -> Callable[[str], Any]:
    """What gives the model with an implementation of attention; all share one set of weights."""
    config = transformers.LlamaConfig(
        vocab_size=32000 if size is LARGE else 97,
        hidden_size=size.heads * size.head_dim,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.head_dim,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        first = transformers.LlamaForCausalLM(config).to(dtype).eval()

    def model(implementation: str) -> Any:
        with torch.device("meta"):
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict())).to(dtype)
        made.load_state_dict(first.state_dict(), assign=True)
        made.model.rotary_emb = first.model.rotary_emb  # whose buffers are no part of the state
        made.set_attn_implementation(implementation)
        return made.eval()

    return model


def cases(size: Size, device: str, dtype: Any, compiled: bool) -> Iterator[Case]:
    model = model_of(size, device, dtype)
    models = {name: model(name) for name in (OURS, THEIRS)}
    vocabulary = models[OURS].config.vocab_size
    generator = torch.Generator().manual_seed(1)

    def tokens(batch: int, rows: int) -> Any:
        return torch.randint(1, vocabulary, (batch, rows), generator=generator).to(device)

    def each(call: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
        return {name: lambda made=made: call(made) for name, made in models.items()}

    ids = tokens(1, size.prefill)

    @torch.no_grad()
    def prefill(model: Any) -> Any:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    yield Case(f"prefill of {size.prefill} tokens", size.prefill, each(prefill), compared=True)

    longest = max(size.padded)
    padded = tokens(len(size.padded), longest)
    mask = torch.arange(longest, device=device) >= longest - torch.tensor(size.padded, device=device)[:, None]

    @torch.no_grad()
    def prefill_padded(model: Any) -> Any:
        return model(padded, attention_mask=mask.long(), use_cache=False, logits_to_keep=1).logits

    lengths = ", ".join(map(str, size.padded))
    yield Case(f"prefill of {lengths} tokens, padded", sum(size.padded), each(prefill_padded), compared=True)

    batch = tokens(1, size.train)

    def step(model: Any) -> Any:
        for parameter in model.parameters():
            parameter.grad = None
        model(batch, labels=batch, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    yield Case(f"forward and backward of {size.train} tokens", size.train, each(step), compared=True)
    for made in models.values():
        for parameter in made.parameters():
            parameter.grad = None

    prompts = tokens(*size.prompts)
    asked = {"max_new_tokens": size.new, "do_sample": False, "cache_implementation": "static"}

    @torch.no_grad()
    def generate(model: Any) -> Any:
        given = {"inputs": prompts, "attention_mask": torch.ones_like(prompts)}
        return model.generate(**given, **asked, disable_compile=not compiled)

    name = f"{size.prompts[0]} × {size.new} tokens behind {size.prompts[1]}, static cache"
    yield Case(f"{name}{', compiled' * compiled}", size.prompts[0] * size.new, each(generate))

    if not is_kernels_available():
        print("# continuous batching is left out: transformers does not take the kernels package that is there")
        return
    lengths_of = torch.linspace(size.longest // 8, size.longest, size.requests).long().tolist()
    requests = [tokens(1, rows)[0].tolist() for rows in lengths_of]
    served = {FLASH: model(FLASH), THEIRS: models[THEIRS]}

    memory = {"max_memory_percent": 0.3} if size is LARGE else {"num_blocks": 16, "max_batch_tokens": 64}

    def serve(model: Any) -> Any:
        return model.generate_batch(
            requests,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=size.new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(auto_switch_to_flash=False, **memory),
            persistent_manager=True,  # graphs are captured once
        )

    yield Case(
        f"{size.requests} requests of up to {size.longest} tokens, {size.new} new ones each, continuous batching",
        size.requests * size.new,
        {name: lambda made=made: serve(made) for name, made in served.items()},
    )


def measure(case: Case, turns: int, wait: Callable[[], object]) -> Found:
    """Call by turns; the first call of each, which may compile, is not counted."""
    results = {name: call() for name, call in case.calls.items()}
    difference = None
    if case.compared:
        one, other = (each.detach().double() for each in results.values())
        difference = float((one - other).norm() / other.norm())
        if not difference <= MAX_DIFFERENCE:
            raise AssertionError(f"{case.name}: results differ by {difference:.1e}")
    del results
    seconds: dict[str, list[float]] = {name: [] for name in case.calls}
    for _ in range(turns):
        for name, call in case.calls.items():
            wait()
            began = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return Found(case, {name: statistics.median(each) for name, each in seconds.items()}, difference)


def markdown(found: Sequence[Found], title: str, conditions: str) -> str:
    lines = [
        f"# {title}",
        "",
        conditions,
        "",
        f"| case | {OURS}, ms | tokens/s | {THEIRS}, ms | tokens/s | ratio | apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, seconds, difference in found:
        mine, its = seconds.values()
        cells = (f"{1e3 * each:.1f} | {case.tokens / each:,.0f}" for each in (mine, its))
        apart = "" if difference is None else f"{difference:.1e}"
        lines.append(f"| {case.name} | {' | '.join(cells)} | {its / mine:.2f} | {apart} |")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the table")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--quick", action="store_true", help="fewer calls of each")
    parser.add_argument("--compile", action="store_true", help="compile the steps of decoding with a static cache")
    parser.add_argument("--tiny", action="store_true", help="a small model, on the GPU if there is one")
    arguments = parser.parse_args(given)
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.tiny:
        parser.error("there is no GPU that torch finds; --tiny runs on the CPU")
    cufa.transformers.register()
    size = TINY if arguments.tiny else LARGE
    turns = 1 if arguments.tiny else 3 if arguments.quick else 9
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    stem = None if arguments.out is None else stem_of(arguments.out, "transformers") if gpu else arguments.out
    title = f"transformers on {torch.cuda.get_device_name() if gpu else 'the CPU'}"
    conditions = (
        f"{setting(Torch()) if gpu else f'torch {torch.__version__}'}, transformers {transformers.__version__}. "
        f"A Llama of {size.layers} layers, {size.heads} heads over {size.key_heads} of {size.head_dim}, "
        f"{str(dtype).removeprefix('torch.')}. Medians of {turns} calls by turns, of the host's clock with the wait "
        f"for the GPU. Under continuous batching {OURS} is `{FLASH}`. The last column is how far logits or gradients "
        "of both are apart, relatively."
    )
    found: list[Found] = []
    for case in cases(size, "cuda" if gpu else "cpu", dtype, arguments.compile):
        if not re.search(arguments.only, case.name):
            continue
        found.append(measure(case, turns, torch.cuda.synchronize if gpu else lambda: None))
        times = ", ".join(f"{name} {each:.3f} s" for name, each in found[-1].seconds.items())
        print(f"# {case.name}: {times}", flush=True)
        if stem is not None and gpu:
            stem.with_suffix(".md").write_text(markdown(found, title, conditions))
    print(markdown(found, title, conditions))


if __name__ == "__main__":
    main()
