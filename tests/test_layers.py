"""The layers of cuda_src and of the package, and what their comments point to, read from their sources."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from cufa._compile import jit as _jit

ROOT = Path(__file__).parents[1]
HEADERS = {name: text.decode() for name, text in _jit.headers().items()}
LAYERS = ("core", "ptx", "tile", "attention")


def includes(name: str) -> list[str]:
    return re.findall(r"^#include (\S+)", HEADERS[name], re.MULTILINE)


def rank(name: str) -> tuple[int, int]:
    """Where a header stands: its directory and, within attention, piece, main loop or kernel."""
    directory, file = name.split("/")
    kernel = re.fullmatch(r"(forward|backward)(_split|_cache|_packed|_listed|_cluster(_cache)?)?_sm\d+\.cuh", file)
    main_loop = re.fullmatch(r"((backward_)?mainloop(_split)?|backward_split_\w+)_sm\d+\.cuh", file)
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
    assert len(code.splitlines()) <= 420, "a header this long does several things"
    assert HEADERS[name].startswith("// "), "a header opens with what it is"


def test_every_header_compiles_alone() -> None:
    for name in HEADERS:
        _jit.compile_source(f'#include "{name}"\n', _jit.options_of(80), name)


FRAMEWORKS = {"cupy", "torch", "jax", "numba", "cuda"}
PARTS = {"torch.py": "torch", "interop/torch.py": "torch", "jax.py": "jax"}
FOR_TORCH = ("_states", "_torch", "bert_padding", "layers/rotary", "losses/cross_entropy", "ops/rms_norm")
FOR_TORCH += ("ops/triton/cross_entropy", "ops/triton/rotary")
PARTS |= {f"flash_attn/{name}.py": "torch" for name in FOR_TORCH}
PARTS |= {"xformers.py": "torch", "flax.py": "jax"}
PARTS |= dict.fromkeys(("_transformers/attention.py", "_transformers/masks.py"), "torch")
PARTS |= dict.fromkeys(("interop/jax.py", "interop/folding.py", "interop/dividing.py"), "jax")
PARTS |= dict.fromkeys(("learn/n03_numba_v1.py", "learn/n04_numba_v2.py"), "numba")
"""A framework's own modules, which nothing else imports as soon as it is imported."""


@pytest.mark.parametrize("path", sorted((ROOT / "cufa").rglob("*.py")), ids=lambda path: path.name)
def test_no_module_imports_a_framework(path: Path) -> None:
    others = FRAMEWORKS - {PARTS.get(path.relative_to(ROOT / "cufa").as_posix())}
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not others & {name.partition(".")[0] for name in names}


def cuda_comments(code: str) -> Iterator[str]:
    """Comments of a header; whole lines that follow each other are one."""
    for block in re.findall(r"(?:^ *//.*\n)+|//.*", code, re.MULTILINE):
        yield " ".join(re.sub(r"^ *//", "", block, flags=re.MULTILINE).split())


