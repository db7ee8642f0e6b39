"""Every row of the tile tables compiles for every architecture: without spills, and without a performance warning.

No GPU is needed. head_dims lie at the edges of the tables and between them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from cufa import _configs, _jit, _plan
from cufa._problem import Static

ARCHS = (80, 86, 90, 100, 120)
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (40, 57), (64, 128), (192, 128))
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal"},
    "everything": {"mask": "window", "softcap": True, "alibi": True, "sinks": True, "varlen": True},
    "elementwise": {"mask": "causal", "varlen": True, "copy_bytes": 0, "store_bytes": 0},
}


def static(element: str, head_dim: int, head_dim_v: int, **features: Any) -> Static:
    size = _configs.SIZEOF[element]
    facts: dict[str, Any] = {"mask": "none", "softcap": False, "alibi": False, "sinks": False, "varlen": False}
    facts |= {"copy_bytes": 16, "store_bytes": max(size, math.gcd(16, head_dim_v * size))} | features
    facts |= {name: facts[name] or size for name in ("copy_bytes", "store_bytes")}
    return Static(element=element, head_dim=head_dim, head_dim_v=head_dim_v, **facts)


def compile_plan(facts: Static, arch: int) -> tuple[_plan.Plan, _jit.Compiled]:
    plan = _plan.make_plan(facts, arch)
    return plan, _jit.compile_source(_jit.source_of(plan), _jit.options_of(arch), _jit.describe(plan))


def check(facts: Static, arch: int) -> None:
    plan, compiled = compile_plan(facts, arch)
    taken = _jit.resources_of(compiled.log)
    assert taken.spill_bytes == 0, f"{_jit.describe(plan)} spills {taken.spill_bytes} bytes"
    assert "C75" not in compiled.log, compiled.log
    assert taken.registers * plan.config.num_threads <= 1 << 16
    assert plan.config.smem_bytes <= _configs.SHARED_MEMORY[arch]
    assert compiled.cubin[:4] == b"\x7fELF" and plan.kernel.encode() in compiled.cubin


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


def test_a_config_that_disagrees_with_the_tiles_does_not_compile() -> None:
    plan = _plan.make_plan(static("bf16", 64, 64), 80)
    wrong = plan._replace(config=plan.config._replace(smem_bytes=plan.config.smem_bytes - 16))
    with pytest.raises(_jit.CompileError, match="disagree on shared memory"):
        _jit.compile_source(_jit.source_of(wrong), _jit.options_of(80), "a wrong Config")


def test_params_that_disagree_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan.make_plan(static("bf16", 64, 64), 80)
    headers = dict(_jit.headers())
    name = "attention/params.cuh"
    headers[name] = headers[name].replace(b"float softmax_scale, softcap;", b"float softcap, softmax_scale;")
    assert headers[name] != _jit.headers()[name]
    monkeypatch.setattr(_jit, "headers", lambda: headers)
    with pytest.raises(_jit.CompileError, match="static assertion failed"):
        _jit.compile_source(_jit.source_of(plan), _jit.options_of(80), "swapped members")
