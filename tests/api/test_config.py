"""The report on this machine where its surroundings are odd."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cufa


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_show_config_of_a_path_that_is_no_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_DIR", os.fsdecode(b"/tmp/caf\xe9/\xc3\xa9"))
    printed = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    cufa.show_config()
    printed.flush()
    text = printed.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    name = "\\xe9" if encoding == "ascii" else "é"
    assert re.search(r"directory +/tmp/caf\\udce9/" + re.escape(name) + "$", text, re.MULTILINE)


def test_show_config_where_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("CUFA_CACHE_DIR", "a cache of this test alone")
    cufa.show_config()
    assert "ValueError: CUFA_CACHE_DIR: expected an absolute path, because the working" in capsys.readouterr().out


def info(path: Path, **environment: str) -> dict[str, dict[str, str]]:
    """What ``cufa info --json`` prints where `path` comes first among the places of modules."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-P", "-m", "cufa", "info", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (path, root)))} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, dict[str, str]] = json.loads(run.stdout)
    return report


@pytest.mark.parametrize("module", ["numpy", "scipy", "ml_dtypes", "torch", "jax", "cupy", "cuda"])
def test_info_where_a_package_is_broken(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('its library is broken')")
    report = info(tmp_path, CUFA_CACHE_DIR=str(tmp_path / "store"))
    assert report["versions"]["cufa"] == cufa.__version__
    assert report["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert report["cache"]["state"].startswith("ok, 0 entries, ")
    broken = "its library is broken"
    assert (broken in report["nvrtc"]["version"]) == (broken in report["gpu"]["driver"]) == (module == "cuda")


def test_info_imports_no_framework(tmp_path: Path) -> None:
    for module in ("numpy", "scipy", "ml_dtypes", "torch", "jax", "cupy", "numba"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / module)!r}, 'w')")
    info(tmp_path, CUFA_CACHE_DIR=str(tmp_path / "store"))
    imported = {path.name for path in tmp_path.iterdir() if not path.suffix and path.is_file()}
    assert imported <= {"numpy"}  # which the look for bundles needs


def test_info_where_every_variable_is_wrong(tmp_path: Path) -> None:
    wrong = {"CUFA_CACHE_MAX_SIZE": "much", "CUFA_CACHE": "maybe", "CUFA_CACHE_TRUST_SHARED": "x"}
    report = info(tmp_path, **wrong)
    assert report["cache"]["state"].startswith("ValueError: CUFA_CACHE")
    assert {name: report["environment"][name] for name in wrong} == wrong
    assert re.fullmatch(r"\d+\.\d+", report["nvrtc"]["version"])


def test_what_bears_on_the_search_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    environment = cufa.show_config("dicts")["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "3" and "CUDA_PATH" not in environment


def test_installed_frameworks_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"cupy-cuda13x": "14.2", "torch": "2.13"}

    def version(name: str) -> str:
        if name == "jax":
            raise OSError("its metadata cannot be read")
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = cufa.show_config("dicts")["versions"]
    assert installed.items() <= versions.items()
    assert versions["jax"] == "OSError: its metadata cannot be read"
    assert versions["scipy"].startswith("PackageNotFoundError") and "numba-cuda" not in versions


def test_a_python_without_the_lock_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    for enabled in (True, False):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda enabled=enabled: enabled, raising=False)
        said.append(cufa.show_config("dicts")["versions"]["python"])
    assert said == [platform.python_version(), f"{platform.python_version()}, free-threaded"]
