"""The benchmark of biases, score functions, dropout and masks, on arrays in host memory."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_bench import Host, run

from cufa._bench import frameworks, variants_ahead, variants_cases, variants_measure, variants_peers, variants_start
from cufa._bench.variants_cases import DROPOUT_P, LEARNED, SOFTCAP, Case
from cufa._bench.variants_measure import Inputs, Ways, error_of, inputs, right
from cufa._bench.variants_peers import FLEX, PEERS
from cufa._bench.variants_reports import PLAIN, WORK, Measured, Report
from cufa.errors import UnsupportedError

SHAPE = (2, 24, 2, 8)
SMALL = [
    *(Case(feature, *SHAPE) for feature in ("bias per head", "bias per sequence", "relative table")),
    *(Case(feature, *SHAPE) for feature in ("ALiBi", "softcap")),
    Case("documents", 1, 24, 2, 8, size=5),
    Case("window", *SHAPE, size=4),
    Case("prefix", *SHAPE, size=7),
    Case("random blocks", *SHAPE, size=4),
]
DROPOUT = [Case("dropout", 2, 512, 2, 128, causal=causal) for causal in (False, True)]
BUILT_IN = [case for case in SMALL if case.feature in ("ALiBi", "softcap", "documents", "window")]
"""Of which every call of cufa has an option, or packed sequences."""

SERVES = {
    "cufa": variants_cases.KINDS.keys() - {"documents", "prefix", "random blocks"},
    "cufa, function": {"relative table", "ALiBi", "softcap"},
    "cufa, BlockMask": {"documents", "window", "prefix", "random blocks"},
    "cufa, packed": {"documents"},
}
"""Which features cufa's ways are for."""


class Arrays(Host):
    xp = np

    def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(getattr(ml_dtypes, dtype, dtype))


class Exact(Arrays):
    """Computes in float64."""

    def float32(self, array: Any) -> Any:
        return array.astype(np.float64)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    monkeypatch.setattr(variants_cases, "cases", lambda quick=False: BUILT_IN[2:] if quick else BUILT_IN)
    monkeypatch.setattr(importlib.import_module("cufa._api.config"), "is_available", lambda: True)
    made = Arrays()
    monkeypatch.setattr(frameworks, "find", lambda: made)
    return made


