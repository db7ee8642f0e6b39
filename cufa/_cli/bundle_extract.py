"""``cufa bundle extract``."""

from __future__ import annotations

import click


@click.command()
@click.argument("file", type=click.Path())
@click.argument("directory", type=click.Path())
def extract(file: str, directory: str) -> None:
    """Write the cubins of FILE, each of which is checked, and its manifest into a new or empty DIRECTORY.

    What cuobjdump and nvdisasm read are such files.
    """
    from .._bundles import files

    written = files.extract(file, directory)
    click.echo(f"wrote {files.number_of(len(written) - 1)} and {written[-1].name} to {directory}")
