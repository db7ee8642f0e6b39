"""Measuring cufa and its peers with biases, score functions, dropout and masks: the same inputs, by turns."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .decode_measure import Kept
from .frameworks import Framework, difference, results_of
from .measure import MAX_ERROR, Say, captured, say_on_stdout, setting, take_turns
from .peers import Call
from .reports import is_ours
from .variants_cases import DROPOUT_P, LEARNED, SOFTCAP, Case, pattern_of, sees
from .variants_reports import PLAIN, WORK, Found, Measured, Report

MAX_LEARNED_ERROR = 3 * MAX_ERROR
"""The same of gradients by a bias or a table, which peers add up in 16 bits."""

MAX_NOISE_ERROR = 0.1
"""What dropout may change results by, relatively to what it should: the norms of few heads scatter."""

PAIRS_AT_ONCE = 1 << 26
"""Of queries and keys, in float32: about 2 GB with all that is made of them."""

T = TypeVar("T")

# --- arrays and what is right -------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The arrays of a case; `array` is what its feature reads: a bias, a table, slopes, or the pattern of a mask."""

    q: Any
    k: Any
    v: Any
    dout: Any
    array: Any = None


def inputs(framework: Framework, case: Case, seed: int) -> Inputs:
    """Random arrays."""
    shape = case.batch, case.seqlen, case.num_heads, case.head_dim
    q, k, v, dout = (framework.random(shape, case.dtype, 5 * seed + place) for place in range(4))
    return Inputs(q, k, v, dout, _array(framework, case, 5 * seed + 4))


def _array(framework: Framework, case: Case, seed: int) -> Any:
    square = case.seqlen, case.seqlen
    if case.feature == "bias per head":
        return framework.random((1, case.num_heads, *square), case.dtype, seed)
    if case.feature == "bias per sequence":
        return framework.random((case.batch, 1, *square), case.dtype, seed)
    if case.feature == "relative table":
        return framework.random((case.num_heads, 2 * case.seqlen - 1), "float32", seed)
    if case.feature == "ALiBi":
        return 2.0 ** (-8.0 / case.num_heads * framework.float32(framework.integers(np.arange(1, case.num_heads + 1))))
    pattern = pattern_of(case)
    return None if pattern is None else framework.integers(pattern)


def right(framework: Framework, case: Case, given: Inputs, head: int) -> tuple[Any, ...]:
    """One head's out, dq, dk and dv, (batch, seqlen, head_dim), and the gradient by its learned array, in float32.

    Of dropout it is what is computed without.
    """
    xp, seqlen, scale = framework.xp, case.seqlen, case.head_dim**-0.5
    numbers = framework.integers(np.arange(seqlen))
    step = max(PAIRS_AT_ONCE // seqlen, 1)
    found: list[list[Any]] = [[], [], [], []]
    learned: Any = 0.0
    for index in range(case.batch):
        q, k, v, dout = (framework.float32(each[index, :, head]) for each in given[:4])
        outs, dqs, dk, dv, slices = [], [], 0.0 * k, 0.0 * v, []
        for first in range(0, seqlen, step):
            rows = slice(first, first + step)
            query, key = numbers[rows][:, None], numbers[None]
            scores, slope = _scored(framework, case, given.array, index, head, query, key, rows, scale * q[rows] @ k.T)
            if case.masked or case.causal:
                scores = scores - 1e30 * (1 - framework.float32(sees(case, given.array, query, key)))
            p = framework.softmax(scores)
            dp = dout[rows] @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdims=True))
            if case.feature == "bias per head":
                slices.append(ds)
            if case.feature == "relative table":
                places = (query - key + seqlen - 1).ravel()
                learned = learned + xp.bincount(places, weights=ds.ravel(), minlength=2 * seqlen - 1)
            ds = scale * slope * ds
            outs.append(p @ v)
            dqs.append(ds @ k)
            dk, dv = dk + ds.T @ q[rows], dv + p.T @ dout[rows]
        for results, one in zip(found, (xp.concatenate(outs), xp.concatenate(dqs), dk, dv), strict=True):
            results.append(one)
        if slices:
            learned = learned + xp.concatenate(slices)
    return (*map(xp.stack, found), *([learned] if case.feature in LEARNED else []))


