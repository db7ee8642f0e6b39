"""Kernels that go over the blocks of a `cufa.BlockMask` compile, and their tiles divide these blocks."""

from __future__ import annotations

from typing import Any

import plans
import pytest
import sass
from sampling import paired, sampled

from cufa._compile import jit as _jit
from cufa._kernels import kernel
from cufa._terms.block_mask import BlockMaskTerm

SPILLS = {("attention_forward_listed_sm90", 256, False): 40}
"""Bytes, by kernel, head_dim and whether there are bounds."""


def plan(size: tuple[int, int], arch: int, head_dim: int, gradient: bool, bounded: bool = False, **changes: Any) -> Any:
    facts = plans.static("bf16", head_dim, head_dim, short=not gradient, **changes)
    term = BlockMaskTerm(*size, by_head=False, bounded=bounded)
    facts = facts._replace(terms=(*facts.terms, term), empty_rows=not gradient)
    return (plans.backward if gradient else plans.forward)(facts, arch)


TILES = (80, 128), (80, 256), (90, 64), (90, 128), (90, 256)
"""Compute capability and head_dim."""
KINDS = {"forward-bits": (0, 0), "forward-bounds": (0, 1), "backward-bounds": (1, 1), "backward-bits": (1, 0)}


@pytest.mark.parametrize(("tile", "kind"), sampled(paired(TILES, KINDS)), ids=str)
def test_they_compile(tile: tuple[int, int], kind: str) -> None:
    (arch, head_dim), (gradient, bounded) = tile, map(bool, KINDS[kind])
    made = plan((128, 128), arch, head_dim, gradient, bounded, mask="causal")
    assert "block_mask" in made.words() and ("sm90" in made.name) == (arch == 90)
    compiled = plans.compile_plan(made)
    most = SPILLS.get((made.name, head_dim, bounded), 0)
    assert _jit.resources_of(compiled.log).spill_bytes <= most, compiled.log
    assert "C75" not in compiled.log
    for instructions in sass.disassemble(compiled.cubin).values():
        assert not sass.wgmma_hazards(instructions)


@pytest.mark.parametrize(("head_dim", "gradient"), [(256, False), (128, True)])
def test_bounds_leave_room_for_windows(head_dim: int, gradient: bool) -> None:
    compiled = plans.compile_plan(plan((128, 128), 90, head_dim, gradient, True, mask="window"))
    assert _jit.resources_of(compiled.log).spill_bytes == 0, compiled.log


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (64, 128), (192, 64), (256, 320)])
@pytest.mark.parametrize("arch", plans.ARCHS)
@pytest.mark.parametrize("element", ["bf16", "f32"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_tiles_divide_blocks(size: tuple[int, int], arch: int, element: str, gradient: bool) -> None:
    for head_dim in (32, 64, 96, 128, 192, 256):
        for changes in ({}, {"mask": "window"}, {"softcap": True}, {"pack": 4}):
            facts = plans.static(element, head_dim, head_dim, **changes)
            facts = facts._replace(terms=(*facts.terms, BlockMaskTerm(*size, by_head=False)))
            if gradient:
                facts = facts._replace(pack=1)
            made = (plans.backward if gradient else plans.forward)(facts, arch)
            config = made.config
            assert size[0] * config.pack % config.block_m == 0 and size[1] % config.block_n == 0
            if made.name == "attention_backward_split_sm90":
                assert size[0] % 128 == 0
            assert config.smem_bytes <= kernel.SHARED_MEMORY[arch]


def test_what_hopper_does_not_serve() -> None:
    assert plan((64, 128), 90, 64, False).refusals[-1] == (
        "attention_forward_sm90",
        "blocks of 64 × 128 are not made of tiles of 128 × 1",
    )
    assert plan((128, 64), 90, 64, True).name == "attention_backward_split_sm90"
    assert plan((64, 64), 90, 64, True).name == "attention_backward_sm80"
