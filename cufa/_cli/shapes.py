"""The options that tell of one call by shapes and dtypes, without arrays, and the problem that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .arguments import Archs, Command, Shape, Window

NUM_SMS = {80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 110: 20, 120: 170, 121: 48}
"""SMs of a large GPU of each compute capability, for one that is not here."""


def shapes_options(function: Command) -> Command:
    """The options that `call_of_options` reads."""
    for option in (
        click.option("--sms", type=click.IntRange(min=1), help="SMs of that GPU; by default those of a large one."),
        click.option("--arch", type=Archs(), help="The GPU's architecture, as sm_90a; by default this machine's GPU."),
        click.option("--deterministic", is_flag=True, help="With --backward: the same bits in every run."),
        click.option("--backward", is_flag=True, help="The gradients of the call."),
        click.option("--lse", is_flag=True, help="With return_lse."),
        click.option("--seqused-k", is_flag=True, help="With seqused_k."),
        click.option("--sinks", is_flag=True, help="With sinks."),
        click.option("--alibi", is_flag=True, help="With alibi_slopes."),
        click.option("--softcap", type=float, default=0.0, help="Of scores."),
        click.option("--window", type=Window(), help="window_size; a side that is left empty is unbounded."),
        click.option("--causal", is_flag=True, help="A query sees no later key."),
        click.option(
            "--sequences", type=click.IntRange(min=0), help="How many sequences are packed, for shapes TOTALxHxD."
        ),
        click.option("--dtype", default="bfloat16", show_default=True, metavar="NAME", help="Or float16, or float32."),
        click.option("--v", "v", type=Shape(), help="Of v; by default that of k."),
        click.option("--k", "k", type=Shape(), help="Of k; by default that of q."),
        click.option("--q", "q", type=Shape(), required=True, help="Shape of q, as 2x4096x32x128."),
    ):
        function = option(function)
    return function


def call_of_options(
    *,
    q: tuple[int, ...],
    k: tuple[int, ...] | None,
    v: tuple[int, ...] | None,
    dtype: str,
    sequences: int | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    alibi: bool,
    sinks: bool,
    seqused_k: bool,
    lse: bool,
    backward: bool,
    deterministic: bool,
    arch: tuple[int, ...] | None,
    sms: int | None,
) -> tuple[Any, Any]:
    """The problem of a call, and what is known of the GPU: None if that is this machine's."""
    from .._call.options import Options
    from .._operations.sketch import OPERATIONS, sketch

    packed = len(q) == 3
    if packed and sequences is None:
        raise click.UsageError("q of three dimensions holds packed sequences; say by --sequences how many.")
    if sequences is not None and not packed:
        raise click.UsageError("--sequences is for packed arrays, whose shapes are TOTALxHxD.")
    if seqused_k and not packed:
        raise click.UsageError("--seqused-k is for packed sequences.")
    if deterministic and not backward:
        raise click.UsageError("--deterministic is for --backward; the forward is deterministic as it is.")
    k = k or q
    shapes: dict[str, tuple[int, ...]] = {"q": q, "k": k, "v": v or k}
    heads = q[-2] if len(q) > 1 else 0
    shapes |= {name: (heads,) for name, given in (("alibi_slopes", alibi), ("sinks", sinks)) if given}
    if sequences is not None:
        shapes |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (sequences + 1,))
        shapes |= {"seqused_k": (sequences,)} if seqused_k else {}
    operation = OPERATIONS[f"attention{'_varlen' if packed else ''}{'_backward' if backward else ''}"]
    options = Options(causal, window, None, softcap, lse, deterministic)
    device = device_of(arch, sms)
    return sketch(operation, shapes, dtype, options), device


def device_of(arch: tuple[int, ...] | None, sms: int | None) -> Any:
    """What is known of the GPU that is meant; None if it is the first of this machine."""
    from .._driver import driver

    if arch is None:
        if sms is not None:
            raise click.UsageError("--sms goes with --arch.")
        if not driver_finds_gpu():
            raise click.UsageError("this machine has no GPU; name an architecture by --arch.")
        return None
    if len(arch) != 1:
        raise click.UsageError("name one architecture by --arch.")
    known = max((each for each in NUM_SMS if each <= arch[0]), default=80)
    return driver.Device(arch[0], sms or NUM_SMS[known])


def driver_finds_gpu() -> bool:
    """Whether this machine has a GPU, and a driver for it."""
    from .._driver import driver
    from ..errors import CudaError

    try:
        return driver.count() > 0
    except CudaError:
        return False


def json_option(function: Command) -> Command:
    """``--json``."""
    wrap: Callable[[Command], Command] = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
    return wrap(function)
