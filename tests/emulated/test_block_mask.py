"""Kernels that go over the blocks of a `cufa.BlockMask`, run on the CPU and held to the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_masks import Kind, Problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import sampled

import cufa
import emulated
from cufa import masks
from cufa.testing import to_numpy
from emulated.gpu import Gpu

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

CAUSAL, WINDOW = {"causal": True}, {"window_size": (90, 30)}
SM80 = (
    Kind("float16", 64, 64),
    Kind("float32", 40, 57, CAUSAL, terms=True),
    Kind("bfloat16", 128, 96, WINDOW),
)
SM90 = (
    Kind("float16", 64, 64, terms=True),
    Kind("bfloat16", 128, 128, CAUSAL),
    Kind("float16", 192, 160, WINDOW),
)


def ran(problem: Problem, arch: int, order: int | None, deterministic: bool = False) -> tuple[set[str], bytes]:
    """The kernels, and what they made, which is right."""
    with Gpu(arch, 3, order) as device:
        found = [to_numpy(each) for each in problem.run(device.array, deterministic)]
        entries = {launched.function.entry for launched in device.launches}
    problem.check(found)
    return entries, b"".join(np.ascontiguousarray(each).tobytes() for each in found)


@pytest.mark.parametrize("kind", sampled(SM80), ids=str)
@settings(max_examples=2)
@given(data=st.data())
def test_lists_for_every_gpu(kind: Kind, data: st.DataObject) -> None:
    problem = data.draw(problems(kind, (130, 200, 70), ((128, 64),)))
    entries, _ = ran(problem, 80, data.draw(st.integers(0, 99)))
    assert {"attention_forward_sm80", "attention_backward_sm80"} <= entries


@pytest.mark.parametrize("kind", sampled(SM90), ids=str)
@settings(max_examples=2)
@given(data=st.data())
def test_lists_on_hopper(kind: Kind, data: st.DataObject) -> None:
    problem = data.draw(problems(kind, (130, 300), ((128, 128),)))
    entries, _ = ran(problem, 90, data.draw(st.integers(0, 99)))
    assert "attention_forward_listed_sm90" in entries
    assert entries & {"attention_backward_sm90", "attention_backward_split_keys_sm90"}


@pytest.mark.parametrize(("head_dim", "window"), [(128, {}), (128, WINDOW), (256, CAUSAL)], ids=str)
def test_bounds_on_hopper(head_dim: int, window: dict[str, Any]) -> None:
    """Several documents in a block, which bounds mask alone or beside a window."""
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 300, 2, head_dim), "dout": (1, 300, 2, head_dim), **dict.fromkeys("kv", (1, 300, 1, head_dim))}
    arrays = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    arrays["dlse"] = rng.standard_normal((1, 2, 300)).astype(np.float32)
    mask = cufa.BlockMask.of(masks.document(offsets=[0, 90, 140, 300]), 1, 1, 300, 300)
    assert mask.bounded
    problem = Problem(arrays, window, mask, 2.0**-10)
    assert "attention_forward_listed_sm90" in ran(problem, 90, 7)[0]


@settings(max_examples=1)
@given(data=st.data())
def test_blocks_of_other_sides(data: st.DataObject) -> None:
    """Blocks of several tiles, and of sides that are no powers of 2."""
    problem = data.draw(problems(Kind("float16", 64, 64), (450, 300), ((256, 192),)))
    assert "attention_forward_listed_sm90" in ran(problem, 90, None)[0]


@settings(max_examples=1)
@given(data=st.data())
def test_gradients_in_turn_are_the_same_bits(data: st.DataObject) -> None:
    problem = data.draw(problems(Kind("bfloat16", 64, 64, CAUSAL), (300, 200), ((128, 128),)))
    assert ran(problem, 90, None, True)[1] == ran(problem, 90, 5, True)[1]
