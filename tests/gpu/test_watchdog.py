"""A kernel that hangs ends the tests with its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HANGS = """
import time
import pytest

@pytest.mark.gpu
def test_hangs():
    import cupy, cufa
    q = cupy.zeros((1, 64, 1, 64), cupy.float16)
    cufa.attention(q, q, q, causal=True)
    time.sleep(60)  # as in cudaStreamSynchronize
"""


@pytest.mark.gpu
def test_a_hang_is_reported_with_the_kernel(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    tests = Path(__file__).parents[1]
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_hangs.py").write_text(HANGS)
    environment = os.environ | {
        "CUFA_HANG_SECONDS": "4",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=55)
    assert run.returncode == 70
    assert "test_hangs hangs; it launched last: attention_forward_sm" in run.stderr
    assert "(f16, head_dim 64, causal)" in run.stderr
