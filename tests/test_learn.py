"""The chapters of docs/learn: what their code prints, their pictures, their links and the notebook made of them."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "learn"
PAGES = ("index", "theory", "versions", "ladder", "optimise")


@functools.cache
def run(page: str) -> dict[str, Any]:
    """Run a page's blocks one after the other, hold what they print to the page, and return the names they made."""
    names: dict[str, Any] = {"__name__": page}
    blocks = re.findall(
        r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", (FOLDER / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"docs/learn/{page}.md", "exec"), names)
        assert printed.getvalue() == shown, f"docs/learn/{page}.md says something else of:\n{code}"
    return names


@pytest.mark.parametrize("page", PAGES[1:])
def test_blocks_print_what_the_page_says(page: str) -> None:
    run(page)


def test_pictures_are_what_is_drawn() -> None:
    pictures = runpy.run_path(str(FOLDER / "pictures.py"))
    files = {path.name: path.read_text() for path in pictures["FOLDER"].iterdir()}
    assert files == pictures["drawn"](), "python docs/learn/pictures.py draws them anew"
    shown = {
        name for page in PAGES for name in re.findall(r"\(pictures/(\w+\.svg)\)", (FOLDER / f"{page}.md").read_text())
    }
    assert shown == set(files)


def test_links_and_the_list_of_pages_lead_somewhere() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == set(PAGES)
    tree = (FOLDER / "index.md").read_text().partition("```{toctree}")[2].split()
    assert tree[1:-1] == list(PAGES[1:])
    for page in PAGES:
        text = (FOLDER / f"{page}.md").read_text()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert link.startswith("https://") or (FOLDER / link).exists(), f"{page}.md: {link}"
        headings = {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_notebook_runs() -> None:
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    made = runpy.run_path(str(FOLDER / "notebook.py"))
    assert made["PAGES"] == PAGES
    notebook = made["notebook"]()
    client.NotebookClient(notebook, timeout=120).execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and len(code) > 25
    assert sum(bool(cell.get("attachments")) for cell in notebook.cells) >= 8
