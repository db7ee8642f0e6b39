"""``cufa bench``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from .._bench.frameworks import Framework
    from .._bench.peers import Peer
    from .._bench.reports import Results, Row

QUICK_SEQLEN = 2048
"""The longest sequence that ``--quick`` measures."""

ALONE = "# torch is not there, or finds no GPU: cufa is measured alone"

OF_THE_LADDER = ("backward", "dtype", "head_dims", "seqlens", "causal", "csv_file")
"""What ``--decode`` and ``--variants`` do not take."""


def _numbers(least: int, most: int) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    """Read numbers between two bounds, with commas between them."""

    def read(context: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a number, or several with commas between them.") from None
        for number in numbers:
            if not least <= number <= most:
                raise click.BadParameter(f"{number} is not from {least} to {most}.")
        return numbers

    return read


def _new_file(context: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that cannot be written before minutes are spent on what it is to hold."""
    if value is not None and (value.is_dir() or not value.absolute().parent.is_dir()):
        raise click.BadParameter(f"{value} cannot be a file: give a name in a directory that exists.")
    return value


def _pattern(context: click.Context, param: click.Parameter, value: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}.") from None


FILE = click.Path(path_type=Path)


@click.command()
@click.option("--backward", is_flag=True, help="Gradients; without it, the forward.")
@click.option("--decode", is_flag=True, help="A few queries over long caches of keys, as in serving.")
@click.option("--variants", is_flag=True, help="Biases, score functions, dropout and masks, forward and backward.")
@click.option("--dtype", type=click.Choice(("bfloat16", "float16", "float32")), default="bfloat16", show_default=True)
@click.option("--head-dim", "head_dims", callback=_numbers(1, 256), metavar="N[,N...]", help="Default: 64,128,256.")
@click.option(
    "--seqlen",
    "seqlens",
    callback=_numbers(1, 1 << 17),
    metavar="N[,N...]",
    help="Default: 512,2048,8192 and, forward, 16384.",
)
@click.option("--causal/--full", default=None, help="One kind of mask; without either, both.")
@click.option("--only", callback=_pattern, default="", metavar="REGEX", help="What a row's name must contain.")
@click.option("--quick", is_flag=True, help=f"Sequences up to {QUICK_SEQLEN}, and fewer calls of each.")
@click.option("--csv", "csv_file", type=FILE, callback=_new_file, help="Write the rows to a file.")
@click.option("--plot", "plot_file", type=FILE, callback=_new_file, help="Draw them, as .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def bench(
    context: click.Context,
    backward: bool,
    decode: bool,
    variants: bool,
    dtype: str,
    head_dims: tuple[int, ...] | None,
    seqlens: tuple[int, ...] | None,
    causal: bool | None,
    only: re.Pattern[str],
    quick: bool,
    csv_file: Path | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Measure cufa on this GPU, beside what else is installed here.

    Peers are torch's scaled_dot_product_attention (its flash, cuDNN and memory-efficient backends), flash-attn,
    FlashAttention-3 (fa3-fwd) and JAX's cuDNN attention. All compute the same inputs, take turns call by call, and are
    held to each other's results. A row holds about 16k tokens of hidden size 2048. Without torch, cufa is measured
    alone, on CuPy's arrays.

    With --decode the cases are those of a server, and rates are bytes of keys and values a second. With --variants
    they are what other attention is made of; FlexAttention, which compiles for long, is measured by
    benchmarks/variants.py alone.
    """
    from .._bench.reports import BACKWARD_SEQLENS, FORWARD_SEQLENS, LADDER_HEAD_DIMS, rungs, write_rows

    if plot_file is not None:
        _check_plot(plot_file)
    if decode and variants:
        raise click.UsageError("--decode and --variants have cases of their own: leave out one of them.")
    if decode or variants:
        _refuse_the_ladder(context, "--decode" if decode else "--variants")
        (_bench_decode if decode else _bench_variants)(only, quick, plot_file, as_json)
        return
    seqlens = seqlens or (BACKWARD_SEQLENS if backward else FORWARD_SEQLENS)
    if quick:
        seqlens = tuple(seqlen for seqlen in seqlens if seqlen <= QUICK_SEQLEN)
        if not seqlens:
            raise click.UsageError(f"--quick measures sequences up to {QUICK_SEQLEN}; leave out --quick or --seqlen.")
    rows = rungs(head_dims or LADDER_HEAD_DIMS, seqlens, (False, True) if causal is None else (causal,))
    rows = [row for row in (row._replace(dtype=dtype) for row in rows) if only.search(str(row))]
    if not rows:
        raise click.UsageError(f"--only: no row's name contains {only.pattern!r}.")
    _check_gpu()

    from .._bench import frameworks, measure

    framework = frameworks.find()
    peers = _peers(framework, backward)
    ceiling = measure.matmul_ceiling(framework)
    conditions = f"{framework.device_name()}, {measure.conditions(framework, ceiling, dtype)}"
    _say(f"# {conditions}")
    measure.compile_ahead(rows, peers["cufa"], framework, backward=backward)
    results, eager = measure.measure(
        rows,
        peers,
        framework,
        backward=backward,
        check_alone=None if backward else measure.check_last_rows,
        repeats=10 if quick else 30,
        say=_say,
    )
    direction = "Backward" if backward else "Forward"
    if csv_file is not None:
        write_rows(results, peers, csv_file)
        _say(f"# wrote {csv_file}")
    if plot_file is not None:
        _plot(results, f"{direction} on {framework.device_name()}, {dtype}", ceiling, plot_file)
        _say(f"# wrote {plot_file}")
    if as_json:
        click.echo(json.dumps(_as_json(direction.lower(), conditions, results, eager), indent=2))
    else:
        click.echo(_as_text(f"# {direction}", conditions, results, peers, eager))
    failed = [str(row) for row, speeds in results.items() if "cufa" not in speeds]
    if failed:
        raise UnsupportedError(f"bench: cufa failed on {', '.join(failed)}; the lines above say how.")


def _refuse_the_ladder(context: click.Context, flag: str) -> None:
    for option in context.command.params:
        name = option.name or ""
        if name in OF_THE_LADDER and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flag} has cases of its own: leave out {option.opts[0]}.")


def _bench_decode(only: re.Pattern[str], quick: bool, plot_file: Path | None, as_json: bool) -> None:
    _check_gpu()

    from .._bench import decode_measure, frameworks
    from .._bench.decode_peers import PEERS, PLANS
    from .._bench.reports import is_ours

    framework = frameworks.find()
    peers, plans = PEERS, PLANS
    if not isinstance(framework, frameworks.Torch):
        _say(ALONE)
        peers, plans = ({name: make for name, make in each.items() if is_ours(name)} for each in (peers, plans))
    report = decode_measure.run(framework, peers, plans, wanted=only, repeats=10 if quick else 30, say=_say)
    failed = [str(case) for case, found in report.results.items() if "cufa" not in found]
    _tell(report, failed, plot_file, as_json)


def _bench_variants(only: re.Pattern[str], quick: bool, plot_file: Path | None, as_json: bool) -> None:
    from .._bench.variants_cases import cases

    chosen = [case for case in cases(quick=quick) if only.search(str(case))]
    if not chosen:
        raise click.UsageError(f"--only: no case's name contains {only.pattern!r}.")
    _check_gpu()

    from .._bench import frameworks, variants_measure
    from .._bench.reports import is_ours
    from .._bench.variants_peers import FLEX, PEERS
    from .._bench.variants_reports import PLAIN

    framework = frameworks.find()
    ours = {name: make for name, make in PEERS.items() if is_ours(name)}
    peers = {name: make for name, make in PEERS.items() if name != FLEX}
    if not isinstance(framework, frameworks.Torch):
        _say(ALONE)
        peers = ours
    variants_measure.compile_ahead(chosen, ours, framework)
    report = variants_measure.run(framework, peers, chosen, repeats=10 if quick else 30, say=_say)
    failed = [
        f"{case}, {direction}"
        for case, directions in report.results.items()
        for direction, found in directions.items()
        if not any(is_ours(name) and name != PLAIN for name in found)
    ]
    _tell(report, failed, plot_file, as_json)


def _tell(report: Any, failed: list[str], plot_file: Path | None, as_json: bool) -> None:
    """Print a report of cases, draw it, and raise if cufa failed on some."""
    if plot_file is not None and (figure := report.figure()) is not None:
        figure.savefig(plot_file, dpi=120)
        _say(f"# wrote {plot_file}")
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else report.markdown())
    if failed:
        raise UnsupportedError(f"bench: cufa failed on {'; '.join(failed)}; the lines above say how.")


def _check_gpu() -> None:
    from .._api.config import is_available

    if not is_available():
        raise UnsupportedError(
            "bench: there is no NVIDIA GPU of compute capability 8.0 or newer here; cufa doctor says what it finds."
        )


def _say(line: str) -> None:
    click.echo(line, err=True)


def _check_plot(path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install matplotlib")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot: {path} does not end in .png, .svg or .pdf.")


def _peers(framework: Framework, backward: bool) -> dict[str, Peer]:
    """Those that are measured in minutes: all but FlexAttention, which compiles for long, or cufa alone."""
    from .._bench.frameworks import Torch
    from .._bench.peers import BACKWARD, FORWARD

    peers = BACKWARD if backward else FORWARD
    if not isinstance(framework, Torch):
        _say(ALONE)
        return {"cufa": peers["cufa"]}
    return {name: make for name, make in peers.items() if name != "FlexAttention"}


def _plot(results: Results, title: str, ceiling: float, path: Path) -> None:
    from .._bench.reports import figure_of

    figure = figure_of(results, None if "float32" in title else ceiling, title)
    figure.savefig(path, dpi=120)


def _as_json(direction: str, conditions: str, results: Results, eager: set[tuple[Row, str]]) -> dict[str, Any]:
    facts = ("head_dim", "seqlen", "batch", "num_heads_q", "num_heads_k", "causal", "dtype")
    rows = [
        {
            **{name: getattr(row, name) for name in facts},
            "tflops": speeds,
            "not_captured": [name for name in speeds if (row, name) in eager],
        }
        for row, speeds in results.items()
    ]
    return {"direction": direction, "conditions": conditions, "rows": rows}


def _as_text(
    title: str, conditions: str, results: Results, peers: Mapping[str, Peer], eager: set[tuple[Row, str]]
) -> str:
    from .._bench.reports import names_in, table

    lines = [title, "", conditions, ""]
    if "cuDNN (JAX)*" in names_in(results, peers):
        lines += ["(*) JAX's stream cannot be captured: the mean of calls in a row, without the flush.", ""]
    if eager:
        lines += ["(†) Not captured: calls, of whose time on the host some may show.", ""]
    return "\n".join([*lines, table(results, peers, eager).rstrip()])
