"""``cufa bench``: what it is asked for, what it prints and writes, and peers by turns, on arrays in host memory."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

import cufa
from cufa._bench import frameworks, measure, reports
from cufa._bench.frameworks import Framework
from cufa._bench.peers import BACKWARD, FORWARD
from cufa._cli.main import cufa as command
from cufa.errors import UnsupportedError
from cufa.testing._timing import Gpu

ROW = reports.Row(16, 32, 1, 2, 2, True)


class Host(Framework):
    """NumPy's arrays, and a clock that `now` moves. No array is longer than `longest`, whatever the row says."""

    longest = 64

    def __init__(self) -> None:
        self.now = 0.0
        self.flushed = 0

    def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        shape = tuple(min(extent, self.longest) for extent in shape)
        kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(kind)

    def integers(self, values: Sequence[int]) -> Any:
        return np.array(values, np.int32)

    def view(self, result: Any) -> Any:
        return result

    def float32(self, array: Any) -> Any:
        return array.astype(np.float32)

    def softmax(self, scores: Any) -> Any:
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def release(self) -> None:
        pass

    def device_name(self) -> str:
        return "a CPU"

    def version(self) -> str:
        return f"NumPy {np.__version__}"

    def clock(self) -> Gpu:
        host = self

        class Stream:
            def __enter__(self) -> None: ...
            def __exit__(self, *error: object) -> None: ...

        def flush() -> None:
            host.flushed += 1

        def record() -> float:
            host.now += 1e-6
            return host.now

        return Gpu(Stream(), lambda: None, flush, lambda fn: fn, record, lambda start, stop: stop - start)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host()
    found.longest = 16  # dozens of rows are computed
    monkeypatch.setattr(frameworks, "find", lambda: found)
    monkeypatch.setattr(importlib.import_module("cufa._api.config"), "is_available", lambda: True)
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["bench", *arguments])


SMALL = ("--head-dim", "16,32", "--seqlen", "16,32")


def test_a_table_for_people(host: Host) -> None:
    done = run(*SMALL)
    assert done.exit_code == 0, done.output
    assert "# torch is not there, or finds no GPU: cufa is measured alone" in done.stderr
    assert "[8/8] hd32 32 " in done.stderr and "(cufa agrees with the float64 reference)" in done.stderr
    assert done.stdout.startswith("# Forward\n\na CPU, ") and "| 32 | 32 | 512 | 64/64 | causal |" in done.stdout
    assert host.flushed == 33 * 9  # of each of eight rows, and of the matrix product


def test_json_for_programs(host: Host) -> None:
    done = run(*SMALL, "--json", "--backward", "--causal", "--dtype", "float32", "--quick")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["direction"] == "backward" and "float32" in found["conditions"] and len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["causal"] and row["dtype"] == "float32" and row["tflops"]["cufa"] > 0 and not row["not_captured"]


def test_files(host: Host, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows, plot = tmp_path / "rows.csv", tmp_path / "plot.svg"
    done = run(*SMALL, "--full", "--dtype", "float16", "--csv", str(rows), "--plot", str(plot))
    assert done.exit_code == 0, done.output
    with rows.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["head_dim"], line["seqlen"], line["dtype"]) for line in lines] == [
        (head_dim, seqlen, "float16") for head_dim in ("16", "32") for seqlen in ("16", "32")
    ]
    assert all(float(line["cufa"]) > 0 for line in lines)
    assert "<svg" in plot.read_text()


