"""``cufa dump``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .shapes import call_of_options, shapes_options


@click.command()
@shapes_options
@click.option("--source", "kinds", flag_value="source", multiple=True, help="The generated source, headers in place.")
@click.option("--ptx", "kinds", flag_value="ptx", multiple=True, help="PTX.")
@click.option("--sass", "kinds", flag_value="sass", multiple=True, help="Machine code, read by NVIDIA's cuobjdump.")
@click.option(
    "--resources",
    "kinds",
    flag_value="resources",
    multiple=True,
    help="Registers, spills, threads and shared memory of each function, as JSON.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="A directory to write files to, the headers too."
)
def dump(kinds: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Print the kernel that would serve a call: source, PTX, machine code, and what it takes.

    The call is told by shapes and dtypes, as to cufa explain; with --arch no GPU is needed.

    \b
        cufa dump --q 2x4096x32x128 --causal --arch sm_90a --resources
        cufa dump --q 2x4096x32x128 --causal --arch sm_90a --source --ptx --sass --out kernel/
    """
    from .._compile import files, jit, listing
    from .._operations.call import planned, planned_for

    if not kinds:
        raise click.UsageError("say what to print: --source, --ptx, --sass or --resources.")
    problem, device = call_of_options(**options)
    plan = (planned(problem) if device is None else planned_for(problem, device)).plan
    unit = jit.unit_of(plan)
    compiled = listing.compiled(unit) if {*kinds} - {"source"} else None
    texts: dict[str, str] = {}
    if "source" in kinds:
        texts["kernel.cu"] = unit.source if out is not None else listing.inlined(unit)
    if compiled is not None and "ptx" in kinds:
        texts["kernel.ptx"] = compiled.ptx
    if compiled is not None and "sass" in kinds:
        texts["kernel.sass"] = listing.sass(compiled.cubin)
    if compiled is not None and "resources" in kinds:
        functions = [each._asdict() for each in listing.takes(unit, compiled)]
        told = {"kernel": plan.words(), "target": jit.target_of(unit), "functions": functions}
        texts["resources.json"] = json.dumps(told, indent=2)
    if out is None:
        click.echo("\n".join(text.rstrip("\n") for text in texts.values()))
        return
    headers = dict(unit.headers) if "source" in kinds else {}
    files.save(out, {**headers, **{name: text.encode() for name, text in texts.items()}})
    click.echo(f"{out}: {', '.join(texts)}{' and the headers' if headers else ''} of {plan.words()}")
