"""``cufa bundle uninstall``."""

from __future__ import annotations

import click


@click.command()
@click.argument("name")
def uninstall(name: str) -> None:
    """Remove an installed bundle, by the name of its file."""
    from .._bundles import files

    click.echo(f"removed {files.uninstall(name)}")
