"""``cufa explain``, ``tiles`` and ``dump``: what is said of kernels, from shapes alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import places
import pytest
from click.testing import CliRunner, Result

from cufa._cli.main import cufa as command
from cufa._compile import jit as _jit
from cufa._compile import listing as _listing

LLAMA = ("--q", "2x4096x32x128", "--k", "2x4096x8x128", "--causal", "--arch", "sm_90a")
SMALL = ("--q", "4x16x2x32", "--dtype", "float16", "--arch", "sm_80")
"""A call whose kernel compiles fast."""


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.use(tmp_path, monkeypatch)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments)])


def said(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def test_a_call_is_explained_without_arrays_or_a_gpu() -> None:
    lines = said("explain", *LLAMA).splitlines()
    assert lines[0] == "attention: attention_forward_sm90 (sm_90a) on a GPU of 132 SMs"
    assert lines[1] == "  tiles      128 × 128 (rows of q × rows of k), 132 blocks of 384 threads"
    assert "  kernel is  to be compiled" in lines[3]
    assert "  kernel is  cached" in said("explain", *LLAMA)


def test_explanations_as_json_name_everything() -> None:
    told = json.loads(said("explain", *SMALL, "--softcap", 20, "--sinks", "--sms", 64, "--json"))
    assert told["kernel"] == "attention_forward_sm80 (sm_80)" and told["device"] == "a GPU of 64 SMs"
    assert told["config"]["variant"] == ["softcap"] and told["config"]["sinks"] is True
    assert told["refusals"] == {
        "attention_forward_cluster_sm90": "it is not for GPUs of compute capability 8.0",
        "attention_forward_split_sm80": "it is for few rows of q, those of all heads that share a key head together, "
        "and many keys",
        "attention_forward_packed_sm90": "it is not for GPUs of compute capability 8.0",
        "attention_forward_listed_sm90": "it is not for GPUs of compute capability 8.0",
        "attention_forward_sm90": "it is not for GPUs of compute capability 8.0",
    }
    assert told["registers"] > 0


def test_packed_gradients_are_explained() -> None:
    text = said("explain", "--q", "800x2x32", "--sequences", 50, "--backward", "--deterministic", "--arch", "sm_80")
    assert text.startswith("attention_varlen_backward: attention_backward_sm80 (sm_80)")


PAGES = ("--q", "8x1x32x64", "--k-cache", "600x16x8x64", "--pages", 300, "--arch", "sm_80")


def test_calls_with_caches_are_explained() -> None:
    text = said("explain", *PAGES, "--append", "--rotary-dim", 64, "--causal")
    assert text.startswith("attention_with_kvcache: attention_forward_cache_sm80 (sm_80) on a GPU of 108 SMs\n")
    assert "launches   attention_cache_prepare of 9 × 256, " in text
    assert said("explain", *PAGES, "--decode-plan").startswith("decode_plan: attention_cache_prepare (sm_80)")
    packed = "--q", "70x32x64", "--sequences", 8, "--k-cache", "8x900x8x64", "--arch", "sm_80"
    assert json.loads(said("explain", *packed, "--json"))["config"]["varlen"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--q", "2x16x4x64", "--append"), 2, "caches are told of without --k-cache, by which the call has some."),
        (("--q", "2x16x4x64", "--k-cache", "2x9x4x64", "--backward"), 2, "--backward are not for --k-cache."),
        (("--q", "2x16x4x64", "--k-cache", "2x9x4x64", "--decode-plan", "--sinks"), 2, "--decode-plan is the same wit"),
        (("--q", "2x16x4x64", "--k-cache", "2x9x4x64", "--rotary-dim", "8"), 1, "rotary_cos is given, but no k; "),
        (("--q", "2x16x4x64", "--k", "2x16x3x64"), 1, "q has 4 heads and k has 3; the heads of q must be a multiple"),
        (("--q", "2x16x4x64", "--dtype", "float64"), 1, "dtype 'float64' is not one of a GPU's; there are float16, "),
        (
            (
                "--q",
                "2x16x4x300",
            ),
            1,
            "head_dim 300 is not supported; it may be 1 to 256.",
        ),
        (("--q", "64"), 1, "q has shape (64,); 4 dimensions (batch, seqlen, num_heads, head_dim) are expected."),
        (("--q", "2x16x4x64", "--softcap", "-1"), 1, "softcap is -1.0; it must be finite and not negative"),
        (("--q", "16x4x64"), 2, "q of three dimensions holds packed sequences; say by --sequences how many."),
        (("--q", "2x16x4x64", "--sequences", "3"), 2, "--sequences is for packed arrays, whose shapes are TOTALxHxD."),
        (("--q", "2x16x4x64", "--deterministic"), 2, "--deterministic is for --backward; "),
        (("--q", "2,16,4,64"), 2, "'2,16,4,64' is no shape; write 2x4096x32x128."),
        (("--q", "2x16x4x64", "--window", "5"), 2, "'5' is no window; write 1024,0, or 1024, if the right side is "),
    ],
)
@pytest.mark.parametrize("name", ["explain", "dump"])
def test_wrong_shapes_are_refused_as_the_call_would(
    name: str, arguments: tuple[str, ...], status: int, message: str
) -> None:
    done = run(name, *arguments, "--arch", "sm_90a", *(("--source",) if name == "dump" else ()))
    assert message in done.output + str(done.exception)
    assert done.exit_code == status


def test_one_architecture_is_asked_for() -> None:
    assert "name one architecture by --arch." in run("explain", "--q", "1x1x1x64", "--arch", "sm_80,sm_90").output
    assert "--sms goes with --arch." in run("explain", "--q", "1x1x1x64", "--sms", "4").output


def test_tables_of_tiles() -> None:
    rows = json.loads(said("tiles", "--arch", "sm_90a", "--head-dim", 128, "--dtype", "float16", "--json"))
    forward = {
        (row["mask"], row["block_m"], row["block_n"]) for row in rows if row["kernel"] == "attention_forward_sm90"
    }
    assert {
        ("none", 128, 128),
        ("none", 128, 176),
        ("causal", 128, 128),
        ("causal", 128, 176),
        ("window", 128, 128),
    } == forward
    split = {(row["mask"], row["block_m"]) for row in rows if row["kernel"] == "attention_forward_split_sm80"}
    assert split == {(mask, few) for mask in ("none", "causal", "window") for few in (16, 32, 64)}
    assert {row["arch"] for row in rows} == {90}
    assert all(0 < row["smem_bytes"] <= 227 << 10 and row["threads"] % 32 == 0 for row in rows)
    text = said("tiles", "--arch", "sm_90a", "--head-dim", 128, "--dtype", "float16")
    assert len(text.splitlines()) == len(rows) + 1
    assert re.search(
        r"^sm_90 +forward_sm90 +float16 +128 +none +128 × 176 +384 +\S+ KB +1024 × 1024$", text, re.MULTILINE
    )


def test_the_source_in_one_piece_compiles() -> None:
    source = said("dump", *SMALL, "--source")
    assert "#include" not in source and "#pragma once" not in source
    compiled = _jit.compile_source(source, _jit.options_of("80"), "the source", {})
    unit_source = said("dump", *SMALL, "--resources")
    told = json.loads(unit_source)
    assert told["target"] == "80"
    (function,) = told["functions"]
    assert function["registers"] == _jit.resources_of(compiled.log).registers
    assert function["entry"] == "attention_forward_sm80" and function["threads"] == 32


def test_what_a_call_compiles_to_is_written_to_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "kernel"
    text = said("dump", *SMALL, "--source", "--ptx", "--resources", "--out", out)
    assert text.startswith(f"{out}: kernel.cu, kernel.ptx, resources.json and the headers of attention_forward_sm80")
    assert ".target sm_80" in (out / "kernel.ptx").read_text()
    headers = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.cuh")}
    assert headers == _jit.headers()
    _jit.compile_source((out / "kernel.cu").read_text(), _jit.options_of("80"), "the source", headers)


def test_resources_of_every_function_of_gradients() -> None:
    told = json.loads(said("dump", "--q", "4x16x2x32", "--arch", "sm_80", "--backward", "--resources"))
    assert [each["entry"] for each in told["functions"]] == [
        "attention_backward_prepare",
        "attention_backward_sm80",
        "attention_backward_finish",
        "attention_backward_repair",
    ]


def test_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.cu13")
    text = said("dump", *SMALL, "--sass")
    assert "Function : attention_forward_sm80" in text and "HMMA" in text
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("cuda.pathfinder.find_nvidia_binary_utility", lambda name: None)
    done = run("dump", *SMALL, "--sass")
    assert done.exit_code == 1
    assert "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm" in str(done.exception)
    assert _listing.inlined  # nothing but the machine code needs the tools
    assert said("dump", *SMALL, "--resources")


def test_something_to_print_is_asked_for() -> None:
    done = run("dump", *SMALL)
    assert done.exit_code == 2
    assert "say what to print: --source, --ptx, --sass or --resources." in done.output


@pytest.mark.parametrize("name", ["explain", "tiles", "dump", "warmup", "bundle build"])
def test_help_imports_no_arrays(name: str) -> None:
    script = (
        "import sys; from cufa._cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('numpy', 'scipy', 'torch', 'jax', 'cupy', 'cuda') if m in sys.modules])"
    )
    arguments: list[Any] = [sys.executable, "-c", script, *name.split(), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
