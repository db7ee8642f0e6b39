"""What every test shares: the Hypothesis profile and the rule for tests that need a GPU."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import workers
from hypothesis import HealthCheck, settings

# Else the first test with JAX takes most of a GPU that it shares with the other workers.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


# Before any test imports what reads them; what the user has set stays.
if worker_name := os.environ.get("PYTEST_XDIST_WORKER"):
    for _name, _value in workers.share_of_machine(worker_name, workers.visible_gpus()).items():
        os.environ.setdefault(_name, _value)

# Derandomised: a failure seen once is seen again. No deadline: the first call of a shape may compile.
settings.register_profile(
    "cufa",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("cufa")


def _why_no_gpu() -> str | None:
    """Why the GPU tests cannot run here, or None if they can."""
    import cufa

    return None if cufa.is_available() else "needs an NVIDIA GPU of compute capability 8.0 or newer"


class Watchdog(threading.Thread):
    """Ends the process, saying which kernel hangs, when a GPU test has launched nothing for too long.

    A kernel that never ends cannot be interrupted: whoever waits for it does so in the driver.
    """

    def __init__(self, seconds: float, capture: Any) -> None:
        super().__init__(daemon=True)
        self.seconds = seconds
        self.capture = capture  # pytest's: what is said must not be lost in it
        self.since = time.monotonic()
        self.test = self.kernel = ""

    def watch(self, launch: Any) -> Any:
        """`launch`, which tells of itself."""

        def watched(this: Any, *arguments: Any) -> None:
            self.kernel, self.since = this.words, time.monotonic()
            launch(this, *arguments)

        return watched

    def run(self) -> None:
        while True:
            time.sleep(min(1.0, self.seconds / 10))
            if self.test and time.monotonic() - self.since > self.seconds:
                self.capture.suspend_global_capture(in_=True)
                os.write(2, f"\n{self.test} hangs; it launched last: {self.kernel or 'nothing'}\n".encode())
                os._exit(70)


@pytest.fixture(scope="session")
def watchdog(pytestconfig: pytest.Config) -> Watchdog:
    from cufa._driver import launch as _launch

    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    dog = Watchdog(float(os.environ.get("CUFA_HANG_SECONDS", "180")), capture)
    _launch.Launch.__call__ = dog.watch(_launch.Launch.__call__)  # type: ignore[method-assign]
    dog.start()
    return dog


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    dog = request.getfixturevalue("watchdog")
    dog.kernel, dog.since, dog.test = "", time.monotonic(), request.node.nodeid
    yield
    dog.test = ""
    cupy = sys.modules.get("cupy")
    if cupy is not None:  # other processes need the memory too
        cupy.get_default_memory_pool().free_all_blocks()


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        is_long = [item.get_closest_marker("long") is not None for item in items]
        items[:] = workers.long_first(items, is_long, config.workerinput["workercount"])
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if gpu_items else None
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)  # before workers are waited for: a run that is cut off then has ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After a run of all GPU tests, cut short or not, write down what was verified, where, and on which sources."""
    config = session.config
    whole = config.getoption("markexpr") == "gpu" and not config.getoption("keyword")
    if not whole or hasattr(config, "workerinput") or _why_no_gpu():
        return
    reporter = config.pluginmanager.getplugin("terminalreporter")
    reports = {name: reporter.stats.get(name, []) for name in ("passed", "failed", "skipped", "error")}
    if not reports["passed"]:
        return
    counts = {name: len(each) for name, each in reports.items()}
    # What is skipped as a module has no tests that were collected.
    finished = {report.nodeid for each in reports.values() for report in each if isinstance(report, pytest.TestReport)}
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_verified_on(),
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "skipped for": workers.reasons(reports["skipped"]),
        "unfinished": session.testscollected - len(finished),
        "digest": source_digest(),
    }
    path = Path(os.environ.get("CUFA_GPU_RECORD", Path(__file__).with_name("gpu_record.json")))
    path.write_text(json.dumps(record, indent=2) + "\n")
    reporter.write_line(f"wrote {path}")


def source_digest() -> str:
    """Digest of everything under cufa/ and cuda_src/ that a GPU run verifies."""
    root = Path(__file__).parents[1]
    files = [path for top in ("cufa", "cuda_src") for path in (root / top).rglob("*")]
    state = hashlib.sha256()
    for path in sorted(path for path in files if path.suffix in (".py", ".cuh", ".cu")):
        if "__pycache__" not in path.parts:
            name = path.relative_to(root).as_posix()
            state.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()


def _verified_on() -> dict[str, object]:
    import cufa

    report = cufa.show_config("dicts")
    libraries = {}
    for name in (
        "numpy",
        "ml_dtypes",
        "cupy-cuda13x",
        "cupy-cuda12x",
        "torch",
        "jax",
        "numba-cuda",
        "cuda-bindings",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    return {
        "device": report["gpu"]["cuda:0"],
        "driver": report["gpu"]["driver"],
        "nvrtc": report["nvrtc"]["version"],
        "python": report["versions"]["python"],
        "libraries": libraries,
    }
