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
        click.option("--decode-plan", is_flag=True, help="With --k-cache: the plan of such calls."),
        click.option("--num-splits", type=click.IntRange(0), default=0, help="With --k-cache: as for the call."),
        click.option("--cache-dtype", metavar="NAME", help="With --k-cache: float8_e4m3fn, if it is not that of q."),
        click.option("--rotary-dim", type=click.IntRange(0), default=0, help="With --append: columns that are turned."),
        click.option("--append", is_flag=True, help="With --k-cache: as many new rows as q has."),
        click.option("--pages", type=click.IntRange(min=0), help="The caches are pages, at most so many a sequence."),
        click.option("--v-cache", type=Shape(), help="Of v_cache; by default that of k_cache."),
        click.option("--k-cache", type=Shape(), help="Of k_cache, as 64x8192x8x128: the call is one with caches."),
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
    k_cache: tuple[int, ...] | None,
    v_cache: tuple[int, ...] | None,
    **of_caches: Any,
) -> tuple[Any, Any]:
    """The problem of a call, and what is known of the GPU: None if that is this machine's."""
    from .._call import options as _options
    from .._operations.asked import asked_by
    from .._operations.sketch import OPERATIONS, sketch

    packed = len(q) == 3
    if packed and sequences is None:
        raise click.UsageError("q of three dimensions holds packed sequences; say by --sequences how many.")
    if sequences is not None and not packed:
        raise click.UsageError("--sequences is for packed arrays, whose shapes are TOTALxHxD.")
    if seqused_k and not packed:
        raise click.UsageError("--seqused-k is for packed sequences.")
    if k_cache is None and (v_cache or any(of_caches.values()) or of_caches["pages"] is not None):
        raise click.UsageError("caches are told of without --k-cache, by which the call has some.")
    if k_cache is not None and (k or v or seqused_k or backward):
        raise click.UsageError("--k, --v, --seqused-k and --backward are not for --k-cache.")
    if of_caches["decode_plan"] and (softcap or alibi or sinks or lse or of_caches["rotary_dim"]):
        raise click.UsageError("--decode-plan is the same with and without softcap, alibi, sinks, lse and rotary_dim.")
    if deterministic and not backward:
        raise click.UsageError("--deterministic is for --backward; the forward is deterministic as it is.")
    shapes: dict[str, tuple[int, ...]] = {"q": q, "k": k or q, "v": v or k or q}
    name = f"attention{'_varlen' if packed else ''}{'_backward' if backward else ''}"
    if k_cache is not None:
        name = "decode_plan" if of_caches["decode_plan"] else "attention_with_kvcache"
        shapes = _with_caches(q, k_cache, v_cache or k_cache, sequences, **of_caches)
    heads = q[-2] if len(q) > 1 else 0
    shapes |= {each: (heads,) for each, given in (("alibi_slopes", alibi), ("sinks", sinks)) if given}
    if sequences is not None:
        shapes |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), (sequences + 1,))
        shapes |= {"seqused_k": (sequences,)} if seqused_k else {}
    options = {"causal": causal, "window_size": window, "softcap": softcap, "return_lse": lse}
    options |= {"deterministic": deterministic}
    options |= {name: of_caches[name] for name in ("num_splits", "cache_dtype")}
    operation = OPERATIONS[name]
    _, asked = asked_by(operation, options)
    problem = sketch(operation, shapes, dtype, _options.of(name, asked, operation.owned))
    return problem, device_of(arch, sms)


def _with_caches(
    q: tuple[int, ...],
    k_cache: tuple[int, ...],
    v_cache: tuple[int, ...],
    sequences: int | None,
    *,
    pages: int | None,
    append: bool,
    rotary_dim: int,
    **_: Any,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a call with caches."""
    batch = q[0] if sequences is None else sequences
    shapes: dict[str, tuple[int, ...]] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": (batch,)}
    if pages is not None:
        shapes["block_table"] = (batch, pages)
    if append:
        shapes |= {"k": (*q[:-2], *k_cache[-2:]), "v": (*q[:-2], *v_cache[-2:])}
    if rotary_dim:
        shapes |= dict.fromkeys(("rotary_cos", "rotary_sin"), (1 << 20, rotary_dim // 2))
    return shapes


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
