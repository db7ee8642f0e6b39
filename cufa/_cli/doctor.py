"""``cufa doctor``."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import click

from .checks import CHECKS, MARK

COMMAND = (sys.executable, "-P", "-m", "cufa._cli.checks")
"""What the process that tries the steps runs; the modules are those that are found here."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Try each step of a call on this machine, and say what to mend.

    Steps go on after one that fails, where they can, and none may take for ever. Exits with 1 if any failed.
    """
    results = []
    for result in examine():
        results.append(result)
        if not as_json:
            _show(result)
    failed = [result["name"] for result in results if result["status"] == "failed"]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "steps": results}, indent=2))
    else:
        click.echo(f"{', '.join(failed)}: mend that first." if failed else "All is well.")
    context.exit(1 if failed else 0)


def examine() -> Iterator[dict[str, Any]]:
    """The results of all steps, one after the other."""
    done: dict[str, str] = {}
    worker = Worker()
    try:
        for name, check in CHECKS.items():
            missing = [each for each in check.needs if done[each] != "ok"]
            if missing:
                says = f"needs {' and '.join(missing)}"
                result: dict[str, Any] = {"name": name, "status": "skipped", "says": says, "do": "", "seconds": 0.0}
            else:
                result = worker.ask(name, check.seconds)
            done[name] = result["status"]
            yield result
    finally:
        worker.end()


def _show(result: dict[str, Any]) -> None:
    width = max(map(len, CHECKS))
    color = {"ok": "green", "failed": "red"}.get(result["status"])
    click.echo(f"{click.style(result['status'].ljust(8), fg=color)} {result['name']:<{width}}  {result['says']}")
    if result["do"]:
        click.echo(f"{'':<{width + 9}}  → {result['do']}")


class Worker:
    """The process that tries the steps, started anew when one step has taken it along."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(self, name: str, seconds: float) -> dict[str, Any]:
        """The result of a step, also if the process hangs or crashes in it."""
        began = time.monotonic()
        process = self._started()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, as the lines will tell
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        said = ""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, began + seconds - time.monotonic()))
            except queue.Empty:
                self.end()
                says = f"it did not end within {seconds:g} s"
                return _lost(name, says, "Something hangs: see what nvidia-smi and dmesg say.", seconds)
            if line is None:
                says = f"{_how_it_ended(process)}{said and f'; it said: {said}'}"
                self.end()
                do = "A library crashes: see whether driver, cuda-bindings and NVRTC are of one CUDA version."
                return _lost(name, says, do, time.monotonic() - began)
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
            said = line.strip() or said

    def end(self) -> None:
        """End the process, if there is one; one that cannot be killed is left alone."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=os.environ | {"PYTHONPATH": paths, "PYTHONUTF8": "1", "CUFA_PROGRESS": "0"},
            )
            self._lines = queue.SimpleQueue()
            threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        return self._process


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Hand on what a process prints, and None when it has ended."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _how_it_ended(process: subprocess.Popen[str]) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "the process closed its output"
    if code >= 0:
        return f"the process ended with status {code}"
    try:
        return f"the process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"the process was ended by signal {-code}"


def _lost(name: str, says: str, do: str, seconds: float) -> dict[str, Any]:
    return {"name": name, "status": "failed", "says": says, "do": do, "seconds": round(seconds, 3)}
