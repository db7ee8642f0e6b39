"""``cufa bundle build``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .arguments import archs_option, kinds_options, plans_of_options


@click.command()
@archs_option("What to compile for, as sm_80,sm_90a; by default this machine's GPUs, or those of the record.")
@kinds_options
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The bundle; replaced if it is there."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile; by default one per core.")
@click.option(
    "--sign",
    "key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Private key to sign the bundle with.",
)
@click.option("--keep-going", is_flag=True, help="Leave kernels out that do not compile, and say so.")
def build(
    archs: tuple[int, ...] | None,
    out: Path,
    jobs: int | None,
    key: Path | None,
    keep_going: bool,
    preset: str | None,
    **choice: Any,
) -> None:
    """Compile kernels ahead into one file, for machines that shall not compile, or not wait for it.

    No GPU is needed. Say what the kernels are for by a preset, by a record of what a program used, or by the calls
    themselves; lengths of sequences need not be said.

    \b
        cufa bundle build --arch sm_80,sm_90a --preset inference --out kernels.cufa-bundle
        cufa bundle build --arch sm_90a --operation attention --head-dim 128 --feature causal --out kernels.cufa-bundle
        CUFA_RECORD=used.jsonl python -m program; cufa bundle build --from-log used.jsonl --out kernels.cufa-bundle
    """
    from .._bundles import build as building
    from .._bundles.progress import watched

    archs, plans = plans_of_options(archs, preset, **choice)
    building.supported(archs)
    signer = None
    if key is not None:
        from .._compile import signing

        signer = signing.signer_of(key)
    if not out.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {out.absolute().parent}.", param_hint="--out")
    built = building.build(
        plans,
        out,
        archs=archs,
        preset=preset,
        jobs=jobs,
        signer=signer,
        keep_going=keep_going,
        watched=lambda made: watched(made, len(plans), "Compiling"),
    )
    for message in built.failed:
        click.echo(message, err=True)
    kernels = f"{built.kernels} kernel{'s' if built.kernels != 1 else ''}"
    targets = ", ".join(f"sm_{arch}" for arch in archs)
    left_out = f", {len(built.failed)} left out" if built.failed else ""
    click.echo(
        f"{out}: {kernels} for {targets}{left_out}, {built.size / 1e6:.1f} MB, in {built.seconds:.0f} s "
        f"({built.cached} were in the cache)"
    )
    if built.failed:
        raise SystemExit(1)
