"""``cufa bundle install``."""

from __future__ import annotations

import click


@click.command()
@click.argument("file", type=click.Path())
def install(file: str) -> None:
    """Check a bundle and copy it to where this user's programs find it, beside the cache of kernels."""
    from .._bundles import files

    click.echo(f"installed {files.install(file)}")
