"""compute-sanitizer finds no bad access and no race in a small profile of calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROFILE = Path(__file__).with_name("sanitizer_profile.py")


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("direction", ["forward", "backward", "caches", "features-float32", "features-bfloat16"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str, direction: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("needs compute-sanitizer")
    pytest.importorskip("cupy")
    root = PROFILE.parents[2]
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--kernel-name",
            "kernel_substring=attention_",
            "--report-api-errors",
            "no",
            sys.executable,
            PROFILE,
            direction,
            tool,
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    report = run.stdout + run.stderr
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, report[-4000:]
    assert f"the {direction} agrees with the reference" in report
    assert "ERROR SUMMARY: 0 errors" in report or "0 hazards" in report, report[-4000:]
