"""The kernels that are compared between versions of the sources: every family, with the edges of its tables.

    python tests/matrix.py                            their translation units and the headers, as JSON
    python tests/matrix.py --compile DIRECTORY < LABELS    compile those whose labels come in, as JSON, to DIRECTORY

``compare_sass.py`` runs this in two source trees, each with its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import plans

from cufa._call.problem import Static
from cufa._compile import jit as _jit
from cufa._kernels import Plan


def kernels() -> Iterator[tuple[str, Plan]]:
    """Each kernel, by a label that says what is asked for and not what serves it."""
    for element, features, arch, head_dims in itertools.product(
        ("bf16", "f32"), plans.FEATURES, plans.ARCHS, plans.HEAD_DIMS
    ):
        facts = plans.static(element, *head_dims, **plans.FEATURES[features])
        yield f"forward {element} {features} sm_{arch} {head_dims}", plans.forward(facts, arch)
    for element, features, arch, head_dims in itertools.product(
        ("f16", "f32"), plans.BACKWARD, plans.ARCHS, plans.HEAD_DIMS
    ):
        facts = plans.static(element, *head_dims, **plans.BACKWARD[features])
        for deterministic, average_rows in ((False, 128), (True, 16)):
            plan = plans.backward(facts, arch, deterministic, average_rows)
            yield f"backward {element} {features} sm_{arch} {head_dims} {deterministic} {average_rows}", plan
    for tile, head_dims in itertools.product(plans.SHORT_TILES, ((64, 64), (128, 40))):
        for element, features in (("f16", "plain"), ("bf16", "everything"), ("bf16", "elementwise")):
            forward = plans.short(element, head_dims, tile, plans.FEATURES[features])
            backward = plans.short(element, head_dims, tile, plans.BACKWARD[features])
            yield f"forward {element} {features} short {tile} {head_dims}", plans.forward(forward, 90)
            yield (
                f"backward {element} {features} short {tile} {head_dims}",
                plans.backward(backward, 90, True),
            )
    for element, features, arch, (rows, head_dims) in itertools.product(
        ("bf16", "f32"),
        plans.FEW_ROWS,
        plans.ARCHS,
        ((16, (128, 128)), (32, (64, 64)), (64, (40, 57)), (16, (256, 256))),
    ):
        facts = plans.few(element, head_dims, rows, plans.FEW_ROWS[features])
        yield f"forward {element} {features} few {rows} sm_{arch} {head_dims}", plans.forward(facts, arch)
    for mask, head_dim in itertools.product(("none", "causal", "window"), (64, 128, 192, 256)):
        plain: Static = plans.static("bf16", head_dim, head_dim, mask=mask)
        changes: dict[str, dict[str, bool]] = {"chains": {"chains": True}, "empty": {"empty_rows": True}}
        for name, change in (changes | {"no maps": {"tma": False}}).items():
            yield f"forward {name} {mask} {head_dim}", plans.forward(plain._replace(**change), 90)
    for arch in plans.ARCHS:
        yield f"align sm_{arch}", plans.aligned(arch)


def compile_to(path: str, label: str) -> None:
    plan = dict(kernels())[label]
    Path(path).write_bytes(plans.compile_plan(plan).cubin)


def path_of(directory: Path, label: str) -> Path:
    """Where the cubin of a label is put."""
    return directory / f"{re.sub(r'[^a-z0-9_]+', '-', label.lower())}.cubin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=Path)
    directory = parser.parse_args().compile
    if directory is None:
        units = {label: [_jit.unit_of(plan).source, _jit.target_of(_jit.unit_of(plan))] for label, plan in kernels()}
        json.dump(
            {"units": units, "headers": {name: text.decode() for name, text in _jit.headers().items()}}, sys.stdout
        )
        return
    labels = json.load(sys.stdin)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_to, [str(path_of(directory, label)) for label in labels], labels))


if __name__ == "__main__":
    main()
