"""A small GPT in torch learns Jane Austen twice: with cufa's attention and with torch's own, from the same start.

    python examples/train_gpt_torch.py
    python examples/train_gpt_torch.py --layers 12 --width 768 --heads 12 --context 2048 --batch 4 --steps 200
    python examples/train_gpt_torch.py --compile

What changes in a model that calls torch's attention is one line of `Attention.forward`; backward, optimizer and
everything else stay. Both models see the same batches, so that their losses differ by rounding alone. Losses of
both, and the time of a step, are printed side by side; `--out DIRECTORY` also draws them. The model runs in bfloat16
on a GPU and in float32 on a CPU. The text is that of train_char_lm.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cufa

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int


SIZES = {"cpu": Size(2, 64, 4, 64, 8, 60), "cuda": Size(8, 512, 8, 1024, 16, 300)}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, with_cufa: bool) -> None:
        super().__init__()
        self.heads, self.with_cufa = heads, with_cufa
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (batch, seqlen, num_heads, head_dim) each
        if self.with_cufa:
            y = cufa.attention(q, k, v, causal=True)  # the line that changes
        else:
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out(y.flatten(-2))


class Block(nn.Module):
    def __init__(self, size: Size, with_cufa: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.attention = Attention(size.width, size.heads, with_cufa)
        wide = nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        self.feed_forward = nn.Sequential(*wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, size: Size, characters: int, with_cufa: bool) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size, with_cufa) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, characters, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def batches(tokens: Tensor, size: Size) -> list[Tensor]:
    """The windows of every step, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(tokens) - size.context - 1, (size.steps, size.batch), generator=generator)
    return [torch.stack([tokens[start : start + size.context + 1] for start in step]) for step in starts.tolist()]


def train(tokens: Tensor, size: Size, device: str, with_cufa: bool, compiled: bool) -> tuple[list[float], float]:
    """The loss at each step, and a step's time in seconds: the median, without the first steps."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: nn.Module = GPT(size, int(tokens.max()) + 1, with_cufa).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if compiled:
        model = torch.compile(model)
    losses, times = [], []
    for step, windows in enumerate(batches(tokens, size)):
        windows = windows.to(device)
        start = time.perf_counter()
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the GPU
        times.append(time.perf_counter() - start)
        if step % max(1, size.steps // 10) == 0:
            print(f"  {'cufa ' if with_cufa else 'torch'} step {step:4}: loss {losses[-1]:.4f}", flush=True)
    return losses, statistics.median(times[min(10, len(times) // 2) :])


def draw(out: Path, curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, losses in curves.items():
        axes.plot(losses, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats per character")
    axes.legend()
    figure.savefig(out / "losses.png", dpi=150, bbox_inches="tight")
    print(f"The curves are in {out / 'losses.png'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in SIZES[device]._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--out", type=Path, help="directory for a picture of the losses")
    arguments = parser.parse_args()
    size = Size(*(getattr(arguments, name) for name in Size._fields))
    if min(size) < 1 or size.width % size.heads:
        parser.error("sizes must be at least 1, and --width a multiple of --heads.")
    text = TEXT.read_text()
    index = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([index[character] for character in text])
    if size.context + 1 >= len(tokens):
        parser.error(f"--context must be below the {len(tokens)} characters of the text.")
    print(f"{size.layers} layers of {size.width}, {size.heads} heads, on the {device}")
    curves, times = {}, {}
    for name in ("cufa", "torch"):
        curves[name], times[name] = train(tokens, size, device, name == "cufa", arguments.compile)
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    last = {name: statistics.mean(losses[-10:]) for name, losses in curves.items()}
    print(f"last losses: cufa {last['cufa']:.4f}, torch {last['torch']:.4f}; at most {apart:.4f} apart at any step")
    print(f"a step: cufa {1e3 * times['cufa']:.2f} ms, torch {1e3 * times['torch']:.2f} ms")
    if arguments.out:
        draw(arguments.out, curves)


if __name__ == "__main__":
    main()
