"""``cufa warmup``."""

from __future__ import annotations

from typing import Any

import click

from .arguments import archs_option, kinds_options, plans_of_options


@click.command()
@archs_option("What to compile for, as sm_80,sm_90a; by default this machine's GPUs, or those of the record.")
@kinds_options
@click.option("--jobs", type=click.IntRange(min=1), help="Threads that compile; by default one per core.")
def warmup(archs: tuple[int, ...] | None, jobs: int | None, preset: str | None, **choice: Any) -> None:
    """Put what calls will need into the cache, so that programs of this user find it there.

    No GPU is needed with --arch. Inside a program, cufa.warmup() loads kernels as well.

    \b
        cufa warmup --preset inference
        cufa warmup --operation attention --head-dim 128 --feature causal --arch sm_90a
    """
    from .._bundles.build import cores, supported
    from .._bundles.progress import watched
    from .._bundles.warm import warm
    from .._compile import jit

    archs, plans = plans_of_options(archs, preset, **choice)
    supported(archs)
    if jit.cache().path is None:
        raise ValueError(f"kernels are not kept on disk ({jit.cache().state()}), so that a warm-up leaves nothing.")
    done = warm(
        [(plan, None) for plan in plans],
        jobs or cores(),
        lambda each: watched(each, len(plans), "Warming up"),
    )
    click.echo(f"{done}; they are in {jit.cache().path}")