def test_a_failure_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setitem(FORWARD, "cufa", fail)
    done = run("--head-dim", "16", "--seqlen", "16", "--full")
    assert "# cufa fails on hd16 16 128/128 full: RuntimeError: no luck" in done.stderr
    assert isinstance(done.exception, UnsupportedError) and "cufa failed on hd16 16" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head-dim", "64,300"], "300 is not from 1 to 256."),
        (["--seqlen", "long"], "'long' is not a number, or several with commas between them."),
        (["--seqlen", "8192", "--quick"], "leave out --quick or --seqlen"),
        (["--csv", "nowhere/rows.csv"], "nowhere/rows.csv cannot be a file"),
        pytest.param(
            ["--plot", "plot.gif"],
            "plot.gif does not end in .png, .svg or .pdf",
            marks=pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib"),
        ),
        (["--dtype", "float64"], "'float64' is not one of"),
    ],
)
def test_wrong_usage(host: Host, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and words in done.stderr
    assert host.flushed == 0


@pytest.mark.skipif(cufa.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu() -> None:
    done = run()
    assert isinstance(done.exception, UnsupportedError) and not done.stdout
    assert str(done.exception).startswith("bench: there is no NVIDIA GPU")


def test_peers_take_turns_and_are_held_to_each_other(host: Host) -> None:
    said: list[str] = []

    def slow(framework: Framework, row: reports.Row, q: Any, k: Any, v: Any) -> Any:
        ours = FORWARD["cufa"](framework, row, q, k, v)

        def call() -> Any:
            host.now += 3e-6
            return ours()

        return call

    def wrong(framework: Framework, row: reports.Row, q: Any, k: Any, v: Any) -> Any:
        return lambda: 2 * v

    def missing(*given: Any) -> Any:
        raise ImportError("No module named 'peer'")

    def particular(*given: Any) -> Any:
        raise NotImplementedError

    peers = {"cufa": FORWARD["cufa"], "slow": slow, "wrong": wrong, "missing": missing, "particular": particular}
    results, eager = measure.measure([ROW, ROW._replace(causal=False)], peers, host, repeats=4, say=said.append)
    assert not eager and [set(speeds) for speeds in results.values()] == [{"cufa", "slow"}] * 2
    for speeds in results.values():
        assert speeds["cufa"] / speeds["slow"] == pytest.approx(4)
    assert said.count("# missing left out: No module named 'peer'") == 1
    assert (
        sum(line.startswith("# wrong fails on hd16 32 2/2 causal: ArithmeticError: differs by ") for line in said) == 1
    )
    assert "[1/2] hd16 32 2/2 causal: " in said[-2] + said[-3] and "(cufa differs by 0.0e+00)" in said[-1]


def test_what_cannot_be_captured_is_measured_and_marked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuse(fn: Any) -> Any:
        raise RuntimeError("not in a capture")

    gpu = host.clock()._replace(capture=refuse)
    monkeypatch.setattr(host, "clock", lambda: gpu)
    results, eager = measure.measure([ROW], {"cufa": FORWARD["cufa"]}, host, say=said.append)
    assert eager == {(ROW, "cufa")} and results[ROW]["cufa"] > 0
    assert said[0] == "# not captured: RuntimeError: not in a capture"


def test_results_that_are_wrong_alone_are_found(host: Host) -> None:
    q, k, v = host.inputs(ROW, 0)[:3]
    out = cufa.attention(q, k, v, causal=True)
    measure.check_last_rows(ROW, q, k, v, out)
    with pytest.raises(AssertionError):
        measure.check_last_rows(ROW, q, k, v, out + out.dtype.type(0.1))


def test_no_framework_has_arrays_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        def make() -> Any:
            raise ImportError(f"{name} finds no GPU")

        return make

    monkeypatch.setattr(frameworks, "Torch", missing("torch"))
    monkeypatch.setattr(frameworks, "CuPy", missing("CuPy"))
    with pytest.raises(UnsupportedError, match=r"neither \(torch finds no GPU; CuPy finds no GPU\); pip install"):
        frameworks.find()


def test_torchs_attention_is_a_peer() -> None:
    torch = pytest.importorskip("torch")

    class OnCpu(frameworks.Torch):
        def __init__(self) -> None:
            self.torch = torch

        def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=getattr(torch, dtype))

    row = ROW._replace(dtype="float32")
    q, k, v, dout = OnCpu().inputs(row, 0)
    for peers, given in ((FORWARD, (q, k, v)), (BACKWARD, (q, k, v, dout))):
        ours, theirs = (
            frameworks.results_of(peers[name](OnCpu(), row, *given)()) for name in ("cufa", reports.BASELINE)
        )
        assert frameworks.difference(OnCpu(), theirs, ours) < 1e-6
        with pytest.raises(NotImplementedError):
            peers["cuDNN (torch)"](OnCpu(), row, *given)
