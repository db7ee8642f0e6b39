"""Parts of what tests could try have something of everything, and are all of it if that is asked for."""

from __future__ import annotations

import pytest
from sampling import examples, paired, sampled


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFA_TEST_ALL", raising=False)


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_turns_have_all_between_them(count: int, of: int) -> None:
    found = [sampled(range(count), turn, of) for turn in range(of)]
    assert sorted({each for part in found for each in part}) == [*range(count)]
    assert all(found) == (count > 0) and max(map(len, found)) <= -(-count // of)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (5, 4), (7, 2), (3, 9)])
def test_pairs_have_all_of_both(rows: int, columns: int) -> None:
    found = paired(range(rows), range(columns))
    assert len(found) <= rows * -(-columns // 2)
    assert {row for row, _ in found} == {*range(rows)}
    assert rows == 1 or {column for _, column in found} == {*range(columns)}


def test_all_is_taken_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examples(3, 8) == 3
    monkeypatch.setenv("CUFA_TEST_ALL", "1")
    assert sampled(range(5), 1, 3) == [*range(5)] and len(paired("abc", "de")) == 6 and examples(3, 8) == 8
