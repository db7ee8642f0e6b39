"""``cufa learn``: the tables of what runs here and of what is only compiled, and the roofline of a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from cufa import reference
from cufa._cli import learn
from cufa._cli.main import cufa as command
from cufa.errors import CompileError
from cufa.learn import ladder
from cufa.learn.ladder import Measured, Rung, Size


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run here does not depend on the machine."""

    def why_not(rung: Rung) -> str:
        return "" if rung.needs == "numpy" else "there is no GPU"

    monkeypatch.setattr(ladder, "why_not", why_not)


def test_what_cannot_run_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    textbook: Any = ModuleType("cufa.learn.r01_textbook")
    textbook.TITLE, textbook.attention = "the specification", reference.attention
    monkeypatch.setitem(sys.modules, textbook.__name__, textbook)
    arguments = ["learn", "--rung", "r01", "--rung", "r12", "--rung", "r13", "--rung", "t04", "--head-dim", "64"]
    arguments += ["--seqlen", "32", "--seconds", "0.001", "--arch", "sm_80", "--out", str(tmp_path)]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    table = (tmp_path / "ladder.md").read_text()
    for line in (
        "In NumPy, on the CPU, head_dim 64, batch 1, 32 queries and keys, 2 heads, float32:",
        "| r01_textbook: the specification ",
        "What the rungs save is",
        "Left out: t04_triton; there is no GPU.",
    ):
        assert line in table and line in done.output
    assert "roofline" not in table and not (tmp_path / "roofline.svg").exists()
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert [each["name"] for each in found["cpu"]] == ["r01_textbook"] and found["cpu"][0]["error"] < 1e-5
    assert (found["cpu"][0]["size"]["seqlen"], found["cpu"][0]["size"]["head_dim"]) == (32, 64)
    compiled = {each["rung"]: each for each in found["compiled"]}
    assert (compiled["r12_swizzle"]["arch"], compiled["r12_swizzle"]["shared_bytes"]) == ("sm_80", 32768)
    assert compiled["r13_hopper"]["arch"] == "sm_90a" and compiled["r13_hopper"]["spill_bytes"] == 0


def test_wrong_options_are_told_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "measure", lambda *_, **__: pytest.fail("it measures"))
    (tmp_path / "file").touch()
    for wrong, text in (
        (["--rung", "r99"], "there is no rung 'r99'"),
        (["--seconds", "nan"], "--seconds: it is not a number"),
        (["--seconds", "inf"], "--seconds"),
        (["--arch", "volta"], "'volta' is not sm_80, or newer"),
        (["--arch", "sm_75"], "'sm_75' is not sm_80, or newer"),
        (["--rung", "r12", "--arch", "sm_999"], "does not compile for compute capability 99.9"),
        (["--out", str(tmp_path / "file" / "below")], "Not a directory"),
    ):
        done = CliRunner().invoke(command, ["learn", "--rung", "r01", *wrong])
        assert done.exit_code != 0 and text in f"{done.output}{done.exception}", (wrong, done.output)


