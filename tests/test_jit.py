"""From a plan to a cubin: the source, the key, the cache, the compiler's messages."""

from __future__ import annotations

import logging
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import cufa
from cufa import _jit, _plan
from cufa._problem import Static

FACTS = Static("bf16", 64, 64, "causal", True, True, True, False, 16, 16, True, False)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def plan() -> _plan.Plan:
    return _plan.make_plan(FACTS, 80)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler was asked for."""
    asked: list[str] = []
    compile_source = _jit.compile_source

    def counted(source: str, options: list[str], what: str) -> _jit.Compiled:
        asked.append(what)
        return compile_source(source, options, what)

    monkeypatch.setattr(_jit, "compile_source", counted)
    return asked


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop what this process remembers, as a new one would have."""
    monkeypatch.setattr(_jit, "_caches", {})


def test_source_names_every_member(plan: _plan.Plan) -> None:
    source = _jit.source_of(plan)
    assert "using variant = attention::Variant<attention::Softcap<bf16>, attention::Alibi>;" in source
    assert "static constexpr bool causal = true;" in source
    for name, value in vars(plan.config).items():
        if name not in ("element", "variant"):
            assert f" {name} = {str(value).lower()};" in source
    assert "attention_forward_sm80(const __grid_constant__ attention::Params params)" in source


def test_key_depends_on_everything(plan: _plan.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [_jit.key_of(plan), _jit.key_of(_plan.make_plan(FACTS._replace(head_dim=63), 80))]
    keys.append(_jit.key_of(_plan.make_plan(FACTS, 86)))
    monkeypatch.setenv("CUFA_LINEINFO", "1")
    keys.append(_jit.key_of(plan))
    monkeypatch.delenv("CUFA_LINEINFO")
    headers, nvrtc = _jit.headers(), _jit.nvrtc()
    for name in headers:
        monkeypatch.setattr(_jit, "headers", lambda name=name: headers | {name: headers[name] + b" "})
        keys.append(_jit.key_of(plan))
    monkeypatch.setattr(_jit, "headers", lambda: headers)
    monkeypatch.setattr(_jit, "nvrtc", lambda: nvrtc._replace(build="another"))
    keys.append(_jit.key_of(plan))
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(_jit, "nvrtc", lambda: nvrtc._replace(path="elsewhere"))
    assert _jit.key_of(plan) == keys[0]


def test_compiles_once_and_is_kept(
    plan: _plan.Plan, compiles: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = _jit.entry_of(plan)
    assert entry.meta["kernel"] == "attention_forward_sm80" and entry.meta["arch"] == "80"
    assert 0 < entry.meta["registers"] <= 255
    forget(monkeypatch)
    assert _jit.entry_of(plan) == entry
    assert compiles == ["attention_forward_sm80 (bf16, head_dim 64, causal, sinks, softcap, alibi) for sm_80"]
    assert len(list(own_cache.rglob("*.cufa"))) == 1


def test_a_damaged_entry_is_compiled_again(
    plan: _plan.Plan, compiles: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = _jit.entry_of(plan)
    (file,) = own_cache.rglob("*.cufa")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    forget(monkeypatch)
    assert _jit.entry_of(plan).cubin == entry.cubin
    assert len(compiles) == 2


def test_threads_compile_a_kernel_once(plan: _plan.Plan, compiles: list[str]) -> None:
    entries: list[Any] = []
    threads = [threading.Thread(target=lambda: entries.append(_jit.entry_of(plan))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiles) == 1 and len(entries) == 8


def test_compiling_can_be_forbidden(plan: _plan.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    with pytest.raises(
        cufa.MissingKernelError, match=r"is not in the cache, and CUFA_DISABLE_JIT forbids compiling it"
    ):
        _jit.entry_of(plan)


def test_the_source_can_be_kept(plan: _plan.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_SAVE_SOURCE", str(tmp_path / "kept"))
    _jit.entry_of(plan)
    (kept,) = (tmp_path / "kept").iterdir()
    assert (kept / "kernel.cu").read_text() == _jit.source_of(plan)
    assert (kept / "attention/mainloop_sm80.cuh").read_bytes() == _jit.headers()["attention/mainloop_sm80.cuh"]
    assert "registers" in (kept / "log.txt").read_text()


def test_a_broken_source_shows_the_log() -> None:
    with pytest.raises(cufa.CompileError) as raised:
        _jit.compile_source("int f() { return nothing; }", _jit.options_of("80"), "a broken kernel")
    text = str(raised.value)
    assert text.startswith("cufa: compiling a broken kernel failed (NVRTC_ERROR_COMPILATION). Set CUFA_SAVE_SOURCE")
    assert 'identifier "nothing" is undefined' in text


def test_a_missing_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import pathfinder

    def missing(name: str) -> Any:
        raise RuntimeError(f"{name} is nowhere")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    _jit.nvrtc.cache_clear()
    try:
        with pytest.raises(cufa.CompileError, match=r"nvrtc is nowhere\. Install it with pip install 'cufa\[cuda13\]'"):
            _jit.nvrtc()
    finally:
        _jit.nvrtc.cache_clear()


@pytest.mark.parametrize(("arch", "target"), [(80, "80"), (89, "89"), (90, "90"), (120, "120"), (129, "121")])
def test_a_gpu_newer_than_nvrtc_takes_its_family(plan: _plan.Plan, arch: int, target: str) -> None:
    assert _jit.target_of(plan._replace(arch=arch)) == target


def test_kernels_for_one_architecture_alone_are_compiled_for_it() -> None:
    assert _jit.target_of(_plan.make_plan(FACTS, 90)) == "90a"
    assert _jit.target_of(_plan.make_plan(FACTS._replace(tma=False), 90)) == "90"


def test_a_gpu_of_a_new_family_needs_a_newer_nvrtc(plan: _plan.Plan) -> None:
    with pytest.raises(cufa.CompileError, match=r"does not compile for compute capability 99\.0; install a newer one"):
        _jit.target_of(plan._replace(arch=990))


@pytest.mark.parametrize("wanted", ["1", "0"])
def test_a_long_compile_is_announced(
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUFA_PROGRESS", wanted)
    monkeypatch.setattr(_jit, "PROGRESS_AFTER", 0.01)
    caplog.set_level(logging.INFO, "cufa")
    with _jit._progress("something large"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ("cufa: compiling something large ...\n" if wanted == "1" else "")
    assert [record.getMessage()[:25] for record in caplog.records] == [
        "compiling something large",
        "compiled something large ",
    ]
    caplog.clear()
    monkeypatch.setattr(_jit, "PROGRESS_AFTER", 5)
    with _jit._progress("something small"):
        pass
    assert capsys.readouterr().err == "" and not caplog.records


def test_the_wheel_is_small_and_whole(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode and "No matching distribution" in run.stderr:
        pytest.skip("needs an index to build from")
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("cufa-*.whl")
    assert wheel.stat().st_size <= 300 << 10
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"cufa/cuda_src/{name}" for name in _jit.headers()} <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cufa").rglob("*.py")}
    assert modules | {"cufa/py.typed"} <= names
