"""A program written for flash_attn, which knows nothing of cufa: a small GPT learns to sort digits, and then sorts.

    python examples/flash_attn_program.py                        # on flash_attn, if that is installed
    python -m cufa.flash_attn examples/flash_attn_program.py     # on cufa, without flash_attn

Training packs q, k and v into one tensor, with rotary embedding and dropout; generation appends to caches.
"""

from __future__ import annotations

import argparse

import torch
from flash_attn import flash_attn_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from torch import Tensor, nn

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
LENGTH, DIGITS, HEADS, WIDTH = 4, 10, 4, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.rotary = RotaryEmbedding(WIDTH // HEADS)

    def forward(self, x: Tensor, caches: list[Tensor] | None, past: int) -> Tensor:
        qkv = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1))
        qkv = self.rotary(qkv, seqlen_offset=past)
        if caches is None:
            y = flash_attn_qkvpacked_func(qkv, dropout_p=0.05 if self.training else 0.0, causal=True)
        else:
            q, k, v = qkv.unbind(2)
            y = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=past, causal=True)
        x = x + self.out(y.flatten(-2))
        return x + self.mlp(self.second(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(DIGITS + 1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None, past: int = 0) -> Tensor:
        x = self.tokens(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index], past)
        return self.head(x)

    @torch.no_grad()
    def generate(self, prompt: Tensor) -> Tensor:
        shape = len(prompt), 2 * LENGTH + 1, HEADS, WIDTH // HEADS
        caches = [[torch.zeros(shape, device=DEVICE, dtype=DTYPE) for _ in "kv"] for _ in self.blocks]
        found, past, fed = [], 0, prompt
        for _ in range(LENGTH):
            logits = self(fed, caches, past)[:, -1]
            past += fed.shape[1]
            fed = logits.argmax(-1, keepdim=True)
            found.append(fed)
        return torch.cat(found, 1)


def examples(count: int) -> tuple[Tensor, Tensor]:
    """Digits, a mark, and the digits in order; and what follows each token, but within the question."""
    digits = torch.randint(DIGITS, (count, LENGTH), device=DEVICE)
    mark = torch.full((count, 1), DIGITS, device=DEVICE)
    tokens = torch.cat([digits, mark, digits.sort(1).values], 1)
    labels = tokens[:, 1:].clone()
    labels[:, :LENGTH] = -100
    return tokens, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="A small GPT learns to sort digits.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model, loss_of = Model().to(DEVICE, DTYPE), CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        tokens, labels = examples(64)
        loss = loss_of(model(tokens[:, :-1]).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, steps):
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    tokens, _ = examples(200)
    sorted_digits = model.generate(tokens[:, : LENGTH + 1])
    right = (sorted_digits == tokens[:, LENGTH + 1 :]).all(1).double().mean()
    print(f"{100 * right:.0f} of 100 sequences of {LENGTH} digits are sorted")


if __name__ == "__main__":
    main()
