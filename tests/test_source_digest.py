"""The digest of sources that a run of the GPU tests has verified."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_digest import digest_of

HEADER = "// What it is.\n#pragma once\n\ninline int one() { return 1; }  // not two\n"
MODULE = "ONE = 1  # not two\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for place, text in (("cuda_src/core/one.cuh", HEADER), ("cufa/one.py", MODULE), ("cufa/notes.txt", "1")):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("place", "before", "after", "differs"),
    [
        ("cuda_src/core/one.cuh", "return 1", "return 2", True),
        ("cuda_src/core/one.cuh", "#pragma once", "#pragma twice", True),
        ("cuda_src/core/one.cuh", "// What it is.", "// What it\n// is.", False),
        ("cuda_src/core/one.cuh", "not two", "not three", False),
        ("cuda_src/core/one.cuh", "  // not two", "", False),
        ("cufa/one.py", "not two", "not three", True),
        ("cufa/notes.txt", "1", "2", False),
    ],
)
def test_what_is_verified(tree: Path, place: str, before: str, after: str, differs: bool) -> None:
    digest = digest_of(tree)
    text = (tree / place).read_text()
    assert before in text
    (tree / place).write_text(text.replace(before, after))
    assert (digest_of(tree) != digest) == differs


def test_names_count(tree: Path) -> None:
    digest = digest_of(tree)
    (tree / "cufa/one.py").rename(tree / "cufa/two.py")
    assert digest_of(tree) != digest
