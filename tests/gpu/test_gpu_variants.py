"""Biases, score functions, dropout and masks on a GPU: the gallery, and the benchmark's cases at small shapes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from cufa._bench import variants_measure
from cufa._bench.frameworks import CuPy
from cufa._bench.reports import is_ours
from cufa._bench.variants_cases import Case
from cufa._bench.variants_peers import PEERS
from cufa._bench.variants_reports import WORK
from cufa.testing import to_numpy

pytestmark = pytest.mark.gpu

GALLERY = Path(__file__).parents[2] / "examples" / "gallery"
EXAMPLES = sorted(path for path in GALLERY.glob("*.py") if path.stem != "arrays")
SHAPES = [(2, 384, 4, 64), (2, 512, 2, 128)]
SIZES = {"documents": 5, "window": 100, "prefix": 150, "random blocks": 64}
FEATURES = [*variants_measure.LEARNED, "bias per sequence", "ALiBi", "softcap", *SIZES]
CASES = [Case(feature, *shape, size=SIZES.get(feature, 0)) for feature in FEATURES for shape in SHAPES]
CASES += [Case("dropout", 2, 1024, 2, head_dim, causal=causal) for head_dim in (64, 128) for causal in (False, True)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_gallery(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.syspath_prepend(str(GALLERY))
    monkeypatch.delitem(sys.modules, "arrays", raising=False)
    names = runpy.run_path(str(path))
    sys.modules.pop("arrays")
    found, expected = (to_numpy(names[name]).astype(np.float32) for name in ("found", "expected"))
    assert type(names["found"]).__module__.startswith("cupy")
    # float16's rounding of out, of what is added up for a gradient, and of the sums that differences are of.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_of_cufa_is_right(case: Case) -> None:
    """In bfloat16, before and after replays of CUDA graphs."""
    pytest.importorskip("cupy")
    if case.feature == "documents":
        case = case._replace(batch=1)
    said: list[str] = []
    ours = {name: make for name, make in PEERS.items() if is_ours(name)}
    found = variants_measure.Runner(CuPy(), ours, repeats=3, say=said.append).run(case, 1)
    assert not [line for line in said if line.startswith("#")]
    assert found.keys() == WORK.keys() and all(len(each) >= 2 for each in found.values())
    assert all(each.captured for measured in found.values() for each in measured.values())
