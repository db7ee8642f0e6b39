"""The soak: that it agrees with the specification, sees what is wrong, and, on a GPU, a short run of it."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import soak
from gradients import Call

import cufa
from cufa import reference
from cufa.testing import Case, _compare, _gradients


@pytest.fixture(scope="module")
def memory() -> soak.Memory:
    return soak.Memory(np)


def by_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls return the reference's results, rounded to what is stored."""

    def forward(function: Any) -> Any:
        def call(q: Any, k: Any, v: Any, *, return_lse: bool, out: Any = None, **more: Any) -> Any:
            result, lse = function(q, k, v, **more, return_lse=True)
            if out is None:
                return result.astype(q.dtype), lse.astype(np.float32)
            # What is given keeps its rows that are no sequence's.
            starts = np.clip(np.maximum.accumulate(more.get("cu_seqlens_q", [0, len(q)])), 0, len(q))
            own = slice(starts[0], starts[-1])
            out[own] = result[own]
            return out, lse.astype(np.float32)

        return call

    def backward(function: Any) -> Any:
        def call(dout: Any, *, out: Any, lse: Any, deterministic: bool, **more: Any) -> Any:
            into = [more.pop(name, None) for name in ("dq", "dk", "dv")]
            found = function(dout, **more)
            results = [each.astype(more["q"].dtype) for each in found[:3]]
            for given, result in zip(into, results, strict=True):
                if given is not None:
                    given[...] = result
            return (*results, *(each.astype(np.float32) for each in found[3:]))

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(cufa, name, forward(getattr(reference, name)))
        monkeypatch.setattr(cufa, f"{name}_backward", backward(getattr(reference, f"{name}_backward")))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_the_soak_agrees_with_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_specification(monkeypatch)
    modes = tuple(mode for mode in soak.MODES if mode != "long")
    report = soak.soak(soak.Memory(np, any_offsets=True), count=300, seed=3, kernels=150, modes=modes)
    assert report.count == 300 and not report.failures, str(report)


def test_a_soak_of_the_cpu(memory: soak.Memory) -> None:
    modes = tuple(mode for mode in soak.MODES if mode != "long")
    report = soak.soak(memory, count=300, seed=5, kernels=150, modes=modes)
    assert report.count == 300 and not report.failures, str(report)


def dense(seed: int, **changed: Any) -> soak.Problem:
    kind = soak.Kind("bfloat16", 40, 56, False, "causal", False, 0, False, ("contiguous",) * 5, (), True)
    return soak.Problem(kind._replace(**changed), seed, ())


ALIKE = ("broadcast", "contiguous", "contiguous", "contiguous", "broadcast")
"""Query heads that are all the same."""


@pytest.mark.parametrize(
    "features", [{"layouts": ALIKE}, {"softcap": True, "alibi": 1, "mask": "window"}, {"sinks": True}]
)
def test_noise_is_that_of_the_other_tests(memory: soak.Memory, features: dict[str, Any]) -> None:
    problem = dense(9, dtype="float16", **features)
    case = soak.make_case(problem, memory)
    frame = soak.Frame(case, np)
    assert min(case.dout.shape) > 0
    q, k, v = case.arrays["q"], case.arrays["k"], case.arrays["v"]
    options = {"alibi_slopes": None, "sinks": None} | case.options
    options |= {name: case.arrays[name] for name in ("alibi_slopes", "sinks") if name in case.arrays}
    with np.errstate(all="ignore"):
        padded = frame.padded(frame.by_row(q), frame.by_key(k), frame.by_key(v))
        right = soak.exact.forward(padded)
        expected = _compare.expect(_compare.Problem(q, k, v, None, None, None, options), None)
        for one, other in ((right.out, expected.out), (right.out_noise, expected.out_noise)):
            np.testing.assert_allclose(one, frame.by_row(other), rtol=1e-9, atol=1e-12)
        for one, other in ((right.lse, expected.lse), (right.lse_noise, expected.lse_noise)):
            np.testing.assert_allclose(one, frame.by_number(other), rtol=1e-9)
        known = right._replace(lse_noise=np.zeros_like(right.lse_noise))
        dlse = None if case.dlse is None else frame.by_number(case.dlse)
        found = soak.exact.backward(padded, known, frame.by_row(case.dout), dlse)
        wanted = _gradients.expect(case.dout, q, k, v, dlse=case.dlse, **options)
        for one, other in ((found.exact, wanted.exact), (found.noise, wanted.noise)):
            for x, y, by in zip(one, other, (frame.by_row, frame.by_key, frame.by_key), strict=False):
                np.testing.assert_allclose(x, by(y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (20, 5), "softmax_scale": 0.3}], ids=str)
def test_gradients_are_checked_where_they_are(mask: dict[str, Any]) -> None:
    """By the bounds of the other check: what exceeds these is refused by both, and nothing else."""
    sizes: dict[str, Any] = {"seqlen_q": 90, "seqlen_k": 70, "num_heads_q": 6, "num_heads_k": 2}
    case = Case(**sizes, batch=2, head_dim=32, head_dim_v=48, dtype="bfloat16", **mask)
    call = Call(case=case)
    found = call.run()
    call.check_there(found, np)
    for index, (right, noise) in enumerate(zip(*_gradients.expect(**call.given(), **case.options), strict=True)):
        for errors in (7.9, 8.1) if index < 3 else ():
            spoilt = [each.astype(np.float64) for each in found]
            spoilt[index][0, 20, 1, 7] = (right + errors * noise)[0, 20, 1, 7]
            refused = _gradients.gradient_complaint("it", spoilt[index], right, noise) is not None
            assert refused == (errors > 8)
            with pytest.raises(AssertionError) if refused else contextlib.nullcontext():
                call.check_there(tuple(spoilt), np)


