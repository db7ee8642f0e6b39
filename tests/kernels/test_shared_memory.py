"""What launches ask for of shared memory, for every tile where queries are few or keys lie in caches, and others."""

from __future__ import annotations

import itertools

import plans
import pytest
from sampling import paired

from cufa._call.problem import FEW_ROWS
from cufa._kernels import Plan, choose
from cufa._kernels.backward_sm80 import BackwardSm80
from cufa._kernels.kernel import SHARED_MEMORY
from cufa._operations.forward import FORWARD
from cufa._operations.kvcache import KVCACHE

ARCHS = {size: arch for arch, size in reversed(SHARED_MEMORY.items())}.values()
"""One for each size of shared memory."""

WIDTHS = (1, 2, *range(16, 257, 16))
"""Head dims: tiles are a multiple of 32 columns wide."""

RESERVED = 1 << 10
"""What a GPU takes for each thread block."""


def declared(plan: Plan) -> dict[str, int]:
    """What the code of each entry declares, which is the same for all tiles of a kernel."""
    return plans.static_memory(plans.compile_plan(plan).log)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ["bf16", "f32"])
def test_every_tile_fits_with_what_the_code_declares(element: str, arch: int) -> None:
    code: dict[str, dict[str, int]] = {}
    widths = paired(WIDTHS, WIDTHS)
    for (head_dim, head_dim_v), rows, kernels in itertools.product(widths, FEW_ROWS, (FORWARD, KVCACHE)):
        facts = plans.static(element, head_dim, head_dim_v, few_rows=rows, mask="causal")
        plan = choose(kernels, facts, arch)
        own = code.get(plan.name) or code.setdefault(plan.name, declared(plan))
        resident = plan.kernel.blocks_per_sm(plan.config)
        for step in plan.steps:
            taken = own[step.entry] + step.smem_bytes
            assert taken <= SHARED_MEMORY[arch], plan.words()
            assert step.entry != plan.name or resident * (taken + RESERVED) <= SHARED_MEMORY[arch] + RESERVED
    assert {"attention_forward_split_sm80", "attention_forward_cache_sm80"} <= code.keys()


@pytest.mark.parametrize("arch", ARCHS)
def test_two_blocks_of_the_forward_for_every_gpu_share_an_sm(arch: int) -> None:
    """Up to head_dim 128; at 64 with two buffers for K and V where these fit."""
    own = 0
    for head_dim in (32, 64, 96, 128):
        plan = plans.forward(plans.static("bf16", head_dim, head_dim, tma=False), arch)
        assert plan.name == "attention_forward_sm80"
        own = own or declared(plan)[plan.name]
        assert 2 * (own + plan.steps[0].smem_bytes + RESERVED) <= SHARED_MEMORY[arch] + RESERVED, plan.words()
        assert plan.config.stages == (2 if head_dim == 64 and SHARED_MEMORY[arch] > 99 << 10 else 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_halves_of_the_warps_have_as_many_columns(arch: int) -> None:
    """Of the gradients for every GPU one half has dv, the other dk."""
    facts = (plans.static("bf16", head_dim, head_dim, tma=False) for head_dim in range(8, 257, 8))
    halved = [config for config in (BackwardSm80().config(each, arch) for each in facts) if config.halves]
    assert {8, 64} <= {config.head_dim for config in halved}
    assert all(config.tile_head_dim == config.tile_head_dim_v for config in halved)
