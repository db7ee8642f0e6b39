"""Problems of few kernels, each of which takes a second to compile, and of few tiles; and how they are run."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from gradients import Call
from hypothesis import strategies as st

import cufa
from cufa._compile import jit as _jit
from cufa._kernels import record
from cufa.testing import VALUES, Case, assert_close, to_numpy

from .gpu import Gpu

ALIGNED = ("contiguous", "transposed", "fused", "fused heads", "fused batch", "fused transposed", "wide", "reversed")
NARROW = ("padded", "offset", "strided")
LAYOUTS = {"aligned": ALIGNED, "mapped": ALIGNED[:-1], "narrow": NARROW}
"""Layouts of arrays by what kernels can do: copy 16 bytes at a time, describe them by tensor maps, or neither."""
MASKS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": ({}, {"window_size": (None, None)}),
    "causal": ({"causal": True}, {"window_size": (-1, 0)}),
    "window": tuple({"window_size": window} for window in ((0, 0), (5, 1), (40, None), (None, 3), (65, 31), (20, 0))),
}


class Kind(NamedTuple):
    """What makes another kernel. Each takes a second to compile, so that there are but a few."""

    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str = "none"
    softcap: bool = False
    alibi: int = 0
    sinks: bool = False
    layouts: str = "aligned"


def features(draw: st.DrawFn, kind: Kind, values: tuple[str, ...] = VALUES) -> dict[str, Any]:
    """All but the lengths, of which but few decide on the kernel."""
    layouts = st.sampled_from(LAYOUTS[kind.layouts])
    heads = draw(st.sampled_from(((2, 1), (1, 1), (2, 2))))
    return {
        "num_heads_q": heads[0],
        "num_heads_k": heads[1],
        "head_dim": kind.head_dim,
        "head_dim_v": kind.head_dim_v,
        "dtype": kind.dtype,
        **draw(st.sampled_from(MASKS[kind.mask])),
        "softmax_scale": draw(st.sampled_from((None, 0.02, 0.25))),
        "softcap": draw(st.sampled_from((0.5, 30.0))) if kind.softcap else 0.0,
        "alibi_ndim": kind.alibi,
        "sinks": kind.sinks,
        "return_lse": draw(st.booleans()),
        "use_out": draw(st.booleans()),
        "layouts": (*draw(st.tuples(layouts, layouts, layouts)), "padded" if kind.layouts == "narrow" else "wide"),
        "values": draw(st.sampled_from(("normal", "large rows", *values))),
        "seed": draw(st.integers(0, 99)),
    }


@st.composite
def dense(draw: st.DrawFn, kind: Kind, values: tuple[str, ...] = VALUES) -> Case:
    lengths = st.sampled_from((33, 70, 112, 127, 129, 150))
    return Case(
        batch=draw(st.integers(1, 2)), seqlen_q=draw(lengths), seqlen_k=draw(lengths), **features(draw, kind, values)
    )


@st.composite
def packed(draw: st.DrawFn, kind: Kind, values: tuple[str, ...] = VALUES) -> Case:
    """On average not short, lest that make another kernel."""
    batch = draw(st.integers(1, 3))
    lengths = st.tuples(*[st.sampled_from((0, 1, 16, 63, 65, 129))] * (batch - 1))
    seqlen_q, seqlen_k = ((*draw(lengths), 150) for _ in range(2))
    used = tuple(max(0, n - draw(st.sampled_from((0, 1, 70)))) for n in seqlen_k) if draw(st.booleans()) else None
    offsets = draw(st.sampled_from(("exact", "zeros", "totals", "short", "wild")))
    lengths_given = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "seqused_k": used, "offsets": offsets}
    return Case(batch=batch, **lengths_given, **features(draw, kind, values))


ORDERS = st.none() | st.integers(0, 999)


class Ran(NamedTuple):
    """What a call has made, the kernels that ran, and whether gradients had numbers that were not finite at first."""

    results: tuple[Any, ...]
    entries: list[str]
    repaired: bool = False

    @property
    def bits(self) -> bytes:
        return b"".join(x.tobytes() for x in self.results)


def forward(case: Case, order: int | None = None, **gpu: Any) -> Ran:
    """Run a case on an emulated GPU, and hold what it makes to the reference."""
    with Gpu(order=order, **gpu) as device:
        options: dict[str, Any] = {**case.options, "return_lse": case.return_lse}
        if case.use_out:
            options["out"] = case.output(device)
        function = cufa.attention_varlen if isinstance(case.seqlen_q, tuple) else cufa.attention
        found = function(**case.arrays(device), **options)
        results = tuple(map(to_numpy, found if case.return_lse else (found,)))
        entries = [launched.function.entry for launched in device.launches]
    out, lse = (*results, None)[:2]
    assert_close(out, lse=lse, **case.arrays(), **case.options)
    return Ran(results, entries)


def backward(call: Call, order: int | None = None, **gpu: Any) -> Ran:
    """The same of gradients."""
    with Gpu(order=order, **gpu) as device:
        results = tuple(map(to_numpy, call.run(device)))
        entries = [launched.function.entry for launched in device.launches]
        repaired = "attention_backward_repair" in entries and _word(device, "not_finite") != 0
    call.check(results)
    return Ran(results, entries, repaired)


def _word(gpu: Gpu, name: str) -> int:
    """What the pointer of a name in the argument of the gradients' kernels points to, when they are done."""
    texts = tuple(text.decode() for path, text in _jit.headers().items() if path.startswith("attention/"))
    pointers = {pointer.name: pointer.offset for pointer in record.read("BackwardArgument", texts).pointers()}
    (address,) = struct.unpack_from("Q", gpu.launches[-1].argument, pointers[name])
    return int(gpu.memory.view(address, (1,), (1,), np.int32)[0])
