"""``cufa bundle build`` and ``cufa warmup``, with the real compiler: what is made, said, refused and left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import places
import plans
import pytest
from click.testing import CliRunner, Result

from cufa._bundles import build as _build
from cufa._bundles import progress as _progress
from cufa._cli.main import cufa as command
from cufa._compile import jit as _jit
from cufa._compile import used as _used
from cufa._compile.bundle import open_bundle
from cufa._kernels import Plan

ROOT = Path(__file__).parents[2]
FACTS = [plans.short("f16", (32, 32), (16, 16), features) for features in ({}, {"mask": "causal"})]
"""Of the two kernels that compile fastest."""


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.use(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of two kernels, used on an A100."""
    path = tmp_path / "used.jsonl"
    monkeypatch.setattr(_used, "_noted", set())
    monkeypatch.setenv("CUFA_RECORD", str(path))
    for facts in FACTS:
        _used.note(plans.forward(facts, 80), facts, "attention")
    monkeypatch.delenv("CUFA_RECORD")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments)])


def build(*arguments: object, out: str = "out.cufa-bundle") -> Result:
    return run("bundle", "build", "--out", out, *arguments)


def test_a_bundle_is_built_and_used_without_a_compiler(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = build("--from-log", log, "--jobs", 1)
    assert done.exit_code == 0, done.output
    assert re.search(r"out.cufa-bundle: 2 kernels for sm_80, 0.0 MB, in \d+ s \(0 were in the cache\)", done.output)
    assert not [*(tmp_path / "cache").rglob("*.cufa")], "a build fills no cache"
    with open_bundle("out.cufa-bundle") as bundle:
        items = [*bundle.items()]
    assert [item.target for item in items] == ["80", "80"]
    chosen = [plans.forward(facts, 80) for facts in FACTS]
    assert {item.key for item in items} == {_jit.source_key(_jit.unit_of(plan)) for plan in chosen}
    assert {item.meta["config"]["mask"] for item in items} == {"none", "causal"}
    monkeypatch.setenv("CUFA_BUNDLE_PATH", str(tmp_path))
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    assert {_jit.entry_of(_jit.unit_of(plan)).cubin for plan in chosen} == {item.cubin for item in items}


def test_processes_beside_each_other_make_the_same_file(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "MINIMUM_PER_PROCESS", 1)
    for out, jobs in (("one.cufa-bundle", 1), ("two.cufa-bundle", 2)):
        done = build("--from-log", log, "--jobs", jobs, out=out)
        assert done.exit_code == 0, done.output
    kernels = []
    for out in ("one.cufa-bundle", "two.cufa-bundle"):
        with open_bundle(out) as bundle:
            kernels.append([(item.key, item.target, item.cubin) for item in bundle.items()])
    assert kernels[0] == kernels[1] and len(kernels[0]) == 2


def test_what_is_in_the_cache_is_taken_from_there(log: Path) -> None:
    warmed = run("warmup", "--from-log", log, "--jobs", 2)
    assert warmed.exit_code == 0, warmed.output
    assert re.search(r"2 kernels are ready after [\d.]+ s: 2 compiled, 0 from the cache", warmed.output)
    again = run("warmup", "--from-log", log)
    assert ": 0 compiled, 2 from the cache, 0 from bundles, 0 loaded; they are in " in again.output
    assert "(2 were in the cache)" in build("--from-log", log).output


def test_a_record_serves_other_gpus(log: Path) -> None:
    done = build("--from-log", log, "--arch", "sm_80,sm_120", "--jobs", 1)
    assert done.exit_code == 0, done.output
    with open_bundle("out.cufa-bundle") as bundle:
        assert [item.target for item in bundle.items()].count("120") == 2


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler to which masks are unknown."""
    unit_of = _jit.unit_of

    def without(plan: Plan) -> Any:
        unit = unit_of(plan)
        return unit._replace(source=unit.source.replace("attention::CausalMask", "attention::NoMask"))

    monkeypatch.setattr(_jit, "unit_of", without)


def test_a_kernel_that_does_not_compile_fails_the_build(log: Path, broken: None) -> None:
    Path("out.cufa-bundle").write_text("what was there")
    done = build("--from-log", log, "--jobs", 1)
    assert done.exit_code == 1
    assert "NoMask" in str(done.exception)
    assert Path("out.cufa-bundle").read_text() == "what was there"
    assert {*os.listdir()} - {"cache"} == {"out.cufa-bundle", "used.jsonl"}


def test_others_are_kept_if_asked(log: Path, broken: None) -> None:
    done = build("--from-log", log, "--jobs", 1, "--keep-going")
    assert done.exit_code == 1
    assert "1 kernel for sm_80, 1 left out" in done.output and "NoMask" in done.output
    with open_bundle("out.cufa-bundle") as bundle:
        assert len([*bundle.items()]) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "nothing says what to compile for; "),
        (("--preset", "inferense"), 2, "there is no preset 'inferense'; there are inference, training, full."),
        (("--head-dim", "64", "--feature", "casual"), 2, "there is no feature 'casual'; there are causal, "),
        (("--head-dim", "64", "--dtype", "int8"), 2, "there is no dtype 'int8'; there are float16, bfloat16, float32."),
        (("--head-dim", "64x", "--arch", "sm_80"), 2, "'64x' is no head_dim; write 128, or 192:128 if v has another."),
        (("--head-dim", "64", "--arch", "ampere"), 2, "'ampere' is no architecture; write sm_80, or sm_80,sm_90a."),
        (("--from-log", "missing"), 2, "File 'missing' does not exist."),
        (("--head-dim", "64", "--arch", "sm_81"), 1, "does not compile for sm_81; it does for sm_80, "),
        (("--head-dim", "64", "--arch", "sm_75"), 1, "a GPU of compute capability 7.5 is not supported; "),
        (("--preset", "full", "--from-log", "setup.cfg"), 2, "--from-log says what to compile; "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(
    arguments: tuple[str, ...], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit, "compile_unit", lambda *_: pytest.fail("compiles"))
    Path("setup.cfg").write_text("")
    done = build(*arguments)
    assert message in done.output + str(done.exception)
    assert done.exit_code == status
    assert {*os.listdir()} - {"cache"} == {"setup.cfg"}


def test_without_a_gpu_an_architecture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from cufa._driver import driver
    from cufa.errors import CudaError

    def none() -> int:
        raise CudaError("cufa: there is no driver.")

    monkeypatch.setattr(driver, "count", none)
    done = build("--preset", "full")
    assert done.exit_code == 1
    assert str(done.exception) == (
        "this machine has no GPU to compile for (cufa: there is no driver.); name some by --arch."
    )


def test_a_record_of_nothing_is_refused(tmp_path: Path) -> None:
    Path("used.jsonl").write_text('{"torn')
    done = build("--from-log", "used.jsonl", "--arch", "sm_80")
    assert done.exit_code == 1
    assert "line 1 is no record of a kernel, or a piece of one; it is skipped." in done.output
    assert str(done.exception).startswith("used.jsonl names no kernel; run a program with CUFA_RECORD=")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    kernels = ["--operation", "attention", "--head-dim", "32", "--arch", "sm_90a"]
    # A test run in the background ignores interrupts, and so would what it starts.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import cufa.__main__"
    command = [sys.executable, "-c", script, "bundle", "build", *kernels, "--jobs", "2", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUFA_PROGRESS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("Compiling: ")
        began = time.monotonic()
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does, to all of its processes
        said = running.stderr.read()
        assert running.wait(timeout=60) == 1, said
    assert said.splitlines()[-1] == "Aborted!" and "Traceback" not in said
    assert time.monotonic() - began < 30
    assert {*os.listdir()} <= {"cache"} and not [*Path("cache").rglob("*.cufa")]


def test_a_terminal_has_a_bar_and_a_pipe_has_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [*_progress.watched(range(25), 25, "Compiling")] == [*range(25)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Compiling: 3 of 25" and lines[-1] == "Compiling: 25 of 25" and len(lines) == 9
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert [*_progress.watched(range(3), 3, "Compiling")] == [*range(3)]
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setenv("CUFA_PROGRESS", "0")
    assert [*_progress.watched(range(3), 3, "Compiling")] == [*range(3)]
    assert not capsys.readouterr().err
