"""A language model learns Jane Austen character by character: a transformer, trained on plain arrays.

    python examples/train_char_lm.py
    python examples/train_char_lm.py --attention plain
    python examples/train_char_lm.py --text novel.txt --steps 1000 --out run

No framework differentiates anything here: each piece of the model stands below beside its gradient, on CuPy
arrays where there is a GPU and on NumPy arrays where there is none. Attention is `cufa.attention`, and its
gradient `cufa.attention_backward`. `--attention plain` puts the textbook's softmax(QKᵀ)V in their place, which
stores a score for every pair of characters and learns the same: on the CPU, at the sizes below, either reaches
1.46 nats (2.10 bits) per character of text that it was not trained on. That takes one to two minutes.

The text is *Persuasion* by Jane Austen (1818), of which the last tenth is held out. It is in the public domain;
this is Project Gutenberg's transcription, runs of blank lines cut to one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import cufa

try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(
        f"train_char_lm: the package {error.name} is missing. Install what this example needs:\n    pip install tqdm"
    )

Array = Any  # a NumPy or a CuPy array
Backward = Callable[[Array], Any]  # the loss's gradient by a result -> its gradients by what it was made from
Piece = Callable[[Array], tuple[Array, Backward]]
Attend = Callable[[Array, Array, Array], tuple[Array, Backward]]  # q, k, v -> out, and dout -> dq, dk, dv

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


class Size(NamedTuple):
    """Of a model and of its training; `HELP` says of what."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    rate: float
    dropout: float


# The small model reads the text three times, the large one twenty times. For longer it learns it by heart, dropout or
# not: on an H200 what it loses on held-out text rose again, from 1.27 nats after 500 steps to 1.93 after 2000.
SIZES = {
    "numpy": Size(layers=3, width=128, heads=4, context=128, batch=8, steps=1200, rate=2e-3, dropout=0.0),
    "cupy": Size(layers=6, width=384, heads=6, context=256, batch=64, steps=500, rate=1e-3, dropout=0.2),
}

HELP = {
    "layers": "layers of the model",
    "width": "numbers that stand for a character between layers",
    "heads": "heads of the attention",
    "context": "characters in a sequence",
    "batch": "sequences in a step",
    "steps": "steps of the training",
    "rate": "learning rate, at its peak",
    "dropout": "share of a layer's results that a step leaves out",
}


# The pieces ----------------------------------------------------------------------------------------------
#
# A piece returns its result, and the function that takes gradients back through it. np.tanh and the like of
# a CuPy array run on the GPU.


def cufa_attention(q: Array, k: Array, v: Array) -> tuple[Array, Backward]:
    """Every character looks at itself and at those before it. Of the scores only a row's log-sum-exp is kept."""
    out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    return out, lambda dout: cufa.attention_backward(dout, q, k, v, out, lse, causal=True)


def plain_attention(q: Array, k: Array, v: Array) -> tuple[Array, Backward]:
    """The same as textbooks have it, with a whole matrix of scores for each head: to compare cufa with."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (batch, heads, context, head_dim)
    scale = q.shape[-1] ** -0.5
    s = q @ k.swapaxes(2, 3) * scale
    s = np.where(np.tril(np.ones_like(s[0, 0], dtype=bool)), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)

    def backward(dout: Array) -> list[Array]:
        dout = dout.swapaxes(1, 2)
        dp = dout @ v.swapaxes(2, 3)
        ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
        gradients = ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
        return [x.swapaxes(1, 2) for x in gradients]

    return (p @ v).swapaxes(1, 2), backward


ATTENTION: dict[str, Attend] = {"cufa": cufa_attention, "plain": plain_attention}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions: pairs of numbers turn by angles that grow with the position, (context, 1, head_dim / 2).

    q · k then depends on how far apart two characters are (Su et al., *RoFormer*, 2021). The gradient is turned
    back: `rotate(dy, cos, -sin)`.
    """
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def norm(x: Array) -> tuple[Array, Backward]:
    """RMSNorm: rows of mean square 1. There are no gains; the weights that follow can hold them."""
    inverse = (np.square(x).mean(axis=-1, keepdims=True) + 1e-6) ** -0.5
    y = x * inverse
    return y, lambda dy: inverse * (dy - y * (dy * y).mean(axis=-1, keepdims=True))


