"""Every row of the tile tables compiles for every architecture: without spills, and without a performance warning.

No GPU is needed. head_dims lie at the edges of the tables and between them. As a program, this compiles the rows of
sm_90 with the NVRTC it is given: python tests/test_compile.py FEATURES LIBRARY...
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sass

from cufa import _configs, _jit, _plan
from cufa._problem import Static

ARCHS = (80, 86, 90, 100, 120)
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (40, 57), (64, 128), (192, 128))
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal"},
    "short": {"mask": "causal", "short": True},
    "sharing": {"pack": 4, "mask": "causal", "short": True},
    "window": {"mask": "window"},
    "packed": {"mask": "causal", "short": True, "varlen": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "varlen": True},
    "elementwise": {"mask": "causal", "varlen": True, "copy_bytes": 0, "store_bytes": 0},
}


def static(element: str, head_dim: int, head_dim_v: int, **features: Any) -> Static:
    size = _configs.SIZEOF[element]
    facts: dict[str, Any] = {"mask": "none", "softcap": False, "alibi": False, "sinks": False, "varlen": False}
    facts |= {"tma": features.get("copy_bytes", 16) == 16, "short": False}
    facts |= {"copy_bytes": 16, "store_bytes": max(size, math.gcd(16, head_dim_v * size))} | features
    facts |= {name: facts[name] or size for name in ("copy_bytes", "store_bytes")}
    return Static(element=element, head_dim=head_dim, head_dim_v=head_dim_v, **facts)


def compile_plan(plan: _plan.Plan) -> _jit.Compiled:
    return _jit.compile_source(_jit.source_of(plan), _jit.options_of(_jit.target_of(plan)), _jit.describe(plan))


def check(facts: Static, arch: int) -> None:
    check_plan(_plan.make_plan(facts, arch))


def check_backward(facts: Static, arch: int, deterministic: bool) -> None:
    check_plan(_plan.make_backward_plan(facts, arch, deterministic))


def check_plan(plan: _plan.Plan) -> None:
    compiled = compile_plan(plan)
    taken = _jit.resources_of(compiled.log)
    assert taken.spill_bytes == 0, f"{_jit.describe(plan)} spills {taken.spill_bytes} bytes"
    assert "C75" not in compiled.log, compiled.log
    assert taken.registers * max(plan.threads) <= 1 << 16
    declared = static_memory(compiled.log)  # the launch asks for the rest
    for entry, asked in zip(plan.entries, plan.smem_bytes, strict=True):
        assert declared[entry] + asked <= _configs.SHARED_MEMORY[plan.arch]
    assert compiled.cubin[:4] == b"\x7fELF" and all(entry.encode() in compiled.cubin for entry in plan.entries)
    if plan.kernel.endswith("_sm90"):
        check_registers(plan.config, taken.registers)
        check_sass(plan, compiled.cubin)


def static_memory(log: str) -> dict[str, int]:
    """Bytes of shared memory that the code of each entry declares, from what ``--ptxas-options=-v`` logs."""
    sizes = {}
    for entry in log.split("Compiling entry function '")[1:]:
        used = re.search(r"Used \d+ registers.*", entry)
        assert used is not None, log
        declared = re.search(r"(\d+) bytes smem", used[0])
        sizes[entry.partition("'")[0]] = int(declared[1]) if declared else 0
    return sizes


def check_registers(config: Any, at_launch: int) -> None:
    """Warpgroups trade registers; more than a block starts with, and they would wait for them for ever."""
    consumers = config.num_threads // 128 - 1
    total = config.producer_registers + consumers * config.consumer_registers
    assert total <= (1 + consumers) * at_launch
    assert config.producer_registers % 8 == config.consumer_registers % 8 == 0


def check_sass(plan: _plan.Plan, cubin: bytes) -> None:
    """wgmma as written. More WARPGROUPs than products and waits would be waits that the compiler put in between."""
    functions = sass.disassemble(cubin)
    for name, (wgmmas, products, waits) in products_of(plan.config).items():
        if name in plan.entries and functions:
            count = sass.count(functions[name])
            assert (count["HGMMA"], count["WARPGROUP"]) == (wgmmas, products + waits), _jit.describe(plan)
            assert not sass.wgmma_hazards(functions[name])


def products_of(config: Any) -> dict[str, tuple[int, int, int]]:
    """Of each kernel: wgmmas, products that these make up, and waits for them."""
    head_dim, head_dim_v = math.ceil(config.head_dim / 16), math.ceil(config.head_dim_v / 16)
    queries, keys = config.block_m // 16, config.block_n // 16
    return {
        # Twice: begun before the loop and ended after it.
        "attention_forward_sm90": (2 * (head_dim + keys), 4, 4),
        # S, dP, dV, dK and dQ, the last also after the loop.
        "attention_backward_sm90": (head_dim + head_dim_v + 2 * queries + 2 * keys, 6, 5),
        "attention_backward_split_keys_sm90": (head_dim + head_dim_v + 2 * queries, 4, 6),
        "attention_backward_split_queries_sm90": (head_dim + head_dim_v + keys, 3, 5 if config.variant else 4),
    }


def test_sass_is_read() -> None:
    if not sass.packages("cu13"):
        pytest.skip("needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    plan = _plan.make_backward_plan(static("bf16", 64, 64), 90, False)
    functions = sass.disassemble(compile_plan(plan).cubin)
    assert sorted(functions) == sorted(plan.entries)
    assert [name for name in plan.entries if sass.count(functions[name])["HGMMA"] > 0] == [plan.kernel]


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


@pytest.mark.parametrize("features", FEATURES)
def test_the_oldest_nvrtc_too(features: str) -> None:
    found = [package / "lib" for package in sass.packages("cuda_nvrtc")]
    libraries = [str(path) for lib in found for path in sorted(lib.glob("libnvrtc*.so.*")) if "alt" not in path.name]
    if not libraries:
        pytest.skip("needs nvidia-cuda-nvrtc-cu12")
    command = [sys.executable, __file__, features, *libraries]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(rf"NVRTC 12\.\d+: {len(HEAD_DIMS)} rows", run.stdout)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("element", ["bf16", "f32"])
def test_every_row_of_the_tables(element: str, features: str, arch: int) -> None:
    for head_dim, head_dim_v in HEAD_DIMS:
        check(static(element, head_dim, head_dim_v, **FEATURES[features]), arch)


@pytest.mark.parametrize("features", FEATURES)
def test_float16_like_bfloat16(features: str) -> None:
    for head_dim in (64, 128, 256):
        check(static("f16", head_dim, head_dim, **FEATURES[features]), 90)


@pytest.mark.parametrize("copy_bytes", [4, 8])
def test_narrow_copies(copy_bytes: int) -> None:
    for head_dim in (64, 128, 256):
        check(static("bf16", head_dim, head_dim, mask="causal", copy_bytes=copy_bytes, store_bytes=copy_bytes), 90)


BACKWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal"},
    "packed": {"mask": "causal", "varlen": True},
    "window": {"mask": "window", "sinks": True},
    "slopes": {"alibi": True},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "varlen": True},
    "elementwise": {"mask": "causal", "varlen": True, "copy_bytes": 0, "store_bytes": 0},
    "elementwise results": {"mask": "causal", "varlen": True, "copy_bytes": 0, "store_bytes": 0, "tma": True},
}


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
        ("elementwise results", False, ((128, 96),)),
    ],
)
def test_gradients_with_wgmma(features: str, deterministic: bool, head_dims: tuple[tuple[int, int], ...]) -> None:
    for head_dim, head_dim_v in head_dims:
        check_backward(static("bf16", head_dim, head_dim_v, **BACKWARD[features]), 90, deterministic)


@pytest.mark.parametrize("arch", [80, 86, 100, 120])
@pytest.mark.parametrize("element", ["bf16", "f32"])
def test_gradients_for_every_gpu(element: str, arch: int) -> None:
    """Every row of the table, each with other features on each architecture."""
    features = ("elementwise", "everything", "packed", "window")
    head_dims = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256))
    for row, (head_dim, head_dim_v) in enumerate(head_dims):
        turn = row + (80, 86, 100, 120).index(arch)
        check_backward(static(element, head_dim, head_dim_v, **BACKWARD[features[turn % 4]]), arch, turn % 3 == 0)


def test_gradients_that_wgmma_does_not_serve() -> None:
    for element, head_dim, head_dim_v, features in (("f32", 128, 40, "window"), ("f16", 57, 256, "elementwise")):
        check_backward(static(element, head_dim, head_dim_v, **BACKWARD[features]), 90, True)


@pytest.mark.parametrize(("arch", "head_dim"), [(None, 64), (80, 64), (90, 64), (90, 256)])
def test_a_config_that_disagrees_with_the_tiles_does_not_compile(arch: int | None, head_dim: int) -> None:
    """Of the forward, and of each kernel of the gradients."""
    facts = static("bf16", head_dim, head_dim)
    plan = _plan.make_plan(facts, 80) if arch is None else _plan.make_backward_plan(facts, arch, False)
    wrong = plan._replace(config=dataclasses.replace(plan.config, smem_bytes=plan.config.smem_bytes - 16))
    with pytest.raises(_jit.CompileError, match="disagree on shared memory"):
        compile_plan(wrong)


@pytest.mark.parametrize(
    ("name", "member"),
    [("params", b"float softmax_scale, softcap;"), ("backward_params", b"const void* dout;\n  const float* dlse;")],
)
def test_params_that_disagree_do_not_compile(monkeypatch: pytest.MonkeyPatch, name: str, member: bytes) -> None:
    plan = _plan.make_backward_plan(static("bf16", 64, 64), 80, False)
    headers = dict(_jit.headers())
    name = f"attention/{name}.cuh"
    first, second = re.findall(rb"\w+(?=[,;])", member)
    swapped = member.replace(first, b"_").replace(second, first).replace(b"_", second)
    headers[name] = headers[name].replace(member, swapped)
    assert headers[name] != _jit.headers()[name]
    monkeypatch.setattr(_jit, "headers", lambda: headers)
    with pytest.raises(_jit.CompileError, match="static assertion failed"):
        compile_plan(plan)


def main() -> None:
    for library in sys.argv[2:]:  # the first of that name to be loaded is the one that is used
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    for head_dim, head_dim_v in HEAD_DIMS:
        check(static("bf16", head_dim, head_dim_v, **FEATURES[sys.argv[1]]), 90)
    if sys.argv[1] == "everything":
        for head_dim in (64, 128, 256):
            check_backward(static("bf16", head_dim, head_dim, **BACKWARD["everything"]), 90, True)
    print("NVRTC {}.{}:".format(*_jit.nvrtc().version), len(HEAD_DIMS), "rows")


if __name__ == "__main__":
    main()
