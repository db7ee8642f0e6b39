"""``cufa bundle list``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


@click.command()
@click.argument("file", type=click.Path(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list(file: str | None, as_json: bool) -> None:
    """The kernels of FILE, or without it the bundles that this machine finds, in the order in which they are asked."""
    rows = _bundles() if file is None else _kernels(file)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        click.echo("\n".join(_table(rows)))
    else:
        click.echo(
            "No bundle is here: CUFA_BUNDLE_PATH names none, and none is installed." if file is None else "Empty."
        )


def _kernels(file: str) -> Sequence[dict[str, Any]]:
    from .._compile.bundle import open_bundle

    names = ("what", "target", "size", "registers", "spill_bytes", "key")
    with open_bundle(file) as bundle:
        return [{name: getattr(entry, name) for name in names} for entry in bundle.manifest.entries]


def _bundles() -> Sequence[dict[str, Any]]:
    import logging

    from .._compile import lookup

    logger = logging.getLogger("cufa")
    before = logger.level
    logger.setLevel(logging.ERROR)  # what is wrong with one is in the list
    try:
        places = lookup.bundles().places
        bundles = [place.bundle() for place in places]
    finally:
        logger.setLevel(before)
    rows = []
    for place, bundle in zip(places, bundles, strict=True):
        kernels = None if bundle is None else len(bundle.manifest.entries)
        targets = None if bundle is None else [f"sm_{target}" for target in bundle.manifest.targets]
        row = {"file": str(place.path), "from": place.origin, "kernels": kernels, "targets": targets}
        rows.append(row | {"unused": place.trouble})
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Sequence[str]:
    """Rows in columns, numbers at the right."""
    shown = [[*rows[0]], *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    right = [isinstance(value, int) for value in rows[0].values()]
    lines = []
    for cells in shown:
        padded = zip(cells, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if left else cell.ljust(width) for cell, width, left in padded))
    return [line.rstrip() for line in lines]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, (str, int)) else ", ".join(value)
