"""Kernels that are wrong are seen to be: each test breaks one, and a call of it must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from gradients import Call

import emulated
from cufa._compile import jit as _jit
from cufa.testing import Case
from emulated import EmulationError
from emulated.cases import Ran, backward, forward

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


class Fault(NamedTuple):
    """What is changed in which header of ``cuda_src/attention``, the problem, and what is said of it.

    Attributes
    ----------
    run : callable
        Of an order and sources that are changed.
    seen : str
        Part of the error's message. Empty: what is computed is far from the reference; ``bits``: it depends on the
        order.
    """

    header: str
    old: str
    new: str
    run: Callable[..., Ran]
    seen: str = ""


def of(compute: Callable[..., Ran], problem: Any) -> Callable[..., Ran]:
    return lambda order, changed: compute(problem, order, changed=changed)


SIZES: dict[str, Any] = {"head_dim": 64, "head_dim_v": 64, "dtype": "float16", "return_lse": True}
CAUSAL = Case(seqlen_q=150, seqlen_k=150, causal=True, **SIZES)
NARROW = Case(seqlen_q=100, seqlen_k=150, **SIZES | {"head_dim": 60, "layouts": ("padded",) * 4})
GRADIENTS = Call(case=Case(seqlen_q=150, seqlen_k=150, causal=True, **SIZES))
IN_TURN = Call(case=Case(seqlen_q=200, seqlen_k=640, **SIZES), deterministic=True)

FAULTS = {
    "no barrier": Fault(
        "mainloop_sm80.cuh",
        "      __syncthreads();  // this block's K has arrived, and every warp is done with V\n",
        "",
        of(forward, CAUSAL),
        "a race",
    ),
    "no wait for a copy": Fault(
        "mainloop_sm80.cuh",
        "      ptx::cp_async_wait_group<0>();\n      __syncthreads();  // V has arrived",
        "      __syncthreads();  // V has arrived",
        of(forward, CAUSAL),
        "an asynchronous copy to it was not waited for",
    ),
    "a key too many": Fault(
        "masks.cuh",
        "return min_of(seqlen.k - 1, row + seqlen.diagonal());",
        "return min_of(seqlen.k - 1, row + seqlen.diagonal() + 1);",
        of(forward, CAUSAL),
    ),
    "rows behind the last": Fault(
        "epilogue.cuh",
        "if (row < work.seqlen.q) work.lse[row] =",
        "work.lse[row] =",
        of(forward, CAUSAL),
        "behind the end of what the call allocates) may not be written",
    ),
    "a neighbour's columns": Fault(
        "align.cuh",
        "params.columns[array] - 8 * chunk);",
        "8);",
        of(forward, NARROW),
        "may not be read",
    ),
    "no barrier behind dS": Fault(
        "backward_mainloop_sm80.cuh",
        "      __syncthreads();  // P and dS are complete\n",
        "",
        of(backward, GRADIENTS),
        "a race",
    ),
    "sums that begin anywhere": Fault(
        "backward_prepare.cuh",
        "    clear_sums<Config>(backward, tile, thread, Threads::threads);\n",
        "",
        of(backward, GRADIENTS),
    ),
    "out of turn": Fault(
        "backward_mainloop_sm80.cuh",
        "      while (ptx::ld_acquire_gpu(turn) != wanted) {\n      }\n",
        "",
        of(backward, IN_TURN),
        "bits",
    ),
    "a turn that never comes": Fault(
        "backward_mainloop_sm80.cuh",
        "while (ptx::ld_acquire_gpu(turn) != wanted)",
        "while (ptx::ld_acquire_gpu(turn) != wanted + 1)",
        of(backward, IN_TURN),
        "news that nobody is left to bring",
    ),
}


def results(fault: Fault, changed: dict[str, str]) -> Iterator[Ran]:
    for order in (None, 1, 2, 3):
        yield fault.run(order, changed)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]
    path = f"attention/{fault.header}"
    whole = _jit.headers()[path].decode()
    assert whole.count(fault.old) == 1
    changed = {path: whole.replace(fault.old, fault.new)}
    if fault.seen == "bits":
        assert len({ran.bits for ran in results(fault, changed)}) > 1
        return
    with pytest.raises(EmulationError if fault.seen else AssertionError) as error:
        list(results(fault, changed))
    assert (fault.seen or "differs from the float64 reference") in str(error.value)
