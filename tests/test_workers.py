"""What the workers of pytest-xdist have each: a GPU, threads, and tests that take long at their beginning."""

from __future__ import annotations

from typing import Any

import pytest
from workers import long_first, reasons, share_of_machine


def test_each_worker_has_a_gpu_of_its_own_and_sees_all() -> None:
    seen = [share_of_machine(f"gw{number}", 4)["CUDA_VISIBLE_DEVICES"] for number in range(6)]
    assert seen == ["0,1,2,3", "1,2,3,0", "2,3,0,1", "3,0,1,2", "0,1,2,3", "1,2,3,0"]
    assert all("CUDA_VISIBLE_DEVICES" not in share_of_machine("gw1", number) for number in (0, 1))
    assert share_of_machine("gw1", 0)["OPENBLAS_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("count", "workers"), [(0, 3), (1, 22), (7, 2), (100, 22), (101, 7), (12, 1)])
@pytest.mark.parametrize("long", [set(), {0}, {3, 4, 5, 6}, {*range(40)}], ids=len)
def test_those_that_take_long_come_first(count: int, workers: int, long: set[int]) -> None:
    """In the parts that workers are given; the others keep their order."""
    items = [*range(count)]
    found = long_first(items, [item in long for item in items], workers)
    assert sorted(found) == items
    assert [item for item in found if item not in long] == [item for item in items if item not in long]
    begin, most = 0, []
    for left in range(workers, 0, -1):
        part = found[begin : begin + (count - begin) // left]
        begin += len(part)
        of_them = [item in long for item in part]
        assert of_them == sorted(of_them, reverse=True)
        most.append(sum(of_them))
    assert count < workers or max(most) - min(most) <= 1 or len(long) > count // 2


def test_the_record_tells_why_tests_were_left_out() -> None:
    def skipped(reason: str) -> Any:
        return type("Report", (), {"longrepr": ("file.py", 7, f"Skipped: {reason}")})

    told = reasons([skipped("needs two GPUs"), skipped("needs torch"), skipped("needs two GPUs")])
    assert told == {"needs torch": 1, "needs two GPUs": 2}
