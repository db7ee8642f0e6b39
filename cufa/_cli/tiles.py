"""``cufa tiles``."""

from __future__ import annotations

import json
from typing import Any

import click

from .arguments import HeadDim, archs_option
from .shapes import json_option

MASKS: dict[str, tuple[str, ...]] = {"none": (), "causal": ("causal",), "window": ("window",)}
COLUMNS = ("arch", "kernel", "dtype", "head_dim", "mask", "block_m", "block_n", "threads", "smem_bytes", "example")


@click.command()
@archs_option("Architectures, as sm_80,sm_90a; by default all whose tables differ.")
@click.option("--dtype", "dtypes", multiple=True, metavar="NAME", help="By default bfloat16 and float32.")
@click.option("--head-dim", "head_dims", multiple=True, type=HeadDim(), help="By default usual ones.")
@json_option
def tiles(
    archs: tuple[int, ...] | None, dtypes: tuple[str, ...], head_dims: tuple[tuple[int, int], ...], as_json: bool
) -> None:
    """Print the tables of tiles: rows of q and of k that a thread block takes at a time, its threads and shared memory.

    They depend on the kernel, dtype, head_dim and mask, and on lengths: the last column has an example, rows of q and
    of k, for which a tile serves.
    """
    from .._bundles import selection

    rows = [
        dict(zip(COLUMNS, row, strict=True))
        for row in selection.tiles(
            archs or (80, 86, 90, 100, 120),
            dtypes or ("bfloat16", "float32"),
            head_dims or tuple((dim, dim) for dim in (32, 64, 96, 128, 192, 256)),
            MASKS,
        )
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(_table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    titles = ("arch", "kernel", "dtype", "head_dim", "mask", "tile", "threads", "shared memory", "example")
    texts = [
        (
            f"sm_{row['arch']}",
            row["kernel"].removeprefix("attention_"),
            row["dtype"],
            ":".join(map(str, dict.fromkeys(row["head_dim"]))),
            row["mask"],
            f"{row['block_m']} × {row['block_n']}",
            str(row["threads"]),
            f"{row['smem_bytes'] / 1024:g} KB",
            row["example"],
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(titles, *texts, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *texts)
    ]
    return "\n".join(lines)