def wrong(problem: soak.Problem, memory: soak.Memory) -> set[str]:
    names, found = soak.measure(problem, memory)
    return {name for name, value in zip(names, found, strict=True) if not value <= 1}


NAMES = ("dq", "dk", "dv")


def test_faults_are_seen(memory: soak.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, one wrong element, NaN, and errors everywhere that are too small to be seen in any one element."""
    by_the_specification(monkeypatch)
    problem = dense(4, sinks=True)
    assert wrong(problem, memory) == set()
    right, right_backward = cufa.attention, cufa.attention_backward
    monkeypatch.setattr(cufa, "attention", lambda *a, **b: tuple(0 * x for x in right(*a, **b)))
    assert {"out", "lse"} <= wrong(problem, memory)
    monkeypatch.setattr(cufa, "attention", right)
    monkeypatch.setattr(cufa, "attention_backward", lambda *a, **b: tuple(0 * x for x in right_backward(*a, **b)))
    assert wrong(problem, memory) == {*NAMES, "dsinks"}

    def near(*arguments: Any, **options: Any) -> Any:
        out, lse = right(*arguments, **options)
        return (out.astype(np.float32) * 1.012).astype(out.dtype), lse

    monkeypatch.setattr(cufa, "attention", near)
    assert "out" in wrong(problem, memory)

    def off(value: float, index: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            found = [np.array(x, order="C") for x in right_backward(*arguments, **options)]
            found[index].ravel()[17] = value
            return tuple(found)

        return call

    monkeypatch.setattr(cufa, "attention", right)
    for index, name in enumerate(NAMES):
        for value in (40.0, np.nan, np.inf):
            monkeypatch.setattr(cufa, "attention_backward", off(value, index))
            assert wrong(problem, memory) == {name}


def test_what_must_be_nan_and_what_must_not(memory: soak.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_specification(monkeypatch)
    modes = ("poison", "infinite", "garbage")
    problems = [dense(seed, mask="window")._replace(modes=modes) for seed in range(60)]
    strange = [[each for each in problems if soak.begin(each)[-1].name == name] for name in ("poison", "infinite")]
    assert min(map(len, strange)) > 2

    def all_wrong(problems: list[soak.Problem]) -> set[str]:
        return set().union(*(wrong(problem, memory) for problem in problems))

    def finite(right: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return tuple(np.nan_to_num(x.astype(np.float32)).astype(x.dtype) for x in right(*arguments, **options))

        return call

    assert all_wrong(problems) == set()
    right = cufa.attention
    monkeypatch.setattr(cufa, "attention", finite(right))
    assert all("out" in all_wrong(each) for each in strange)
    monkeypatch.setattr(cufa, "attention", right)
    monkeypatch.setattr(cufa, "attention_backward", finite(cufa.attention_backward))
    assert all(all_wrong(each) == set(NAMES) for each in strange)


def test_memory_around_results_is_looked_at(memory: soak.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_specification(monkeypatch)
    problem = dense(4, layouts=("contiguous",) * 3 + ("wide8", "contiguous"), results=("padded", "wide16", "wide64"))
    problem = problem._replace(kind=problem.kind._replace(head_dim=20, head_dim_v=20))
    assert wrong(problem, memory) == set()
    right = cufa.attention

    def beyond(*arguments: Any, out: Any, **options: Any) -> Any:
        found = right(*arguments, out=out, **options)
        wide = np.lib.stride_tricks.as_strided(out, (*out.shape[:-1], out.shape[-1] + 1), out.strides)
        wide[..., -1] = 0
        return found

    monkeypatch.setattr(cufa, "attention", beyond)
    assert wrong(problem, memory) == {"memory around out"}


def test_a_failure_can_be_repeated(memory: soak.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(cufa, "attention", fails)
    monkeypatch.setattr(cufa, "attention_varlen", lambda *a, **b: (np.zeros(0), np.zeros(0)))
    report = soak.soak(memory, count=12, seed=0, kernels=6, modes=())
    assert report.count == 12 and len(report.failures) == 12
    assert "raises RuntimeError: no such thing" in str(report)
    for failure in report.failures:
        repeated = eval(failure.problem, vars(soak))
        assert str(repeated) == failure.problem
    monkeypatch.undo()
    assert "out: " in soak.tell(repeated, memory)


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 9))
def test_soak(seed: int) -> None:
    """Few kernels at a time: a soak compiles all of its own before it begins."""
    cupy = pytest.importorskip("cupy")
    report = soak.soak(soak.Memory(cupy), count=38, seed=seed, kernels=5)
    assert report.count == 38 and not report.failures, str(report)


@pytest.mark.gpu
def test_the_kernels_agree() -> None:
    cupy = pytest.importorskip("cupy")
    if int(cupy.cuda.Device().compute_capability) // 10 != 9:
        pytest.skip("needs an sm_90 GPU: others have one kernel")
    modes = ("long", "wide")
    report = soak.soak(soak.Memory(cupy), count=100, seed=1, kernels=24, modes=modes, check=soak.agreement)
    assert report.count == 100 and not report.failures, str(report)
