"""``cufa learn``."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .._bundles.selection import arch_of
from ..errors import CompileError

if TYPE_CHECKING:
    from ..learn.ladder import Measured, Rung, Size

TENSOR_FLOPS = {80: 2048, 90: 4096}
"""Multiplications and additions of 16-bit elements that an SM's tensor cores do in a clock, by compute capability."""

FLOAT_FLOPS = {80: 128, 90: 256}
"""The same of its floating-point units, in float32."""


class Failed(NamedTuple):
    """A rung that was not measured, and why; `wrong` if that is cufa's own fault, and not of what it needs."""

    name: str
    why: str
    wrong: bool


@click.command()
@click.option("--rung", "names", multiple=True, metavar="NAME", help="Only this one, as r07. Can be repeated.")
@click.option(
    "--head-dim",
    "head_dims",
    multiple=True,
    type=click.Choice(["64", "128"]),
    help="By default both, and 64 in NumPy.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of the CUDA rungs; those in NumPy take float32.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seqlen", type=click.IntRange(1), help="By default 4096 on a GPU, and 256 in NumPy.")
@click.option("--heads", type=click.IntRange(1), help="By default 16 on a GPU, and 2 in NumPy.")
@click.option("--causal", is_flag=True, help="With a causal mask.")
@click.option("--seconds", type=click.FloatRange(0.001, 600), default=0.5, show_default=True, help="To measure a rung.")
@click.option(
    "--arch",
    default="sm_90",
    show_default=True,
    help="What to compile for, where kernels cannot run, but for r13, which is for sm_90 alone.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="A directory for ladder.md, and a plot.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def learn(
    names: tuple[str, ...],
    head_dims: tuple[str, ...],
    dtype: str,
    batch: int,
    seqlen: int | None,
    heads: int | None,
    causal: bool,
    seconds: float,
    arch: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run the ladder from ten lines of NumPy to a kernel for Hopper: check every rung, and measure it.

    A rung is the same attention once more, in a file of its own in cufa/learn that explains it. Those in CUDA that
    cannot run here are compiled, which says much of them, too.

    \b
        cufa learn
        cufa learn --rung r12 --rung r13 --head-dim 128 --causal
        cufa learn --out ladder/
    """
    from ..learn import ladder

    rungs = list(dict.fromkeys(ladder.rung(name) for name in names)) or list(ladder.RUNGS)
    widths = [*dict.fromkeys(map(int, head_dims))]
    sizes = [ladder.Size(batch, seqlen or 4096, heads or 16, width, dtype, causal) for width in widths or (64, 128)]
    cpu_sizes = [ladder.Size(batch, seqlen or 256, heads or 2, width, "float32", causal) for width in widths or (64,)]
    if math.isnan(seconds):
        raise click.BadParameter("it is not a number.", param_hint="--seconds")
    if (arch_of(arch) or 0) < 80:
        raise click.BadParameter(f"{arch!r} is not sm_80, or newer.", param_hint="--arch")
    if out is not None:  # before anything is measured that could not be written
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    running, other, left_out = [], [], []
    for each in rungs:
        reason = ladder.why_not(each)
        if not reason:
            running.append(each)
        elif each.needs in ("cuda", "sm_90"):
            other.append(each)
        else:
            left_out.append({"rung": each.name, "why": reason})
    if other and (reason := _why_not_compiled()):
        left_out += [{"rung": each.name, "why": reason} for each in other]
        other = []
    compiled = [_compiled(each, arch, size) for each in other for size in sizes]
    in_numpy = [each for each in running if each.needs == "numpy"]
    on_cpu = {size: [_said(each, size, seconds) for each in in_numpy] for size in cpu_sizes if in_numpy}
    of_gpu = [each for each in running if each.needs != "numpy"]
    on_gpu = {size: _on_gpu(of_gpu, size, seconds) for size in sizes if of_gpu}
    found: dict[str, Any] = {
        "cpu": [_row(each, size) for size, rows in on_cpu.items() for each in _measured(rows)],
        "gpu": [_row(each, size) for size, rows in on_gpu.items() for each in _measured(rows)],
        "compiled": compiled,
        "left out": left_out,
    }
    tables = [*on_cpu.items(), *on_gpu.items()]
    failed = [(each, size) for size, rows in tables for each in rows if isinstance(each, Failed)]
    if failed:
        found["failed"] = [{"rung": each.name, "why": each.why, "size": size._asdict()} for each, size in failed]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    text = _text(on_cpu, on_gpu, compiled, left_out)
    if out is not None:
        plotted = bool(on_gpu) and _plot({size: _measured(rows) for size, rows in on_gpu.items()}, out / "roofline.svg")
        image = "\n![What each rung does, beside what the GPU could](roofline.svg)\n" if plotted else ""
        (out / "ladder.md").write_text(f"{text}{image}", encoding="utf-8")
        (out / "ladder.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if on_gpu and not plotted:
            click.echo("cufa: there is no plot, since matplotlib is not installed.", err=True)
    if not as_json:
        click.echo(text, nl=False)
    if wrong := [each for each, _ in failed if each.wrong]:
        raise click.ClickException("\n".join(dict.fromkeys(f"{each.name} {each.why}" for each in wrong)))


def _why_not_compiled() -> str:
    """Why kernels cannot be compiled here; empty if they can."""
    from .._compile import jit as _compiler

    try:
        _compiler.nvrtc()
    except CompileError as error:
        return " ".join(str(error).split()).removeprefix("cufa: ").removesuffix(".")
    return ""


def _measured(rows: Sequence[Measured | Failed]) -> list[Measured]:
    return [each for each in rows if not isinstance(each, Failed)]


def _on_gpu(rungs: list[Rung], size: Size, seconds: float) -> list[Measured | Failed]:
    from ..learn import ladder

    found = [_said(each, size, seconds) for each in rungs]
    cuda = [each for each in rungs if each.needs in ("cuda", "sm_90")]
    if cuda:
        click.echo(f"cufa.attention, head_dim {size.head_dim} ...", err=True)
        found.append(ladder.measure_cufa(size, ladder.framework_of(cuda[0]), seconds=seconds))
    return found


def _said(rung: Rung, size: Size, seconds: float) -> Measured | Failed:
    """What is measured of a rung, or why it is not: the others go on.

    A rung in NumPy or CUDA can be somebody's who has changed it; those in Numba and Triton need compilers of others.
    """
    from ..learn import ladder

    click.echo(f"{rung.name}, head_dim {size.head_dim} ...", err=True)
    try:
        return ladder.measure(rung, size, seconds=seconds)
    except MemoryError as error:
        return Failed(rung.name, f"does not fit the memory: {error}", False)
    except AssertionError as error:
        return Failed(rung.name, f"is wrong: {error}", rung.needs in OWN)
    except Exception as error:  # whatever a compiler, or its import, meets in its environment
        return Failed(rung.name, f"cannot run: {type(error).__name__}: {error}", rung.needs in OWN)


def _compiled(rung: Rung, arch: str, size: Size) -> dict[str, Any]:
    """What a kernel takes, or why it is not compiled for an architecture."""
    from ..learn import host

    found: dict[str, Any] = {"rung": rung.name, "title": rung.title, "head_dim": size.head_dim}
    module = rung.load()
    target = "sm_90" if rung.needs == "sm_90" else arch
    taken = host.kernel(rung.name, size.dtype, size.head_dim).compile(target)
    shared = getattr(module, "shared_bytes", lambda head_dim: 0)(size.head_dim)
    return found | {
        "arch": taken.arch,
        "registers": taken.registers,
        "shared_bytes": taken.shared_bytes + shared,
        "spill_bytes": taken.spill_bytes,
        "instructions": taken.instructions,
    }


OWN = ("numpy", "cuda", "sm_90")
"""What rungs of cufa's own need."""


def _row(measured: Measured, size: Size) -> dict[str, Any]:
    return {**measured._asdict(), "tflops": measured.tflops, "size": size._asdict()}


def _text(
    on_cpu: Mapping[Size, Sequence[Measured | Failed]],
    on_gpu: Mapping[Size, Sequence[Measured | Failed]],
    compiled: list[dict[str, Any]],
    left_out: list[dict[str, str]],
) -> str:
    """The tables, in Markdown."""
    parts = []
    for size, rows in on_cpu.items():
        parts.append(f"In NumPy, on the CPU, {_described(size)}:\n\n{_table(rows, 1e3, 'GFLOP/s')}")
    if on_cpu:
        parts.append(
            "NumPy multiplies whole matrices best, and at this size they stay in a CPU's caches.\n"
            "What the rungs save is memory traffic, which cufa.learn.counting counts.\n"
        )
    for size, rows in on_gpu.items():
        parts.append(f"On {_gpu_name()}, {_described(size)}:\n\n{_table(rows, 1, 'TFLOP/s')}")
    if compiled:
        lines = [
            (
                f"{each['rung']}: {each['title']}",
                str(each["head_dim"]),
                each["arch"],
                *("–" if each[name] is None else f"{each[name]:,}" for name in _TAKEN),
            )
            for each in compiled
        ]
        heads = ("rung", "head_dim", "for", "registers", "shared bytes", "spilled bytes", "instructions")
        parts.append(f"Compiled, since they cannot run here:\n\n{_markdown(heads, lines)}")
        if any(each["instructions"] is None for each in compiled):
            tools = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
            parts.append(f"Instructions are counted where cuobjdump and nvdisasm are: {tools}\n")
    for why in dict.fromkeys(each["why"] for each in left_out):
        names = [each["rung"] for each in left_out if each["why"] == why]
        parts.append(f"Left out: {', '.join(names)}; {why}.\n")
    return "\n".join(parts)


def _described(size: Size) -> str:
    what = f"head_dim {size.head_dim}, batch {size.batch}, {size.seqlen} queries and keys, {size.heads} heads"
    return f"{what}, {size.dtype}{', causal' if size.causal else ''}"


_TAKEN = ("registers", "shared_bytes", "spill_bytes", "instructions")


def _table(rows: Sequence[Measured | Failed], factor: float, unit: str) -> str:
    """A row for each rung, and below it what keeps those that were not measured from running."""

    def column(cell: Callable[[Measured], str]) -> list[str]:
        return ["–" if isinstance(each, Failed) else cell(each) for each in rows]

    def asked_for(each: Measured) -> str:
        return "–" if each.bytes_asked_for is None else f"{each.bytes_asked_for / 1e6:,.1f}"

    columns = {
        "rung": [each.name if isinstance(each, Failed) else f"{each.name}: {each.title}" for each in rows],
        "time, ms": column(lambda each: f"{each.seconds * 1e3:.4g}"),
        "MB asked for": column(asked_for),
        unit: column(lambda each: f"{each.tflops * factor:.3g}"),
        "times the one before": ["", *(_factor(a, b) for a, b in pairwise(rows))],
        "largest error": column(lambda each: f"{each.error:.1e}"),
    }
    if all(each.bytes_asked_for is None for each in _measured(rows)):
        del columns["MB asked for"]
    below = [f"\n{each.name} {' '.join(each.why.split())}\n" for each in rows if isinstance(each, Failed)]
    return _markdown([*columns], [*zip(*columns.values(), strict=True)]) + "".join(below)


def _factor(before: Measured | Failed, after: Measured | Failed) -> str:
    """How much faster a rung is than the one before, if they are of one ladder: Triton's is not below CUDA's first."""
    if isinstance(before, Failed) or isinstance(after, Failed):
        return ""
    same = before.name[0] == after.name[0] or after.name == "cufa.attention"
    return f"{after.tflops / before.tflops:.2f}" if same else ""


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as what they hold; all but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    return "\n".join([line(heads), f"|{rule}|", *map(line, lines)]) + "\n"


def _gpu_name() -> str:
    from .._driver import driver as _driver

    name = _driver.call("cuDeviceGetName", 128, _driver.call("cuDeviceGet", _driver.current_ordinal() or 0))
    return str(bytes(name).split(b"\0")[0].decode())


def roofs() -> dict[str, float]:
    """What the current GPU could do at most: bytes from memory in a second, and operations, by their units' names."""
    from .._driver import driver as _driver

    ordinal = _driver.current_ordinal() or 0
    attribute, handle = _driver.driver().CUdevice_attribute, _driver.call("cuDeviceGet", ordinal)
    clock, memory_clock, width = (
        int(_driver.call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))
        for name in ("CLOCK_RATE", "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH")
    )
    device = _driver.device(ordinal)
    found = {"memory": 2 * memory_clock * 1e3 * width / 8}  # twice a clock, in kHz
    for name, table in (("tensor cores", TENSOR_FLOPS), ("float32", FLOAT_FLOPS)):
        if device.arch in table:
            found[name] = table[device.arch] * device.num_sms * clock * 1e3
    return found


def _plot(on_gpu: Mapping[Size, Sequence[Measured]], path: Path) -> bool:
    """Draw the rungs below the roofs; False if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    draw(on_gpu, roofs(), path)
    return True


def draw(on_gpu: Mapping[Size, Sequence[Measured]], most: dict[str, float], path: Path) -> None:
    """A roofline: operations in a second over operations for each byte asked for, by head_dim."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    shown = [each for rows in on_gpu.values() for each in rows if each.bytes_asked_for]
    intensities = [each.flops / each.bytes_asked_for for each in shown if each.bytes_asked_for] or [1.0]
    ends = [min(intensities) / 4, max(intensities) * 4]
    for name, flops in most.items():
        if name != "memory":
            reached = [min(flops, most["memory"] * x) / 1e12 for x in (ends[0], flops / most["memory"], ends[1])]
            axes.plot([ends[0], flops / most["memory"], ends[1]], reached, color="gray", linewidth=1)
            axes.annotate(name, (ends[1], flops / 1e12), ha="right", va="bottom", color="gray", fontsize=8)
    beside = {"textcoords": "offset points", "color": "gray", "fontsize": 8}
    axes.annotate("memory; caches give more", (ends[0], most["memory"] * ends[0] / 1e12), xytext=(14, -6), **beside)
    ways = (("o", "right", 4), ("s", "left", 90))
    for (marker, side, column), (size, rows) in zip(ways, on_gpu.items(), strict=False):
        points = [(each.flops / each.bytes_asked_for, each) for each in rows if each.bytes_asked_for]
        (series,) = axes.plot(
            [x for x, _ in points], [each.tflops for _, each in points], marker, label=f"head_dim {size.head_dim}"
        )
        for x, each in points:
            place = {"xytext": (-6 if side == "right" else 6, -3), "ha": side}
            axes.annotate(each.name[:3], (x, each.tflops), textcoords="offset points", fontsize=8, **place)
        for each in rows:
            if not each.bytes_asked_for:  # cufa's, whose bytes depend on its tile, and those in Python
                axes.axhline(each.tflops, color=series.get_color(), linestyle=":", linewidth=1)
                text = {**beside, "color": series.get_color()}
                axes.annotate(each.name, (ends[0], each.tflops), xytext=(column, 2), **text)
    axes.set(xscale="log", yscale="log", xlim=ends)
    axes.set(xlabel="FLOP per byte asked for", ylabel="TFLOP/s")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
