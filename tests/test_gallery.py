"""The gallery: each example computes the same in two ways, on the CPU."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cufa

GALLERY = Path(__file__).parents[1] / "examples" / "gallery"
EXAMPLES = sorted(path for path in GALLERY.glob("*.py") if path.stem != "arrays")
DIFFERENCES = {"sigmoid_gate": 1e-2, "dropout_step": 1e-3}
"""Relative errors of derivatives that are differences of float32 sums."""


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(GALLERY))
    monkeypatch.setattr(cufa, "is_available", lambda: False, raising=False)
    yield
    sys.modules.pop("arrays", None)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_two_ways_agree(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(path))
    found, expected = names["found"], names["expected"]
    assert type(found).__module__ == "numpy"
    scale = np.abs(expected).max()
    assert scale > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=DIFFERENCES.get(path.stem, 1e-5) * scale)
    assert re.search(r"^largest difference \d", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 30 and lines[0].startswith('"""') and lines[0].endswith('"""')


def test_the_gallery_lists_its_examples() -> None:
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.py\) \|", (GALLERY / "README.md").read_text(), re.MULTILINE)
    assert len(EXAMPLES) == 12 and sorted(listed) == [(path.stem, path.stem) for path in EXAMPLES]
