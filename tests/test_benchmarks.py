"""What the benchmarks do without a GPU: rows, colors and plots, and the comparison of two source trees."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cufa._bench import reports
from cufa._call.arrays import CupyAdapter

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.split(".")[0] in ("reports", "common", "compare", "counters", "host_calls", "cufa_base", "cufa_new"):
            del sys.modules[name]


@pytest.mark.parametrize("head_dims", [(64,), (64, 128, 256)])
def test_names_below_a_plot_fit_its_width(
    head_dims: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    peers = list(reports.COLORS)[:9]
    results = {row: dict.fromkeys(peers, 100.0) for row in reports.rungs(head_dims, (512, 2048))}
    saved: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **more: Any) -> None:
        saved.append(figure)
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", spy)
    reports.plot(results, 800.0, "title", tmp_path / "plot.png")
    (legend,) = saved[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {*peers, reports.CEILING}
    box, whole = legend.get_window_extent(), saved[0].bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_peer_has_one_color_in_every_panel_and_is_in_the_legend(path: Path) -> None:
    from matplotlib.colors import same_color

    results = {row: each for row, each in reports.read_rows(path).items() if row.on_the_ladder}
    figure = reports.figure_of(results, 800.0, "title")
    peers = set(reports.names_in(results, reports.COLORS))
    (legend,) = figure.legends
    shown = {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert len(legend.get_texts()) == len(shown) and shown.keys() == peers | {reports.CEILING}
    drawn = set()
    for axis in figure.axes:
        assert axis.get_legend() is None
        for line in axis.get_lines():
            name = line.get_label()
            drawn.add(name)
            assert same_color(line.get_color(), shown[name].get_color())
            assert name == reports.CEILING or same_color(line.get_color(), reports.COLORS[name])
            assert list(line.get_xdata()) == sorted(line.get_xdata())
    assert drawn == shown.keys()


def test_what_calls_take_of_pythons_time_is_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import host_calls

    command = [sys.executable, host_calls.__file__, "--rounds", "1", "--only", "^CuPy", str(ROOT)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = [line.partition("  ")[0] for line in shown.splitlines()[1:]]
    assert kinds == [*host_calls.cupy_calls()]
    monkeypatch.setitem(sys.modules, "cupy", host_calls.pretended_cupy())
    adapter = CupyAdapter()
    first, second = host_calls.Array((2, 3), "float16"), host_calls.Array((5,), "int32")
    arrays = adapter.view_plain((first, None, second))
    assert arrays is not None
    views = adapter.view(first), (0, None), adapter.view(second)
    assert [*zip(arrays.pointers, arrays.layouts, strict=True)] == [*views]
    assert adapter.view_plain((first, np.zeros(3))) is None
    made, address = adapter.empty((5,), "int32", first)
    assert (made.shape, made.dtype, address) == ((5,), np.int32, made.data.ptr)


def test_colors_tell_peers_apart() -> None:
    from matplotlib.colors import to_hex

    assert len({to_hex(color) for color in reports.COLORS.values()}) == len(reports.COLORS)
    with pytest.raises(ValueError, match="'FA9' has no color"):
        reports.check_colors({"cufa", "FA9"})


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [*reports.ladder((512,)), reports.Row(64, 2, 65536, 8, 8, True, dtype="float16", seqlen_k=3)]
    packed = reports.Row(64, 16, 2, 8, 8, True, lengths=(16, 16))
    results = {row: {"cufa": 100.0 + i} for i, row in enumerate([*rows, packed])}
    reports.write_rows(results, ["cufa", "FA3"], tmp_path / "rows.csv")
    assert reports.read_rows(tmp_path / "rows.csv") == {row: results[row] for row in rows}


def test_pairs_are_counted() -> None:
    for queries, keys, causal in itertools.product((40, 100), (40, 100), (False, True)):
        row = reports.Row(64, queries, 3, 2, 2, causal, seqlen_k=keys)
        keep = np.tri(queries, keys, keys - queries) if causal else np.ones((queries, keys))
        assert row.flop == pytest.approx(4 * 3 * 2 * 64 * keep.sum(), rel=0.03)


def test_two_trees_live_in_one_process(tmp_path: Path) -> None:
    import compare

    import cufa

    shutil.copytree(ROOT / "cufa", tmp_path / "cufa")
    source = tmp_path / "cufa" / "_cpu" / "forward.py"
    source.write_text(source.read_text() + "\ndef forward(q, k, v, out, lse, **_):\n    out[...] = 7\n")
    base, new = compare.load(tmp_path, "cufa_base"), compare.load(ROOT, "cufa_new")
    job = compare.Job(compare.Row(16, 8, 1, 2, 2, True), False)
    given = tuple(np.random.default_rng(0).standard_normal((4, 1, 8, 2, 16), dtype=np.float32))
    assert (compare.call_of(job, base, given, None)() == 7).all()
    expected = cufa.attention(*given[:3], causal=True)
    np.testing.assert_array_equal(compare.call_of(job, new, given, None)(), expected)
    found = compare.call_of(job._replace(backward=True), new, given, None)()
    assert [each.shape for each in found] == [(1, 8, 2, 16)] * 3
    with pytest.raises(FileNotFoundError, match=r"holds no cufa/__init__\.py"):
        compare.load(tmp_path / "cufa", "cufa_base")


def test_both_take_turns() -> None:
    """By a clock that moves when something is called, more slowly from call to call."""
    import compare

    now, order = [0.0], []

    def call(name: str, cost: float) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += cost * (1 + len(order) / 1000)

        return run

    gpu = SimpleNamespace(
        flush=lambda: order.append("flush"),
        record=lambda: now[0],
        synchronize=lambda: None,
        seconds=lambda start, stop: stop - start,
    )
    found = compare.take_turns((call("base", 3.0), call("new", 2.0)), gpu, seconds=0.0)
    assert found.pairs >= 20 and found.ratio == pytest.approx(1.5, rel=1e-2) and found.error < 0.01
    assert order[:8] == ["flush", "base", "flush", "new", "flush", "new", "flush", "base"]
    text = compare.report({compare.Job(compare.Row(64, 512, 1, 2, 2, True), True): found}, limit=2.0)
    assert "backward: geometric mean 1.5" in text and "1 of 1 rows below 2.0" in text


def test_the_ladder_is_compared() -> None:
    import compare

    asked = {"forward": False, "backward": False, "beside": False, "deterministic": False, "only": ""}
    jobs = compare.jobs_of(SimpleNamespace(**asked))
    assert [sum(job.backward == backward for job in jobs) for backward in (False, True)] == [26, 20]


def test_times_of_shapes_that_are_easily_slow() -> None:
    rows = reports.cliffs()
    assert len(set(rows)) == len(rows) and not any(row.on_the_ladder for row in rows)
    results = {row: {"cufa": 1.0, "cufa, dense": 9.0, "FA2 (torch)": 1.2, "cuDNN (torch)": 0.5} for row in rows}
    results[rows[1]] = results[rows[1]] | {"cufa": 0.5}
    text = reports.times(results, reports.COLORS, set(), work=2.0, limit=1.3)
    assert f"Greatest 2.40×; 1 of {len(rows)} rows above 1.3×." in text
    assert f"| 16384 over 128 | 2 | 16/16 | full | {2 * rows[0].flop / 1e6:.1f} |" in text


def test_counters_are_told_by_row() -> None:
    import counters

    shares, several = [*counters.SHARES.values()], [name for names in counters.BYTES.values() for name in names]
    stalls = [f"{counters.STALLED}{name}_per_issue_active.ratio" for name in counters.STALLS]
    active = [f"{counters.ACTIVE}.avg", f"{counters.ACTIVE}.min"]
    columns = [counters.DURATION, counters.ELAPSED, *active, *shares, *several, *stalls]

    def line(name: str, microseconds: int, first: int) -> str:
        elapsed = 1500 * microseconds
        values = [1000 * microseconds, elapsed, 0.9 * elapsed, 0.8 * elapsed]
        values += [first + i for i in range(len(shares))] + [1e6 * (i + 1) for i in range(len(several))]
        values += [0.5 * (len(stalls) - i) for i in range(len(stalls))]
        return ",".join(f'"{value}"' for value in ("1", name, *(f"{value:,}" for value in values)))

    head, units = (",".join(f'"{text}"' for text in each) for each in (["ID", "Kernel Name", *columns], ["", ""]))
    marks = [line(name, 1, 0) for name in ("row_3()", "row_end()", "row_7()")]
    lines = ["==PROF== Connected", head, units, line("attention_forward_sm90", 99, 1), marks[0]]
    lines += [line("attention_backward_prepare", 40, 10), line("attention_backward_repair", 3, 20), marks[1]]
    lines += [line("attention_forward_sm90", 98, 30), marks[2], line("void pytorch_flash::flash_fwd<T>(P)", 50, 40)]
    found = counters.launches_in("\n".join(lines))
    assert {index: len(launches) for index, launches in found.items()} == {3: 2, 7: 1}
    rows = [line.strip("| ").split(" | ") for line in counters.table({3: "three", 7: "seven"}, found)[2:]]
    waits = "fixed latencies 7.0, memory, mbarriers 6.5, shared memory 6.0, barriers 5.5"
    busy = [str(10 + i) for i in range(len(shares))]
    assert rows[0] == ["three", "backward_prepare", "40", "1.50", "90, 80", *busy, "3", "3", waits]
    assert len(rows) == 2 and rows[1][:3] == ["seven", "pytorch_flash::flash_fwd", "50"]


def test_what_is_counted_has_names_of_its_own() -> None:
    import counters

    names = [each.name for each in counters.profiled()]
    assert len(set(names)) == len(names) and any("deterministic" in name for name in names)