def gelu(x: Array) -> tuple[Array, Backward]:
    """x σ(1.702 x), the cheaper approximation of Hendrycks and Gimpel, *Gaussian error linear units*, 2016."""
    gate = 0.5 + 0.5 * np.tanh(0.851 * x)  # σ without an exp, which could overflow
    y = x * gate
    return y, lambda dy: dy * (gate + 1.702 * y * (1 - gate))


def cross_entropy(logits: Array, wanted: Array) -> tuple[Array, Backward]:
    """The mean of -ln p for the characters that do come next, marked by the 1 in each row of `wanted`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    count = math.prod(logits.shape[:-1])
    return -(wanted * log_p).sum() / count, lambda dloss: (np.exp(log_p) - wanted) * (dloss / count)


def chain(*pieces: Piece) -> Piece:
    """The pieces one after the other, and back through them the other way round."""

    def piece(x: Array) -> tuple[Array, Backward]:
        backwards = []
        for part in pieces:
            x, backward = part(x)
            backwards.append(backward)
        return x, lambda dy: functools.reduce(lambda dy, backward: backward(dy), reversed(backwards), dy)

    return piece


def residual(*pieces: Piece) -> Piece:
    """x and, added to it, what a chain makes of it."""

    def piece(x: Array) -> tuple[Array, Backward]:
        y, backward = chain(*pieces)(x)
        return x + y, lambda dy: dy + backward(dy)

    return piece


# The model -----------------------------------------------------------------------------------------------


class Transformer:
    """A causal transformer over characters, on the arrays of `xp`, NumPy or CuPy.

    Activations are (batch, context, width). All weights lie in one flat array and their gradients in another,
    so that the optimiser needs to know neither names nor shapes. They are float32 on a GPU too: cufa multiplies
    float32 on tensor cores as well, at a context this short attention is a few per cent of the work, and what
    is not float16 needs no scaled loss.
    """

    def __init__(
        self, xp: ModuleType, characters: int, size: Size, attend: Attend, seed: int = 0, dtype: str = "float32"
    ) -> None:
        self.xp, self.size, self.attend = xp, size, attend
        width, inner = size.width, 4 * size.width
        shapes = {"embedding": (characters, width)}
        for n in range(size.layers):
            shapes |= {f"qkv{n}": (width, 3 * width), f"out{n}": (width, width)}
            shapes |= {f"up{n}": (width, inner), f"down{n}": (inner, width)}
        shapes["head"] = (width, characters)
        self.flat, self.flat_gradients = xp.zeros((2, sum(map(math.prod, shapes.values()))), dtype)
        self.weights, self.gradients = views(self.flat, shapes), views(self.flat_gradients, shapes)

        # What a weight makes of rows varies as they do, and what all layers add varies as what they add to. The
        # head is 0: at first every character is as likely as any other.
        random, fixed = np.random.default_rng(seed), {"embedding": 1.0, "head": 0.0}
        for name, weight in self.weights.items():
            scale = fixed.get(name, len(weight) ** -0.5)
            if name.startswith(("out", "down")):
                scale /= math.sqrt(2 * size.layers)
            weight[...] = xp.asarray(random.normal(scale=scale, size=weight.shape))

        self.one_hot = xp.eye(characters, dtype=dtype)
        pairs = width // size.heads // 2
        angles = np.outer(np.arange(size.context), 1000.0 ** (-np.arange(pairs) / pairs))[:, None]
        self.cos, self.sin = xp.asarray(np.cos(angles), dtype=dtype), xp.asarray(np.sin(angles), dtype=dtype)
        self.random = xp.random.default_rng(seed)

    def loss(self, text: Array, dropout: float = 0.0) -> tuple[Array, Backward]:
        """The loss of telling each character of `text` (batch, n + 1) but the first from those before it.

        The second result, called with 1.0, leaves the loss's gradients by the weights in `gradients`.
        """
        wanted = functools.partial(cross_entropy, wanted=self.one_hot[text[:, 1:]])
        return chain(self.pieces(dropout), wanted)(self.one_hot[text[:, :-1]])

    def logits(self, text: Array) -> Array:
        """What `text` (batch, n) says of the next character, at every place of it: (batch, n, characters)."""
        return self.pieces()(self.one_hot[text])[0]

    def pieces(self, dropout: float = 0.0) -> Piece:
        """The whole model, from characters as rows of the identity to logits."""
        drop = functools.partial(self.drop, rate=dropout)
        layers = []
        for n in range(self.size.layers):
            layers += [
                residual(norm, self.linear(f"qkv{n}"), self.attention, self.linear(f"out{n}"), drop),
                residual(norm, self.linear(f"up{n}"), gelu, self.linear(f"down{n}"), drop),
            ]
        return chain(self.linear("embedding"), *layers, norm, self.linear("head"))

    def linear(self, name: str) -> Piece:
        """x @ weight. Going back leaves the gradient of the weight in `gradients`."""

        def piece(x: Array) -> tuple[Array, Backward]:
            rows, weight = x.reshape(-1, x.shape[-1]), self.weights[name]

            def backward(dy: Array) -> Array:
                dy = dy.reshape(-1, dy.shape[-1])
                self.gradients[name][...] = rows.T @ dy
                return (dy @ weight.T).reshape(x.shape)

            return (rows @ weight).reshape(*x.shape[:-1], -1), backward

        return piece

    def attention(self, qkv: Array) -> tuple[Array, Backward]:
        """Attention by `attend`, of queries, keys and values that lie side by side: (batch, context, 3 * width)."""
        batch, context, _ = qkv.shape
        parts = qkv.reshape(batch, context, 3, self.size.heads, -1)
        cos, sin = self.cos[:context], self.sin[:context]
        q, k = (rotate(parts[:, :, n], cos, sin) for n in range(2))
        out, attend_backward = self.attend(q, k, parts[:, :, 2])

        def backward(dout: Array) -> Array:
            dq, dk, dv = attend_backward(dout.reshape(out.shape))
            return np.stack([rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv], axis=2).reshape(qkv.shape)

        return out.reshape(batch, context, -1), backward

    def drop(self, x: Array, rate: float) -> tuple[Array, Backward]:
        """x with some numbers set to 0, so that the model relies on none of them; the others grow to make up."""
        if not rate:
            return x, lambda dy: dy
        mask = (self.random.random(x.shape, dtype=x.dtype) >= rate) * x.dtype.type(1 / (1 - rate))
        return x * mask, lambda dy: dy * mask


def views(flat: Array, shapes: dict[str, tuple[int, int]]) -> dict[str, Array]:
    """Matrices that lie end to end in one flat array, by name."""
    matrices, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        matrices[name] = flat[start:stop].reshape(shape)
        start = stop
    return matrices


# Its training --------------------------------------------------------------------------------------------


class AdamW:
    """Steps down the gradient, averaged over steps and divided by its size (Loshchilov and Hutter, 2019)."""

    def __init__(self, weights: Array, decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.weights, self.decay, self.betas = weights, decay, betas
        self.mean, self.square = np.zeros_like(weights), np.zeros_like(weights)
        self.steps = 0

    def step(self, gradient: Array, rate: float) -> None:
        """Change the weights; a gradient longer than 1 is cut to 1."""
        self.steps += 1
        beta1, beta2 = self.betas
        gradient = gradient / np.maximum(np.sqrt(gradient @ gradient), 1)
        self.mean += (1 - beta1) * (gradient - self.mean)
        self.square += (1 - beta2) * (np.square(gradient) - self.square)
        # Both averages begin at 0, and so are too small by a factor that is known.
        mean, square = self.mean / (1 - beta1**self.steps), self.square / (1 - beta2**self.steps)
        self.weights -= rate * (mean / (np.sqrt(square) + 1e-8) + self.decay * self.weights)


def learning_rate(size: Size, step: int) -> float:
    """Up to the peak in the first twentieth of all steps, then along a cosine down to 0."""
    done = step / size.steps
    return size.rate * min(20 * done, 0.5 + 0.5 * math.cos(math.pi * done))


class Curves(NamedTuple):
    """Losses in nats per character."""

    training: list[float]  # of each step
    held_out: dict[int, float]  # after some of the steps


def windows(text: Array, size: Size) -> list[Array]:
    """A text as batches of sequences, each with the character after it, laid end to end; the rest is left out."""
    starts = np.arange(0, len(text) - size.context, size.context)[:, None]
    sequences = text[starts + np.arange(size.context + 1)]
    return [sequences[n : n + size.batch] for n in range(0, len(sequences), size.batch)]


def evaluate(model: Transformer, batches: list[Array]) -> float:
    """The mean loss over batches of sequences."""
    total = sum(float(model.loss(model.xp.asarray(batch))[0]) * len(batch) for batch in batches)
    return total / sum(map(len, batches))


def train(model: Transformer, text: Array, held_out: Array, seed: int = 0) -> tuple[Curves, float]:
    """Train on sequences from anywhere in the text; the curves, and the seconds that the steps took."""
    size, random = model.size, np.random.default_rng(seed)
    optimiser, curves = AdamW(model.flat), Curves([], {})
    batches = windows(held_out, size)
    sample = batches[:: math.ceil(len(batches) / 8)]
    losses: list[Array] = []
    seconds, start = 0.0, time.perf_counter()
    with tqdm(total=size.steps, unit=" steps", disable=None, leave=False) as bar:
        for step in range(1, size.steps + 1):
            starts = random.integers(len(text) - size.context, size=(size.batch, 1))
            batch = model.xp.asarray(text[starts + np.arange(size.context + 1)])
            loss, backward = model.loss(batch, size.dropout)
            backward(1.0)
            losses.append(loss)
            optimiser.step(model.flat_gradients, learning_rate(size, step))
            if step % math.ceil(size.steps / 20) == 0 or step == size.steps:
                curves.training.extend(map(float, losses))  # the first to need a number, and so to wait for the GPU
                losses.clear()
                seconds += time.perf_counter() - start
                curves.held_out[step] = evaluate(model, sample)
                bar.set_postfix(loss=f"{curves.training[-1]:.3f}", held_out=f"{curves.held_out[step]:.3f}")
                start = time.perf_counter()
            bar.update()
    return curves, seconds


def write_on(model: Transformer, text: Array, count: int, temperature: float, seed: int = 0) -> list[int]:
    """`count` more characters, each drawn from what the model says of as many as it can see."""
    random = np.random.default_rng(seed)
    ids: list[int] = text.tolist()
    for _ in range(count):
        logits = model.logits(model.xp.asarray([ids[-model.size.context :]]))[0, -1]
        # The largest after adding Gumbel noise: drawn with the probabilities softmax(logits / temperature).
        noise = model.xp.asarray(random.gumbel(scale=temperature, size=logits.shape))
        ids.append(int((logits + noise).argmax()))
    return ids[len(text) :]


def draw(curves: Curves, path: Path) -> None:
    """The loss over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per character)")
    axes.plot(range(1, len(curves.training) + 1), curves.training, alpha=0.5, linewidth=1, label="training")
    axes.plot(list(curves.held_out), list(curves.held_out.values()), marker="o", label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


# The command ---------------------------------------------------------------------------------------------


def array_library() -> ModuleType:
    """CuPy where there is a GPU for it, else NumPy."""
    if cufa.is_available() and importlib.util.find_spec("cupy"):
        return importlib.import_module("cupy")
    return np


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def non_negative(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def parse_arguments(xp: ModuleType) -> argparse.Namespace:
    """The options; `size`, and `characters` and `ids`: which there are, and the text as indices of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", default=TEXT, help="learn this, not Jane Austen")
    parser.add_argument("--attention", choices=ATTENTION, default="cufa", help="default: cufa")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the loss over the steps in DIR/loss.png")
    parser.add_argument("--sample", type=positive, default=500, metavar="N", help="characters to write (default: 500)")
    parser.add_argument(
        "--temperature",
        type=non_negative,
        default=0.8,
        metavar="T",
        help="of what is written: the higher, the bolder; 0 writes what is likeliest (default: 0.8)",
    )
    parser.add_argument("--seed", type=positive, default=1, metavar="N", help="of all that is random (default: 1)")
    for name, default in SIZES[xp.__name__]._asdict().items():
        kind = positive if isinstance(default, int) else non_negative
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{HELP[name]} (default here: {default})"
        )
    options = parser.parse_args()
    size = options.size = Size(*(getattr(options, name) for name in Size._fields))
    if size.width % (2 * size.heads):
        parser.error(f"--width {size.width} is not a multiple of 2 * --heads, {2 * size.heads}")
    if size.dropout >= 1:
        parser.error(f"--dropout {size.dropout}: must be less than 1")
    if options.out:
        if not importlib.util.find_spec("matplotlib"):
            parser.error("--out needs matplotlib: pip install matplotlib")
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {options.out}: {error.strerror}")
    try:
        text = options.text.read_text(encoding="utf-8")
    except OSError as error:
        parser.error(f"--text {options.text}: {error.strerror}")
    except UnicodeDecodeError:
        parser.error(f"--text {options.text}: the file is not UTF-8 text")
    if len(text) // 10 <= size.context:
        parser.error(f"--text {options.text}: {len(text)} characters are too few for a --context of {size.context}")
    options.characters, options.ids = np.unique(np.array(list(text)), return_inverse=True)
    return options


def main() -> None:
    xp = array_library()
    options = parse_arguments(xp)
    size, characters = options.size, options.characters
    text, held_out = np.split(options.ids, [len(options.ids) - len(options.ids) // 10])
    model = Transformer(xp, len(characters), size, ATTENTION[options.attention], options.seed)
    attention = f"cufa {cufa.__version__}" if options.attention == "cufa" else "softmax(QKᵀ)V"
    print(f"{model.flat.size:,} weights in float32 {xp.__name__} arrays, attention by {attention}.")
    print(f"{options.text.name}: {len(text):,} characters to learn, {len(held_out):,} held out.")

    curves, seconds = train(model, text, held_out, options.seed)
    rate = size.steps * size.batch * size.context / seconds
    print(f"Trained {size.steps} steps in {seconds:.1f} s: {rate:,.0f} characters/s.")
    loss = evaluate(model, windows(held_out, size))
    share = np.bincount(options.ids) / len(options.ids)
    known = -(share * np.log(share)).sum()
    print(f"Loss on the held-out text: {loss:.3f} nats per character, {loss / math.log(2):.3f} bits.")
    print(f"(Who knows only how frequent each character is loses {known:.3f} nats.)")
    if options.out:
        draw(curves, options.out / "loss.png")
        print(f"Drawn in {options.out / 'loss.png'}.")

    prompt = held_out[: size.context]
    written = write_on(model, prompt, options.sample, options.temperature, options.seed)
    print(f"\nThe held-out text begins:\n\n{''.join(characters[prompt])}")
    print(f"\nThe model goes on:\n\n{''.join(characters[written])}")


if __name__ == "__main__":
    main()
