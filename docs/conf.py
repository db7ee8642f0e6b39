"""The documentation as Sphinx builds it: `make docs` writes it to build/docs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

from sphinx.ext.autodoc import mock as mocked_modules

sys.path.insert(0, str(Path(__file__).parents[1]))

import cufa

# torch takes gigabytes, and what it computes is not wanted here: without it, its modules are read beside a mock. That
# has no tensor for `view` to look at.
if importlib.util.find_spec("torch") is None:
    with mocked_modules(["torch"]), mock.patch("cufa._call.arrays.view"):
        import cufa.torch
        import cufa.xformers

project = "cufa"
author = "the authors of cufa"
version = release = cufa.__version__
extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_parser"]
root_doc = "index"
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"cufa {release}"
nitpicky = False  # docstrings put names of arguments into backticks, as numpydoc has it
default_role = "py:obj"
autodoc_typehints = "none"  # docstrings say it in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
html_show_copyright = False


def unlink(app: object, name: str, source: list[str]) -> None:
    """Keep the text of links to files of the repository that are no pages, and leave out the link."""
    out = "../" * (name.count("/") + 1)
    source[0] = re.sub(rf"(?<!!)\[([^]]*)\]\({re.escape(out)}[^)]*\)", r"\1", source[0])


def setup(app: object) -> None:
    app.connect("source-read", unlink)  # type: ignore[attr-defined]
