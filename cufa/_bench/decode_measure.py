"""Measuring cufa and its peers over caches of keys, case by case, with the same inputs and by turns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..testing import _timing
from .decode_reports import MANY_ROWS, Case, Cost, Measured, Report, cases, host_cases, plan_cases
from .frameworks import Framework, difference
from .measure import MAX_ERROR, Say, captured, host_seconds, say_on_stdout, setting, take_turns
from .peers import Call

READ_BYTES = 2 << 30
"""What is read to measure how fast that goes."""

# --- arrays and what is right -------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The arrays of a case; `pages` is the table on the host."""

    q: Any
    k_cache: Any
    v_cache: Any
    cache_seqlens: Any
    block_table: Any = None
    pages: NDArray[np.int32] | None = None


def inputs(framework: Framework, case: Case, seed: int) -> Inputs:
    """Random arrays. The pages of a shared prefix come first and lie in order, all others are shuffled."""
    lengths = np.array(case.lengths)
    pages = None
    rows: tuple[int, int] = (case.batch, int(lengths.max()))
    if case.page_size:
        shared = case.prefix // case.page_size
        own = -(-lengths // case.page_size) - shared
        ids = shared + np.arange(own.sum())
        if not shared:
            np.random.default_rng(seed).shuffle(ids)
        pages = np.zeros((case.batch, shared + int(own.max())), np.int32)
        pages[:, :shared] = np.arange(shared)
        for row, first, count in zip(pages, np.cumsum(own) - own, own, strict=True):
            row[shared : shared + count] = ids[first : first + count]
        rows = shared + len(ids), case.page_size
    queries = case.batch, case.seqlen_q, case.num_heads_q, case.head_dim
    keys = *rows, case.num_heads_k, case.head_dim
    q, k, v = (
        framework.random(shape, case.dtype, 3 * seed + place) for place, shape in enumerate((queries, keys, keys))
    )
    table = None if pages is None else framework.integers(pages)
    return Inputs(q, k, v, framework.integers(lengths), table, pages)


def right(framework: Framework, case: Case, given: Inputs, index: int) -> Any:
    """What one sequence's rows are in float32, (seqlen_q, num_heads_q, head_dim)."""
    rows, length, heads = case.seqlen_q, case.lengths[index], case.num_heads_k
    if given.pages is None:
        found = [cache[index] for cache in (given.k_cache, given.v_cache)]
    else:
        pages = framework.integers(given.pages[index, : -(-length // case.page_size)])
        found = [cache[pages].reshape(-1, *cache.shape[2:]) for cache in (given.k_cache, given.v_cache)]
    k, v = (framework.float32(each[:length]).swapaxes(0, 1) for each in found)
    q = framework.float32(given.q[index]).reshape(rows, heads, -1, case.head_dim).swapaxes(0, 1)
    scores = q.reshape(heads, -1, case.head_dim) @ k.swapaxes(1, 2) / math.sqrt(case.head_dim)
    if case.causal:
        last = np.repeat(np.arange(length - rows, length), case.num_heads_q // heads)
        hidden = framework.integers(np.arange(length)) > framework.integers(last)[:, None]
        scores = scores - 1e30 * framework.float32(hidden)
    out = framework.softmax(scores) @ v
    return out.reshape(heads, rows, -1, case.head_dim).swapaxes(0, 1).reshape(rows, -1, case.head_dim)


Peer = Callable[[Framework, Case, Inputs], Call]

# --- measuring ----------------------------------------------------------------------------------------


class Kept:
    """A call that keeps what it returned last: in replays of a graph too, whose memory that is."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.result: Any = None

    def __call__(self) -> Any:
        self.result = self.call()
        return self.result


def clock(framework: Framework) -> _timing.Gpu:
    """The framework's clock, whose flush reads: what it writes would have to leave the L2 in the time of a call."""
    other = framework.random((_timing.FLUSH_BYTES // 4,), "float32", 0)
    return framework.clock()._replace(flush=lambda: other.sum())


def read_bandwidth(framework: Framework) -> float:
    """Bytes a second that this GPU reads in a large sum."""
    gpu = clock(framework)
    with gpu.stream:
        array = framework.random((READ_BYTES // 4,), "float32", 1)
        return float(array.nbytes / take_turns({"sum": lambda: array.sum()}, gpu)["sum"])


class Runner:
    """Measures cases one after the other.

    Parameters
    ----------
    framework : Framework
    peers : dict of str to Peer
        Each is given the framework, a case and its arrays, and returns what is measured. An ImportError leaves it out
        for good, a NotImplementedError on this case.
    repeats : int
    say : callable
        Is given a line for every case as soon as it is measured, and for what is left out.
    """

    def __init__(
        self, framework: Framework, peers: Mapping[str, Peer], *, repeats: int = 30, say: Say = say_on_stdout
    ) -> None:
        self.framework, self.peers, self.repeats, self.say = framework, dict(peers), repeats, say
        self.gpu = clock(framework)

    def calls_of(self, case: Case, given: Inputs, peers: dict[str, Peer]) -> dict[str, Kept]:
        """What is to be measured, each called once."""
        calls: dict[str, Kept] = {}
        for name, make in list(peers.items()):
            try:
                call = Kept(make(self.framework, case, given))
                call()
                calls[name] = call
            except ImportError as reason:
                self.say(f"# {name} left out: {reason}")
                del peers[name]
            except NotImplementedError:
                pass
            except Exception as reason:
                self._failed(name, case, reason)
        return calls

    def run(self, case: Case, seed: int = 0) -> dict[str, Measured]:
        """All peers on a case, by turns. Their results are held to what is right, and after the replays again."""
        framework = self.framework
        with self.gpu.stream:
            given = inputs(framework, case, seed)
            chosen = [case.batch - 1] if case.seqlen_q >= MANY_ROWS else sorted({0, case.batch // 2, case.batch - 1})
            expected = [right(framework, case, given, index) for index in chosen]
            calls = self.calls_of(case, given, self.peers)
            errors = {name: self._error(case, name, call, chosen, expected) for name, call in calls.items()}
            runs: dict[str, Call] = {}
            graphs = set()
            for name, call in calls.items():
                if math.isfinite(errors[name]):
                    graph = captured(call, self.gpu, self.say)
                    runs[name] = graph or call
                    graphs |= {name} if graph else set()
            times = take_turns(runs, self.gpu, self.repeats) if runs else {}
            self.gpu.synchronize()
            found = {}
            for name, seconds in times.items():
                error = max(errors[name], self._error(case, name, calls[name], chosen, expected))
                if math.isfinite(error):
                    found[name] = Measured(seconds, error, name in graphs)
        shown = "  ".join(f"{name} {1e6 * each.seconds:.1f}" for name, each in found.items())
        self.say(f"{case}: {shown or 'nothing'} µs")
        return found

    def costs(self, case: Case, makers: dict[str, Peer], on_gpu: bool) -> dict[str, Cost]:
        """What calls in steady state cost the host and, if `on_gpu`, the GPU."""
        with self.gpu.stream:
            calls = self.calls_of(case, inputs(self.framework, case, 0), makers)
            found = {}
            for name, call in calls.items():
                on_the_host = host_seconds(call.call, self.gpu.synchronize, calls=4 * self.repeats, batches=10)
                run = captured(call, self.gpu, self.say) if on_gpu else None
                on_the_gpu = take_turns({name: run or call}, self.gpu, self.repeats)[name] if on_gpu else 0.0
                found[name] = Cost(on_the_host, on_the_gpu)
                self.say(f"{case}, {name}: {1e6 * on_the_host:.1f} µs of the host, {1e6 * on_the_gpu:.1f} of the GPU")
        return found

    def _error(self, case: Case, name: str, call: Kept, chosen: Sequence[int], expected: Sequence[Any]) -> float:
        """How far a result is from what is right, relatively; infinite, and said, if that is too far."""
        try:
            out = self.framework.view(call.result)
            if tuple(out.shape) != (case.batch, case.seqlen_q, case.num_heads_q, case.head_dim):
                raise ArithmeticError(f"the result is of shape {tuple(out.shape)}")
            error = difference(self.framework, [out[index] for index in chosen], expected)
            if not error < MAX_ERROR:
                raise ArithmeticError(f"differs by {error:.3g}")
            return error
        except Exception as reason:
            self._failed(name, case, reason)
            return math.inf

    def _failed(self, name: str, case: Case, reason: Exception) -> None:
        self.say(f"# {name} fails on {case}: {type(reason).__name__}: {' '.join(str(reason).split())[:200]}")


def run(
    framework: Framework,
    peers: Mapping[str, Peer],
    plans: Mapping[str, Peer],
    *,
    wanted: re.Pattern[str],
    repeats: int = 30,
    say: Say = say_on_stdout,
    keep: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure the cases whose names `wanted` is found in; `keep` is given the report whenever it has grown.

    What calls cost the host are cases of names that begin with "host, ", and what plans cost of "plan, ".
    """
    read = read_bandwidth(framework)
    conditions = (
        f"{setting(framework)}. Medians of CUDA-graph replays by turns, with the L2 flushed before each by reading (†: "
        f"calls, not captured). A large sum in the same run reads {read / 1e9:.0f} GB/s. "
        "Errors are relative, in the Frobenius norm, to float32. Rate and ratio are of the fastest of cufa's ways."
    )
    report = Report(f"Decoding on {framework.device_name()}", conditions, read, {}, {}, {})
    say(f"# {report.title}, {conditions}")
    runner = Runner(framework, peers, repeats=repeats, say=say)
    for seed, case in enumerate(cases()):
        if wanted.search(str(case)):
            report.results[case] = runner.run(case, seed)
            framework.release()
            keep(report)
    for words, chosen, costs, makers in (
        ("host", host_cases(), report.host, runner.peers),
        ("plan", plan_cases(), report.plans, dict(plans)),
    ):
        for case in chosen:
            if wanted.search(f"{words}, {case}"):
                costs[case] = runner.costs(case, makers, on_gpu=words == "plan")
                framework.release()
                keep(report)
    return report