def seen(case: Case, query: int, key: int) -> bool:
    """Whether a query sees a key, by what the feature means."""
    if case.feature == "documents":
        ends = np.cumsum(variants_cases.lengths_of(case))
        return query >= key and not any(key < end <= query for end in ends)
    if case.feature == "window":
        return query - case.size <= key <= query
    if case.feature == "prefix":
        return key <= query or key < case.size
    if case.feature == "random blocks":
        pattern = variants_cases.pattern_of(case)
        assert pattern is not None
        return bool(pattern[query // case.size][key // case.size])
    return key <= query or not case.causal


def naive(case: Case, given: Inputs, head: int) -> np.ndarray:
    """One head's out, score by score."""
    out = np.zeros((case.batch, case.seqlen, case.head_dim))
    for index, query in np.ndindex(*out.shape[:2]):
        keys = [key for key in range(case.seqlen) if seen(case, query, key)]
        scores = []
        for key in keys:
            score = given.q[index, query, head] @ given.k[index, key, head] / math.sqrt(case.head_dim)
            if case.feature == "bias per head":
                score += given.array[0, head, query, key]
            if case.feature == "bias per sequence":
                score += given.array[index, 0, query, key]
            if case.feature == "relative table":
                score += given.array[head, query - key + case.seqlen - 1]
            if case.feature == "ALiBi":
                score -= given.array[head] * abs(query - key)
            if case.feature == "softcap":
                score = SOFTCAP * np.tanh(score / SOFTCAP)
            scores.append(score)
        weights = np.exp(scores)
        out[index, query] = weights @ given.v[index, keys, head] / weights.sum()
    return out


@pytest.mark.parametrize("case", [*SMALL, DROPOUT[1]._replace(seqlen=9)], ids=str)
def test_what_is_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scores one by one, and against differences of these along random directions."""
    monkeypatch.setattr(variants_measure, "PAIRS_AT_ONCE", 10 * case.seqlen)  # in several steps
    given = inputs(Exact(), case._replace(dtype="float64"), 3)
    given = given._replace(array=None if given.array is None else np.asarray(given.array, np.result_type(given.array)))
    if case.kind == "Biases" or case.feature == "ALiBi":
        given = given._replace(array=given.array.astype(np.float64))
    head = 1
    out, *gradients = right(Exact(), case, given, head)
    np.testing.assert_allclose(out, naive(case, given, head), rtol=1e-9, atol=1e-12)
    names = ["q", "k", "v", "array"] if case.feature in LEARNED else ["q", "k", "v"]
    assert len(gradients) == len(names)
    random = np.random.default_rng(0)
    dout = given.dout[:, :, head]
    for name, gradient in zip(names, gradients, strict=True):
        array = getattr(given, name)
        step = 1e-5 * random.standard_normal(array.shape)
        places = np.zeros(array.shape, bool)
        places[{"array": (0, head) if array.ndim == 4 else head}.get(name, np.s_[:, :, head])] = True
        step *= places  # of the one head that is asked for
        ahead, behind = (naive(case, given._replace(**{name: array + sign * step}), head) for sign in (1, -1))
        own = step[places].reshape(gradient.shape)
        assert (dout * (ahead - behind)).sum() / 2 == pytest.approx((gradient * own).sum(), rel=1e-6)


@pytest.mark.parametrize("case", [*SMALL, *DROPOUT], ids=str)
def test_pairs_are_counted(case: Case) -> None:
    pairs = sum(seen(case, query, key) for query, key in np.ndindex(case.seqlen, case.seqlen))
    assert case.flop == 4 * case.batch * case.num_heads * case.head_dim * pairs
    pairs = case.seqlen * (case.seqlen + 1) / 2 if case.plain_causal else case.seqlen**2
    assert case.plain_flop == 4 * case.batch * case.num_heads * case.head_dim * pairs >= case.flop


def test_cases() -> None:
    cases, quick = variants_cases.cases(), variants_cases.cases(quick=True)
    assert len({str(case) for case in cases}) == len(cases) == 19 and cases[: len(quick)] == quick
    assert [case.feature for case in quick] == [*dict.fromkeys(case.feature for case in cases)]
    assert {case.feature for case in cases} == variants_cases.KINDS.keys()
    assert str(cases[0]) == "bias (1, h, s, s) with its gradient, 8 × 2048 × 16 × 128"
    assert str(cases[6]) == "64 documents, 1 × 32768 × 16 × 128" and sum(variants_cases.lengths_of(cases[6])) == 32768
    pattern = variants_cases.pattern_of(cases[9])
    assert pattern is not None and 0.09 < (pattern.sum() - 64) / 64**2 < 0.11 and pattern.diagonal().all()


@pytest.mark.parametrize("case", [*SMALL, *DROPOUT], ids=str)
@pytest.mark.parametrize("name", SERVES)
def test_cufa_is_right(case: Case, name: str) -> None:
    host = Arrays()
    given = inputs(host, case, 3)
    if case.feature not in SERVES[name]:
        with pytest.raises(NotImplementedError):
            PEERS[name](host, case, given)
        return
    ways, expected = PEERS[name](host, case, given), right(host, case, given, 1)
    error_of(host, case, [ways.forward()], expected[:1], 1)
    error_of(host, case, ways.backward()(), expected[1:], 1)


class TorchOnCpu(frameworks.Torch):
    def __init__(self) -> None:
        self.torch = self.xp = pytest.importorskip("torch")

    def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        generator = self.torch.Generator().manual_seed(seed)
        return self.torch.randn(shape, generator=generator, dtype=getattr(self.torch, dtype))

    def integers(self, values: Any) -> Any:
        return self.torch.tensor(np.asarray(values), dtype=self.torch.int32)


def flex_attention(q: Any, k: Any, v: Any, score_mod: Any, block_mask: Any) -> Any:
    """What torch's does, score functions and masks taken of all entries at once: on a CPU that has no gradients."""
    import torch

    scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    places = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *places)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask.mask_mod(*places), -math.inf)
    return (torch.softmax(scores, -1) @ v.float()).to(q.dtype)


