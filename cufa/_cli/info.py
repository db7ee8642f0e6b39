"""``cufa info``."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def info(as_json: bool) -> None:
    """Versions, GPUs, NVRTC, the cache and the environment: what a bug report should hold."""
    from .._api.config import show_config

    if as_json:
        click.echo(json.dumps(show_config("dicts"), indent=2))
    else:
        show_config()
