"""A small GPT in JAX learns Jane Austen twice: with cufa's attention and with JAX's own, from the same start.

    python examples/train_gpt_jax.py
    python examples/train_gpt_jax.py --layers 12 --width 768 --heads 12 --context 2048 --batch 4 --steps 200

What changes in a model that calls `jax.nn.dot_product_attention` is one line of `attend`; `jax.value_and_grad` and
`jax.jit` stay. Both models see the same batches, so that their losses differ by rounding alone. Losses of both, and
the time of a step, are printed side by side; `--out DIRECTORY` also draws them. The model runs in bfloat16 on a GPU
and in float32 on a CPU. The text is that of train_char_lm.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cufa

Array = Any
Params = dict[str, Any]
Attend = Callable[[Array, Array, Array], Array]

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int


SIZES = {"cpu": Size(2, 64, 4, 64, 8, 60), "gpu": Size(8, 512, 8, 1024, 16, 300)}


def attend(with_cufa: bool) -> Attend:
    """Causal attention of (batch, seqlen, num_heads, head_dim) arrays."""
    if with_cufa:
        return lambda q, k, v: cufa.attention(q, k, v, causal=True)  # the line that changes
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def new_params(size: Size, characters: int) -> Params:
    keys = iter(jax.random.split(jax.random.key(0), 4 * size.layers + 3))

    def matrix(rows: int, columns: int) -> Array:
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    width = size.width
    blocks = [
        {
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width),
            "wide": matrix(width, 4 * width),
            "narrow": matrix(4 * width, width),
        }
        for _ in range(size.layers)
    ]
    return {
        "token": matrix(characters, width),
        "place": matrix(size.context, width),
        "head": matrix(width, characters),
        "blocks": blocks,
    }


def normed(x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    spread = jnp.sqrt(x32.var(axis=-1, keepdims=True) + 1e-5)
    return ((x32 - x32.mean(axis=-1, keepdims=True)) / spread).astype(x.dtype)


def loss_of(params: Params, windows: Array, heads: int, attention: Attend, dtype: Any) -> Array:
    """The mean of what each character costs, in nats."""
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tokens, targets = windows[:, :-1], windows[:, 1:]
    x = params["token"][tokens] + params["place"]
    for block in params["blocks"]:
        q, k, v = (each.reshape(*each.shape[:2], heads, -1) for each in jnp.split(normed(x) @ block["qkv"], 3, axis=-1))
        x = x + attention(q, k, v).reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(normed(x) @ block["wide"]) @ block["narrow"]
    log_probabilities = jax.nn.log_softmax((normed(x) @ params["head"]).astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()


def batches(tokens: np.ndarray[Any, Any], size: Size) -> Iterator[np.ndarray[Any, Any]]:
    """The windows of every step, the same in every run."""
    rng = np.random.default_rng(1)
    for _ in range(size.steps):
        starts = rng.integers(len(tokens) - size.context - 1, size=size.batch)
        yield np.stack([tokens[start : start + size.context + 1] for start in starts])


def train(tokens: np.ndarray[Any, Any], size: Size, with_cufa: bool) -> tuple[list[float], float]:
    """The loss at each step, and a step's time in seconds: the median, without the first steps."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    attention = attend(with_cufa)

    @jax.jit
    def step(params: Params, moments: tuple[Params, Params], count: Array, windows: Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, windows, size.heads, attention, dtype)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
        second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradients)
        scale = 1e-3 * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, s: p - scale * m / (jnp.sqrt(s) + 1e-8), params, first, second)
        return params, (first, second), loss

    params = new_params(size, int(tokens.max()) + 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moments = zeros, zeros
    losses, times = [], []
    for number, windows in enumerate(batches(tokens, size)):
        start = time.perf_counter()
        params, moments, loss = step(params, moments, jnp.float32(number + 1), windows)
        losses.append(float(loss))  # waits for the GPU
        times.append(time.perf_counter() - start)
        if number % max(1, size.steps // 10) == 0:
            print(f"  {'cufa' if with_cufa else 'jax '} step {number:4}: loss {losses[-1]:.4f}", flush=True)
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
    device = "cpu" if jax.default_backend() == "cpu" else "gpu"
    for name, value in SIZES[device]._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--out", type=Path, help="directory for a picture of the losses")
    arguments = parser.parse_args()
    size = Size(*(getattr(arguments, name) for name in Size._fields))
    if min(size) < 1 or size.width % size.heads:
        parser.error("sizes must be at least 1, and --width a multiple of --heads.")
    text = TEXT.read_text()
    index = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = np.array([index[character] for character in text], np.int32)
    if size.context + 1 >= len(tokens):
        parser.error(f"--context must be below the {len(tokens)} characters of the text.")
    print(f"{size.layers} layers of {size.width}, {size.heads} heads, on the {device}")
    curves, times = {}, {}
    for name in ("cufa", "jax"):
        curves[name], times[name] = train(tokens, size, name == "cufa")
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    last = {name: statistics.mean(losses[-10:]) for name, losses in curves.items()}
    print(f"last losses: cufa {last['cufa']:.4f}, jax {last['jax']:.4f}; at most {apart:.4f} apart at any step")
    print(f"a step: cufa {1e3 * times['cufa']:.2f} ms, jax {1e3 * times['jax']:.2f} ms")
    if arguments.out:
        draw(arguments.out, curves)


if __name__ == "__main__":
    main()
