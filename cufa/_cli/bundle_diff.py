"""``cufa bundle diff``."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the difference as JSON.")
@click.pass_context
def diff(context: click.Context, first: str, second: str, as_json: bool) -> None:
    """Kernels that one of two bundles has, and those whose machine code differs. Exits with 0 if there are none."""
    from .._bundles import files

    found = files.diff(first, second)
    if as_json:
        names = ("what", "target", "key")
        lists = {
            kind: [{name: getattr(entry, name) for name in names} for entry in getattr(found, kind)]
            for kind in found._fields
        }
        click.echo(json.dumps(lists, indent=2))
    else:
        titles = (f"only in {first}", f"only in {second}", "different")
        for title, entries in zip(titles, found, strict=True):
            for entry in entries:
                click.echo(f"{title}: {entry.what}, built for sm_{entry.target} ({entry.key[:8]}…)")
    context.exit(1 if found else 0)