def _scored(
    framework: Framework, case: Case, array: Any, index: int, head: int, query: Any, key: Any, rows: slice, scores: Any
) -> tuple[Any, Any]:
    """What becomes of scores, and the derivative by them."""
    if case.feature == "bias per head":
        return scores + framework.float32(array[0, head, rows]), 1.0
    if case.feature == "bias per sequence":
        return scores + framework.float32(array[index, 0, rows]), 1.0
    if case.feature == "relative table":
        return scores + array[head][query - key + case.seqlen - 1], 1.0
    if case.feature == "ALiBi":
        return scores - array[head] * abs(query - key), 1.0
    if case.feature == "softcap":
        share = framework.xp.tanh(scores / SOFTCAP)
        return SOFTCAP * share, 1 - share * share
    return scores, 1.0


def error_of(framework: Framework, case: Case, results: Sequence[Any], expected: Sequence[Any], head: int) -> float:
    """How far results are from what is right, relatively; ArithmeticError if that is too far.

    Expected is one head, of whose results the first are (batch, seqlen, heads, head_dim), and a fifth has a gradient by
    a learned array. Dropout changes results by noise of a known norm: its rows' second half is held to that, since the
    few keys that first rows see under a causal mask scatter.
    """
    pairs = [(framework.view(each)[:, :, head], one) for each, one in zip(results[:3], expected, strict=False)]
    pairs += [
        (framework.view(each)[head] if case.feature == "relative table" else framework.view(each)[0, head], one)
        for each, one in zip(results[3:], expected[3:], strict=True)
    ]
    for own, one in pairs:
        if tuple(own.shape) != tuple(one.shape):
            raise ArithmeticError(f"a result is of shape {tuple(own.shape)}, not {tuple(one.shape)}")
    if case.feature == "dropout":
        noise = math.sqrt(DROPOUT_P / (1 - DROPOUT_P))
        later = slice(case.seqlen // 2, None)
        apart = [difference(framework, [own[:, later]], [one[:, later]]) / noise - 1 for own, one in pairs]
        errors = [(abs(each), MAX_NOISE_ERROR) for each in apart]
    else:
        errors = [
            (difference(framework, [own], [one]), MAX_ERROR if place < 3 else MAX_LEARNED_ERROR)
            for place, (own, one) in enumerate(pairs)
        ]
    for error, limit in errors:
        if not error < limit:
            raise ArithmeticError(f"differs by {error:.3g}")
    return max(error for error, _ in errors)


# --- measuring ----------------------------------------------------------------------------------------


class Ways(NamedTuple):
    """What a peer does with a case.

    Attributes
    ----------
    forward : callable
        Its result is out.
    backward : callable
        Prepares a call of the gradients.
    capturable : bool
        Whether a CUDA graph may hold that call, where its forward was called outside of one.
    """

    forward: Call
    backward: Callable[[], Call]
    capturable: bool = True


Peer = Callable[[Framework, Case, Inputs], Ways]


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in what runs for longer. Only the main thread can be interrupted so."""
    if seconds is None:
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compile_ahead(chosen: Sequence[Case], ours: Mapping[str, Peer], framework: Framework) -> None:
    """Let cufa compile what cases take side by side: in turn it would take longer than the measurements."""

    def call(case: Case) -> None:
        given = inputs(framework, case, 0)
        for make in ours.values():
            with contextlib.suppress(Exception):  # what fails, fails again where it is told
                ways = make(framework, case, given)
                ways.forward()
                ways.backward()()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(call, chosen))
    framework.release()


class Runner:
    """Measures cases one after the other.

    Parameters
    ----------
    framework : Framework
    peers : dict of str to Peer
        An ImportError leaves one out for good, a NotImplementedError on this case or in this direction.
    repeats : int
    limit : float, optional
        Seconds that a peer may take until its first result in a direction.
    say : callable
        Is given a line for every direction of a case as soon as it is measured, and for what is left out.
    """

    def __init__(
        self,
        framework: Framework,
        peers: Mapping[str, Peer],
        *,
        repeats: int = 30,
        limit: float | None = None,
        say: Say = say_on_stdout,
    ) -> None:
        self.framework, self.peers, self.repeats, self.limit, self.say = framework, dict(peers), repeats, limit, say
        self.gpu = framework.clock()

    def run(self, case: Case, seed: int = 0) -> dict[str, Found]:
        """All peers on a case, by turns, forward and backward. Results are held to what is right, before and after."""
        # autograd computes gradients on the stream of their forward, which has to be the captured one.
        with self.gpu.stream:
            given = inputs(self.framework, case, seed)
            head = case.num_heads - 1
            expected = right(self.framework, case, given, head)
            ways = {}
            for name, make in list(self.peers.items()):
                made = self._tried(name, f"{case}", partial(make, self.framework, case, given))
                if made is not None:
                    ways[name] = made
            wanted = {"forward": expected[:1], "backward": expected[1:]}
            return {direction: self._direction(case, direction, ways, wanted[direction], head) for direction in WORK}

    def _direction(
        self, case: Case, direction: str, ways: Mapping[str, Ways], expected: Sequence[Any], head: int
    ) -> Found:
        words = f"{case}, {direction}"
        calls: dict[str, Kept] = {}
        errors: dict[str, float] = {}
        for name, way in ways.items():
            call = self._tried(name, words, partial(_called, way, direction))
            error = None if call is None else self._error(case, words, name, call, expected, head)
            if call is not None and error is not None:
                calls[name], errors[name] = call, error
        runs: dict[str, Call] = {}
        graphs = set()
        for name, call in calls.items():
            capturable = direction == "forward" or ways[name].capturable
            graph = captured(call, self.gpu, self.say) if capturable else None
            runs[name] = graph or call
            graphs |= {name} if graph else set()
        times = take_turns(runs, self.gpu, self.repeats) if runs else {}
        self.gpu.synchronize()
        found: Found = {}
        for name, seconds in times.items():
            error = self._error(case, words, name, calls[name], expected, head)
            if error is not None:
                found[name] = Measured(seconds, max(error, errors[name]), name in graphs)
        shown = "  ".join(f"{name} {1e3 * each.seconds:.3f}" for name, each in found.items())
        self.say(f"{words}: {shown or 'nothing'} ms")
        return found

    def _error(self, case: Case, words: str, name: str, call: Kept, expected: Sequence[Any], head: int) -> float | None:
        if name == PLAIN:
            return 0.0
        return self._tried(name, words, lambda: error_of(self.framework, case, results_of(call.result), expected, head))

    def _tried(self, name: str, words: str, make: Callable[[], T]) -> T | None:
        """What `make` returns in time, or None; it is said why, and a peer that is not there is left out for good."""
        try:
            with limited(self.limit):
                return make()
        except NotImplementedError:
            pass
        except Exception as reason:
            if isinstance(reason, ImportError) and not is_ours(name):
                self.say(f"# {name} left out: {reason}")
                self.peers.pop(name, None)
                return None
            self.say(f"# {name} fails on {words}: {type(reason).__name__}: {' '.join(str(reason).split())[:200]}")
        return None


def _called(way: Ways, direction: str) -> Kept:
    """A peer's call in a direction, called once."""
    call = Kept(way.forward if direction == "forward" else way.backward())
    call()
    return call


def run(
    framework: Framework,
    peers: Mapping[str, Peer],
    chosen: Sequence[Case],
    *,
    repeats: int = 30,
    seconds: float | None = None,
    limit: float | None = None,
    say: Say = say_on_stdout,
    keep: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure cases; `keep` is given the report whenever it has grown.

    No case is begun more than `seconds` after the first, and no peer may take longer than `limit` to a first result.
    """
    conditions = (
        f"{setting(framework)}. bfloat16, forward / backward, medians of CUDA-graph replays by turns, with the L2 "
        "flushed before each (†: calls, not captured). Sizes are batch × seqlen × heads × head_dim. Work counts pairs "
        "of a query and a key it sees: 4 · head_dim operations each forward, and 2.5 times as many backward. Plain "
        "cufa is the same shape without the feature, causal beside documents and windows. cufa's backward computes the "
        "gradient by every bias, torch's by those (1, h, s, s) alone. Errors are relative, in the Frobenius norm, to "
        "float32; of dropout, that of the noise it makes, to what that should be."
    )
    report = Report(f"Variants on {framework.device_name()}", conditions, {}, {})
    say(f"# {report.title}, {setting(framework)}")
    runner = Runner(framework, peers, repeats=repeats, limit=limit, say=say)
    began = time.monotonic()
    for seed, case in enumerate(chosen):
        if seconds is not None and time.monotonic() - began > seconds:
            say(f"# no time is left for {case}")
            continue
        report.results[case] = runner.run(case, seed)
        framework.release()
        keep(report)
    return report
