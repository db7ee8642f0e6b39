"""The kernels of this source tree beside those of another one, on the rows of the ladder, taking turns call by call.

    python benchmarks/compare.py BASE_TREE [--forward | --backward] [--deterministic] [--beside] [--kernel sm80]
                                 [--only REGEX] [--seconds 1.2] [--limit 0.99]

BASE_TREE is a directory that holds another version of cufa (``git worktree add BASE_TREE COMMIT`` makes one); this tree
itself tells how much the measurement scatters. Both are loaded into one process and compute the same inputs, as CUDA
graphs, with the L2 flushed before each call. A row's ratio is the median, over pairs of neighbouring calls, of base
time over new time: above 1 the new sources are faster. Rows below the limit are measured once more, for longer; if any
stays there, or results differ, the exit status is 1. All kernels are compiled before, side by side.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from cufa._bench.reports import (
    BACKWARD_SEQLENS,
    FORWARD_SEQLENS,
    Row,
    beside_the_ladder,
    geometric_mean,
    ladder,
    markdown,
)

HERE = Path(__file__).resolve().parents[1]
MODULES = (("_api.attention", "_attention"), ("_api.backward", "_backward"), ("_call.problem", "_problem"))
"""Where the functions are, and what tells which arrays have tensor maps: in trees of now, and of before."""
MAX_DIFFERENCE = 0.01
"""What both trees' results may differ by, relatively, in Frobenius' norm."""


def load(tree: Path, name: str) -> SimpleNamespace:
    """The functions of the cufa in a source tree, as a package of another name beside any that is there.

    Its modules import each other relatively, and so find those of their own tree.
    """
    root = tree.resolve() / "cufa"
    if not (root / "__init__.py").is_file():
        raise FileNotFoundError(f"{tree} holds no cufa/__init__.py; pass the root of a source tree.")
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    places = [now if (root / f"{now.replace('.', '/')}.py").is_file() else before for now, before in MODULES]
    modules = [importlib.import_module(f"{name}.{place}") for place in places]
    names = ("attention", "attention_varlen"), ("attention_backward", "attention_varlen_backward")
    functions = {
        function: getattr(module, function) for module, found in zip(modules, names, strict=False) for function in found
    }
    for found, module in list(sys.modules.items()):
        if found.startswith(f"{name}.") and not Path(str(module.__file__)).is_relative_to(root):
            raise ImportError(f"{found} comes from {module.__file__}, not from {root}.")
    return SimpleNamespace(name=name, root=root, problem=modules[2], **functions)


class Job(NamedTuple):
    """A row, forward or backward."""

    row: Row
    backward: bool

    def __str__(self) -> str:
        return f"{'backward' if self.backward else 'forward'} {self.row}"


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """What the command line asks for."""
    beside = beside_the_ladder() if arguments.beside else []
    jobs = []
    if not arguments.backward:
        jobs += [Job(row, False) for row in ladder(FORWARD_SEQLENS) + beside]
    if not arguments.forward:
        rows = ladder(BACKWARD_SEQLENS) + beside
        jobs += [Job(row._replace(deterministic=arguments.deterministic), True) for row in rows]
    return [job for job in jobs if re.search(arguments.only, str(job))]


def call_of(job: Job, cufa: Any, given: tuple[Any, ...], offsets: Any) -> Callable[[], Any]:
    """What is measured: a call of one of the trees."""
    row = job.row
    options: dict[str, Any] = {"causal": row.causal}
    if row.window is not None:
        options["window_size"] = (row.window, None)
    packed = () if offsets is None else (offsets, offsets)
    forward = cufa.attention if offsets is None else cufa.attention_varlen
    q, k, v, dout = given
    if not job.backward:
        return lambda: forward(q, k, v, *packed, **options)
    backward = cufa.attention_backward if offsets is None else cufa.attention_varlen_backward
    out, lse = forward(q, k, v, *packed, return_lse=True, **options)
    options["deterministic"] = row.deterministic
    return lambda: backward(dout, q, k, v, out, lse, *packed, **options)


class Ratio(NamedTuple):
    """Median times, in seconds, and the median of base over new with its standard error."""

    base: float
    new: float
    ratio: float
    error: float
    pairs: int


def ratio_of(base: list[float], new: list[float]) -> Ratio:
    """Of the times of calls that took turns."""
    ratios = [one / other for one, other in zip(base, new, strict=True)]
    ratio = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(each - ratio) for each in ratios)  # that of normal numbers, robustly
    error = 1.2533 * deviation / len(ratios) ** 0.5
    return Ratio(statistics.median(base), statistics.median(new), ratio, error, len(ratios))


def take_turns(calls: tuple[Callable[[], Any], ...], gpu: Any, seconds: float) -> Ratio:
    """Call base and new in turn, in changing order, for about so long.

    Events are looked at only after several turns: the GPU then has work all the time, as the host is ahead of it.
    """
    times: tuple[list[float], list[float]] = ([], [])
    warm_up, group = 3, 8
    until = None
    turn = 0
    while until is None or time.monotonic() < until or len(times[0]) < 20:
        events = []
        for _ in range(group):
            turn += 1
            for index in (0, 1) if turn % 2 else (1, 0):
                gpu.flush()
                start = gpu.record()
                calls[index]()
                events.append((index, start, gpu.record()))
        gpu.synchronize()
        if turn > warm_up * group:
            until = until or time.monotonic() + seconds
            for index, start, stop in events:
                times[index].append(gpu.seconds(start, stop))
    return ratio_of(*times)


def compile_ahead(jobs: list[Job], trees: tuple[Any, ...], inputs: Callable[[Job], Any]) -> None:
    """Compile and load what the jobs take, in both trees; two rows of one kernel are compiled once."""

    def call(task: tuple[Job, Any]) -> str:
        job, tree = task
        try:
            call_of(job, tree, *inputs(job))()
        except Exception as error:
            return f"{tree.name}: {job}: {type(error).__name__}: {error}"
        return ""

    small = [(job, tree) for job in jobs for tree in trees]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        failures = [text for text in pool.map(call, small) if text]
    if failures:
        raise RuntimeError("\n".join(failures))


def compare(
    jobs: list[Job], trees: tuple[Any, Any], arguments: argparse.Namespace
) -> tuple[dict[Job, Ratio], list[Job]]:
    """Measure every job, telling each as it is done; the ratios, and the jobs whose results differ."""
    from cufa._bench.frameworks import Torch, difference, results_of
    from cufa._bench.measure import captured

    framework = Torch()

    def given(job: Job) -> tuple[Any, Any]:
        lengths = job.row.lengths
        return framework.inputs(job.row, jobs.index(job)), None if lengths is None else framework.offsets(lengths)

    began = time.monotonic()
    compile_ahead(jobs, trees, given)
    framework.release()
    print(f"# {framework.device_name()}, compiled in {time.monotonic() - began:.0f} s", flush=True)
    gpu = framework.clock()
    found: dict[Job, Ratio] = {}
    differing = []
    with gpu.stream:
        for index, job in enumerate(jobs):
            arrays, offsets = given(job)
            calls = [call_of(job, tree, arrays, offsets) for tree in trees]
            base, new = (results_of(call()) for call in calls)
            apart = difference(framework, new, base)
            graphs = tuple(captured(call, gpu) or call for call in calls)
            found[job] = take_turns(graphs, gpu, arguments.seconds)
            words = ""
            if found[job].ratio < arguments.limit:
                words = f"  (at first {found[job].ratio:.3f})"
                found[job] = take_turns(graphs, gpu, 3 * arguments.seconds)
            if not apart < MAX_DIFFERENCE:
                words += "  RESULTS DIFFER"
                differing.append(job)
            print(f"[{index + 1}/{len(jobs)}] {job}: {in_words(found[job])}, differ by {apart:.1e}{words}", flush=True)
    return found, differing


def in_words(each: Ratio) -> str:
    return f"base {1e3 * each.base:.4f} ms, new {1e3 * each.new:.4f} ms, {each.ratio:.3f}× ± {each.error:.3f}"


def report(found: dict[Job, Ratio], limit: float) -> str:
    """All ratios as Markdown, and their least and geometric mean, forward and backward."""
    lines = [
        [str(job), f"{1e3 * each.base:.4f}", f"{1e3 * each.new:.4f}", f"{each.ratio:.3f}× ± {each.error:.3f}"]
        for job, each in found.items()
    ]
    text = [*markdown(["row", "base, ms", "new, ms", "base / new"], lines), ""]
    for backward, name in ((False, "forward"), (True, "backward")):
        own = {job: each.ratio for job, each in found.items() if job.backward == backward}
        if own:
            least = min(own, key=lambda job: own[job])
            below = sum(ratio < limit for ratio in own.values())
            text.append(
                f"{name}: geometric mean {geometric_mean(list(own.values())):.3f}×, least {own[least]:.3f}× "
                f"({least.row}), {below} of {len(own)} rows below {limit}."
            )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE_TREE")
    parser.add_argument("--forward", action="store_true", help="nothing but the forward")
    parser.add_argument("--backward", action="store_true", help="nothing but the gradients")
    parser.add_argument("--deterministic", action="store_true", help="deterministic gradients")
    parser.add_argument("--beside", action="store_true", help="also the rows beside the ladder")
    parser.add_argument("--kernel", choices=("best", "sm80"), default="best", help="sm80: the kernel for every GPU")
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument("--seconds", type=float, default=1.2, help="how long a row is measured")
    parser.add_argument("--limit", type=float, default=0.99, help="least ratio that is no failure")
    arguments = parser.parse_args()
    trees = load(arguments.base, "cufa_base"), load(HERE, "cufa_new")
    if arguments.kernel == "sm80":
        for tree in trees:  # it is what serves inputs of which no tensor map can be made
            tree.problem.has_tensor_map = lambda *_: False
    jobs = jobs_of(arguments)
    found, differing = compare(jobs, trees, arguments)
    print(report(found, arguments.limit))
    for job in differing:
        print(f"RESULTS DIFFER: {job}")
    sys.exit(bool(differing) or any(each.ratio < arguments.limit for each in found.values()))


if __name__ == "__main__":
    main()