def python_comments(code: str) -> Iterator[str]:
    """Docstrings and comments of a module; comments of lines that follow each other are one."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield " ".join(node.value.value.split())
    found: list[str] = []
    line = 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            if found and token.start[0] != line + 1:
                yield " ".join(found)
                found = []
            found.append(token.string.lstrip("# "))
            line = token.start[0]
    yield " ".join(found)


SOURCES = {
    path: path.read_text()
    for folder in ("cuda_src", "cufa")
    for path in sorted((ROOT / folder).rglob("*.*"))
    if path.suffix in (".cuh", ".py")
}
COMMENTS = [
    (path, comment)
    for path, code in SOURCES.items()
    for comment in (python_comments if path.suffix == ".py" else cuda_comments)(code)
]
CODE = re.sub(r"//.*", "", "".join(code for path, code in SOURCES.items() if path.suffix == ".cuh"))
FILE = r"(?<![\w/.-])(?:[\w-]+/)*\w[\w-]*\.(?:cuh|py|md)\b"
NAME = r"[A-Za-z_]\w*(?:(?:::|\.)\w+)*"


def files(mention: str) -> list[Path]:
    """The files that a name stands for, which may lack leading directories."""
    folders = ("cuda_src", "cufa", "docs", "tests", "benchmarks", "examples")
    all_files = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    return [path for path in all_files if f"/{path.relative_to(ROOT).as_posix()}".endswith(f"/{mention}")]


def unresolved(comment: str) -> Iterator[str]:
    """What a comment points to that is not there: files, names in files, and names in the kernels."""
    for mention in re.findall(FILE, comment):
        if not files(mention):
            yield mention
    for *names, mention in re.findall(rf"(?:`({NAME})`+|[Ss]ee ({NAME})|\b(\w+_\w+)) (?:in|of) `*({FILE})", comment):
        name = "".join(names)
        for part in re.split(r"::|\.", name):
            if not any(re.search(rf"\b{part}\b", path.read_text()) for path in files(mention)):
                yield f"{name} in {mention}"
    for name in re.findall(r"\w+(?:::\w+)+", comment):
        if not all(re.search(rf"\b{part}\b", CODE) for part in name.split("::")):
            yield name


@pytest.mark.parametrize(
    ("comment", "missing"),
    [
        ("see _keys in cufa/_kernels/params.py", ["_keys in cufa/_kernels/params.py"]),
        ("see `params_of` in params.py, and tile/local.cuh", []),
        ("See Softmax::reject.", ["Softmax::reject"]),
        ("See Softmax::accept, repair.cuh and nowhere/repair.cuh", ["nowhere/repair.cuh"]),
        ("as in `probabilities` of masks.cuh", ["probabilities in masks.cuh"]),
        ("``Softmax::shift`` in cuda_src/attention/masks.cuh", ["Softmax::shift in cuda_src/attention/masks.cuh"] * 2),
        ("what exponent_scale in scoring.cuh finds", []),
    ],
)
def test_what_comments_point_to_is_looked_up(comment: str, missing: list[str]) -> None:
    assert list(unresolved(comment)) == missing


def test_comments_point_to_what_is_there() -> None:
    found = [f"{path.relative_to(ROOT)}: {missing}" for path, comment in COMMENTS for missing in unresolved(comment)]
    assert not found, "\n".join(found)


ROOMS = (
    *(
        "errors",
        "_driver",
        "_call",
        "_masks",
        "_terms",
        "functions",
        "_kernels",
        "_compile",
        "_cpu",
        "_operations",
        "_bundles",
        "_jit",
        "interop",
    ),
    "_pages",
    *(
        "_api",
        "jax",
        "torch",
        "masks",
        "flash_attn",
        "xformers",
        "diffusers",
        "flax",
        "_transformers",
        "transformers",
        "__init__",
        "_bench",
        "_cli",
        "__main__",
    ),
)
"""Of the package, in their order: a room imports from itself and from those before it."""
BESIDE = {
    "reference": ("errors", "_call", "_specification", "_terms"),
    "testing": ("errors", "_call", "_terms", "reference"),
}
BESIDE["_specification"] = ("errors",)
BESIDE["learn"] = ("errors", "_call", "_terms", "_jit", "reference", "testing")
BESIDE["_bench"] = ("errors", "_api", "testing")
"""Rooms that stand by themselves, and what they import from."""
MODULES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "cufa").rglob("*.py"))}


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a module imports as soon as it is imported itself, by their places in it."""
    place = path.relative_to(ROOT / "cufa").with_suffix("").parts
    for node in MODULES[path].body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = (*place[: len(place) - node.level], *(node.module or "").split("."))
        base = tuple(filter(None, base))
        for alias in node.names:
            inner = (*base, alias.name)
            whole = (ROOT / "cufa").joinpath(*inner)
            yield inner if whole.with_suffix(".py").is_file() or whole.is_dir() else base


def room_of(place: tuple[str, ...]) -> str:
    return place[0] if place else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT / "cufa").as_posix())
def test_rooms_import_from_those_before_them(path: Path) -> None:
    room = room_of(path.relative_to(ROOT / "cufa").with_suffix("").parts)
    allowed = BESIDE.get(room) or ROOMS[: ROOMS.index(room)]
    for place in imported(path):
        assert room_of(place) in (*allowed, room), f"{path.name} imports {'.'.join(place)}"


def test_modules_make_no_cycle() -> None:
    paths = {path.relative_to(ROOT / "cufa").with_suffix("").parts: path for path in MODULES}
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " → ".join(each.name for each in (*way, path))
        if path not in done:
            for place in imported(path):
                target = paths.get(place) or paths.get((*place, "__init__"))
                if target is not None and target != path:
                    visit(target, (*way, path))
            done.add(path)

    for path in MODULES:
        visit(path, ())
    assert len(done) == len(MODULES) > 40


def test_the_source_that_is_walked_is_what_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    flow = (ROOT / "docs" / "flow.md").read_text()
    (code,), (shown,) = (re.findall(rf"```{language}\n(.*?)```", flow, re.DOTALL) for language in ("python", "cpp"))
    exec(code, {})
    source = capsys.readouterr().out.splitlines()
    there = [line for line in shown.splitlines() if line and not line.startswith("// ...")]
    assert len(there) > 30 and not set(there) - set(source)
    left = sum("static_assert" in line for line in source if line not in there)
    total = sum("static_assert" in line for line in source)
    assert f"of {len(source)} lines; {left} of {total} asserts are left out" in " ".join(flow.split())


def test_tests_that_docs_name_are_there() -> None:
    named = {name for path in (ROOT / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", path.read_text())}
    there = {
        function
        for path in (ROOT / "tests").rglob("test_*.py")
        for function in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 15 and named <= there
