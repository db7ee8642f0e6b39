"""`cufa.warmup`: afterwards no call compiles or loads anything, which a counter shows."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
import test_contexts
from gradients import Call
from test_contexts import FakeDriver, operations, pretend

import cufa
from cufa._bundles import selection
from cufa._compile import jit as _jit
from cufa._compile import lookup as _lookup
from cufa._compile import used as _used
from cufa._driver import driver as _driver
from cufa.testing import Case

cold = test_contexts.cold
cupy = test_contexts.cupy

SHORT = Call(
    case=Case(
        batch=2, seqlen_q=16, seqlen_k=16, num_heads_q=2, num_heads_k=1, head_dim=32, head_dim_v=32, dtype="float16"
    )
)
"""Of kernels that compile fast."""
SHAPES = {"q": (2, 16, 2, 32), "k": (2, 16, 1, 32), "v": (2, 16, 1, 32), "dtype": "float16"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_jit, "_caches", {})
    monkeypatch.setattr(_lookup, "_in_wheels", tuple)
    cufa.stats(reset=True)
    return tmp_path / "cache"


class CapturingDriver(FakeDriver):
    """A driver of one Hopper GPU, while every stream is captured into a CUDA graph. Threads begin without a context."""

    def __init__(self) -> None:
        self._threads = threading.local()
        super().__init__(0)
        self._initial = self.mode

    @property
    def current(self) -> list[int]:  # type: ignore[override]
        if not hasattr(self._threads, "current"):
            self._threads.current = []
        return self._threads.current  # type: ignore[no-any-return]

    @current.setter
    def current(self, current: list[int]) -> None:
        self._threads.current = current

    @property
    def mode(self) -> Any:  # type: ignore[override]
        return getattr(self._threads, "mode", self._initial)

    @mode.setter
    def mode(self, mode: Any) -> None:
        self._initial = getattr(self, "_initial", mode)
        self._threads.mode = mode

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "cuStreamIsCapturing":
            return (self._real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE,)
        return super()._answer(name, arguments)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, cold: None) -> FakeDriver:
    driver = CapturingDriver()
    monkeypatch.setattr(_driver, "driver", lambda: driver)
    monkeypatch.setattr(_driver, "count", lambda: 1)
    return driver


def kernels() -> dict[str, int]:
    return {name: count for name, count in cufa.stats().kernels.items() if count}


def test_a_call_that_was_warmed_up_can_be_captured_at_once(fake: FakeDriver) -> None:
    arrays = pretend(SHORT)
    forward, backward = operations(SHORT, arrays)
    for call in (forward, backward):
        with pytest.raises(cufa.MissingKernelError, match=r"or cufa\.warmup\(\) what it needs\.$"):
            call()
    given = {name: arrays[name] for name in "qkv"}
    done = cufa.warmup(calls=[{**given, "backward": True}])
    assert (done.kernels, done.compiled, done.loaded) == (2, 2, 2)
    assert kernels() == {"compiled": 2, "loaded": 2}
    forward(), backward()
    assert kernels() == {"compiled": 2, "loaded": 2}
    assert len(cufa.stats().launches) == 2
    again = cufa.warmup(calls=[{**given, "backward": True}])
    assert (again.kernels, again.compiled, again.cached, again.loaded) == (2, 0, 0, 0)


def test_shapes_do_as_well_as_arrays(fake: FakeDriver) -> None:
    assert cufa.warmup(calls=[SHAPES]).loaded == 1
    operations(SHORT, pretend(SHORT))[0]()
    assert kernels() == {"compiled": 1, "loaded": 1}


STEP = {"q": (4, 1, 8, 64), "k_cache": (90, 16, 2, 64), "v_cache": (90, 16, 2, 64), "dtype": "float16"}
STEP |= {"operation": "attention_with_kvcache", "cache_seqlens": (4,), "block_table": (4, 9)}
"""A step of decoding, in shapes."""


def test_calls_of_every_function_are_warmed_up(fake: FakeDriver) -> None:
    state = {"out_a": (2, 9, 4, 64), "lse_a": (2, 4, 9), "out_b": (2, 9, 4, 64), "lse_b": (2, 4, 9), "dtype": "float16"}
    turned = {"q": (2, 9, 4, 64), "cos": (9, 32), "sin": (9, 32), "dtype": "float16", "operation": "rotary"}
    calls = [
        STEP,
        STEP | {"plan": True},  # which clusters serve as well
        STEP | {"plan": True, "num_splits": 4},
        STEP | {"operation": "decode_plan", "block_table": None, "cache_batch_idx": (4,)},
        state | {"operation": "merge_states"},
        state | {"operation": "merge_states_backward"},
        turned,
        turned | {"interleaved": False},
    ]
    loaded: list[str] = []
    for call in calls:
        before = kernels().get("loaded", 0)
        cufa.warmup(calls=[call])
        loaded.append(kernels()["loaded"] - before)
    assert loaded == [1, 0, 1, 1, 1, 1, 1, 1]


def test_kinds_of_calls_hold_every_length(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(_jit, "load", lambda plan, device: loaded.append((plan, device)))
    done = cufa.warmup(operation="attention", head_dim=32, dtype="float16", features="causal", jobs=1)
    kind = selection.Kind("attention", "float16", 32, 32, ("causal",))
    expected = selection.plans_for([selection.Chosen("every", (kind,))], 90)
    assert {*loaded} == {(plan, 0) for plan in expected} and done.kernels == len(expected)


def test_a_kernel_that_is_chosen_for_another_reason_is_the_same(fake: FakeDriver) -> None:
    facts = plans.short("f16", (32, 32), (16, 16), {})
    plan = plans.forward(facts, 90)
    _jit.load(plan, 0)
    assert _jit.is_loaded(plan._replace(reason="another"), 0)
    assert _jit.load_kernel(plan._replace(reason="another"), 0, 7) == _jit.load_kernel(plan, 0, 7)
    assert kernels()["loaded"] == 1


def test_for_an_architecture_the_cache_is_filled_without_a_gpu(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_driver, "driver", lambda: pytest.fail("asks the driver"))
    ready = cufa.warmup(calls=[SHAPES], arch=["sm_80", "9.0"])
    assert (ready.kernels, ready.compiled, ready.loaded) == (2, 2, 0)
    assert len([*own_cache.rglob("*.cufa")]) == 2
    monkeypatch.setattr(_jit, "_caches", {})
    again = cufa.warmup(calls=[SHAPES], arch="sm_80")
    assert (again.compiled, again.cached) == (0, 1)
    assert re.fullmatch(
        r"1 kernels are ready after \d+\.\d s: 0 compiled, 1 from the cache, 0 from bundles, 0 loaded", str(again)
    )


def test_a_record_is_warmed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "used.jsonl"
    monkeypatch.setattr(_used, "_noted", set())
    monkeypatch.setenv("CUFA_RECORD", str(log))
    facts = plans.short("f16", (32, 32), (16, 16), {})
    _used.note(plans.forward(facts, 90), facts, "attention")
    monkeypatch.delenv("CUFA_RECORD")
    with log.open("a") as file:
        file.write('{"torn')
    with caplog.at_level(logging.WARNING, "cufa"):
        assert cufa.warmup(log=log, arch="sm_80").compiled == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{log}: line 2 is no record of a kernel, or a piece of one; it is skipped."
    ]


def test_calls_that_run_are_recorded(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "used.jsonl"
    monkeypatch.setattr(_used, "_noted", set())
    monkeypatch.setenv("CUFA_RECORD", str(log))
    cufa.warmup(calls=[{**SHAPES, "backward": True}])
    assert not log.exists(), "what is warmed up is not used yet"
    for _ in range(2):
        for call in operations(SHORT, pretend(SHORT)):
            call()
    uses, _ = _used.read(log)
    assert [use.kernel for use in uses] == ["attention_forward_sm80", "attention_backward_sm80"]
    found, _ = selection.plans_used(uses, 90)
    assert all(_jit.is_loaded(plan, 0) for plan in found)


def test_arrays_in_host_memory_need_nothing(fake: FakeDriver) -> None:
    q = np.zeros((1, 16, 2, 64), np.float32)
    assert cufa.warmup(calls=[{"q": q, "k": q, "v": q, "causal": True, "backward": True}]).kernels == 0


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise cufa.CudaError("cufa: there is no driver.")

    monkeypatch.setattr(_driver, "count", none)
    with pytest.raises(cufa.CudaError, match=r"^cufa: there is no driver\. To fill the cache .*: arch='sm_90a'\.$"):
        cufa.warmup(head_dim=64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "warmup: nothing says what for; name a preset, a head_dim, calls, or a log."),
        ({"preset": "inferense"}, ValueError, "there is no preset 'inferense'; "),
        ({"head_dim": 64, "features": ["casual"]}, ValueError, "there is no feature 'casual'; "),
        ({"head_dim": 64, "dtype": 16}, TypeError, "warmup: dtype is 16; pass a string, or a sequence of strings."),
        ({"head_dim": 64, "arch": "ampere"}, ValueError, "warmup: 'ampere' is no architecture; "),
        ({"head_dim": 64, "device": 3}, ValueError, "warmup: there is no GPU 3; this process sees 1."),
        ({"calls": [{**SHAPES, "window": 3}]}, TypeError, "warmup: a call has no argument 'window'."),
        (
            {"calls": [{**SHAPES, "dtype": None}]},
            TypeError,
            "warmup: a call with shapes in place of arrays needs dtype",
        ),
        ({"calls": [{**SHAPES, "k": (2, 16, 3, 32)}]}, ValueError, "attention: v has 1 heads but k has 3; "),
        ({"calls": [{**SHAPES, "deterministic": True}]}, TypeError, "warmup: deterministic is for gradients; "),
        ({"calls": [{**SHAPES, "operation": "decode"}]}, ValueError, "warmup: there is no operation 'decode'; there "),
        ({"calls": [{**STEP, "causal": 1}]}, TypeError, "attention_with_kvcache: causal is a int; "),
        ({"calls": [{**STEP, "backward": True}]}, cufa.UnsupportedError, "attention_with_kvcache: there are no grad"),
        ({"calls": [{**STEP, "cu_seqlens_k": (5,)}]}, TypeError, "warmup: a call has no argument 'cu_seqlens_k'."),
        ({"calls": [{**SHAPES, "q": np.zeros(4)}]}, TypeError, "warmup: k of a call is a shape, and others are arrays"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit, "compile_unit", lambda *_: pytest.fail("compiles"))
    with pytest.raises(error) as caught:
        cufa.warmup(**arguments)
    assert str(caught.value).startswith(message)


def test_a_cache_that_keeps_nothing_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE", "0")
    with pytest.raises(ValueError, match="kernels are not kept on disk"):
        cufa.warmup(calls=[SHAPES], arch="sm_80")


def test_the_first_that_fails_ends_it(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    with pytest.raises(cufa.MissingKernelError, match="CUFA_DISABLE_JIT"):
        cufa.warmup(calls=[SHAPES])


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["arrays", "shapes", "kind"])
def test_a_capture_right_after_warming_up_compiles_nothing(way: str, cold: None, cupy: Any) -> None:
    """Neither is anything loaded within the capture, of the forward or of the gradients."""
    call = Call(
        case=Case(
            batch=2, seqlen_q=80, seqlen_k=80, num_heads_q=4, num_heads_k=2, head_dim=64, head_dim_v=64, dtype="float16"
        )
    )
    arrays, into = call.arrays(cupy), test_contexts.results(call, cupy)
    given = {name: arrays[name] for name in "qkv"}
    if way == "kind":
        cufa.warmup(operation=["attention", "attention_backward"], head_dim=64, dtype="float16")
    elif way == "shapes":
        cufa.warmup(calls=[{**{n: x.shape for n, x in given.items()}, "dtype": "float16", "backward": True}])
    else:
        cufa.warmup(calls=[{**given, "backward": True}])
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cupy.empty(1 << 22)  # memory in the pool for the gradients' workspace
    cupy.cuda.Device().synchronize()
    before = cufa.stats().kernels
    with stream:
        stream.begin_capture()
        try:
            for each in operations(call, arrays, into):
                each()
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    assert cufa.stats().kernels == before
    test_contexts.check(call, into["out"])
    test_contexts.check(call, tuple(into[name] for name in ("dq", "dk", "dv")))