@pytest.mark.parametrize("case", [*SMALL, *DROPOUT], ids=str)
@pytest.mark.parametrize("name", ["math", FLEX])
def test_torch_is_right(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of torch that serves everything, in place of those for a GPU, and FlexAttention's functions."""
    framework = TorchOnCpu()
    framework.torch.manual_seed(0)
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(framework.torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(module, "flex_attention", flex_attention)
    served = case.kind == "Dropout" or case.feature.startswith("bias") if name == "math" else case.kind != "Dropout"
    make = {"math": variants_peers._sdpa("MATH")}.get(name) or PEERS[name]
    given = inputs(framework, case, 3)
    if not served:
        with pytest.raises(NotImplementedError):
            make(framework, case, given)
        return
    ways, expected = make(framework, case, given), right(framework, case, given, 1)
    error_of(framework, case, [ways.forward()], expected[:1], 1)
    error_of(framework, case, ways.backward()(), expected[1:], 1)


def dropped(host: Arrays, case: Case, given: Inputs, p: float, seed: int) -> list[Any]:
    """out of a head, with dropout."""
    scores = given.q[:, :, 1].astype(np.float32) @ given.k[:, :, 1].astype(np.float32).swapaxes(1, 2)
    scores = scores / math.sqrt(case.head_dim) - 1e30 * (case.causal * np.triu(np.ones(scores.shape[1:]), 1))
    kept = np.random.default_rng(seed).random(scores.shape) >= p
    out = np.zeros(given.q.shape, np.float32)
    out[:, :, 1] = (host.softmax(scores) * kept / (1 - p)) @ given.v[:, :, 1].astype(np.float32)
    return [out]


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_is_held_to_the_noise_that_it_makes(case: Case) -> None:
    host, given = Arrays(), inputs(Arrays(), case, 3)
    expected = right(host, case, given, 1)[:1]
    for seed in range(3):
        assert error_of(host, case, dropped(host, case, given, DROPOUT_P, seed), expected, 1) < 0.1
        for p in (0.0, 0.04, 0.2):
            with pytest.raises(ArithmeticError, match=r"^differs by "):
                error_of(host, case, dropped(host, case, given, p, seed), expected, 1)


def test_results_of_another_shape_are_wrong() -> None:
    host, case = Arrays(), SMALL[3]
    expected = right(host, case, inputs(host, case, 0), 1)
    with pytest.raises(ArithmeticError, match=r"^a result is of shape \(2, 23, 8\), not \(2, 24, 8\)$"):
        error_of(host, case, [np.zeros((2, 23, 2, 8))], expected[:1], 1)


# --- whole runs ---------------------------------------------------------------------------------------


def exact(framework: Any, case: Case, given: Inputs, wrong: str = "") -> Ways:
    """What is right, in the last head, except in a direction."""
    out, *gradients = right(framework, case, given, case.num_heads - 1)

    def wide(one: Any) -> Any:
        return np.stack([one] * case.num_heads, 2)

    forward = 0 * wide(out) if wrong == "forward" else wide(out)
    backward = [wide(each) * (wrong != "backward") for each in gradients]
    return Ways(lambda: forward, lambda: lambda: backward)


def test_a_whole_run(host: Arrays, tmp_path: Path) -> None:
    said: list[str] = []
    written = []

    def keep(report: Report) -> None:
        report.write(tmp_path / "variants")
        written.append(len(json.loads((tmp_path / "variants.json").read_text())["rows"]))

    def later_wrong(framework: Any, case: Case, given: Inputs) -> Ways:
        ways, calls = exact(framework, case, given), []

        def forward() -> Any:
            calls.append(case)
            return ways.forward() * (len(calls) < 10)

        return ways._replace(forward=forward)

    def missing(*given: Any) -> Ways:
        raise ImportError("No module named 'peer'")

    ours = {name: PEERS[name] for name in ("cufa", "cufa, packed", PLAIN)}
    others = {
        FLEX: exact,
        "FA3": lambda *given: exact(*given, wrong="backward"),
        "cuDNN (torch)": later_wrong,
        "flash-attn": missing,
    }
    report = variants_measure.run(host, ours | others, BUILT_IN, repeats=6, say=said.append, keep=keep)
    assert len(written) == len(BUILT_IN) and written == sorted(written)
    for case, directions in report.results.items():
        own = "cufa, packed" if case.feature == "documents" else "cufa"
        assert set(directions["forward"]) == {own, PLAIN, FLEX, "FA3"}, said
        assert set(directions["backward"]) == {own, PLAIN, FLEX, "cuDNN (torch)"}, said
        for found in directions.values():
            assert all(each.seconds > 0 and each.captured for each in found.values())
            assert found[FLEX].error < 1e-6 and 1e-9 < found[own].error < 0.01
    assert said.count("# flash-attn left out: No module named 'peer'") == 1
    assert sum(line.startswith("# FA3 fails on") for line in said) == len(BUILT_IN)
    late = [line for line in said if line.startswith("# cuDNN (torch) fails on")]
    assert len(late) == len(BUILT_IN) and all("forward: ArithmeticError: differs by " in line for line in late)
    text = (tmp_path / "variants.md").read_text()
    assert "## Score functions" in text and "## Masks" in text
    pytest.importorskip("matplotlib")
    forward, backward = report.figure().axes
    assert {line.get_label() for line in forward.get_lines()} == {*ours, FLEX, "FA3"}
    assert {line.get_label() for line in backward.get_lines()} == {*ours, FLEX, "cuDNN (torch)"}
    assert Report("", "", {}, {}).figure() is None


def test_time_is_limited(host: Arrays) -> None:
    def slow(*given: Any) -> Ways:
        time.sleep(20)
        raise AssertionError("was not interrupted")

    said: list[str] = []
    peers = {FLEX: slow, PLAIN: PEERS[PLAIN]}
    report = variants_measure.run(host, peers, BUILT_IN[:1], repeats=1, limit=0.05, say=said.append)
    assert f"# {FLEX} fails on {BUILT_IN[0]}: TimeoutError: took longer than 0 s" in said
    assert set(report.results[BUILT_IN[0]]["forward"]) == {PLAIN}
    report = variants_measure.run(host, peers, BUILT_IN, seconds=-1.0, say=said.append)
    assert not report.results and said[-1] == f"# no time is left for {BUILT_IN[-1]}"


def test_a_report_says_how_fast_each_is() -> None:
    case = Case("window", 1, 1000, 1, 25, size=499)  # 375250 pairs of 500500
    found = {"cufa": Measured(1e-3, 2e-3, True), PLAIN: Measured(1e-3, 0.0, True), FLEX: Measured(2e-3, 1e-3, False)}
    starts = {"plain": {"cold cache": 1.234, "warm cache": 0.1}}
    report = Report("title", "conditions", {case: {"forward": found, "backward": {"cufa": found["cufa"]}}}, starts)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown().splitlines() if "|" in line]
    assert lines[2:5] == [
        [str(case), "cufa", "1.000 / 1.000", "0 / 0", "0.75× / –", "2.00× / –", "2.0e-03 / 2.0e-03"],
        ["", PLAIN, "1.000 / –", "0 / –", "– / –", "– / –", "– / –"],
        ["", FLEX, "2.000† / –", "0 / –", "0.37× / –", "– / –", "1.0e-03 / –"],
    ]  # fmt: skip
    assert lines[-1] == ["plain", "1.23", "0.10"]
    rows = report.as_json()["rows"]
    assert [(row["direction"], row["peer"]) for row in rows] == [
        ("forward", "cufa"), ("forward", PLAIN), ("forward", FLEX), ("backward", "cufa")
    ]  # fmt: skip
    work = 4 * 25 * 375250 / 1e-3 / 1e12
    assert rows[0]["tflops"] == pytest.approx(work) and rows[3]["tflops"] == pytest.approx(2.5 * work)
    assert rows[1]["tflops"] == pytest.approx(4 * 25 * 500500 / 1e-3 / 1e12) and rows[1]["error"] is None


# --- what is compiled ahead, and first calls ----------------------------------------------------------


def test_processes_that_are_late_are_ended() -> None:
    processes = [subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({each})"]) for each in (0, 60)]
    assert variants_ahead.finish(processes, 3.0) == 1
    assert [process.poll() for process in processes] == [0, -9]


def test_cases_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(variants_ahead.subprocess, "Popen", lambda command, **_: begun.append(command))
    monkeypatch.setattr(variants_ahead.os, "cpu_count", lambda: 6)
    variants_ahead.begin(SMALL)
    assert [command[:3] for command in begun] == [[sys.executable, "-m", "cufa._bench.variants_ahead"]] * 3
    assert sorted(name for command in begun for name in command[3:]) == sorted(map(str, SMALL))
    begun.clear()
    variants_ahead.begin(SMALL[:1])
    assert len(begun) == 1


def test_a_process_compiles_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def flex(framework: Any, case: Case, given: Inputs) -> Ways:
        if case == BUILT_IN[0]:
            raise ValueError
        return Ways(lambda: compiled.append((case, "forward")), lambda: lambda: compiled.append((case, "backward")))

    monkeypatch.setattr(variants_ahead, "Torch", Arrays)
    monkeypatch.setattr(variants_ahead, "cases", lambda: BUILT_IN)
    monkeypatch.setitem(variants_peers.PEERS, FLEX, flex)
    variants_ahead.compile_all([str(case) for case in BUILT_IN[:2]])
    assert compiled == [(BUILT_IN[1], direction) for direction in WORK]


def test_first_calls() -> None:
    said: list[str] = []
    calls = {"plain": "cufa.attention(q, q, q)", "wrong": "cufa.attention(q, q, q, softcap=-1.0)"}
    found = variants_start.first_calls("NumPy", calls, warm_runs=1, say=said.append)
    assert found.keys() == {"plain"} and found["plain"].keys() == {"cold cache", "warm cache"}
    assert all(0 < seconds < 60 for seconds in found["plain"].values())
    (line,) = said
    assert line.startswith("# the first call fails, wrong: ") and "softcap" in line


# --- the command --------------------------------------------------------------------------------------


def test_the_command(host: Arrays) -> None:
    done = run("--variants", "--only", "ALiBi", "--json")
    assert "cufa is measured alone" in done.stderr and f"{BUILT_IN[0]}, backward: cufa " in done.stderr
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert {row["case"] for row in rows} == {str(BUILT_IN[0])} and {row["direction"] for row in rows} == WORK.keys()
    done = run("--variants", "--quick")
    assert done.exit_code == 0 and "## Masks" in done.stdout and "## Score functions" not in done.stdout


def test_the_command_tells_a_failure(host: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PEERS:
        if name != PLAIN:
            monkeypatch.setitem(variants_peers.PEERS, name, lambda *_: Ways(lambda: np.zeros(1), lambda: np.zeros))
    done = run("--variants", "--only", "ALiBi")
    assert re.search(r"# cufa fails on ALiBi, [\d ×]+, forward: ", done.stderr)
    assert isinstance(done.exception, UnsupportedError) and "cufa failed on ALiBi" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "--seqlen", "512"], "--variants has cases of its own: leave out --seqlen."),
        (["--variants", "--decode"], "--decode and --variants have cases of their own: leave out one of them."),
        (["--variants", "--only", "nothing"], "--only: no case's name contains 'nothing'."),
    ],
)
def test_wrong_usage(host: Arrays, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and words in done.stderr