def test_what_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rung that somebody changed, and is wrong now; without the compiler the rungs in NumPy run all the same."""
    asked = []

    def measure(rung: Rung, size: Size, *, seconds: float) -> Measured:
        asked.append((rung.name, size.head_dim, size.dtype))
        if rung.name == "r02_online":
            raise AssertionError("0.5 is far from 0.25")
        return ROWS[0]

    def missing() -> None:
        raise CompileError("cufa: NVRTC\ncannot be loaded.")

    monkeypatch.setattr(ladder, "measure", measure)
    done = CliRunner().invoke(command, ["learn", "--rung", "r02"])
    assert done.exit_code == 1 and "r02_online is wrong: 0.5 is far from 0.25" in done.output
    monkeypatch.setattr("cufa._compile.jit.nvrtc", missing)
    widths = ["--head-dim", "64", "--head-dim", "128", "--head-dim", "64"]
    done = CliRunner().invoke(command, ["learn", "--rung", "r13", "--rung", "r01", "--rung", "r01", *widths])
    assert done.exit_code == 0 and "Left out: r13_hopper; NVRTC cannot be loaded." in done.output
    assert asked[1:] == [("r01_textbook", 64, "float32"), ("r01_textbook", 128, "float32")]


def test_what_cannot_run_is_shown_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what others make no fault is cufa's."""
    troubles = {
        "r02_online": MemoryError("of 3 TB"),
        "n03_numba_v1": AttributeError("module 'numpy'\nhas no attribute 'row_stack'"),
        "t04_triton": AssertionError("0.5 is far from 0.25"),
    }

    def measure(rung: Rung, size: Size, *, seconds: float) -> Measured:
        if rung.name in troubles:
            raise troubles[rung.name]
        return ROWS[0]._replace(name=rung.name)

    monkeypatch.setattr(ladder, "why_not", lambda rung: "")
    monkeypatch.setattr(ladder, "measure", measure)
    monkeypatch.setattr(ladder, "framework_of", lambda rung: None)
    monkeypatch.setattr(ladder, "measure_cufa", lambda *_, **__: ROWS[2])
    monkeypatch.setattr(learn, "_gpu_name", lambda: "a GPU")
    monkeypatch.setattr(learn, "_plot", lambda on_gpu, path: all(map(len, on_gpu.values())))
    rungs = ("r01", "r02", "n03", "t04", "r07", "r08")
    arguments = [*(part for rung in rungs for part in ("--rung", rung)), "--head-dim", "64"]
    done = CliRunner().invoke(command, ["learn", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table = (tmp_path / "ladder.md").read_text()
    assert "r02_online does not fit the memory: of 3 TB\n" in table
    assert "n03_numba_v1 cannot run: AttributeError: module 'numpy' has no attribute 'row_stack'\n" in table
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    rows = {first.partition(":")[0]: cells for first, *cells in lines}
    assert {*rows["n03_numba_v1"]} == {"–", ""}
    times = [rows[name][0] for name in ("r01_textbook", "r07_thread_per_row", "cufa.attention")]
    assert times == ["1000", "1000", "10"]
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert [each["rung"] for each in found["failed"]] == ["r02_online", "n03_numba_v1", "t04_triton"]
    assert [each["name"] for each in found["gpu"]] == ["r07_thread_per_row", "r08_shared_tiles", "cufa.attention"]
    troubles["r07_thread_per_row"] = CompileError("expected a ;")
    done = CliRunner().invoke(command, ["learn", *arguments])
    assert done.exit_code == 1 and "r07_thread_per_row cannot run: CompileError: expected a ;" in done.output
    assert "| r08_shared_tiles: slow" in done.output


ROWS = [
    Measured("r07_thread_per_row", "slow", 1.0, 10**12, 2 * 10**11, 1e-3),
    Measured("r08_shared_tiles", "faster", 0.1, 10**12, 10**10, 1e-3),
    Measured("cufa.attention", "fast", 0.01, 10**12, None, 1e-3),
]


def test_what_ran_on_a_gpu_is_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(learn, "_gpu_name", lambda: "a GPU")
    triton = Measured("t04_triton", "of blocks", 0.02, 10**12, None, 1e-3)
    text = learn._text({}, {Size(causal=True): [triton, *ROWS]}, [], [])
    assert "On a GPU, head_dim 128, batch 1, 4096 queries and keys, 16 heads, bfloat16, causal:" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "cufa.attention" in line]
    assert cells == [["cufa.attention: fast", "10", "–", "100", "10.00", "1.0e-03"]]
    factors = [line.split("|")[5].strip() for line in text.splitlines() if line.startswith(("| t0", "| r0"))]
    assert factors == ["", "", "10.00"], "no rung of CUDA's follows Triton's"
    taken = {"rung": "r12", "title": "", "head_dim": 64, "arch": "sm_80", **dict.fromkeys(learn._TAKEN, 1)}
    for count, told in ((1234, False), (None, True)):
        text = learn._text({}, {}, [taken | {"instructions": count}], [])
        assert (" 1,234 |" in text) is not told and ("pip install nvidia-cuda" in text) is told
    learn.draw({Size(): ROWS}, {"memory": 4e12, "tensor cores": 1e15}, tmp_path / "roofline.svg")
    drawn = (tmp_path / "roofline.svg").read_text()
    assert drawn.count("<!-- r0") == 2 and drawn.count("<!-- cufa.attention") == 1 and "<!-- TFLOP/s" in drawn


def test_bytes_are_those_of_every_tile() -> None:
    size = Size(batch=2, seqlen=100, heads=3, head_dim=64)
    assert size.flops == 4 * 2 * 3 * 64 * 100 * 100
    # q and out once, k and v for each of four tiles; under a mask up to the last row of a tile.
    assert size.bytes_asked_for(32) == 2 * 6 * 64 * (200 + 2 * 400)
    assert size._replace(causal=True).bytes_asked_for(32) == 2 * 6 * 64 * (200 + 2 * (32 + 64 + 96 + 100))
    assert size._replace(causal=True).pairs == 6 * 5050
