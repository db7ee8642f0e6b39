"""The documentation: what the pages must name, and the examples in docstrings."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

import cufa
from cufa._compile import env as _env

ROOT = Path(__file__).parents[1]
PUBLIC = (
    "__init__",
    "diffusers",
    "flash_attn/__init__",
    "flash_attn/flash_attn_3",
    "flax",
    "jax",
    "masks",
    "reference",
    "testing/__init__",
    "torch",
    "transformers",
    "xformers",
)
"""The modules that users import."""
NEEDED = {"flax": "jax", "jax": "jax", "torch": "torch", "xformers": "torch"}
"""What some of them import."""
SOURCES = {path.relative_to(ROOT).with_suffix(""): path.read_text() for path in sorted((ROOT / "cufa").rglob("*.py"))}
WITH_EXAMPLES = [".".join(path.parts).removesuffix(".__init__") for path, text in SOURCES.items() if ">>> " in text]


def names_of(module: str) -> list[str]:
    """What a module has in ``__all__``, with the module's name; it is not imported."""
    path = Path("cufa", module)
    for node in ast.parse(SOURCES[path]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            prefix = ".".join(path.parts).removesuffix(".__init__")
            return [f"{prefix}.{name}" for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{path} has no __all__")


@pytest.mark.parametrize("module", PUBLIC)
def test_the_api_page_has_every_public_name(module: str) -> None:
    page = set(re.findall(r"^ *\.\. [\w:]+:: (cufa[\w.]*)$", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE))
    assert not set(names_of(module)) - page, "add them to docs/api.rst"


def test_the_api_page_has_nothing_else() -> None:
    page = re.findall(r"^ *\.\. [\w:]+:: (cufa[\w.]+)$", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE)
    there = {name for module in PUBLIC for name in names_of(module)} | {"cufa.torch", "cufa.jax", "cufa.flash_attn"}
    there |= {"cufa.flash_attn.flash_attn_3", "cufa.xformers", "cufa.diffusers", "cufa.flax", "cufa.transformers"}
    methods = {f"cufa.cache.{name}" for name in ("stats", "clear", "prune", "verify")}
    assert len(page) == len(set(page)) and not set(page) - there - methods


@pytest.mark.parametrize("module", PUBLIC)
def test_public_functions_have_examples(module: str) -> None:
    if module in NEEDED:
        pytest.importorskip(NEEDED[module])
    for name in names_of(module):
        home, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(home), last)
        assert not inspect.isfunction(found) or ">>> " in (found.__doc__ or ""), f"{name} has no example"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    framework = name.rpartition(".")[2]
    if framework in NEEDED:
        pytest.importorskip(NEEDED[framework])
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("module", ["cufa.flash_attn", "cufa.flash_attn.flash_attn_3"])
def test_the_page_of_flash_attn_has_every_argument(module: str) -> None:
    home = importlib.import_module(module)
    functions = [name for name in home.__all__ if name.startswith("flash_attn_")]
    tables = re.findall(
        r"^(\| \| `\w+` .*\n)\|[-|]+\n((?:\|.*\n)+)", (ROOT / "docs" / "flash_attn.md").read_text(), re.M
    )
    head, body = tables[module.endswith("3")]
    columns = [f"flash_attn_{name}" for name in re.findall(r"`(\w+)`", head)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]
    assert sorted(columns) == sorted(functions) and all(row[-1] for row in rows)
    for place, name in enumerate(columns, 1):
        parameters = inspect.signature(getattr(home, name)).parameters
        assert {row[0].strip("`") for row in rows if row[place] == "✓"} == set(parameters), name


def test_the_page_of_variables_is_what_the_code_reads() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `CUFA_")]
    assert table == [f"| `{each.name}` | {each.default} | {each.meaning} |" for each in _env.VARIABLES]


def test_the_page_of_serving_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE | re.DOTALL)
    run = [block for block in blocks if "import torch" not in block]
    assert len(run) == len(blocks) - 1
    exec(compile("\n".join(run), "docs/serving.md", "exec"), {})


def test_the_page_of_own_kernels_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "jit.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), "docs/jit.md", "exec"), {})


def test_the_page_of_masks_runs() -> None:
    failed, attempted = doctest.testfile(str(ROOT / "docs" / "masks.md"), module_relative=False, encoding="utf-8")
    assert failed == 0 < attempted


def test_pictures_of_masks_are_what_the_objects_draw() -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    files = {path.name: path.read_text() for path in pictures["FOLDER"].iterdir()}
    assert files == pictures["drawn"](), "python docs/pictures.py draws them anew"
    page = (ROOT / "docs" / "masks.md").read_text().replace("\\|", "|")
    for name, mask in pictures["PICTURES"].items():
        assert f"(pictures/{name}.svg)" in page
        of = [text for text in re.findall(r"\| `(.*?)` (?=\|)", page) if name in text and masked(text) == mask]
        assert of, f"docs/masks.md does not say what {name} is made of"


def masked(text: str) -> object:
    """The mask of an expression of functions of `cufa.masks`; None if it is none."""
    try:
        return eval(text, {name: getattr(cufa.masks, name) for name in cufa.masks.__all__})
    except (NameError, SyntaxError, TypeError):
        return None


def test_pages_are_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text().split()
    pages = {path.stem for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".rst")} - {"index"}
    assert pages <= set(index)


def test_links_between_pages_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            assert re.match(r"https?://|mailto:", link) or (path.parent / link).exists(), f"{path.name}: {link}"
