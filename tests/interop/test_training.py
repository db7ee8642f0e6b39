"""The examples that train a model in a framework, run as a user runs them: both attentions learn the same."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cufa

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch", "4", "--steps", "15")


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)


@pytest.mark.parametrize(("name", "framework"), [("train_gpt_torch.py", "torch"), ("train_gpt_jax.py", "jax")])
def test_both_attentions_learn_the_same(name: str, framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    done = run(name, *SMALL)
    assert done.returncode == 0, done.stderr
    first, *_ = re.findall(r"step +0: loss (\S+)", done.stdout)
    found = re.search(rf"last losses: cufa (\S+), {framework} (\S+); at most (\S+) apart", done.stdout)
    assert found is not None, done.stdout
    mine, other, apart = map(float, found.groups())
    assert max(mine, other) < float(first) - 0.1  # it learns
    assert apart <= (0.1 if cufa.is_available() else 1e-3)  # on a GPU numbers are bfloat16
    assert re.search(rf"a step: cufa \S+ ms, {framework} \S+ ms", done.stdout)


@pytest.mark.parametrize("arguments", [("--heads", "3"), ("--steps", "0"), ("--context", "10000000")])
def test_sizes_that_will_not_do_are_refused(arguments: tuple[str, ...]) -> None:
    pytest.importorskip("jax")
    done = run("train_gpt_jax.py", *arguments)
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
