"""The command line: finding commands, messages, exit codes, and what starting it costs."""

from __future__ import annotations

import json
import subprocess
import sys

import places
import pytest
from click.testing import CliRunner

import cufa
from cufa._cli.main import COMMANDS
from cufa._cli.main import cufa as command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cufa", *arguments], capture_output=True, text=True)


def test_help_names_every_command_and_imports_none() -> None:
    said = places.imported_by(["--help"], ("numpy", "scipy", "torch", "jax", "cupy", "cuda"))
    assert said.endswith("[]\n")
    assert all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = CliRunner().invoke(command, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert f"cufa {name}" in done.output


def test_unknown_commands() -> None:
    done = run("infos")
    assert done.returncode == 2
    assert "no command 'infos'; did you mean info?" in done.stderr
    assert run("--version").stdout == f"cufa, version {cufa.__version__}\n"


def test_info_as_json() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["cufa"] == cufa.__version__
