"""A model of Hugging Face transformers learns and writes with cufa's attention; nothing is fetched.

    python examples/generate_transformers.py
    python examples/generate_transformers.py --attention sdpa
    python examples/generate_transformers.py --model FOLDER --prompt "She had been" --tokens 200

Two lines make it run on cufa: `cufa.transformers.register()`, and the name of the attention. Without `--model` it is a
small Llama that reads Jane Austen for a while first, character by character: its sentences come in one row, packed, and
do not see each other. Then it goes on with a few prompts of different lengths, padded on the left, and its answers are
held to those of transformers' own eager attention. The text is that of train_char_lm.py. FOLDER holds a model with its
tokenizer, as `save_pretrained` leaves them. It takes torch and transformers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import cufa.transformers

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
PROMPTS = ("She had been ", "The ", "Captain Wentworth, who ")
ROW = 256
"""Characters of a step of learning."""


class Characters:
    """Turns texts into numbers and back, as far as is needed here of what a tokenizer does; 0 is padding."""

    def __init__(self, text: str) -> None:
        self.known = sorted(set(text))
        self.numbers = {character: number for number, character in enumerate(self.known, 1)}

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        longest = max(map(len, texts))
        rows = [[0] * (longest - len(text)) + [self.numbers[character] for character in text] for text in texts]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def decode(self, ids: Any) -> str:
        return "".join(self.known[number - 1] for number in ids.tolist() if number)


def learned(attention: str, device: str, steps: int) -> tuple[Any, Characters]:
    """A model that has read for some steps, and its characters."""
    text = TEXT.read_text(encoding="utf-8")
    characters = Characters(text)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(characters.known) + 1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ROW,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        begin = int(torch.randint(len(text) - ROW, ()))
        row = text[begin : begin + ROW]
        ids = characters([row])["input_ids"].to(device)
        # Positions that begin anew at every paragraph tell that paragraphs are sequences of their own.
        lengths = [len(part) for part in row.replace("\n\n", "\n\n\0").split("\0") if part]
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        loss = model(ids, position_ids=positions, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(steps // 5, 1) == 0:
            print(f"step {step:4}: loss {loss.item():.3f}", flush=True)
    return model.eval(), characters


def written(model: Any, given: dict[str, Any], count: int) -> Any:
    """The tokens that a model goes on with, greedily, from a cache of fixed size."""
    asked = {"max_new_tokens": count, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with torch.no_grad():
        return model.generate(**given, **asked)[:, given["input_ids"].shape[1] :]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model and its tokenizer")
    parser.add_argument("--prompt", action="append", help="what to go on with; may be given several times")
    parser.add_argument("--attention", default=cufa.transformers.NAME, help="attn_implementation of the model")
    parser.add_argument("--tokens", type=int, default=120, help="tokens to write")
    parser.add_argument("--steps", type=int, default=300, help="steps to learn for, without --model")
    given = parser.parse_args(arguments)
    if given.tokens < 1 or given.steps < 1:
        parser.error("--tokens and --steps are at least 1")
    cufa.transformers.register()  # what makes transformers know the name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = given.prompt or PROMPTS
    if given.model is None:
        model, tokenizer = learned(given.attention, device, given.steps)
        if unknown := set("".join(prompts)) - set(tokenizer.known):
            parser.error(f"the model has not read these characters: {''.join(sorted(unknown))}")
        inputs = tokenizer(prompts)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(given.model, padding_side="left")
        model = transformers.AutoModelForCausalLM.from_pretrained(given.model, attn_implementation=given.attention)
        model, inputs = model.to(device).eval(), dict(tokenizer(prompts, padding=True, return_tensors="pt"))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    began = time.perf_counter()
    answers = written(model, inputs, given.tokens)
    took = time.perf_counter() - began
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"\n{prompt}|{tokenizer.decode(answer)}")
    model.set_attn_implementation("eager")
    same = (written(model, inputs, given.tokens) == answers).long().cumprod(1).sum(1).tolist()
    print(f"\n{given.attention}: {answers.numel()} tokens in {took:.2f} s; as with eager attention the first {same}")


if __name__ == "__main__":
    main()
