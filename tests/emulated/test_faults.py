"""Kernels that are wrong are seen to be: each test breaks one, and a call of it must fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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
    """What is changed in which header of ``attention/``, or of another folder, the problem, and what is said of it.

    Attributes
    ----------
    run : callable
        Of an order and sources that are changed.
    seen : str
        A pattern in the error's message. Empty: what is computed is far from the reference; ``bits``: it depends on the
        order.
    """

    header: str
    old: str
    new: str
    run: Callable[..., Ran]
    seen: str = ""


def of(compute: Callable[..., Ran], problem: Any, **gpu: Any) -> Callable[..., Ran]:
    return lambda order, changed: compute(problem, order, changed=changed, **gpu)


SIZES: dict[str, Any] = {"head_dim": 64, "head_dim_v": 64, "dtype": "float16", "return_lse": True}
CAUSAL = Case(seqlen_q=150, seqlen_k=150, causal=True, **SIZES)
ONE_BUFFER = Case(seqlen_q=150, seqlen_k=150, causal=True, **SIZES | {"head_dim": 128, "head_dim_v": 128})
NARROW = Case(seqlen_q=100, seqlen_k=150, **SIZES | {"head_dim": 60, "layouts": ("padded",) * 4})
GRADIENTS = Call(case=Case(seqlen_q=150, seqlen_k=150, causal=True, **SIZES))
FEW_ROWS = Case(seqlen_q=1, seqlen_k=600, num_heads_q=5, num_heads_k=1, **SIZES)
SMALL = Case(seqlen_q=1, seqlen_k=100, num_heads_q=5, num_heads_k=1, **SIZES)
BY_HALVES = Call(case=Case(seqlen_q=150, seqlen_k=70, **SIZES | {"head_dim": 256, "head_dim_v": 256}))
IN_TURN = Call(case=Case(seqlen_q=200, seqlen_k=640, **SIZES), deterministic=True)

NOT_FINITE = Case(seqlen_q=300, seqlen_k=150, values="infinite", **SIZES)
PACKED_GRADIENTS = Call(
    case=Case(batch=4, seqlen_q=(150, 0, 90, 100), seqlen_k=(140, 40, 0, 300), num_heads_q=2, num_heads_k=2, **SIZES)
)

FAULTS = {
    "no barrier": Fault(
        "mainloop_sm80.cuh",
        "__syncthreads();  // this block's K and V have arrived, and every warp is done with the other buffers\n",
        "",
        of(forward, CAUSAL),
        "a race",
    ),
    "no barrier where K and V have a buffer each": Fault(
        "mainloop_sm80.cuh",
        "        __syncthreads();  // V has arrived, and every warp is done with K\n",
        "",
        of(forward, ONE_BUFFER),
        "a race",
    ),
    "no wait for a copy": Fault(
        "mainloop_sm80.cuh",
        "        ptx::cp_async_wait_group<0>();\n        __syncthreads();  // this block's K and V have arrived",
        "        __syncthreads();  // this block's K and V have arrived",
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
        r"behind the end of what the call allocates\) may not be written",
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
    "no barrier behind P in float32": Fault(
        "backward_scores_sm80.cuh",
        "      ptx::bar_sync(Main::exact_barrier, Config::num_threads);\n",
        "",
        of(backward, BY_HALVES),
        "a race",
    ),
    "no barrier behind the half that has dS": Fault(
        "backward_mainloop_sm80.cuh",
        "      ptx::bar_sync(ds_barrier, Config::num_threads / 2);\n",
        "",
        of(backward, BY_HALVES),
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
    "no wait for what blocks of the cluster send": Fault(
        "forward_cluster_sm90.cuh",
        "  exchange.wait();\n",
        "",
        of(forward, FEW_ROWS, arch=90),
        "is written by st.async, and was touched before|is read, but an asynchronous copy to it was not waited for",
    ),
    "blocks of the cluster that may not have begun": Fault(
        "cluster_merge.cuh",
        "    ptx::cluster_wait();\n",
        "",
        of(forward, FEW_ROWS, arch=90),
        "no barrier of the cluster says that block",
    ),
    "stores to other blocks where there are none": Fault(
        "cluster_merge.cuh",
        "return shift == 0;",
        "return false;",
        of(forward, SMALL, arch=90),
        "st.async: the launch has no clusters",
    ),
    "an mbarrier that others may not see": Fault(
        "cluster_merge.cuh",
        "      ptx::fence_mbarrier_init();\n",
        "",
        of(forward, FEW_ROWS, arch=90),
        "no fence.mbarrier_init has come",
    ),
    "bytes that never come": Fault(
        "cluster_merge.cuh",
        "own * size() *",
        "(own * size() + 1) *",
        of(forward, FEW_ROWS, arch=90),
        "(?s)nobody can go on.*waiting for an mbarrier",
    ),
    "a block that ends too early": Fault(
        "forward_cluster_sm90.cuh",
        "if (first_own >= live) return;",
        "return;",
        of(forward, FEW_ROWS, arch=90),
        "whose memory it is, has ended|copies to its shared memory are on their way",
    ),
    "a part that is sent to the wrong place": Fault(
        "cluster_merge.cuh",
        "return (row & -size()) + part;",
        "return part;",
        of(forward, FEW_ROWS, arch=90),
        "is written by st.async, and was touched before",
    ),
    "a turn that never comes": Fault(
        "backward_mainloop_sm80.cuh",
        "while (ptx::ld_acquire_gpu(turn) != wanted)",
        "while (ptx::ld_acquire_gpu(turn) != wanted + 1)",
        of(backward, IN_TURN),
        "news that nobody is left to bring",
    ),
}

WIDE_GRADIENTS = Call(case=Case(seqlen_q=250, seqlen_k=100, **SIZES | {"head_dim": 192, "head_dim_v": 192}))
WIDE_PACKED_GRADIENTS = Call(case=replace(PACKED_GRADIENTS.case, head_dim=192, head_dim_v=192))
ON_HOPPER = of(forward, CAUSAL, arch=90)
MANY_KEYS_ON_HOPPER = of(forward, Case(seqlen_q=100, seqlen_k=900, **SIZES), arch=90)
GRADIENTS_ON_HOPPER = of(backward, GRADIENTS, arch=90)
PACKED_ON_HOPPER = of(backward, PACKED_GRADIENTS, arch=90)

FAULTS |= {
    "K given back too early": Fault(
        "mainloop_sm90.cuh",
        "      warpgroup::wait<1>(scores);\n      release(keys(), at_keys);\n",
        "      release(keys(), at_keys);\n      warpgroup::wait<1>(scores);\n",
        MANY_KEYS_ON_HOPPER,
        "is written by cp.async.bulk.tensor, and was read by wgmma",
    ),
    "K not waited for": Fault(
        "mainloop_sm90.cuh",
        "entry(0).before(warpgroup));\n      keys().wait_full(at_keys);\n      warpgroup::gemm_abt",
        "entry(0).before(warpgroup));\n      warpgroup::gemm_abt",
        ON_HOPPER,
        "is read by wgmma, and was written by an asynchronous copy",
    ),
    "scores not waited for": Fault(
        "mainloop_sm90.cuh",
        "      warpgroup::wait<0>(scores);\n      release(keys(), at_keys);\n",
        "      finish_scores(scores);\n      warpgroup::wait<0>(scores);\n      release(keys(), at_keys);\n",
        ON_HOPPER,
        "a register of D has changed before the product was waited for",
    ),
    "P overwritten": Fault(
        "mainloop_sm90.cuh",
        "exponentiate_at_once<0, early_steps>(early_p,",
        "exponentiate_at_once<0, early_steps>(p,",
        of(forward, Case(seqlen_q=100, seqlen_k=900, **SIZES | {"head_dim": 128}), arch=90),
        "a register of A has changed before the product was waited for",
    ),
    "registers not fenced": Fault(
        "tile/gemm_sm90.cuh",
        "  hold(scores);\n  ptx::wgmma_fence();\n",
        "  hold(scores);\n",
        ON_HOPPER,
        "no wgmma.fence",
    ),
    "too few bytes": Fault(
        "forward_loader_sm90.cuh",
        "queries.expect(at_queries, Loop::Q::bytes);",
        "queries.expect(at_queries, Loop::Q::bytes - 16);",
        ON_HOPPER,
        "waiting for an mbarrier",
    ),
    "mbarriers not fenced": Fault(
        "mainloop_sm90.cuh",
        "    ptx::fence_mbarrier_init();\n",
        "",
        ON_HOPPER,
        "no fence.mbarrier_init",
    ),
    "another swizzle": Fault(
        "tile/gemm_sm90.cuh",
        "swizzle = Tile::panel_bytes == 128 ? 1 : 2;",
        "swizzle = 2;",
        ON_HOPPER,
        "is read by wgmma, and was written by an asynchronous copy",
    ),
    "more registers than there are": Fault(
        "forward_sm90.cuh", "setmaxnreg_inc<Config::consumer_registers>", "setmaxnreg_inc<256>", ON_HOPPER, "registers"
    ),
    "a flag that is no relaxed one": Fault(
        "mainloop_sm90.cuh",
        "ptx::st_relaxed_shared_u32(to_repair(), 1);",
        "ptx::st_shared_u32(to_repair(), 1);",
        of(forward, NOT_FINITE, arch=90),
        "a race",
    ),
    "a scan made by all lanes": Fault(
        "mainloop_sm90.cuh",
        "    if (tile::lane() == 0) place.scan.init();\n",
        "    place.scan.init();\n",
        of(forward, NOT_FINITE, arch=90),
        "a race",
    ),
    "dS not fenced": Fault(
        "backward_mainloop_sm90.cuh",
        "      ptx::fence_proxy_async_shared();\n      exchange().fill_warp(at);\n",
        "      exchange().fill_warp(at);\n",
        GRADIENTS_ON_HOPPER,
        "is read by wgmma, and was written by a thread without a fence.proxy.async",
    ),
    "dq not fenced": Fault(
        "backward_mainloop_sm90.cuh",
        "          ptx::fence_proxy_async_shared();\n",
        "",
        GRADIENTS_ON_HOPPER,
        "without a fence.proxy.async",
    ),
    "dq given back before it is read": Fault(
        "backward_mainloop_sm90.cuh",
        "    ptx::cp_async_bulk_wait_group_read<0>();\n#pragma unroll\n",
        "#pragma unroll\n",
        GRADIENTS_ON_HOPPER,
        "a race",
    ),
    "dq told before it is there": Fault(
        "backward_sums_sm90.cuh",
        "    ptx::cp_async_bulk_wait_group<running>();\n",
        "",
        GRADIENTS_ON_HOPPER,
        "has not told this one",
    ),
    "dq that nobody waits for": Fault(
        "backward_mainloop_sm90.cuh",
        "    if (!Config::finishes) ptx::cp_async_bulk_wait_group_read<0>();\n",
        "",
        PACKED_ON_HOPPER,
        "its bulk copies may still read shared memory",
    ),
    "a unit overwritten": Fault(
        "backward_find_sm90.cuh",
        "    // are few.\n    __syncwarp();\n",
        "    // are few.\n",
        PACKED_ON_HOPPER,
        "a race",
    ),
    "dq read before all is there": Fault(
        "backward_sums_sm90.cuh",
        "        while (each[i].row >= 0 && !is_done<Config>(backward, each[i])) {\n        }\n",
        "",
        GRADIENTS_ON_HOPPER,
        "has not told this one",
    ),
    "dq written early before all is there": Fault(
        "backward_sums_sm90.cuh",
        "        found = is_done<Config>(backward, tile);\n",
        "        found = true;\n",
        GRADIENTS_ON_HOPPER,
    ),
    "Q given back too early": Fault(
        "backward_split_keys_sm90.cuh",
        "      warpgroup::wait<1>(dk, ds);\n      if (at.count != first_count) queries()",
        "      if (at.count != first_count) queries()",
        of(backward, WIDE_GRADIENTS, arch=90),
        "is written by cp.async.bulk.tensor, and was read by wgmma",
    ),
    "a unit of two passes overwritten": Fault(
        "backward_units_sm90.cuh",
        "if that was left out.\n      __syncwarp();\n",
        "if that was left out.\n",
        of(backward, WIDE_PACKED_GRADIENTS, arch=90, num_sms=2),
        "a race",
    ),
}


def results(fault: Fault, changed: dict[str, str]) -> Iterator[Ran]:
    for order in (None, 1, 2, 3):
        yield fault.run(order, changed)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]
    path = fault.header if "/" in fault.header else f"attention/{fault.header}"
    whole = _jit.headers()[path].decode()
    assert whole.count(fault.old) == 1
    changed = {path: whole.replace(fault.old, fault.new)}
    if fault.seen == "bits":
        assert len({ran.bits for ran in results(fault, changed)}) > 1
        return
    with pytest.raises(EmulationError if fault.seen else AssertionError) as error:
        list(results(fault, changed))
    assert re.search(fault.seen or "differs from the float64 reference", str(error.value))
