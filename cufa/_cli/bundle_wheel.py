"""``cufa bundle wheel``."""

from __future__ import annotations

import click


@click.command()
@click.argument("file", type=click.Path())
@click.option("--name", default="cufa-kernels", show_default=True, help="Of the distribution: cufa-kernels-TEAM.")
@click.option("--version", required=True, help="Of the distribution, such as 1.0.")
@click.option("--out", default=".", show_default=True, type=click.Path(), help="The directory to write it into.")
def wheel(file: str, name: str, version: str, out: str) -> None:
    """Put a bundle into a wheel: where pip installs that, cufa finds the bundle by itself."""
    from .._bundles.wheel import wheel as make

    click.echo(f"wrote {make(file, name, version, out)}")
