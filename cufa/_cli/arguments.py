"""Arguments that commands share: architectures, head_dims, shapes, and which calls are meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # which older versions cannot subscript


class Archs(ParamType):
    """Architectures, with commas between them, as compute capabilities: 80 for sm_80, 90 for sm_90a."""

    name = "sm_NN,…"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        from .._bundles.selection import arch_of

        found: dict[int, None] = {}
        for text in filter(None, map(str.strip, value.split(","))):
            arch = arch_of(text)
            if arch is None:
                self.fail(f"{text!r} is no architecture; write sm_80, or sm_80,sm_90a.", param, context)
            found[arch] = None
        if not found:
            self.fail("name an architecture, as sm_90a.", param, context)
        return tuple(found)


class HeadDim(ParamType):
    """``D``, or ``D:DV`` where v has another head_dim than q and k."""

    name = "D[:DV]"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value[0], value[1]
        match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", value, re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no head_dim; write 128, or 192:128 if v has another.", param, context)
        return int(match[1]), int(match[2] or match[1])


class Shape(ParamType):
    """A shape with ``x`` between its extents."""

    name = "BxSxHxD"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if re.fullmatch(r"\d{1,12}(x\d{1,12})*", value.lower(), re.ASCII) is None:
            self.fail(f"{value!r} is no shape; write 2x4096x32x128.", param, context)
        return tuple(map(int, value.lower().split("x")))


class Window(ParamType):
    """``LEFT,RIGHT``; a side that is left empty is unbounded."""

    name = "LEFT,RIGHT"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int | None, int | None]:
        if isinstance(value, tuple):
            return value[0], value[1]
        match = re.fullmatch(r"(\d{0,12}),(\d{0,12})", value, re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no window; write 1024,0, or 1024, if the right side is unbounded.", param, context)
        left, right = (int(side) if side else None for side in match.groups())
        return left, right


def archs_option(text: str) -> Callable[[Command], Command]:
    """``--arch``."""
    return click.option("--arch", "archs", type=Archs(), help=text)


def kinds_options(function: Command) -> Command:
    """The options by which a command is told which calls kernels are for; `plans_of_options` reads them."""
    for option in (
        click.option(
            "--from-log",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="What a program used that ran with CUFA_RECORD=FILE.",
        ),
        click.option(
            "--feature",
            "features",
            multiple=True,
            metavar="NAME",
            help="causal, window, softcap (at 128 at most), large_softcap, alibi, sinks, deterministic, unaligned, "
            "or of caches paged or packed: what the calls have, together.",
        ),
        click.option("--head-dim", "head_dims", multiple=True, type=HeadDim(), help="Of q and k, and of v."),
        click.option("--dtype", "dtypes", multiple=True, metavar="NAME", help="bfloat16, float16 or float32."),
        click.option(
            "--operation",
            "operations",
            multiple=True,
            metavar="NAME",
            help="attention, attention_varlen, attention_backward, attention_varlen_backward, attention_with_kvcache, "
            "decode_plan, merge_states, merge_states_backward or rotary.",
        ),
        click.option(
            "--preset",
            metavar="inference|training|full",
            help="A choice of usual calls, of which the other options leave some.",
        ),
    ):
        function = option(function)
    return function


def plans_of_options(
    archs: tuple[int, ...] | None,
    preset: str | None,
    from_log: Path | None,
    **choice: tuple[Any, ...],
) -> tuple[tuple[int, ...], list[Any]]:
    """The architectures and the plans that the options of `kinds_options` ask for; notices go to stderr."""
    from .._bundles import selection

    if from_log is None:
        try:
            chosen = selection.asked_for(preset=preset, **choice)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        archs = archs or _archs_here()
        return archs, [plan for arch in archs for plan in selection.plans_for(chosen, arch)]
    if preset is not None or any(choice.values()):
        raise click.UsageError("--from-log says what to compile; leave --preset and the others out.")
    from .._compile import used

    uses, notices = used.read(from_log)
    archs = archs or tuple(dict.fromkeys(use.arch for use in uses))
    plans: dict[Any, None] = {}
    for arch in archs:
        found, unknown = selection.plans_used(uses, arch)
        plans |= dict.fromkeys(found)
        notices += unknown
    for notice in dict.fromkeys(notices):
        click.echo(f"cufa: {from_log}: {notice}", err=True)
    if not plans:
        raise ValueError(f"{from_log} names no kernel; run a program with CUFA_RECORD={from_log} first.")
    return archs, list(plans)


def _archs_here() -> tuple[int, ...]:
    """Of this machine's GPUs."""
    from .._driver import driver

    try:
        return tuple(dict.fromkeys(driver.device(ordinal).arch for ordinal in range(driver.count())))
    except Exception as error:
        raise ValueError(f"this machine has no GPU to compile for ({error}); name some by --arch.") from error
