"""The CUDA rungs of the ladder: right in the emulator, and compiled without spills or products that wait."""

from __future__ import annotations

from itertools import pairwise

import emulated
import numpy as np
import pytest
import sass
from sampling import paired

import cufa
from cufa.learn import host, ladder
from cufa.testing import Case

CUDA = [each for each in ladder.RUNGS if each.needs in ("cuda", "sm_90")]
needs_emulator = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())
PROBLEMS = (
    (64, "float16", False, 70, 150),
    (64, "bfloat16", True, 150, 100),  # whose first rows see no key
    (128, "bfloat16", True, 65, 200),
    (128, "float16", False, 1, 129),
)
"""head_dim, dtype, causal, seqlen_q and seqlen_k."""


@needs_emulator
@pytest.mark.parametrize(
    ("rung", "head_dim"), paired(CUDA, [64, 128]), ids=lambda given: getattr(given, "name", str(given))
)
def test_rungs_are_right(rung: ladder.Rung, head_dim: int) -> None:
    for order, (width, dtype, causal, seqlen_q, seqlen_k) in enumerate(PROBLEMS):
        if width != head_dim:
            continue
        case = Case(
            batch=1 + order % 2,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads_q=2,
            num_heads_k=2,
            head_dim=width,
            head_dim_v=width,
            dtype=dtype,
            causal=causal,
            softmax_scale=(None, 0.3)[order % 2],
        )
        with emulated.Gpu(arch=90 if rung.needs == "sm_90" else 80, order=order) as gpu:
            ladder.check_case(rung, case, gpu)


@needs_emulator
def test_what_a_rung_does_not_take_is_refused() -> None:
    x = np.zeros((1, 8, 2, 64), np.float16)
    with emulated.Gpu() as gpu:
        q = gpu.array(x)
        for wrong, kind, text in (
            (gpu.array(x.astype(np.float32)), TypeError, "k is float32"),
            (gpu.array(x[..., :32]), ValueError, r"k has shape \(1, 8, 2, 32\)"),
            (gpu.array(x.swapaxes(1, 2)), ValueError, "k is not C-contiguous"),
            (gpu.array(x[:, :, :1].copy()), ValueError, "have shapes"),
        ):
            with pytest.raises(kind, match=text):
                ladder.rung("r12").load().attention(q, wrong, wrong)
        with pytest.raises(ValueError, match="softmax_scale is -1"):
            ladder.rung("r12").load().attention(q, q, q, softmax_scale=-1)
        assert gpu.launches == []
    with pytest.raises(ValueError, match="q is in host memory"):
        ladder.rung("r12").load().attention(x, x, x)


@pytest.mark.parametrize("rung", CUDA, ids=lambda rung: rung.name)
def test_rungs_compile_well(rung: ladder.Rung) -> None:
    """Without spills, and without products that the compiler makes wait for each other."""
    for arch in (("sm_80",) if rung.needs == "cuda" else ()) + ("sm_90",):
        for head_dim in host.HEAD_DIMS:
            found = host.kernel(rung.name, "bfloat16", head_dim).compile(arch)
            assert found.spill_bytes == 0, found
            assert "C75" not in found.log and "warning" not in found.log, found.log
            if rung.name == "r09_warp_rows" and (functions := sass.disassemble(found.cubin)):
                (code,) = functions.values()
                counted = sass.count(code)
                # Else shared memory would be what it waits for: a read of 16 bytes for all lanes takes four clocks.
                assert counted["FFMA"] >= 16 * counted["LDS"]
            if rung.needs == "sm_90" and (functions := sass.disassemble(found.cubin)):
                (code,) = functions.values()
                assert not sass.wgmma_hazards(code)
                counted = sass.count(code)
                # A loop and what is before and behind it: scores twice, outputs twice.
                assert counted["HGMMA"] == 2 * head_dim // 16 + 2 * 8
                waits = [at for at, each in enumerate(code) if each.opcode.startswith("WARPGROUP.DEPBAR")]
                beside = [sass.count(code[a:b])["MUFU"] for a, b in pairwise(waits)]
                assert max(beside) >= 64, "the softmax waits for the output's products"
                assert counted["WARPGROUP"] <= 10 and not counted["LDL"] and not counted["STL"]


def test_launches_ask_for_the_shared_memory_of_the_kernel() -> None:
    """What a rung says in Python is what its struct in C++ takes."""
    for name in ("r09_warp_rows", "r10_tensor_cores", "r11_async_copies", "r12_swizzle", "r13_hopper"):
        module, source = ladder.rung(name).load(), host.source_of(name)
        for head_dim in host.HEAD_DIMS:
            asserted = f'{source}\nstatic_assert(sizeof(Smem) == {module.shared_bytes(head_dim)}, "of the launch");\n'
            kernel = cufa.jit(asserted, "attention", defines={"ELEMENT": "bf16", "HEAD_DIM": head_dim})
            kernel.compile("sm_90")


def test_a_file_that_was_changed_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process, too: who learns changes a kernel and calls it again."""
    before = host.kernel("r07_thread_per_row", "float16", 64)
    assert host.kernel("r07_thread_per_row", "float16", 64) is before
    changed = before.source.replace("extern", "// changed\nextern", 1)
    monkeypatch.setattr(host, "source_of", lambda rung: changed)
    assert host.kernel("r07_thread_per_row", "float16", 64).source == changed


def test_the_ladder_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cufa._api.config.is_available", lambda: False)
    reasons = {each.needs: ladder.why_not(each) for each in ladder.RUNGS}
    assert [*reasons] == ["numpy", "numba", "triton", "cuda", "sm_90"] and not reasons.pop("numpy")
    assert {*reasons.values()} == {"there is no GPU of compute capability 8.0 or newer"}
    assert [each.name[:3] for each in CUDA] == ["r07", "r08", "r09", "r10", "r11", "r12", "r13"]
    for each in CUDA:
        module = each.load()
        assert each.title and (module.__doc__ or "").startswith(f"Rung {int(each.name[1:3])}: ") and module.ROWS > 0
    assert ladder.rung("r13_hopper") == ladder.rung("r13")
    with pytest.raises(ValueError, match="no rung 'r14'"):
        ladder.rung("r14")
