"""The benchmark over caches: its cases, what is right, peers by turns and the report, on arrays in host memory."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench import Host, run

from cufa import reference
from cufa._bench import decode_measure, decode_peers, decode_reports, frameworks
from cufa._bench.decode_measure import Inputs
from cufa._bench.decode_reports import Case
from cufa.errors import UnsupportedError

SMALL = [
    Case((40, 40), 4, 2, head_dim=16),
    Case((33, 1, 20), 4, 4, head_dim=16),
    Case((20, 5, 17), 4, 1, page_size=4, head_dim=16, dtype="float32"),
    Case((30, 9), 6, 2, seqlen_q=3, page_size=1, head_dim=16),
    Case((40, 40), 4, 2, seqlen_q=5, head_dim=16),
    Case((16, 16, 16), 4, 2, page_size=4, prefix=8, head_dim=16),
]
EVERYTHING = re.compile("")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(decode_measure, "cases", lambda: SMALL)
    monkeypatch.setattr(decode_measure, "host_cases", lambda: SMALL[:1])
    monkeypatch.setattr(decode_measure, "plan_cases", lambda: SMALL[2:3])
    monkeypatch.setattr(importlib.import_module("cufa._api.config"), "is_available", lambda: True)
    made = Host()
    monkeypatch.setattr(frameworks, "find", lambda: made)
    return made


def keys_of(case: Case, given: Inputs, index: int) -> list[Any]:
    """k and v of a sequence, row by row."""
    found = []
    for cache in (given.k_cache, given.v_cache):
        if given.block_table is None:
            found.append(cache[index, : case.lengths[index]])
        else:
            rows = [divmod(key, case.page_size) for key in range(case.lengths[index])]
            found.append(np.stack([cache[given.block_table[index, page], row] for page, row in rows]))
    return found


def of_reference(case: Case, given: Inputs) -> Any:
    found = [
        reference.attention(
            given.q[index][None], *(each[None] for each in keys_of(case, given, index)), causal=case.causal
        )
        for index in range(case.batch)
    ]
    return np.concatenate(found).astype(np.float32)


def exact(framework: Any, case: Case, given: Inputs) -> Any:
    out = of_reference(case, given)
    return lambda: out


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_what_is_right(case: Case, host: Host) -> None:
    given = decode_measure.inputs(host, case, 3)
    expected = of_reference(case, given)
    for index in range(case.batch):
        np.testing.assert_allclose(decode_measure.right(host, case, given, index), expected[index], atol=1e-5)


@pytest.mark.parametrize("case", SMALL[2:4], ids=str)
def test_pages_are_shuffled_and_of_one_sequence_each(case: Case, host: Host) -> None:
    given = decode_measure.inputs(host, case, 3)
    used = [
        page for row, n in zip(given.block_table, case.lengths, strict=True) for page in row[: -(-n // case.page_size)]
    ]
    assert sorted(used) == list(range(len(given.k_cache))) and used != sorted(used)


def test_a_prefix_is_shared(host: Host) -> None:
    given = decode_measure.inputs(host, SMALL[-1], 3)
    assert (given.block_table[:, :2] == [0, 1]).all() and sorted(given.block_table[:, 2:].ravel()) == list(range(2, 8))
    assert SMALL[-1].bytes == (8 + 3 * 8) * 2 * 2 * 16 * 2


def test_a_whole_run(host: Host, tmp_path: Path) -> None:
    said: list[str] = []
    written = []

    def keep(report: decode_reports.Report) -> None:
        report.write(tmp_path / "decode")
        written.append(len(json.loads((tmp_path / "decode.json").read_text())["cases"]))

    def wrong(framework: Any, case: Case, given: Inputs) -> Any:
        out = of_reference(case, given)
        out[-1] = 0  # of one sequence of several
        return lambda: out

    def later_wrong(framework: Any, case: Case, given: Inputs) -> Any:
        out, calls = of_reference(case, given), []

        def call() -> Any:
            calls.append(case)
            return out if len(calls) < 10 else 0 * out

        return call

    peers = {name: make for name, make in decode_peers.PEERS.items() if name.startswith("cufa")}
    plans = {name: make for name, make in decode_peers.PLANS.items() if name.startswith("cufa")}
    others = {"FA3": exact, "FA3, plan": wrong, "flash-attn": later_wrong}
    report = decode_measure.run(host, peers | others, plans, wanted=EVERYTHING, repeats=6, say=said.append, keep=keep)
    assert written == [1, 2, 3, 4, 5, 6, 6, 6]
    for case, found in report.results.items():
        dense = {"cufa, dense"} if case.uniform and not case.page_size else set()
        prefix = {"cufa, prefix"} if case.prefix else set()
        assert set(found) == {"cufa", "cufa, plan", "FA3"} | dense | prefix, said
        assert all(each.seconds > 0 and each.captured for each in found.values())
        assert found["FA3"].error < 1e-6 and 1e-9 < found["cufa"].error < 0.01
    assert sum(line.startswith("# FA3, plan fails on") for line in said) == len(SMALL)
    assert sum(line.startswith("# flash-attn fails on") for line in said) == len(SMALL)  # found behind the replays
    assert set(report.host[SMALL[0]]) >= {"cufa", "FA3"} and set(report.plans[SMALL[2]]) == set(plans)
    text = (tmp_path / "decode.md").read_text()
    assert "| 3 × (8 shared + 8), 4/2, pages of 4 |" in text and "## What dividing the work costs" in text
    pytest.importorskip("matplotlib")
    (axis,) = report.figure().axes
    assert {line.get_label() for line in axis.get_lines()} == {*peers, "FA3"}


def test_what_is_not_wanted_is_not_measured(host: Host) -> None:
    peers = {"FA3": exact}
    report = decode_measure.run(host, peers, {}, wanted=re.compile("pages of 4$"), repeats=2, say=lambda line: None)
    assert list(report.results) == [SMALL[2], SMALL[5]] and not report.host and list(report.plans) == [SMALL[2]]
    assert decode_measure.run(host, peers, {}, wanted=re.compile("^host"), say=lambda line: None).host


def test_a_peer_that_is_not_there_is_left_out_once(host: Host) -> None:
    def missing(*given: Any) -> Any:
        raise ImportError("No module named 'peer'")

    said: list[str] = []
    peers = {"FA3": exact, "flash-attn": missing}
    report = decode_measure.run(host, peers, {}, wanted=re.compile("^[^,]*,[^,]*$"), repeats=2, say=said.append)
    assert report.results and said.count("# flash-attn left out: No module named 'peer'") == 1


def test_cases_of_a_server() -> None:
    cases = decode_reports.cases()
    assert len({str(case) for case in cases}) == len(cases) == 20
    assert cases[5].bytes == 64 * 4096 * 8 * 2 * 128 * 2 and str(cases[5]) == "64 × 4k, 32/8"
    assert [str(case) for case in cases[-3:]] == [
        "4 × 16k, 32/8, 512 rows", "4 × 16k, 32/8, 512 rows, pages of 64", "64 × (8k shared + 256), 32/8, pages of 64"
    ]  # fmt: skip
    rows = 512
    assert cases[-3].flop == 4 * 4 * 32 * 128 * sum(16384 - rows + 1 + i for i in range(rows))
    assert {case.kind for case in cases} == {
        "Contiguous caches", "Pages", "Mixed lengths", "A few query rows", "Many query rows", "A shared prefix"
    }  # fmt: skip


def test_the_command(host: Host, tmp_path: Path) -> None:
    done = run("--decode", "--only", "2 × 40|1–20", "--quick", "--json")
    assert done.exit_code == 0, done.output
    assert "cufa is measured alone" in done.stderr and "2 × 40, 4/2: cufa " in done.stderr
    first, last = SMALL[0], SMALL[2]
    found = json.loads(done.stdout)["cases"]
    assert [each["case"] for each in found] == [str(case) for case in (first, last, SMALL[4])]
    assert found[0]["bytes"] == first.bytes and 0 < found[0]["peers"]["cufa"]["error"] < 0.01
    done = run("--decode", "--only", "^2 × 40, 4/2$")
    assert "## Contiguous caches" in done.stdout and "| 2 × 40, 4/2 |" in done.stdout


def test_the_command_tells_a_failure(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode_peers.PEERS, "cufa", lambda *_: np.zeros)
    done = run("--decode", "--only", "^2 × 40, 4/2$")
    assert "# cufa fails on 2 × 40, 4/2: TypeError" in done.stderr
    assert isinstance(done.exception, UnsupportedError) and "cufa failed on 2 × 40" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decode", "--seqlen", "512"], "--decode has cases of its own: leave out --seqlen."),
        (["--decode", "--full"], "leave out --causal"),
        (["--only", "hd12 "], "no row's name contains 'hd12 '"),
        (["--only", "("], "'(' is no regular expression"),
    ],
)
def test_wrong_usage(host: Host, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and words in done.stderr
