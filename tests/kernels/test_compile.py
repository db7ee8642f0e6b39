"""The rows of the tile tables compile without spills, and without a performance warning.

Every one for Hopper, half of them for sm_80, a third for each of the others; of these, and of the other grids, a part,
or with CUFA_TEST_ALL=1 all of them.

No GPU is needed. head_dims lie at the edges of the tables and between them. Several versions of NVRTC take turns; each
compiles every family of Configs. As a program, this checks plans with the NVRTC it is given, see `OtherNvrtc`.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import plans
import pytest
import sass
from plans import (
    ARCHS,
    BACKWARD,
    CACHES,
    EIGHT_BITS,
    FEATURES,
    FEW_ROWS,
    HEAD_DIMS,
    SHORT_TILES,
    cached,
    cached_many,
    compile_plan,
    few,
    short,
    static,
    static_memory,
)
from sampling import paired, sampled

from cufa._call.problem import Static
from cufa._compile import jit as _jit
from cufa._kernels import Kernel, Plan, choose
from cufa._kernels.kernel import SHARED_MEMORY, SIZEOF
from cufa._kernels.merge_states import MergeStates, MergeStatesBackward
from cufa._kernels.rotary import Rotary

NEWEST = "newest"
"""The NVRTC that cufa finds by itself."""
ELEMENTS = tuple(element for element in SIZEOF if element != "e4m3")
"""Those of arrays that are no caches."""
OLDER = ("12.9", "13.0")
NVRTCS = (*OLDER, NEWEST)


class OtherNvrtc:
    """A process that checks plans with another NVRTC: of one name only one library can be loaded into a process."""

    def __init__(self, libraries: list[Path]) -> None:
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
        command = [sys.executable, __file__, *map(str, libraries)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version = self._read()

    def check(self, plan: Plan) -> None:
        """`check_plan` there."""
        assert self.process.stdin is not None
        self.process.stdin.write(base64.b64encode(pickle.dumps(plan)).decode() + "\n")
        self.process.stdin.flush()
        failure = self._read()
        assert not failure, f"with NVRTC {self.version}: {failure}"

    def _read(self) -> str:
        assert self.process.stdout is not None
        answer: str = json.loads(self.process.stdout.readline() or '"the process has ended"')
        return answer


@functools.lru_cache
def other_nvrtc(version: str) -> OtherNvrtc:
    """The process for a version, which lives as long as this one."""
    libraries = sass.older_nvrtcs().get(version)
    if libraries is None:
        pytest.skip(f"needs NVRTC {version}, which make test installs")
    found = OtherNvrtc(libraries)
    assert found.version == version
    return found


def check(facts: Static, arch: int, nvrtc: str = NEWEST) -> None:
    check_with(nvrtc, plans.forward(facts, arch))


def check_backward(facts: Static, arch: int, deterministic: bool, nvrtc: str = NEWEST, average_rows: int = 128) -> None:
    check_with(nvrtc, plans.backward(facts, arch, deterministic, average_rows))


def check_with(nvrtc: str, plan: Plan) -> None:
    if nvrtc == NEWEST:
        check_plan(plan)
    else:
        other_nvrtc(nvrtc).check(plan)


def check_plan(plan: Plan) -> None:
    compiled = compile_plan(plan)
    taken = _jit.resources_of(compiled.log)
    # NVRTC 13.0 keeps two words of the warp that finds packed tiles in memory, where warpgroups have their own blocks.
    most = 8 if plan.name == "attention_forward_packed_sm90" and plan.config.own_blocks else 0
    assert taken.spill_bytes <= most, f"{plan.words()} spills {taken.spill_bytes} bytes"
    assert "C75" not in compiled.log, compiled.log
    assert taken.registers * max(step.threads for step in plan.steps) <= 1 << 16
    declared = static_memory(compiled.log)  # the launch asks for the rest
    for step in plan.steps:
        assert declared[step.entry] + step.smem_bytes <= SHARED_MEMORY[plan.arch]
    assert compiled.cubin[:4] == b"\x7fELF" and all(entry.encode() in compiled.cubin for entry in plan.entries)
    if plan.name.endswith("_sm90"):
        check_registers(plan.config, taken.registers)
        check_sass(plan, compiled.cubin)


def check_registers(config: Any, at_launch: int) -> None:
    """Warpgroups trade registers; more than a block starts with, and they would wait for them for ever."""
    consumers = config.num_threads // 128 - 1
    total = config.producer_registers + consumers * config.consumer_registers
    assert total <= (1 + consumers) * at_launch
    assert config.producer_registers % 8 == config.consumer_registers % 8 == 0


def check_sass(plan: Plan, cubin: bytes) -> None:
    """wgmma as written. More WARPGROUPs than products and waits would be waits that the compiler put in between."""
    functions = sass.disassemble(cubin)
    for name, (wgmmas, products, waits) in products_of(plan.config).items():
        if name in plan.entries and functions:
            count = sass.count(functions[name])
            assert (count["HGMMA"], count["WARPGROUP"]) == (wgmmas, products + waits), plan.words()
            assert not sass.wgmma_hazards(functions[name])
            assert not sass.lost_operands(functions[name]), plan.words()
            if name == "attention_forward_sm90" and not plan.config.variant:
                check_exponents(plan.config, functions[name])


def check_exponents(config: Any, instructions: list[sass.Instruction]) -> None:
    """What scales the scores is read where constants are: in a register it makes the loop 2% slower at head_dim 64."""
    multiply_adds = [each for each in instructions if each.opcode == "FFMA"]
    constant = [each for each in multiply_adds if re.search(r"\bUR\d|\bc\[", " ".join(each.operands))]
    assert len(constant) >= 3 * config.block_n // 2  # before the loop, in it, and on the way of the textbook


def products_of(config: Any) -> dict[str, tuple[int, int, int]]:
    """Of each kernel: wgmmas, products that these make up, and waits for them."""
    head_dim, head_dim_v = math.ceil(config.head_dim / 16), math.ceil(config.head_dim_v / 16)
    queries, keys = config.block_m // 16, config.block_n // 16
    # The first step, without dQ, is compiled apart in the one-pass kernel's tiles of 64 rows and under dense windows,
    # but for most terms.
    apart = config.block_m == 64 or (getattr(config, "part_blocks", 0) > 0 and not config.chains)
    steps = 2 if apart and all(term.bounded for term in config.variant) else 1
    return {
        # Twice: begun before the loop and ended after it.
        **dict.fromkeys(
            ("attention_forward_sm90", "attention_forward_packed_sm90", "attention_forward_cache_sm90"),
            (2 * (head_dim + keys), 4, 4),
        ),
        # S, dP, dV, dK and dQ, the last also after the loop.
        "attention_backward_sm90": (
            steps * (head_dim + head_dim_v + 2 * queries) + 2 * keys,
            4 * steps + 2,
            4 * steps + 1,
        ),
        "attention_backward_split_keys_sm90": (head_dim + head_dim_v + 2 * queries, 4, 6),
        "attention_backward_split_queries_sm90": (head_dim + head_dim_v + keys, 3, 5 if config.variant else 4),
    }


def test_sass_is_read() -> None:
    if not sass.packages("cu13"):
        pytest.skip("needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    plan = plans.backward(static("bf16", 64, 64), 90, False)
    functions = sass.disassemble(compile_plan(plan).cubin)
    assert sorted(functions) == sorted(plan.entries)
    assert [name for name in plan.entries if sass.count(functions[name])["HGMMA"] > 0] == [plan.name]


def test_two_passes_begin_when_the_kernels_before_have_ended() -> None:
    """That over keys waits for them before it lets that over queries begin, of which one block at least waits too."""
    if not sass.packages("cu13"):
        pytest.skip("needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    functions = sass.disassemble(compile_plan(plans.backward(static("bf16", 256, 256), 90, False)).cubin)
    keys, queries = (
        [each.opcode for each in functions[f"attention_backward_split_{side}_sm90"]] for side in ("keys", "queries")
    )
    assert keys.index("ACQBULK") < keys.index("PREEXIT")
    assert "ACQBULK" in queries[queries.index("PREEXIT") :]


@pytest.mark.parametrize(
    ("instruction", "hazard"),
    [
        ("FADD R8, R9, R10", False),
        ("FADD R44, R9, R10", True),  # writes A
        ("FADD R8, R44, R10", False),
        ("FADD R8, R9, R31", True),  # reads D
        ("@P0 LDS.128 R41, [R3]", True),  # writes into A
        ("IMAD.WIDE.U32 R39, R8, R9, RZ", True),
        ("SHFL.BFLY PT, R47, R8, 0x1, 0x1f", True),
        ("SHFL.BFLY PT, R8, R47, 0x1, 0x1f", False),
        ("ISETP.NE.AND P0, PT, R44, RZ, PT", False),
        ("@P0 BRA 0x0060", True),  # round the wait
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", False),
    ],
)
def test_hazards_are_seen(instruction: str, hazard: bool) -> None:
    lines = [
        "HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR4], R24",
        "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24, gsb0",
        instruction,
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "FADD R24, R24, R44",
        "EXIT",
        "FADD R44, R24, R24",
        "EXIT",
    ]
    listing = "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
    assert bool(sass.wgmma_hazards(sass.parse(listing))) == hazard


@pytest.mark.parametrize(("written", "lost"), [("R44", False), ("R43", True), ("R40", True), ("R36", False)])
def test_operands_that_a_loop_overwrites_are_seen(written: str, lost: bool) -> None:
    """Two wgmmas have four registers each for A. Those from R40 on are loaded before the loop."""
    lines = [
        "LDSM.16.M88.4 R40, [R3]",
        "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], RZ, !UPT, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        f"F2FP.BF16.F32.PACK_AB {written}, R25, R24",
        "HGMMA.64x16x16.F32.BF16 R8, R44, gdesc[UR4], R8, gsb0",
        "@P0 BRA 0x0010",
        "EXIT",
    ]
    listing = "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
    found = sass.lost_operands(sass.parse(listing))
    assert [each.address for each in found] == ([0x10] if lost else [])


class Cell(NamedTuple):
    """One kernel of the forward, and who compiles it."""

    element: str
    features: str
    arch: int
    head_dims: tuple[int, int]
    nvrtc: str

    @property
    def plan(self) -> Plan:
        return plans.forward(static(self.element, *self.head_dims, **FEATURES[self.features]), self.arch)


def cells(element: str, features: str, arch: int) -> Iterator[Cell]:
    """Every row of the tables, by one NVRTC in turn; one of those whose tiles leave no register over by each.

    The table of float32 is the same for all architectures, so a third of its rows do on each; that of bfloat16 is much
    the same for all but Hopper, so half do on sm_80. Hopper's own kernel has as many sequences as there are.
    """
    turn = ARCHS.index(arch) + list(FEATURES).index(features)
    fullest = ((64, 64), (128, 128), (256, 256)) if arch == 90 else ((96, 96), (128, 128), (128, 128))
    of = 3
    if element == "bf16" and arch in (80, 90):
        of = 1 if arch == 90 and features != "many" else 2
    for row, head_dims in enumerate(HEAD_DIMS):
        if (turn + row) % of:
            continue
        nvrtcs: tuple[str, ...] = (NVRTCS[(turn + row) // of % len(NVRTCS)],)
        if element == "bf16" and head_dims == fullest[turn % 3]:
            nvrtcs = NVRTCS
        for nvrtc in nvrtcs:
            yield Cell(element, features, arch, head_dims, nvrtc)


OF_TABLES = [pair for pair in itertools.product(FEATURES, ARCHS) if pair[1] == 90 or pair in paired(FEATURES, ARCHS)]


@pytest.mark.parametrize(("of", "element"), paired(OF_TABLES, ["bf16", "f32"]), ids=str)
def test_every_row_of_the_tables(of: tuple[str, int], element: str) -> None:
    features, arch = of
    turn = ARCHS.index(arch) + list(FEATURES).index(features)
    for cell in sampled(cells(element, features, arch), turn, 7):
        check_with(cell.nvrtc, cell.plan)


def test_every_nvrtc_compiles_every_family() -> None:
    """A family is a kernel with an element, and the tiles that head_dims have. With CUFA_TEST_ALL=1; else by turns."""
    found: dict[Any, set[str]] = {}
    for element, features, arch in itertools.product(("bf16", "f32"), FEATURES, ARCHS):
        for cell in cells(element, features, arch):
            found.setdefault((cell.plan.name, element, cell.head_dims), set()).add(cell.nvrtc)
    assert len(found) == 3 * len(HEAD_DIMS) and all(nvrtcs == set(NVRTCS) for nvrtcs in found.values())


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_what_hopper_leaves_to_the_other_kernel(nvrtc: str) -> None:
    """Aligned rows that no tensor map can describe."""
    masks = {64: ("none", "causal"), 96: ("causal", "window"), 128: ("none", "window"), 256: ("none",)}
    problems = [(head_dim, mask) for head_dim, names in masks.items() for mask in names]
    for head_dim, mask in sampled(problems, NVRTCS.index(nvrtc), 3):
        check(static("bf16", head_dim, head_dim, mask=mask, tma=False), 90, nvrtc)


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_rows_without_keys(nvrtc: str) -> None:
    problems = (64, "none"), (128, "causal"), (192, "window"), (256, "causal")
    for head_dim, mask in sampled(problems, NVRTCS.index(nvrtc), 3):
        check(static("bf16", head_dim, head_dim, mask=mask, short=mask == "causal", empty_rows=True), 90, nvrtc)


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_packed_tiles_that_are_taken(nvrtc: str) -> None:
    """What finds them has the fewest registers where there are chains."""
    problems = (64, "window"), (128, "none"), (192, "none"), (256, "window")
    for head_dim, mask in sampled(problems, NVRTCS.index(nvrtc), 3):
        facts = static("bf16", head_dim, head_dim, mask=mask, varlen=True, many_tiles=True, chains=mask == "none")
        plan = plans.forward(facts, 90)
        assert plan.name == "attention_forward_packed_sm90" and plan.config.own_blocks == (mask == "window")
        check_with(nvrtc, plan)


@pytest.mark.parametrize("features", sampled(FEATURES))
def test_float16_like_bfloat16(features: str) -> None:
    for head_dim in sampled((64, 128, 256), list(FEATURES).index(features), 3):
        check(static("f16", head_dim, head_dim, **FEATURES[features]), 90)


@pytest.mark.parametrize("copy_bytes", [4, 8])
def test_narrow_copies(copy_bytes: int) -> None:
    for head_dim in sampled((64, 128, 256), copy_bytes // 8):
        check(static("bf16", head_dim, head_dim, mask="causal", copy_bytes=copy_bytes, store_bytes=copy_bytes), 90)


@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
def test_what_copies_arrays_that_are_not_aligned(arch: int) -> None:
    plan = plans.aligned(arch)
    for nvrtc in NVRTCS if arch in ARCHS else (NEWEST,):
        check_with(nvrtc, plan)
    compiled = compile_plan(plan)
    threads = plan.config.num_threads * plan.config.blocks_per_sm
    assert "warning" not in compiled.log  # of more threads than an SM holds
    assert _jit.resources_of(compiled.log).registers * threads <= 1 << 16


@pytest.mark.parametrize("kernel", [MergeStates(), MergeStatesBackward()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("element", ELEMENTS)
def test_what_merges_states(element: str, kernel: Kernel) -> None:
    for turn, arch in enumerate(ARCHS):
        for copy_bytes in sampled((SIZEOF[element], 16), turn):
            facts = static(element, 96, 96, copy_bytes=copy_bytes, store_bytes=copy_bytes)
            check_with(NVRTCS[turn % 3], choose((kernel,), facts, arch))


@pytest.mark.parametrize("element", ELEMENTS)
def test_rotary_embeddings(element: str) -> None:
    for turn, (arch, layout) in enumerate(itertools.product(ARCHS, ("interleaved", "halves"))):
        for copy_bytes in sampled((SIZEOF[element], 16), turn):
            facts = static(element, 96, 96, copy_bytes=copy_bytes, store_bytes=copy_bytes, rotary=layout)
            check_with(NVRTCS[turn % 3], choose((Rotary(),), facts, arch))


@pytest.mark.parametrize("features", ["causal", "everything"])
def test_copies_of_rows_of_any_width(features: str) -> None:
    """Read 16 bytes at a time; results are written as their own rows allow."""
    for turn, head_dim in sampled(enumerate((33, 65, 129, 1, 100)), features == "causal", 3):
        facts = static("f16", head_dim, head_dim, **FEATURES[features])
        check(facts, 90, NVRTCS[turn % 3])
        check(facts, 80, NVRTCS[(turn + 1) % 3])


@pytest.mark.parametrize(
    ("features", "deterministic", "head_dims"),
    [
        ("plain", False, ((64, 64), (128, 128), (256, 256))),
        ("causal", True, ((64, 64), (128, 128))),
        ("packed", False, ((64, 64), (128, 128), (40, 56), (192, 192))),
        ("window", True, ((32, 32), (96, 96), (192, 128))),
        ("slopes", False, ((64, 64), (128, 64))),
        ("everything", True, ((64, 64), (128, 128), (256, 256))),
        ("everything", False, ((64, 128), (96, 200))),
        ("elementwise results", False, ((128, 96), (33, 65), (129, 129))),
    ],
)
def test_gradients_with_wgmma(features: str, deterministic: bool, head_dims: tuple[tuple[int, int], ...]) -> None:
    start = list(BACKWARD).index(features)
    for turn, (head_dim, head_dim_v) in sampled(enumerate(head_dims, start=start), start, 4):
        facts = static("bf16", head_dim, head_dim_v, **BACKWARD[features])
        check_backward(facts, 90, deterministic, NVRTCS[turn % len(NVRTCS)])


@pytest.mark.parametrize("nvrtc", NVRTCS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_score_terms_of_gradients_by_every_nvrtc(head_dim: int, nvrtc: str) -> None:
    """Each score term under each mask by one of them in turn; what fills the registers by all."""
    terms = itertools.product((False, True), (False, True), ("none", "causal", "window"))
    for turn, (softcap, alibi, mask) in sampled(enumerate(terms), NVRTCS.index(nvrtc) + head_dim // 128, 9):
        fullest = head_dim == 128 and softcap and not alibi
        if not fullest and (turn + NVRTCS.index(nvrtc)) % 3:
            continue
        element, varlen, deterministic = ("bf16", "f16")[turn % 2], turn % 4 > 1, turn % 3 == 0
        facts = static(element, head_dim, head_dim, mask=mask, softcap=softcap, alibi=alibi, varlen=varlen)
        check_backward(facts, 90, deterministic, nvrtc)
        if fullest:
            check_backward(facts, 90, not deterministic, nvrtc)


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_terms_that_bend_scores_by_themselves(nvrtc: str) -> None:
    """Where low softcaps have four warpgroups, and gradients begin dP before the exponentials."""
    four = static("bf16", 64, 64, softcap=True)
    assert plans.forward(four, 90).config.block_m == 256
    for facts in (four, static("f16", 128, 128, softcap=True), static("bf16", 64, 64, large_softcap=True)):
        check(facts, 90, nvrtc)
    for head_dim, mask in ((64, "none"), (128, "causal")):
        check_backward(static("bf16", head_dim, head_dim, mask=mask, large_softcap=True), 90, False, nvrtc)


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_two_passes_beside_products_as_wide_as_those_of_what_they_hold(nvrtc: str) -> None:
    """K, V and q are held in registers, but not where NVRTC would lose them: `sass.lost_operands`."""
    check_backward(static("bf16", 192, 64, mask="causal"), 90, False, nvrtc)
    check_backward(static("bf16", 64, 192), 90, False, nvrtc)
    for head_dims in ((64, 64), (100, 60)):
        check_backward(static("bf16", *head_dims, **BACKWARD["packed"]), 90, False, nvrtc, average_rows=1)


@pytest.mark.parametrize(("average_rows", "features"), paired([0, 16], ["packed", "everything"]))
def test_gradients_of_short_sequences(features: str, average_rows: int) -> None:
    """Without sums of dq, or with small tiles of them."""
    for head_dim in sampled((64, 96, 128), average_rows // 16 + (features == "packed")):
        check_backward(static("bf16", head_dim, head_dim, **BACKWARD[features]), 90, False, average_rows=average_rows)


@pytest.mark.parametrize(("arch", "element"), paired([80, 86, 100, 120], ["bf16", "f32"]))
def test_gradients_for_every_gpu(element: str, arch: int) -> None:
    """Every row of the table on half of the architectures, each with other features."""
    features = ("elementwise", "everything", "packed", "window")
    head_dims = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256))
    start = (80, 86, 100, 120).index(arch)
    for row in sampled((row for row in range(5) if (row + start) % 2 != (element == "f32")), start // 2):
        turn, (head_dim, head_dim_v) = row + start, head_dims[row]
        facts = static(element, head_dim, head_dim_v, **BACKWARD[features[turn // 2 % 4]])
        check_backward(facts, arch, turn % 3 == 0, NVRTCS[turn % 3], 16 if turn // 2 % 2 else 128)


def test_gradients_that_wgmma_does_not_serve() -> None:
    for element, head_dim, head_dim_v, features in (("f32", 128, 40, "window"), ("f16", 57, 256, "elementwise")):
        check_backward(static(element, head_dim, head_dim_v, **BACKWARD[features]), 90, True)


def thirds(start: int) -> list[tuple[int, tuple[int, int]]]:
    """A third of the rows of a table with their numbers, another one for each `start`; of these one is sampled."""
    rows = ((row, head_dims) for row, head_dims in enumerate(HEAD_DIMS) if (row + start) % 3 == 0)
    return sampled(rows, start // 3, 3)


@pytest.mark.parametrize(("arch", "element"), paired(ARCHS, ["bf16", "f32"]))
def test_tiles_of_short_sequences(element: str, arch: int) -> None:
    """A third of the rows on each architecture, each with other tiles and features, in both directions."""
    for row, head_dims in thirds(ARCHS.index(arch)):
        turn = row + ARCHS.index(arch)
        if element == "f32" and max(head_dims) > 128:
            continue
        tile = SHORT_TILES[(turn // 3 + row) % 6]
        if element == "f32":
            tile = tile[0], min(tile[1], 32)
        forward, backward = (list(table.values())[(turn + row) % len(table)] for table in (FEATURES, BACKWARD))
        check(short(element, head_dims, tile, forward), arch, NVRTCS[row % 3])
        check_backward(short(element, head_dims, tile, backward), arch, row % 2 == 0, NVRTCS[row % 3], 16)


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_tiles_of_short_sequences_that_have_most_registers(nvrtc: str) -> None:
    """And those that are usual, each by one in turn."""
    usual = itertools.product((((64, 64), (16, 16)), ((256, 256), (16, 32))), ("plain", "many", "elementwise"))
    for turn, ((head_dims, tile), features) in enumerate(usual):
        if (turn + turn // 3 + NVRTCS.index(nvrtc)) % 3 == 0:
            check(short("bf16", head_dims, tile, FEATURES[features]), 90, nvrtc)
    most: tuple[Any, ...] = (
        ("bf16", (64, 64), (16, 16), "packed"),
        ("bf16", (128, 128), (32, 16), "everything"),
        ("bf16", (192, 192), (16, 16), "elementwise"),
        ("bf16", (256, 256), (32, 32), "elementwise"),
        ("f32", (128, 128), (32, 16), "everything"),
    )
    for element, head_dims, tile, features in sampled(most, NVRTCS.index(nvrtc), 6):
        check_backward(short(element, head_dims, tile, BACKWARD[features]), 90, True, nvrtc, 16)


@pytest.mark.parametrize(("arch", "element"), paired(ARCHS, ["bf16", "f32"]))
def test_tiles_of_few_rows(element: str, arch: int) -> None:
    """A third of the rows on each architecture, each with other tiles and features."""
    for row, head_dims in thirds(ARCHS.index(arch)):
        turn = row + ARCHS.index(arch)
        rows = (16, 32, 64)[(turn // 3 + row) % 3]
        if element == "f32" and rows == 64 and max(head_dims) > 128:
            continue
        check(few(element, head_dims, rows, list(FEW_ROWS.values())[(turn + row) % 6]), arch, NVRTCS[row % 3])


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_tiles_of_few_rows_that_have_most_registers(nvrtc: str) -> None:
    """And those that are usual, each by one in turn."""
    for turn, (head_dim, rows) in enumerate(itertools.product((64, 128), (16, 32, 64))):
        if (turn + turn // 3 + NVRTCS.index(nvrtc)) % 3 == 0:
            check(few("bf16", (head_dim, head_dim), rows, FEW_ROWS["plain"]), 90, nvrtc)
    most = (
        ("bf16", (256, 256), 64, "everything"),
        ("f16", (256, 256), 16, "narrow"),
        ("bf16", (40, 57), 32, "elementwise"),
        ("f32", (128, 128), 64, "causal"),
        ("f32", (256, 256), 16, "everything"),
    )
    for element, head_dims, rows, features in sampled(most, NVRTCS.index(nvrtc), 6):
        check(few(element, head_dims, rows, FEW_ROWS[features]), 90, nvrtc)


@pytest.mark.parametrize(("arch", "element"), paired(ARCHS, ["bf16", "f32"]))
def test_tiles_over_caches(element: str, arch: int) -> None:
    """A third of the rows on each architecture, each with other tiles and features."""
    for row, head_dims in thirds(ARCHS.index(arch)):
        turn = row + ARCHS.index(arch)
        rows = (16, 32, 64)[(turn // 3 + row) % 3]
        features = list(CACHES.values())[(turn + row) % len(CACHES)]
        check_with(NVRTCS[row % 3], cached(element, head_dims, rows, features, arch))


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_tiles_over_caches_that_have_most_registers(nvrtc: str) -> None:
    most = (
        ("bf16", (128, 128), (16, 32, 64)[NVRTCS.index(nvrtc)], "packed"),
        ("bf16", (128, 128), 64, "everything"),
        ("f16", (256, 256), 64, "paged"),
        ("f32", (128, 128), 64, "packed"),
    )
    for element, head_dims, rows, features in sampled(most, NVRTCS.index(nvrtc), 6):
        check_with(nvrtc, cached(element, head_dims, rows, CACHES[features], 90))


@pytest.mark.parametrize(("arch", "element"), paired([80, 89, 90], ["bf16", "f16"]))
def test_tiles_over_caches_of_eight_bits(element: str, arch: int) -> None:
    """Without and with an instruction that converts, on each architecture a third of the rows with other features."""
    start = arch + (element == "f16")
    for row, head_dims in thirds(start):
        rows = (16, 32, 64)[((row + start) // 3 + row) % 3]
        features = list(EIGHT_BITS.values())[(start + 2 * row) % len(EIGHT_BITS)]
        check_with(NVRTCS[row % 3], cached(element, head_dims, rows, features, arch))


@pytest.mark.parametrize("nvrtc", NVRTCS)
def test_tiles_over_caches_of_eight_bits_that_have_most_registers(nvrtc: str) -> None:
    most = (
        ("bf16", (128, 128), (16, 32, 64)[NVRTCS.index(nvrtc)], "packed"),
        ("bf16", (128, 128), 64, "everything"),
        ("bf16", (256, 256), 64, "paged"),
        ("f16", (64, 64), 16, "rotary"),
    )
    for element, head_dims, rows, features in sampled(most, NVRTCS.index(nvrtc), 6):
        check_with(nvrtc, cached(element, head_dims, rows, EIGHT_BITS[features], 90))


def test_wgmma_leaves_caches_of_eight_bits_to_the_other_kernel() -> None:
    plan = cached_many("bf16", (128, 128), EIGHT_BITS["plain"] | {"few_rows": 64})
    assert plan.name == "attention_forward_cache_sm80" and "e4m3 caches" in plan.words()
    assert "converted in registers" in plan.reason


@pytest.mark.parametrize(
    ("features", "nvrtc"), sampled(paired(["plain", "paged", "packed", "everything", "rotary"], NVRTCS))
)
def test_tiles_over_caches_on_hopper(features: str, nvrtc: str) -> None:
    """Of queries that fill large tiles. Pages of a single row, which tensor copies cannot load, are of 8 here.

    Every row with half of the features, by one NVRTC in turn.
    """
    facts = CACHES[features]
    facts = facts | {"page_rows": max(8, facts["page_rows"])} if "page_rows" in facts else facts
    turn = list(CACHES).index(features)
    rows = (row for row in range(NVRTCS.index(nvrtc), len(HEAD_DIMS), 3) if (row + turn) % 2 == 0)
    for row in sampled(rows, turn, 4):
        own = facts | ({"pack": 4} if features == "plain" and row % 2 else {})
        plan = cached_many(("bf16", "f16")[row % 2], HEAD_DIMS[row], own)
        assert plan.name == "attention_forward_cache_sm90"
        check_with(nvrtc, plan)


@pytest.mark.parametrize(("arch", "head_dim"), [(None, 64), (80, 64), (90, 64), (90, 256)])
def test_a_config_that_disagrees_with_the_tiles_does_not_compile(arch: int | None, head_dim: int) -> None:
    """Of the forward, and of each kernel of the gradients."""
    facts = static("bf16", head_dim, head_dim)
    plan = plans.forward(facts, 80) if arch is None else plans.backward(facts, arch, False)
    wrong = plan._replace(config=dataclasses.replace(plan.config, smem_bytes=plan.config.smem_bytes - 16))
    with pytest.raises(_jit.CompileError, match="disagree on shared memory"):
        compile_plan(wrong)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("params", b"i32 num_heads_q, qheads_per_khead;"),
        ("backward_params", b"const void* dout;\n  const float* dlse;"),
        ("align", b"const void* sources[arrays];\n  void* copies[arrays];"),
    ],
)
def test_a_struct_that_is_read_wrongly_does_not_compile(name: str, member: bytes) -> None:
    """Here the header has changed since it was read."""
    plan: Plan = plans.backward(static("bf16", 64, 64), 80, False)
    if name == "align":
        plan = plans.aligned(80)
    unit = _jit.unit_of(plan)
    headers = dict(unit.headers)
    name = f"attention/{name}.cuh"
    first, second = re.findall(rb"\w+(?=[,;[])", member)
    swapped = member.replace(first, b"_").replace(second, first).replace(b"_", second)
    headers[name] = headers[name].replace(member, swapped)
    assert headers[name] != _jit.headers()[name]
    with pytest.raises(_jit.CompileError, match="static assertion failed"):
        _jit.compile_unit(unit._replace(headers=headers))


def test_another_nvrtc_tells_what_is_wrong() -> None:
    """And goes on: with a plan that it cannot compile before one that it can."""
    other = other_nvrtc("12.9")
    plan = plans.forward(static("bf16", 64, 64), 80)
    wrong = plan._replace(config=dataclasses.replace(plan.config, smem_bytes=plan.config.smem_bytes - 16))
    with pytest.raises(AssertionError, match=r"with NVRTC 12\.9: (.|\n)*disagree on shared memory"):
        other.check(wrong)
    other.check(plan)


def main() -> None:
    for library in sys.argv[1:]:  # the first of that name to be loaded is the one that is used
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    print(json.dumps("{}.{}".format(*_jit.nvrtc().version)), flush=True)
    for line in sys.stdin:
        try:
            check_plan(pickle.loads(base64.b64decode(line)))
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps(failure), flush=True)


if __name__ == "__main__":
    main()
