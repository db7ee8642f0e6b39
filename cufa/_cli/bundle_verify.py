"""``cufa bundle verify``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .._bundles.files import Verified


@click.command()
@click.argument("file", type=click.Path())
@click.option("--arch", "archs", multiple=True, help="Ask for GPUs that are not here: sm_80,sm_90a. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def verify(context: click.Context, file: str, archs: tuple[str, ...], as_json: bool) -> None:
    """Check every kernel of a bundle, and say whether it serves the GPUs of this machine, or others.

    Exits with 0 if all is well and every GPU that was asked for is served, and with 1 otherwise.
    """
    from .._bundles import files

    try:
        asked = sorted({files.arch_of(arch) for each in archs for arch in each.split(",")}) or files.gpus()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--arch") from None
    try:
        found = files.verify(file, asked)
    except (ValueError, OSError) as error:
        if not as_json:
            raise
        click.echo(json.dumps({"file": file, "good": False, "error": str(error).removeprefix("cufa: ")}, indent=2))
        context.exit(1)
    click.echo(json.dumps(_as_dict(found), indent=2) if as_json else "\n".join(_report(found)))
    context.exit(0 if found.good else 1)


def _report(found: Verified) -> list[str]:
    from .._bundles.files import number_of
    from .._compile.bundle import architectures
    from .._compile.cache import human

    manifest = found.bundle.manifest
    lines = [
        f"{found.bundle.path}: {number_of(len(manifest.entries))}, {human(found.size)}, "
        f"{'damaged' if found.damaged else 'whole'}, {'signed' if found.bundle.signature else 'not signed'}",
        f"  made from cufa {manifest.cufa} sources {manifest.sources[:8]}… by NVRTC {', '.join(manifest.nvrtc)} "
        f"for {architectures(manifest.archs)}",
    ]
    lines += [f"  damaged: {each.removeprefix('cufa: ')}" for each in found.damaged]
    lines += [f"  is not used here: {found.unused}"] if found.unused else []
    for arch, kernels, why_not in found.serving:
        lines.append(
            f"  sm_{arch}: " + (f"does not serve: {why_not}" if why_not else f"serves with {number_of(kernels)}")
        )
    return lines if found.serving else [*lines, "  no GPU is here; --arch says whether another is served"]


def _as_dict(found: Verified) -> dict[str, object]:
    manifest = found.bundle.manifest
    return {
        "file": str(found.bundle.path),
        "good": found.good,
        "size": found.size,
        "kernels": len(manifest.entries),
        "signed": found.bundle.signature is not None,
        "damaged": list(found.damaged),
        "unused": found.unused,
        **{name: getattr(manifest, name) for name in ("cufa", "sources", "nvrtc", "archs", "preset")},
        "serving": {f"sm_{each.arch}": {"kernels": each.kernels, "why_not": each.why_not} for each in found.serving},
    }
