"""Which kernels a selection holds: presets, calls, records of what was used, and the commands that messages name."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matrix
import plans
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import examples

from cufa._bundles import build as _build
from cufa._bundles import selection
from cufa._bundles.selection import PRESETS, SPREADS, Cached, Kind, Lengths
from cufa._call.problem import CHAIN_ROWS, LONG_ROWS, MANY
from cufa._cli.main import cufa as command
from cufa._compile import bundle as _bundle
from cufa._compile import used as _used
from cufa._kernels import Plan, align, choose
from cufa._operations.call import chosen
from cufa._operations.forward import ATTENTION
from cufa._operations.kvcache import KVCACHE, PLANNING
from cufa._operations.sketch import OPERATIONS, Layout
from cufa._terms import Term

ARCHS = (80, 86, 89, 90, 100, 120)
ROOT = Path(__file__).parents[2]


# --- Presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_presets_hold_as_many_kernels_as_can_be_compiled_in_time(arch: int) -> None:
    """On two cores `full` takes 0.5 s per kernel; `inference` takes 40 KB, of which those over caches have most."""
    counts = {name: len(selection.plans_for(kinds, arch)) for name, kinds in PRESETS.items()}
    assert 100 < counts["inference"] <= 250
    assert 30 < counts["training"] <= 100
    assert max(counts["inference"], counts["training"]) < counts["full"] <= 330


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_same_in_every_process(name: str) -> None:
    script = (
        "import sys\nfrom cufa._bundles import selection\n"
        "for plan in selection.plans_for(selection.PRESETS[sys.argv[1]], 90): print(plan.name, plan.config)"
    )
    run = [sys.executable, "-c", script, name]
    seen = {
        subprocess.run(run, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True).stdout
        for seed in "12"
    }
    found = selection.plans_for(PRESETS[name], 90)
    assert seen == {"".join(f"{plan.name} {plan.config}\n" for plan in found)}
    assert len(set(found)) == len(found)


def test_the_full_preset_holds_the_others() -> None:
    full = {*selection.plans_for(PRESETS["full"], 90)}
    for name in ("inference", "training"):
        assert {*selection.plans_for(PRESETS[name], 90)} <= full


def held(name: str, arch: int) -> set[Plan]:
    return {*selection.plans_for(PRESETS[name], arch)}


def kernels_of(kind: Kind, lengths: Lengths, arch: int, cached: Cached = selection.CONTIGUOUS) -> set[Plan]:
    """What a call needs."""
    _, copies, plan = chosen(selection.problem_of(kind, lengths, cached=cached), arch)
    return {plan.bare} | ({align.plan_for(arch)} if copies is not None else set())


def cached_of(kind: Kind, page_sizes: list[int]) -> st.SearchStrategy[Cached]:
    """What calls of a kind may differ by if they have caches."""
    scored, sizes = kind.operation == "attention_with_kvcache", st.sampled_from(page_sizes)
    found = st.builds(
        Cached, sizes if "paged" in kind.features else st.just(0), *[st.booleans() if scored else st.just(False)] * 2
    )
    return found.filter(lambda each: each.appends or not each.rotates)


RATIOS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8])
HEADS = st.sampled_from([1, 16, 128])
"""Of packed sequences, whose tiles may be many by them."""
MOST = 1 << 17


@st.composite
def served(draw: st.DrawFn, kind: Kind) -> Lengths:
    """Lengths that the spread ``serving`` claims."""
    if kind.operation in ("attention_with_kvcache", "decode_plan"):
        rows = st.integers(1, 2000) if "packed" in kind.features else st.sampled_from([1, 512, 600, 3000])
        return Lengths(draw(st.integers(1, 600)), draw(rows), draw(st.integers(1, MOST)), draw(RATIOS))
    if "varlen" in kind.operation:
        return Lengths(draw(st.integers(1, 600)), draw(st.integers(1, 4096)), draw(st.integers(65, 8192)), draw(HEADS))
    ratio = draw(RATIOS)
    rows = draw(st.one_of(st.just(1), st.integers(2, 64), st.integers(65, MOST)))
    most = CHAIN_ROWS if 1 < rows <= 64 else MOST
    return Lengths(draw(st.integers(1, 64)), rows, draw(st.integers(rows, most)), ratio)


@st.composite
def usual(draw: st.DrawFn, kind: Kind) -> Lengths:
    """Those of ``usual``: whole prompts, and tokens behind them."""
    if "varlen" in kind.operation:
        rows = draw(st.integers(512, 2048))
        return Lengths(draw(st.integers(1, min(MANY, CHAIN_ROWS // rows))), rows, rows, draw(HEADS))
    keys = draw(st.integers(512, CHAIN_ROWS))
    one = draw(st.booleans()) and "backward" not in kind.operation
    return Lengths(draw(st.integers(1, 8)), 1 if one else keys, keys, draw(RATIOS))


@st.composite
def trained(draw: st.DrawFn, kind: Kind) -> Lengths:
    """Those of ``training``."""
    if "varlen" in kind.operation:
        rows = draw(st.integers(LONG_ROWS, 8192))
        return Lengths(draw(st.integers(1, 600)), rows, rows, draw(HEADS))
    ratio = draw(RATIOS)
    rows = draw(st.integers(65 if ratio == 1 else 512, MOST))
    return Lengths(draw(st.integers(1, 64)), rows, rows, ratio)


CLAIMED = {"serving": served, "usual": usual, "training": trained}
PROMISES = [(name, spread, kind) for name, kinds in PRESETS.items() for spread, those in kinds for kind in those]


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("name", PRESETS)
@given(data=st.data())
@settings(max_examples=examples(50, 150))
def test_calls_that_a_preset_claims_find_their_kernels(name: str, arch: int, data: st.DataObject) -> None:
    _, spread, kind = data.draw(st.sampled_from([each for each in PROMISES if each[0] == name]))
    lengths, cached = data.draw(CLAIMED[spread](kind)), data.draw(cached_of(kind, [16, 64, 128, 256]))
    assert kernels_of(kind, lengths, arch, cached) <= held(name, arch), f"{kind} of {lengths}, {cached}"


def test_a_call_that_no_preset_claims_is_not_held() -> None:
    kind = Kind("attention", "bfloat16", 48, 48)
    assert not kernels_of(kind, Lengths(1, 512, 512, 1), 90) & held("full", 90)


@given(
    kind=st.builds(
        Kind,
        st.sampled_from([*selection.OPERATIONS]),
        st.sampled_from(["bfloat16", "float32"]),
        st.sampled_from([40, 57, 64, 128, 200]),
        st.sampled_from([64, 57]),
        st.sampled_from([(), ("causal",), ("window", "softcap"), ("causal", "alibi", "sinks"), ("causal", "paged")]),
    ),
    lengths=st.builds(Lengths, st.integers(1, 400), *[st.integers(1, 40000)] * 2, st.integers(1, 64)),
    arch=st.sampled_from(ARCHS),
    data=st.data(),
)
@settings(max_examples=300)
def test_every_spread_covers_all_lengths_and_heads(
    kind: Kind, lengths: Lengths, arch: int, data: st.DataObject
) -> None:
    if "paged" in kind.features and data.draw(st.booleans()):
        kind = kind._replace(features=(*kind.features, "packed"))
    found = selection.plans_for([selection.Chosen("every", (kind,))], arch)
    assert kernels_of(kind, lengths, arch, data.draw(cached_of(kind, [1, 2, 24, 40, 16, 100]))) <= {*found}


def test_what_is_asked_for_narrows_a_preset() -> None:
    found = selection.asked_for(preset="full", operations=["attention"], dtypes=["bfloat16"], features=["sinks"])
    assert [str(kind) for each in found for kind in each.kinds] == [
        "attention bfloat16 64 causal sinks",
        "attention bfloat16 64 window sinks",
    ]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"preset": "inferense"}, "there is no preset 'inferense'; there are inference, training, full."),
        ({"head_dims": [(64, 64)], "dtypes": ["int8"]}, "there is no dtype 'int8'; there are float16, "),
        ({"head_dims": [(64, 64)], "features": ["casual"]}, "there is no feature 'casual'; there are causal, "),
        ({"head_dims": [(64, 64)], "operations": ["decode"]}, "there is no operation 'decode'; there are attention, "),
        ({"head_dims": [(64, 300)]}, "head_dim 300 is not supported; it may be 1 to 256."),
        ({}, "nothing says what to compile for; "),
        ({"features": ["causal"]}, "nothing says what to compile for; "),
        ({"preset": "training", "head_dims": [(40, 40)]}, "the preset training has no such calls; leave it out "),
        ({"head_dims": [(64, 64)], "features": ["causal", "window"]}, "window and causal exclude each other"),
        ({"head_dims": [(64, 64)], "features": ["softcap", "large_softcap"]}, "softcap and large_softcap exclude each"),
        (
            {"head_dims": [(64, 64)], "features": ["deterministic"], "operations": ["attention"]},
            "attention is always deterministic; ",
        ),
        (
            {"head_dims": [(64, 64)], "features": ["paged"], "operations": ["attention"]},
            "calls of attention may have no other features than causal, window, softcap, large_softcap, alibi, sinks, "
            "unaligned.",
        ),
        (
            {"head_dims": [(64, 64)], "features": ["paged", "deterministic"]},
            "no operation has calls with all of deterministic, paged; ",
        ),
    ],
)
def test_what_is_not_known_is_refused_in_one_sentence(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        selection.asked_for(**asked)
    assert str(caught.value).startswith(message)


# --- The commands that messages name ----------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that ``cufa bundle build`` is about to compile, which it does not."""
    found: list[Plan] = []

    def build(plans: list[Plan], out: Path, **_: Any) -> _build.Built:
        found[:] = plans
        return _build.Built(len(plans), 0, [], 0, 0.0)

    monkeypatch.setattr(_build, "build", build)
    return found


