"""`cufa.stats`: what ran is counted, by all threads, and from the last reset on."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import pytest

import cufa
from cufa._driver import counts as _counts
from cufa._driver import driver as _driver
from cufa._driver.launch import Argument, Launch, Shape


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    cufa.stats(reset=True)


def test_calls_are_counted_by_what_ran() -> None:
    q = np.zeros((1, 4, 1, 8), np.float32)
    out, lse = cufa.attention(q, q, q, return_lse=True)
    cufa.attention(q, q, q)
    cufa.attention_backward(q, q, q, q, out, lse)
    with pytest.raises(ValueError):
        cufa.attention(q, q[:, :, :, :4], q)
    found = cufa.stats()
    assert list(found.launches.items()) == [("cpu (attention)", 2), ("cpu (attention_backward)", 1)]
    assert found == cufa.stats(reset=True), "looking does not count"
    assert cufa.stats() == cufa.stats() != found
    assert not cufa.stats().launches
    cufa.attention(q, q, q)
    assert cufa.stats().launches == {"cpu (attention)": 1}


def test_its_text_is_a_report() -> None:
    _counts.tally("launches", "a kernel").add()
    for _ in range(10):
        _counts.tally("handed on", "a reason").add()
    assert str(cufa.stats(reset=True)).splitlines() == [
        "kernels: 0 compiled, 0 cached, 0 bundled, 0 loaded",
        "launches: 1",
        "  1  a kernel",
        "handed on to torch: 10",
        "  10  a reason",
    ]


def test_no_thread_is_missed() -> None:
    add = _counts.tally("launches", "threads").add

    def count() -> None:
        for _ in range(20_000):
            add()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    seen = [cufa.stats().launches.get("threads", 0) for _ in range(200)]
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert cufa.stats(reset=True).launches["threads"] == 160_000


class Bindings:
    """A driver that launches nothing, and fails when told to."""

    CUlaunchConfig = type("CUlaunchConfig", (), {})
    status = 0

    def cuLaunchKernelEx(self, *_: Any) -> tuple[int]:
        return (self.status,)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"it fails"


def test_a_launch_of_several_kernels_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings()
    monkeypatch.setattr(_driver, "driver", lambda: bindings)
    monkeypatch.setattr(_driver, "overlaps", lambda device: False)
    monkeypatch.setattr(_driver, "enter", lambda device: False)
    monkeypatch.setattr(_driver, "current", lambda device: contextlib.nullcontext())
    argument = Argument(bytes(8), ((0, "q"),))

    def launch(words: str, blocks: int) -> Launch:
        return Launch(words, ["first", "second"], 0, [Shape(blocks, 32, 0)] * 2, argument, ["q"])

    several, none = launch("several", 4), launch("none", 0)
    for current_device in (0, 0, -1):
        several([64], 0, current_device)
        none([64], 0, current_device)
    launch("several", 8)([64], 0, 0)
    bindings.status = 1
    with pytest.raises(cufa.CudaError, match="launching several failed"):
        several([64], 0, 0)
    assert cufa.stats(reset=True).launches == {"several": 4}


@pytest.mark.gpu
def test_launches_are_counted_by_kernel() -> None:
    cupy: Any = pytest.importorskip("cupy")
    q = cupy.zeros((1, 256, 2, 64), cupy.float16)
    out, lse = cufa.attention(q, q, q, return_lse=True)
    for _ in range(3):
        cufa.attention(q, q, q)
    cufa.attention_backward(q, q, q, q, out, lse)
    first, second = cufa.stats().launches.items()
    assert first[0].startswith("attention_forward") and first[1] == 4
    assert second[0].startswith("attention_backward") and second[1] == 1
