"""``cufa explain``."""

from __future__ import annotations

import json
from typing import Any

import click

from .shapes import call_of_options, json_option, shapes_options


@click.command()
@shapes_options
@json_option
def explain(as_json: bool, **options: Any) -> None:
    """Say which kernel would serve a call, why, and what it takes: from shapes and dtypes alone.

    Nothing is computed, and with --arch no GPU is needed. A kernel that is not there yet is compiled, since what it
    takes is known only then.

    \b
        cufa explain --q 2x4096x32x128 --k 2x4096x8x128 --causal --arch sm_90a
        cufa explain --q 8192x16x64 --sequences 12 --dtype float16 --backward --arch sm_80
        cufa explain --q 64x1x32x128 --k-cache 9000x16x8x128 --pages 512 --append --causal --arch sm_90a
    """
    from .._operations.explanation import explained

    problem, device = call_of_options(**options)
    found = explained(problem, device)
    click.echo(json.dumps(_plain(vars(found)), indent=2) if as_json else str(found))


def _plain(value: Any) -> Any:
    """What JSON holds; score terms by name."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)
