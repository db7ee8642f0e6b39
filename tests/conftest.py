"""What every test shares: the Hypothesis profile and the rule for tests that need a GPU."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# Derandomised: a failure seen once is seen again. No deadline: the first call of a shape may compile.
settings.register_profile(
    "cufa",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("cufa")


def _why_no_gpu() -> str | None:
    """Why the GPU tests cannot run here, or None if they can."""
    import cufa

    return None if cufa.is_available() else "needs an NVIDIA GPU of compute capability 8.0 or newer"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if gpu_items else None
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
