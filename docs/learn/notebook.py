"""The chapters as a Jupyter notebook: ``python docs/learn/notebook.py [FILE]`` writes it, by default to learn.ipynb.

It needs nbformat. Each block of Python is a cell, what it prints comes from running it, pictures are inside the file,
and links, which lead to files of the repository, are left as text.
"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent
PAGES = ("index", "theory", "versions", "ladder", "optimise")


def page(name: str) -> str:
    """The text of a page, with what it includes, and without what only Sphinx reads."""
    text = (FOLDER / f"{name}.md").read_text()
    text = re.sub(r"^```{include} (\S+)\n(?::.*\n)?```", lambda found: included(found[1]), text, flags=re.MULTILINE)
    return re.sub(r"^```{toctree}\n.*?^```\n?", "", text, flags=re.MULTILINE | re.DOTALL)


def included(file: str) -> str:
    """A file that a page includes; its images are named from where it is."""
    folder = Path(file).parent.as_posix()
    return re.sub(r"(!\[[^]]*\])\(", rf"\1({folder}/", (FOLDER / file).read_text())


def markdown(text: str) -> list[Any]:
    """A cell of text, or none if there is nothing in it."""
    attachments = {}
    for file in re.findall(r"!\[[^]]*\]\((\S+\.(?:svg|png))\)", text):
        data = (FOLDER / file).read_bytes()
        kind = "image/svg+xml" if file.endswith("svg") else "image/png"
        attachments[Path(file).name] = {kind: base64.b64encode(data).decode()}
    text = re.sub(r"(!\[[^]]*\])\((?:\S+/)?(\S+\.(?:svg|png))\)", r"\1(attachment:\2)", text)
    text = re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text).strip()
    return [new_markdown_cell(text, attachments=attachments)] if text else []


def notebook() -> Any:
    """All chapters, with no results in them yet."""
    cells = []
    for name in PAGES:
        pieces = re.split(r"^```python\n(.*?)^```\n(?:```text\n.*?^```\n)?", page(name), flags=re.MULTILINE | re.DOTALL)
        for number, piece in enumerate(pieces):
            cells += [new_code_cell(piece.strip())] if number % 2 else markdown(piece)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # else they are random
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


if __name__ == "__main__":
    nbformat.write(notebook(), sys.argv[1] if len(sys.argv) > 1 else FOLDER / "learn.ipynb")