def check_command(plan: Plan, asked: list[Plan]) -> None:
    words = shlex.split(_bundle.command_for(plan))
    assert words[:3] == ["cufa", "bundle", "build"]
    done = CliRunner().invoke(command, words[1:])
    assert done.exit_code == 0, done.output
    assert plan.bare in asked, shlex.join(words)


NO_CALLS = ("elementwise", "True 16", "empty none")
"""Labels of facts that go with no call: elements that are read singly, where arrays would be copied first; dense
sequences that have a short average; and keys that all are seen and none."""
SAMPLE = {
    label: plan
    for index, (label, plan) in enumerate(matrix.kernels())
    if (index % 59 == 0 or plan.kernel == align.ALIGN) and not any(each in label for each in NO_CALLS)
}


@pytest.mark.parametrize("label", SAMPLE)
def test_the_command_for_a_kernel_builds_it(label: str, asked: list[Plan]) -> None:
    check_command(SAMPLE[label], asked)


ASKED = [st.just(()), *(st.just((each,)) for each in selection.FEATURES), st.just(("causal", "softcap", "unaligned"))]
LAYOUTS = st.sampled_from([None, Layout(0), Layout(8), Layout(4), Layout(0, backwards=True)])


@given(
    kind=st.builds(
        Kind,
        st.sampled_from([*selection.OPERATIONS]),
        st.sampled_from(["float16", "float32"]),
        st.sampled_from([24, 57, 128]),
        st.sampled_from([128, 57]),
        st.one_of(ASKED),
    ),
    lengths=st.builds(Lengths, st.integers(1, 400), *[st.sampled_from([1, 20, 60, 300, 9000, 20000])] * 2, RATIOS),
    layouts=st.tuples(LAYOUTS, st.sampled_from([None, Layout(0), Layout(8), Layout(4)])),
    arch=st.sampled_from(ARCHS),
    data=st.data(),
)
@settings(max_examples=examples(20, 40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_command_for_any_call_builds_its_kernel(
    kind: Kind, lengths: Lengths, layouts: tuple[Any, Any], arch: int, asked: list[Plan], data: st.DataObject
) -> None:
    kind = kind._replace(
        features=tuple(each for each in kind.features if each in selection.features_of(OPERATIONS[kind.operation]))
    )
    cached = data.draw(cached_of(kind, [1, 2, 24, 16, 64]))
    interleaved = data.draw(st.booleans())
    _, copies, plan = chosen(selection.problem_of(kind, lengths, *layouts, cached, interleaved), arch)
    check_command(plan, asked)
    if copies is not None:
        assert align.plan_for(arch) in asked


# --- Records ----------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "used.jsonl"
    monkeypatch.setenv("CUFA_RECORD", str(path))
    monkeypatch.setattr(_used, "_noted", set())
    monkeypatch.setattr(_used, "_failed", False)
    yield path


FACTS = [
    plans.static("bf16", 64, 64, mask="causal", softcap=True, alibi=True),
    plans.static("f16", 128, 64, mask="window", varlen=True, many=True),
    plans.static("f32", 32, 32, sinks=True),
]


def note_all() -> list[Plan]:
    noted = [plans.forward(facts, 90) for facts in FACTS]
    for plan, facts in zip(noted, FACTS, strict=True):
        _used.note(plan, facts, "attention")
    gradients = plans.backward(FACTS[0], 90, deterministic=True)
    _used.note(gradients, FACTS[0]._replace(deterministic=True), "attention_backward")
    _used.note(plans.aligned(90), None, "attention")
    caches = FACTS[0]._replace(few_rows=16, page_rows=16, rotary="halves", appends=True)
    cached = [choose(kernels, caches, 90) for kernels in (KVCACHE, PLANNING)]
    for plan, operation in zip(cached, ("attention_with_kvcache", "decode_plan"), strict=True):
        _used.note(plan, caches, operation)
    return [*noted, gradients, plans.aligned(90), *cached]


def test_what_is_recorded_is_chosen_again(record: Path) -> None:
    noted = note_all()
    note_all()  # once in a process
    assert len(record.read_text().splitlines()) == len(noted)
    uses, notices = _used.read(record)
    assert not notices
    assert selection.plans_used(uses, 90) == ([plan.bare for plan in noted], [])
    elsewhere, _ = selection.plans_used(uses, 80)
    assert [plan.arch for plan in elsewhere] == [80] * len(noted)
    assert elsewhere[0] == plans.forward(FACTS[0], 80).bare


def test_nothing_is_recorded_unless_asked(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFA_RECORD")
    note_all()
    assert not record.exists()


@pytest.mark.parametrize("torn", [1, 20, -2])
def test_a_torn_line_is_skipped_and_ends_no_other(torn: int, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = note_all()
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:2]) + lines[2][:torn])  # whose writer was killed
    monkeypatch.setattr(_used, "_noted", set())
    note_all()
    uses, notices = _used.read(record)
    assert selection.plans_used(uses, 90)[0] == [plan.bare for plan in noted]
    assert notices == ["line 3 is no record of a kernel, or a piece of one; it is skipped."]


@given(st.data())
@settings(max_examples=200)
def test_any_other_line_is_skipped(data: st.DataObject) -> None:
    """What becomes source is nothing but what cufa writes."""
    facts = FACTS[0]._asdict() | {"terms": ["softcap"]}
    line = {"cufa": "0.1", "kernel": "attention_forward_sm80", "arch": 80, "static": facts}
    name = data.draw(st.sampled_from([*facts]))
    value = data.draw(st.sampled_from([None, "f16; }", -1, 1.5, [], {}, "12", ["alibi; "]]))
    facts[name] = value
    if name == "terms" and value in ([], {}):
        return
    with pytest.raises((ValueError, TypeError, KeyError, _used._Skipped)):
        _used._use(json.loads(json.dumps(line)))


def test_a_record_of_another_version_is_skipped(record: Path) -> None:
    note_all()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    del lines[0]["static"]["short_rows"]
    record.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    uses, notices = _used.read(record)
    assert len(uses) == len(lines) - 1
    assert notices[0].startswith("line 1: it was written by cufa 0.1.0, which tells kernels apart otherwise than ")


class Own(Term):
    name = "own"
    header = "attention/own.cuh"
    type = "attention::Own"
    data = "OwnData"


def test_a_term_of_the_programs_own_is_told_of(record: Path) -> None:
    facts = FACTS[0]._replace(terms=(Own(),))
    _used.note(plans.forward(facts, 90), facts, "attention")
    uses, notices = _used.read(record)
    assert not uses
    assert notices == [
        "line 1: attention_forward_sm90 has the score term test_selection.Own, which is the program's own and cannot "
        "be compiled without it; it is skipped."
    ]


@pytest.mark.parametrize("kind", ["directory", "fifo", "nowhere", "full"])
def test_trouble_is_logged_once_and_fails_nothing(
    kind: str, record: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "directory":
        record.mkdir()
    elif kind == "fifo":
        os.mkfifo(record)
    elif kind == "nowhere":
        monkeypatch.setenv("CUFA_RECORD", str(record / "missing" / "file"))
    else:
        monkeypatch.setenv("CUFA_RECORD", "/dev/full")
    with caplog.at_level(logging.WARNING, "cufa"):
        note_all()
    (entry,) = caplog.records
    assert entry.getMessage().startswith("used kernels are not recorded: ")


def test_many_processes_append_whole_lines(record: Path) -> None:
    script = (
        "import plans\nfrom cufa._compile import used\n"
        "for head_dim in range(1, 257):\n"
        "    facts = plans.static('f16', head_dim, 64)\n"
        "    used.note(plans.forward(facts, 90), facts, 'attention')\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}) for _ in range(4)
    ]
    assert [each.wait() for each in running] == [0] * 4
    # One that sees half of another's line, across the border of a page, begins a new one, and leaves an empty one so.
    assert sum(map(bool, record.read_text().splitlines())) == 4 * 256
    uses, notices = _used.read(record)
    assert len(uses) == 256 and not notices


def test_kernels_that_the_sources_do_not_have_are_told_of() -> None:
    uses = [_used.Use("attention_forward_sm70", FACTS[0], 90)]
    assert selection.plans_used(uses, 90) == (
        [],
        ["there is no kernel attention_forward_sm70, which the record names; it is skipped."],
    )


def test_the_docs_tell_what_presets_hold() -> None:
    text = (ROOT / "docs" / "bundles.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w[^|]*) \| (\w+) \| ([\d, ]+) \| (.*) \| (\w+) \|$", text, re.MULTILINE)
    told = {
        (preset, spread, kind)
        for preset, operations, dtype, dims, masks, spread in rows
        for kind in selection.kinds_of(
            operations.split(", "),
            [dtype],
            map(int, dims.split(", ")),
            *(tuple(mask.split(" + ")) if mask != "none" else () for mask in masks.split(", ")),
        )
    }
    held = {each for each in PROMISES if each[0] != "full"}
    also = {each for each in PROMISES if each[0] == "full" and each[1:] not in {other[1:] for other in held}}
    assert told == held | also
    words = " ".join(text.split())
    for name in ("serving", "training", "usual"):
        assert f"**{name}**: {SPREADS[name].meaning}." in words


def test_operations_are_those_of_cufa() -> None:
    assert selection.OPERATIONS["attention"] is ATTENTION
    assert {*SPREADS} == {*CLAIMED, "every"}
