"""The layers of cuda_src and of the package, read from their sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cufa import _jit

ROOT = Path(__file__).parents[1]
HEADERS = {name: text.decode() for name, text in _jit.headers().items()}
LAYERS = ("core", "ptx", "tile", "attention")


def includes(name: str) -> list[str]:
    return re.findall(r"^#include (\S+)", HEADERS[name], re.MULTILINE)


def rank(name: str) -> tuple[int, int]:
    """Where a header stands: its directory and, within attention, piece, main loop or kernel."""
    directory, file = name.split("/")
    kernel = re.fullmatch(r"(forward|backward|backward_split)_sm\d+\.cuh", file)
    main_loop = re.fullmatch(r"((backward_)?mainloop|backward_split_\w+)_sm\d+\.cuh", file)
    level = 2 if kernel else 1 if main_loop else 0
    return LAYERS.index(directory), level


@pytest.mark.parametrize("name", HEADERS)
def test_includes_point_one_way(name: str) -> None:
    for include in includes(name):
        assert re.fullmatch(r'"[a-z]+/\w+\.cuh"', include), f"{include} is not quoted and root-relative"
        target = include.strip('"')
        assert target in HEADERS, f"{target} does not exist"
        assert rank(target) <= rank(name), f"{name} includes {target}, which stands above it"


def test_includes_make_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for include in includes(name):
                visit(include.strip('"'), (*path, name))
            done.add(name)

    for name in HEADERS:
        visit(name, ())


@pytest.mark.parametrize("name", HEADERS)
def test_instructions_and_architectures_stay_in_their_place(name: str) -> None:
    code = re.sub(r"//.*", "", HEADERS[name])
    if not name.startswith("ptx/"):
        assert not re.search(r"\basm\b", code)
        if not re.search(r"_sm\d+\.cuh$", name):
            assert not re.search(r"sm_?\d\d", re.sub(r'#include "[^"]*"', "", code), re.IGNORECASE)
    assert "#pragma once" in code
    assert len(code.splitlines()) <= 400
    assert HEADERS[name].startswith("// "), "a header opens with what it is"


def test_every_header_compiles_alone() -> None:
    for name in HEADERS:
        _jit.compile_source(f'#include "{name}"\n', _jit.options_of(80), name)


FRAMEWORKS = {"cupy", "torch", "jax", "numba", "cuda"}


@pytest.mark.parametrize("path", sorted((ROOT / "cufa").rglob("*.py")), ids=lambda path: path.name)
def test_no_module_imports_a_framework(path: Path) -> None:
    if path == ROOT / "cufa" / "interop" / "jax.py":
        return
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not FRAMEWORKS & {name.partition(".")[0] for name in names}
