"""``cufa bundle merge``."""

from __future__ import annotations

import click


@click.command()
@click.argument("out", type=click.Path())
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--keep-first", is_flag=True, help="Of a kernel that differs between bundles, take that of the first.")
@click.option("--sign", "key", metavar="KEY", type=click.Path(), help="Sign it with an Ed25519 private key in PEM.")
def merge(out: str, files: tuple[str, ...], keep_first: bool, key: str | None) -> None:
    """Write a bundle OUT that holds the kernels of all FILES.

    One FILE and --sign make a signed bundle of it. Signatures of the FILES do not pass over.
    """
    from .._bundles import files as tools
    from .._compile.signing import signer_of

    signer = None if key is None else signer_of(key)
    count = tools.merge(out, files, keep_first=keep_first, signer=signer)
    click.echo(f"wrote {tools.number_of(count)} to {out}")
