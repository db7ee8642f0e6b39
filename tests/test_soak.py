"""A short run of the soak: random problems, the GPU's own kernel against the one for every GPU."""

from __future__ import annotations

import pytest


@pytest.mark.gpu
def test_soak() -> None:
    cupy = pytest.importorskip("cupy")
    if int(cupy.cuda.Device().compute_capability) // 10 != 9:
        pytest.skip("needs an sm_90 GPU: others have one kernel")
    from soak import soak

    assert soak(count=300, seed=1, kernels=24) == ""
