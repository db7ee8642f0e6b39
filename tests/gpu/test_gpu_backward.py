"""On a GPU: the properties of the gradients, on every framework at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from gradients import Call, lay_out
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu import EDGES, framework, same

import cufa
from cufa import reference
from cufa._call import problem as _problem
from cufa._operations import call as _call
from cufa._operations.call import Prepared
from cufa.testing import Case, View, assert_close, assert_gradients_close, to_numpy
from cufa.testing._gradients import NAMES, expect, gradient_complaint

pytestmark = pytest.mark.gpu


class Kind(NamedTuple):
    """What makes another kernel. Each takes a second to compile, so that there are but a few."""

    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str = "none"
    deterministic: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    layouts: str = "aligned"


DENSE = (
    Kind("bfloat16", 64, 64),
    Kind("bfloat16", 128, 128, "causal"),
    Kind("float16", 128, 128, "window", deterministic=True, sinks=True),
    Kind("float16", 64, 64, "causal", softcap=True, alibi=True),
    Kind("bfloat16", 32, 96, "window", alibi=True),
    Kind("float16", 16, 8, "causal", deterministic=True, sinks=True),
    Kind("bfloat16", 128, 64, deterministic=True, softcap=True, layouts="narrow out"),
    Kind("float16", 256, 256, "causal"),
    Kind("bfloat16", 192, 128, "window", softcap=True, sinks=True),
    Kind("float32", 64, 64, "causal"),
    Kind("float32", 160, 256, "window", deterministic=True, alibi=True, sinks=True),
    Kind("float32", 1, 7, softcap=True, layouts="narrow"),
    Kind("float16", 128, 128, "causal", layouts="narrow"),
    Kind("bfloat16", 255, 57, "window", deterministic=True, layouts="narrow"),
    Kind("bfloat16", 96, 96, layouts="reversed"),
    Kind("float16", 60, 20, "causal", layouts="wide"),
    Kind("bfloat16", 190, 100, layouts="wide"),
    Kind("float32", 21, 61, "window", layouts="wide"),
)
PACKED = (
    Kind("bfloat16", 64, 64, "causal"),
    Kind("float16", 128, 128, deterministic=True),
    Kind("bfloat16", 128, 128, "window", softcap=True, alibi=True, sinks=True),
    Kind("float16", 40, 56, "causal", deterministic=True, alibi=True),
    Kind("bfloat16", 96, 32, sinks=True, layouts="narrow out"),
    Kind("bfloat16", 256, 200, "causal", sinks=True),
    Kind("float16", 64, 160, "window", alibi=True),
    Kind("float32", 128, 128, "causal", deterministic=True),
    Kind("float32", 31, 65, "window", softcap=True, sinks=True, layouts="narrow"),
    Kind("float16", 80, 80, layouts="narrow"),
    Kind("bfloat16", 100, 60, "causal", layouts="wide"),
    Kind("float32", 30, 22, layouts="wide"),
)
# One of each kernel, which give the same bits in every run.
EXACT = (
    Kind("bfloat16", 64, 64, "causal", deterministic=True),
    Kind("bfloat16", 128, 128, "window", deterministic=True),
    Kind("bfloat16", 256, 256, "causal", deterministic=True),
    Kind("float32", 64, 64, "causal", deterministic=True),
)

ALIGNED = ("contiguous", "transposed", "fused", "fused heads", "fused batch", "fused transposed", "wide")
NARROW = ("padded", "offset", "strided")
LENGTHS = (129, 1, 2, 17, 63, 64, 65, 100, 127, 128, 191, 193, 200, 257)
MASKS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": ({}, {"window_size": (None, -1)}),
    "causal": ({"causal": True}, {"window_size": (-1, 0)}),
    "window": (
        *({"window_size": window} for window in ((0, 0), (5, 1), (64, None), (None, 3), (65, 31), (400, 300))),
        {"causal": True, "window_size": (70, 5)},
    ),
}


@st.composite
def calls(draw: st.DrawFn, kind: Kind, packed: bool) -> Call:
    """Calls of a kind, with all that the kernel does not depend on."""
    written, narrow = st.sampled_from(ALIGNED), st.sampled_from(NARROW)
    q, k, v, dout = (draw(st.sampled_from((*ALIGNED, "broadcast"))) for _ in range(4))
    out = "padded" if kind.layouts.startswith("narrow") else draw(written)
    results: Any = draw(st.none() | st.tuples(written, written, written))
    if kind.layouts == "wide":
        # Rows that are aligned as none of their width are side by side.
        q = k = v = dout = out = "wide"
        results = draw(st.sampled_from((None, ("wide", "wide", "wide"))))
    elif kind.layouts == "narrow":
        q, results = draw(narrow), draw(st.tuples(narrow, narrow, written))
    elif kind.layouts == "reversed":
        q = "reversed"
    lengths: dict[str, Any] = {"batch": draw(st.integers(1, 5 if packed else 3))}
    # Of a single query a causal mask removes nothing, which makes another kernel.
    least = 0 if packed else 2 if kind.mask == "causal" else 1
    length = st.sampled_from([n for n in (*LENGTHS, 0) if n >= least])
    if packed:
        seqlens = st.tuples(*[length] * lengths["batch"])
        lengths |= {"seqlen_q": draw(seqlens), "seqlen_k": draw(seqlens)}
        if draw(st.booleans()):
            gone = draw(st.tuples(*[st.sampled_from((0, 1, 64, 300))] * lengths["batch"]))
            lengths["seqused_k"] = tuple(max(0, n - m) for n, m in zip(lengths["seqlen_k"], gone, strict=True))
    else:
        lengths |= {"seqlen_q": draw(length), "seqlen_k": draw(length)}
    heads = draw(st.sampled_from(((4, 2), (1, 1), (2, 1), (2, 2), (6, 2), (3, 3), (5, 1))))
    case = Case(
        **lengths,
        num_heads_q=heads[0],
        num_heads_k=heads[1],
        head_dim=kind.head_dim,
        head_dim_v=kind.head_dim_v,
        dtype=kind.dtype,
        **draw(st.sampled_from(MASKS[kind.mask])),
        softmax_scale=draw(st.sampled_from((None, 0.02, 0.25))),
        softcap=draw(st.sampled_from((0.5, 5.0, 30.0))) if kind.softcap else 0.0,
        alibi_ndim=draw(st.sampled_from((1, 2))) if kind.alibi else 0,
        sinks=kind.sinks,
        layouts=(q, k, v, out),
        values=draw(st.sampled_from(("normal", "large rows"))),
        seed=draw(st.integers(0, 99)),
    )
    return Call(case=case, deterministic=kind.deterministic, dlse=draw(st.booleans()), dout=dout, results=results)


def plain(call: Call) -> Call:
    """The same of arrays that are contiguous."""
    case = replace(call.case, layouts=("contiguous",) * 4)
    return replace(call, case=case, dout="contiguous", results=None)


def name_of(kind: Kind) -> str:
    parts = (kind.dtype, kind.head_dim, kind.head_dim_v, kind.mask, "deterministic" * kind.deterministic)
    return "-".join(str(part) for part in parts if part)


of_every_kind = pytest.mark.parametrize(
    ("kind", "packed"),
    [(kind, packed) for packed, kinds in enumerate((DENSE, PACKED)) for kind in kinds],
    ids=[f"{side}-{name_of(kind)}" for side, kinds in (("dense", DENSE), ("packed", PACKED)) for kind in kinds],
)
of_every_kernel = pytest.mark.parametrize("kind", EXACT, ids=name_of)
dense_or_packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@of_every_kind
@settings(max_examples=10)
@given(data=st.data(), name=st.sampled_from(["cupy", "torch"]))
def test_gradients_equal_the_reference(name: str, kind: Kind, packed: bool, data: st.DataObject) -> None:
    if kind.layouts == "reversed":  # torch knows no negative strides
        name = "cupy"
    xp = framework(name)
    call = data.draw(calls(kind, packed))
    call.right(xp)


@settings(max_examples=15)
@given(call=st.sampled_from((DENSE[2], DENSE[9])).flatmap(lambda kind: calls(kind, packed=False)))
def test_numba_gradients_equal_the_reference(call: Call) -> None:
    cuda = framework("numba.cuda")

    def upload(flat: np.ndarray, view: View) -> Any:
        return cuda.to_device(np.ascontiguousarray(view.on(flat)))

    call = plain(call)
    call.right(upload)


@pytest.mark.parametrize(
    ("kind", "packed"), [(DENSE[2], False), (DENSE[9], False), (PACKED[0], True), (PACKED[5], True)]
)
@settings(max_examples=8)
@given(data=st.data())
def test_jax_gradients_equal_the_reference(kind: Kind, packed: bool, data: st.DataObject) -> None:
    xp = framework("jax").numpy
    plain(data.draw(calls(kind, packed))).right(xp)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float16", 128), ("bfloat16", 64), ("bfloat16", 256), ("float32", 64), ("float32", 128)]
)
def test_errors_are_those_of_the_same_mathematics(dtype: str, head_dim: int) -> None:
    """In the storage dtype, and after a forward of the GPU's own; in float32 at most twice those."""
    most = 2.0 if dtype == "float32" else 1.1
    cupy = framework("cupy")
    sizes = {"seqlen_q": 700, "seqlen_k": 700, "num_heads_q": 2, "num_heads_k": 1, "head_dim": head_dim}
    call = Call(case=Case(**sizes, head_dim_v=head_dim, dtype=dtype, causal=True), dlse=False)
    arrays, host = call.arrays(cupy), call.arrays()
    out, lse = cufa.attention(*(arrays[name] for name in "qkv"), causal=True, return_lse=True)
    found = call.run(cupy, out=out, lse=lse)
    given = {name: host[name] for name in ("dout", "q", "k", "v")} | {"dlse": None, "causal": True}
    exact = reference._differentiate(**given)
    rounded = reference._differentiate(**given, precision=reference.Precision(np.float32, host["q"].dtype))
    for name, gradient, true, other in zip(NAMES, found, exact, rounded, strict=False):
        error, bound = (np.linalg.norm(to_numpy(x).astype(np.float64) - true) for x in (gradient, other))
        assert 0 < error <= most * bound, f"the error of {name} is {error / bound:.2f} times that"


def nearly_same(some: Any, others: Any) -> bool:
    """Whether sums of the same terms differ by no more than their order, and a rounding, explain."""
    one, other = to_numpy(some), to_numpy(others)
    unit = max(float(ml_dtypes.finfo(other.dtype).eps), 1e-5)
    one, other = one.astype(np.float64), other.astype(np.float64)
    return bool(np.linalg.norm(one - other) <= unit * np.linalg.norm(other) + 1e-6 * np.sqrt(other.size))


@of_every_kernel
@dense_or_packed
@settings(max_examples=7)
@given(data=st.data(), power=st.sampled_from((-3, 1, 5)))
def test_gradients_scale_with_those_they_are_given(kind: Kind, packed: bool, data: st.DataObject, power: int) -> None:
    cupy = framework("cupy")
    call = plain(data.draw(calls(kind, packed)))
    call = replace(call, case=replace(call.case, values="normal"))
    host = call.arrays()
    scaled = {
        name: cupy.asarray(host[name] * host[name].dtype.type(2.0**power)) for name in ("dout", "dlse") if name in host
    }
    for once, more in zip(call.right(cupy), call.run(cupy, **scaled), strict=True):
        gradient = to_numpy(once)
        assert same(gradient * gradient.dtype.type(2.0**power), more)


@of_every_kernel
@dense_or_packed
@settings(max_examples=7)
@given(data=st.data())
def test_gradients_of_lse_alone(kind: Kind, packed: bool, data: st.DataObject) -> None:
    cupy = framework("cupy")
    call = replace(data.draw(calls(kind, packed)), dlse=True)
    host = call.arrays()
    zeros = {name: np.zeros(host[name].shape, host[name].dtype) for name in ("dout", "dlse")}
    found = call.run(cupy, dout=cupy.asarray(zeros["dout"]))
    assert not to_numpy(found[2]).any()
    del host["out"], host["lse"]
    assert_gradients_close(found, **host | {"dout": zeros["dout"]}, **call.case.options)
    without = replace(call, dlse=False).right(cupy)
    assert all(map(same, call.run(cupy, dlse=cupy.asarray(zeros["dlse"])), without))


@of_every_kernel
@dense_or_packed
@settings(max_examples=7)
@given(data=st.data())
def test_gradients_of_grouped_heads_add_up(kind: Kind, packed: bool, data: st.DataObject) -> None:
    cupy = framework("cupy")
    call = plain(data.draw(calls(kind, packed)))
    ratio = call.case.num_heads_q // call.case.num_heads_k
    repeated = {name: cupy.asarray(np.repeat(call.arrays()[name], ratio, axis=-2)) for name in ("k", "v")}
    dq, *sums = call.right(cupy)
    other, *parts = call.run(cupy, **repeated)
    assert same(dq, other)
    for whole, part in zip(sums, parts, strict=True):
        heads = to_numpy(part).astype(np.float64).reshape(*whole.shape[:-1], ratio, whole.shape[-1])
        total = heads.sum(axis=-2).astype(to_numpy(part).dtype)
        assert nearly_same(whole, total)


@of_every_kernel
@settings(max_examples=10)
@given(data=st.data())
def test_gradients_of_packed_sequences_equal_dense_ones(kind: Kind, data: st.DataObject) -> None:
    cupy = framework("cupy")
    call = plain(data.draw(calls(kind, packed=True)))
    call = replace(call, case=replace(call.case, seqused_k=None))
    arrays, found = call.arrays(cupy), call.right(cupy)
    starts_q, starts_k = (to_numpy(arrays[f"cu_seqlens_{side}"]) for side in "qk")
    for b in range(call.case.batch):
        rows, keys = slice(*starts_q[b : b + 2].tolist()), slice(*starts_k[b : b + 2].tolist())
        if rows.stop - rows.start < 2 or keys.stop == keys.start:
            continue
        own = {name: arrays[name][None, rows] for name in ("dout", "q", "out")}
        own |= {name: arrays[name][None, keys] for name in ("k", "v")}
        own |= {name: arrays[name][None, :, rows] for name in ("lse", "dlse") if name in arrays}
        alone = cufa.attention_backward(**own, **call.case.options, deterministic=True)
        for gradient, other, part in zip(found, alone, (rows, keys, keys), strict=True):
            assert nearly_same(gradient[part], other[0])


@of_every_kernel
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 99))
def test_gradients_are_chosen_and_permuted_as_batch_and_heads_are(kind: Kind, data: st.DataObject, seed: int) -> None:
    """No bit depends on what else is in the batch."""
    cupy = framework("cupy")
    call, rng = plain(data.draw(calls(kind, packed=False))), np.random.default_rng(seed)
    batch, heads_k = (rng.permutation(n)[rng.integers(n) :] for n in (call.case.batch, call.case.num_heads_k))
    ratio = call.case.num_heads_q // call.case.num_heads_k
    heads_q = (heads_k[:, None] * ratio + rng.permutation(ratio)).ravel()
    changed = {}
    for name, array in call.arrays().items():
        heads = heads_k if name in ("k", "v") else heads_q
        permuted = array[batch][:, heads] if "lse" in name else array[batch][:, :, heads]
        changed[name] = cupy.asarray(np.ascontiguousarray(permuted))
    for gradient, other, heads in zip(
        call.right(cupy), call.run(cupy, **changed), (heads_q, heads_k, heads_k), strict=True
    ):
        # dk and dv add up the heads of a group in their order.
        equal = same if ratio == 1 or heads is heads_q else nearly_same
        assert equal(to_numpy(gradient)[batch][:, :, heads], other)


@of_every_kernel
@dense_or_packed
@settings(max_examples=7)
@given(data=st.data())
def test_gradients_of_views_equal_those_of_copies(kind: Kind, packed: bool, data: st.DataObject) -> None:
    """All layouts here are served by one kernel."""
    cupy = framework("cupy")
    call = data.draw(calls(kind, packed))
    host = call.arrays()
    copies = {name: cupy.asarray(np.ascontiguousarray(array)) for name, array in host.items()}
    assert all(map(same, call.right(cupy), plain(call).run(cupy, **copies)))


@of_every_kind
@settings(max_examples=4)
@given(data=st.data())
def test_memory_around_gradients_is_not_written(kind: Kind, packed: bool, data: st.DataObject) -> None:
    cupy = framework("cupy")
    call = data.draw(calls(kind, packed))
    views, memories, into = {}, {}, {}
    for name, layout in zip("qkv", call.results or ("wide", "fused heads", "fused batch"), strict=True):
        view = views[name] = View.of(call.case.view(name).shape, layout)
        memory = memories[name] = cupy.asarray(np.full(view.size, np.nan, call.arrays()["q"].dtype))
        strides = [stride * memory.itemsize for stride in view.strides]
        into[f"d{name}"] = cupy.lib.stride_tricks.as_strided(memory[view.offset :], view.shape, strides)
    call.check(replace(call, results=None).run(cupy, **into))
    for name, view in views.items():
        isnan = np.isnan(to_numpy(memories[name]).astype(np.float32))
        assert (isnan == view.outside()).all()


# --- what does not count ----------------------------------------------------------------------------


@of_every_kernel
@settings(max_examples=20)
@given(data=st.data(), place=st.integers(0, 99))
def test_what_other_sequences_and_heads_hold_never_counts(kind: Kind, data: st.DataObject, place: int) -> None:
    """They share boxes and tiles: here one key head of one sequence is NaN."""
    cupy = framework("cupy")
    call = plain(data.draw(calls(kind, packed=True)))
    sequence, head = place % call.case.batch, place % call.case.num_heads_k
    ratio = call.case.num_heads_q // call.case.num_heads_k
    arrays = call.arrays()
    rows, keys = (slice(*arrays[f"cu_seqlens_{side}"][sequence : sequence + 2]) for side in "qk")
    heads = slice(head * ratio, (head + 1) * ratio)
    changed = {}
    for name in {"q", "k", "v", "dout", "out", "lse", "dlse"} & arrays.keys():
        array = arrays[name].copy()
        array[(heads, rows) if "lse" in name else (keys, head) if name in ("k", "v") else (rows, heads)] = np.nan
        changed[name] = cupy.asarray(array)
    clean, poisoned = call.right(cupy), call.run(cupy, **changed)
    for gradient, other, at in zip(clean, poisoned, ((rows, heads), (keys, head), (keys, head)), strict=True):
        one, two = to_numpy(gradient).copy(), to_numpy(other).copy()
        assert np.isfinite(one.astype(np.float32)).all()
        one[at] = two[at] = 0
        assert same(one, two)


@pytest.mark.parametrize("outside", [(5, 0), (0, 130), (200, 70)], ids=str)
@pytest.mark.parametrize("lengths", [(), (300, 0, 65, 1, 100)], ids=["none", "five"])
@of_every_kernel
def test_rows_of_no_sequence_have_no_gradient(kind: Kind, lengths: tuple[int, ...], outside: tuple[int, int]) -> None:
    """Nor do those beyond the live keys; whatever they hold."""
    cupy = framework("cupy")
    starts = np.cumsum((outside[0], *lengths), dtype=np.int32)
    used = np.array([max(0, length - 30) for length in lengths], np.int32)
    total, options = int(starts[-1]) + outside[1], MASKS[kind.mask][-1]
    sizes = {"seqlen_q": (total,), "seqlen_k": (total,), "num_heads_q": 4, "num_heads_k": 2}
    case = Case(**sizes, head_dim=kind.head_dim, head_dim_v=kind.head_dim_v, dtype=kind.dtype)
    arrays = Call(case=case).arrays()
    offsets = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "seqused_k": used}
    given = {name: arrays[name].copy() for name in ("q", "k", "v", "dout", "dlse")} | offsets
    live = np.zeros((2, total), bool)  # rows and keys
    for side, counts in enumerate((lengths, used)):
        for start, count in zip(starts, counts, strict=False):
            live[side, start : start + count] = True
    out, lse = reference.attention_varlen(
        **{name: x for name, x in given.items() if name not in ("dout", "dlse")}, **options, return_lse=True
    )
    out, lse = out.astype(given["q"].dtype), lse.astype(np.float32)
    for array in (given["q"], given["dout"], out, lse.T, given["dlse"].T):
        array[~live[0]] = np.nan
    for array in (given["k"], given["v"]):
        array[~live[1]] = np.nan
    found = cufa.attention_varlen_backward(
        **{name: cupy.asarray(x) for name, x in (given | {"out": out, "lse": lse}).items()},
        **options,
        deterministic=True,
    )
    assert_gradients_close(found, **given, **options)


@of_every_kernel
def test_a_row_without_keys_gives_no_gradient(kind: Kind) -> None:
    """Whatever its dlse, and any finite dout: 0 times NaN is NaN."""
    cupy = framework("cupy")
    sizes = {"seqlen_q": 200, "seqlen_k": 100, "num_heads_q": 2, "num_heads_k": 1, "head_dim": kind.head_dim}
    options = {"causal": True} if kind.mask == "causal" else {"window_size": (50, 0)}
    call = Call(case=Case(**sizes, head_dim_v=kind.head_dim_v, dtype=kind.dtype, **options), deterministic=True)
    host = call.arrays()
    host["dout"][:, :100], host["dlse"][:, :, :100] = 1e4, np.inf
    found = call.run(cupy, **{name: cupy.asarray(host[name]) for name in ("dout", "dlse")})
    assert all(np.isfinite(to_numpy(gradient).astype(np.float32)).all() for gradient in found)
    call.check(found)


@pytest.mark.parametrize("nothing", ["batch", "seqlen_q", "seqlen_k", "heads"])
@of_every_kernel
def test_sizes_of_zero(kind: Kind, nothing: str) -> None:
    cupy = framework("cupy")
    sizes = {"batch": 2, "seqlen_q": 70, "seqlen_k": 130, "num_heads_q": 4, "num_heads_k": 2}
    sizes |= {"num_heads_q": 0, "num_heads_k": 0} if nothing == "heads" else {nothing: 0}
    case = Case(**sizes, head_dim=kind.head_dim, head_dim_v=kind.head_dim_v, dtype=kind.dtype, **MASKS[kind.mask][0])
    call = Call(case=case, deterministic=True, results=("contiguous",) * 3)
    call.right(cupy)


OFFSETS: dict[str, tuple[list[int], int]] = {
    "padded with zeros": ([0, 100, 300, 0, 0, 0], 300),
    "padded with the last": ([0, 100, 300, 300, 300], 300),
    "begins late, ends early": ([37, 100, 129], 300),
    "decreases": ([0, 1000, 0, 1000, 2000], 2000),
    "decreases at once": ([1500, 1000, 500, 2000], 2000),
    "beyond": ([-9, 64, 1000, 5, 2**31 - 1], 300),
    "nothing": ([0, 0, 0], 50),
    "no sequence": ([7], 50),
    "many": ([*range(0, 700, 2), *[0] * 9, *range(650, 1500, 5)], 1600),
    "one row each": ([*range(800)], 800),
    "twenty rows each": ([*range(0, 1600, 20)], 1600),
}
"""Offsets of any content, and how many rows there are."""


@pytest.mark.parametrize("content", OFFSETS)
@of_every_kernel
def test_offsets_of_any_content(kind: Kind, content: str) -> None:
    """They count as the largest up to each, within the array; so every row of q has its turn, once."""
    cupy = framework("cupy")
    offsets, total = OFFSETS[content]
    options = MASKS[kind.mask][-1]
    mirrored = [total - offset if 0 <= offset <= total else offset for offset in reversed(offsets)]
    for offsets_k in (offsets, mirrored):
        starts, starts_k = (
            np.maximum.accumulate(np.clip(np.asarray(each, np.int64), 0, total)).astype(np.int32)
            for each in (offsets, offsets_k)
        )
        sizes = {"seqlen_q": (total,), "seqlen_k": (total,), "num_heads_q": 4, "num_heads_k": 2}
        case = Case(**sizes, head_dim=kind.head_dim, head_dim_v=kind.head_dim_v, dtype=kind.dtype)
        arrays = Call(case=case).arrays()
        given = {name: arrays[name].copy() for name in ("q", "k", "v", "dout", "dlse")}
        right = {"cu_seqlens_q": starts, "cu_seqlens_k": starts_k}
        out, lse = reference.attention_varlen(
            *(given[name] for name in "qkv"), starts, starts_k, **options, return_lse=True
        )
        results = {"out": out.astype(given["q"].dtype), "lse": lse.astype(np.float32)}
        wide = {
            f"cu_seqlens_{side}": np.stack([np.asarray(each, np.int64).astype(np.int32)] * 2, axis=1)
            for side, each in (("q", offsets), ("k", offsets_k))
        }
        on_gpu = {name: cupy.asarray(array) for name, array in (given | results).items()}
        on_gpu |= {name: cupy.asarray(array)[:, 1] for name, array in wide.items()}
        # What was in the workspace before must not matter.
        dirty = cupy.full(8 << 20, np.nan, cupy.float32)
        del dirty
        for deterministic in (False, True):
            found = cufa.attention_varlen_backward(**on_gpu, **options, deterministic=deterministic)
            assert_gradients_close(found, **given, **right, **options)
            inside = np.zeros(total, bool)
            inside[starts[0] : starts[-1]] = True
            assert (to_numpy(found[0])[~inside] == 0).all()


def test_offsets_outside_the_arrays_touch_nothing_else() -> None:
    cupy = framework("cupy")
    q, lse = cupy.ones((40, 2, 64), cupy.float16), cupy.zeros((2, 40), cupy.float32)
    for offsets in ([0, 20, 1000], [-7, 20, 40], [30, 10, 40], [0, 2**31 - 1, 40]):
        bad = cupy.asarray(offsets, dtype=cupy.int32)
        memories = [cupy.full((64 + 40 + 64, 2, 64), 5, cupy.float16) for _ in range(3)]
        into = dict(zip(("dq", "dk", "dv"), (memory[64:104] for memory in memories), strict=True))
        cufa.attention_varlen_backward(q, q, q, q, q, lse, bad, bad, **into)
        cupy.cuda.Device().synchronize()
        assert all((memory[:64] == 5).all() and (memory[104:] == 5).all() for memory in memories)
        assert all((memory[64:104] != 5).any() for memory in memories)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_softcaps_that_hardly_cap(dtype: str, head_dim: int) -> None:
    """Of a score far below its cap tanh takes a hundred-thousandth, of which 1 - 2 / (e^2x + 1) would know nothing."""
    cupy = framework("cupy")
    sizes = {"seqlen_q": 130, "seqlen_k": 70, "num_heads_q": 2, "num_heads_k": 1, "head_dim": head_dim}
    for softcap in (100.0, 1e6):
        case = Case(**sizes, head_dim_v=head_dim, dtype=dtype, softcap=softcap)
        check_with_own_forward(case)
        out = cufa.attention(**case.arrays(cupy), **case.options)
        assert_close(out, **case.arrays(), **case.options)


# --- many, long, and again --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in DENSE if kind.layouts in ("aligned", "wide")], ids=name_of)
def test_ordinary_numbers_are_not_computed_once_more(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last kernel mends what is not finite: a NaN on the way is not seen, but takes hundreds of times the time."""
    cupy = framework("cupy")
    places: dict[int, int] = {}
    found = []
    begin, launch = Prepared.__init__, Prepared.__call__

    def spy_begin(self: Prepared, make: Any, names: Any, copying: Any, scratch: Any, floats: int) -> None:
        begin(self, make, names, copying, scratch, floats)
        if "not_finite" in scratch.parts:
            places[id(self)] = 4 * scratch.parts["not_finite"]

    def spy_launch(self: Prepared, addresses: list[int], memory: int, *where: int) -> None:
        launch(self, addresses, memory, *where)
        if id(self) not in places:  # of a forward that copies arrays first
            return
        cupy.cuda.Device().synchronize()
        word = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory + places[id(self)], 4, None), 0)
        found.append(int(cupy.ndarray((1,), cupy.int32, word)[0]))

    monkeypatch.setattr(Prepared, "__init__", spy_begin)
    monkeypatch.setattr(Prepared, "__call__", spy_launch)
    monkeypatch.setattr(_call, "expect", lambda *_: None)  # or the second call would go past that
    _problem._checked.cache_clear()
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 300, 4, kind.head_dim), "k": (2, 350, 2, kind.head_dim), "v": (2, 350, 2, kind.head_dim_v)}
    shapes["dout"] = (2, 300, 4, kind.head_dim_v)
    dtype = ml_dtypes.bfloat16 if kind.dtype == "bfloat16" else kind.dtype
    q, k, v, dout = (cupy.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes.values())
    options: dict[str, Any] = {"causal": kind.mask == "causal", "softcap": 5.0 if kind.softcap else 0.0}
    options["window_size"] = (100, 50) if kind.mask == "window" else None
    if kind.alibi:
        options["alibi_slopes"] = cupy.asarray(rng.uniform(0, 0.1, 4).astype(np.float32))
    if kind.sinks:
        options["sinks"] = cupy.asarray(rng.standard_normal(4).astype(np.float32))
    out, lse = cufa.attention(q, k, v, return_lse=True, **options)
    for dout_held, expected in ((dout, 0), (cupy.full_like(dout, np.inf), 1)):
        found.clear()
        cufa.attention_backward(dout_held, q, k, v, out, lse, deterministic=kind.deterministic, **options)
        assert found == [expected]
    _problem._checked.cache_clear()


def with_own_forward(call: Call) -> tuple[Any, ...]:
    """The gradients of what the forward gives."""
    cupy = framework("cupy")
    forward = cufa.attention_varlen if call.packed else cufa.attention
    out, lse = forward(**call.case.arrays(cupy), **call.case.options, return_lse=True)
    return call.run(cupy, out=out, lse=lse)


def check_with_own_forward(case: Case, **options: Any) -> None:
    call = Call(case=case, **options)
    call.check(with_own_forward(call))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (200, 100)}], ids=["none", "causal", "window"])
def test_edges_of_tiles(head_dim: int, mask: dict[str, Any]) -> None:
    for seqlen_q, seqlen_k in zip(EDGES, (*EDGES[12:], *EDGES[:12]), strict=True):
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "head_dim_v": head_dim}
        check_with_own_forward(Case(**sizes, num_heads_q=3, num_heads_k=1, dtype="bfloat16", **mask))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads"),
    [(2300, 2300, 2), (2700, 2200, 2), (150, 2300, 2), (2300, 2300, 15)],  # the last in chains, each of whole heads
)
def test_late_blocks(seqlen_q: int, seqlen_k: int, heads: int, head_dim: int) -> None:
    """On Hopper, from more than 16 blocks of keys, those from the middle on have sums of dq of their own."""
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "head_dim_v": head_dim}
    case = Case(**sizes, num_heads_q=heads, num_heads_k=1, dtype="bfloat16", causal=True)
    call = Call(case=case, deterministic=True)
    call.check_there(with_own_forward(call), framework("cupy"))


@pytest.mark.parametrize(
    ("head_dim", "deterministic", "mask"),
    [(64, True, {"causal": True}), (128, False, {"window_size": (50, 10)}), (256, False, {"causal": True})],
    ids=["64", "128", "256"],
)
def test_many_packed_sequences(head_dim: int, deterministic: bool, mask: dict[str, Any]) -> None:
    lengths = np.random.default_rng(0).choice([0, 1, 17, 63, 64, 65, 129, 200], (2, 200)).tolist()
    sizes = {"seqlen_q": tuple(lengths[0]), "seqlen_k": tuple(lengths[1]), "batch": 200}
    sizes |= {"head_dim": head_dim, "head_dim_v": head_dim, "num_heads_q": 2, "num_heads_k": 1}
    check_with_own_forward(Case(**sizes, dtype="bfloat16", **mask), deterministic=deterministic)


def test_gradients_of_long_sequences() -> None:
    """Where the reference can tell: of some rows, and of keys that few rows see; and all by another kernel."""
    cupy = framework("cupy")
    seqlen, sizes = 16500, {"num_heads_q": 2, "num_heads_k": 1, "head_dim": 128, "head_dim_v": 128}
    call = Call(case=Case(seqlen_q=seqlen, seqlen_k=seqlen, **sizes, dtype="bfloat16", causal=True), dlse=False)
    case = call.case
    host = {name: case.view(name).on(case.flat(name)) for name in "qkv"}
    host["dout"] = np.random.default_rng(1).standard_normal(host["q"].shape).astype(host["q"].dtype)
    q, k, v, dout = (cupy.asarray(host[name]) for name in ("q", "k", "v", "dout"))
    out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    found = cufa.attention_backward(dout, q, k, v, out, lse, causal=True)
    for stop in (100, 8300, seqlen):
        rows, keys = slice(stop - 100, stop), slice(0, stop)
        exact, noise = expect(
            host["dout"][:, rows], host["q"][:, rows], host["k"][:, keys], host["v"][:, keys], causal=True
        )
        assert not gradient_complaint("dq", found[0][:, rows], exact[0], noise[0])
    for i in (1, 2):
        assert not gradient_complaint(NAMES[i], found[i][:, rows], exact[i][:, rows], noise[i][:, rows])
    unaligned = lay_out(host["q"], "offset", cupy)
    others = cufa.attention_backward(dout, unaligned, k, v, out, lse, causal=True)
    assert all(map(nearly_same, found, others))


@pytest.mark.parametrize(
    ("dtype", "seqlen", "head_dim"),
    [
        ("float16", 700, 128),
        ("bfloat16", 2100, 64),  # so many keys that blocks from the middle on have sums of their own
        ("bfloat16", 2300, 128),
        ("bfloat16", 700, 256),
        ("float32", 700, 64),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_bitwise_repeatable(dtype: str, seqlen: int, head_dim: int, deterministic: bool) -> None:
    """dk and dv always, dq if asked for."""
    cupy = framework("cupy")
    sizes = {"batch": 2, "num_heads_q": 8, "num_heads_k": 2, "head_dim": head_dim, "head_dim_v": head_dim}
    case = Case(seqlen_q=seqlen, seqlen_k=seqlen, **sizes, dtype=dtype)
    q, k, v = (case.view(name).on(case.flat(name), cupy) for name in "qkv")
    out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    first, *again = (
        cufa.attention_backward(q, q, k, v, out, lse, causal=True, deterministic=deterministic) for _ in range(51)
    )
    assert all(to_numpy(gradient).any() for gradient in first)
    for found in again:
        assert all(map(same, found[1:], first[1:]))
        assert (same if deterministic else nearly_same)(found[0], first[0])


# --- arrays that are not aligned ----------------------------------------------------------------------


COPIED: dict[str, dict[str, Any]] = {
    "33": {"head_dim": 33, "head_dim_v": 33},
    "65": {"head_dim": 65, "head_dim_v": 65, "causal": True},
    "129": {"head_dim": 129, "head_dim_v": 129, "causal": True},
    "100 and 1": {"head_dim": 100, "head_dim_v": 1},
    "only k": {"head_dim": 64, "head_dim_v": 64, "layouts": ("contiguous", "offset", "contiguous", "contiguous")},
    "only dout": {"head_dim": 64, "head_dim_v": 64, "dout": "offset", "causal": True},
    "only out": {"head_dim": 64, "head_dim_v": 64, "layouts": ("contiguous",) * 3 + ("offset",)},
    "apart": {"head_dim": 128, "head_dim_v": 64, "layouts": ("strided", "padded", "strided", "offset")},
    "reversed": {"head_dim": 64, "head_dim_v": 64, "layouts": ("reversed",) * 4, "window_size": (100, 3)},
    "one head": {"head_dim": 33, "head_dim_v": 65, "layouts": ("broadcast",) * 3 + ("contiguous",)},
    "many terms": {"head_dim": 65, "head_dim_v": 33, "softcap": 5.0, "alibi_ndim": 1, "sinks": True, "causal": True},
}


def copied_call(kind: str, dtype: str, packed: bool, **changed: Any) -> Call:
    lengths: dict[str, Any] = {"batch": 2, "seqlen_q": 200, "seqlen_k": 333}
    if packed:
        lengths = {"batch": 3, "seqlen_q": (129, 0, 300), "seqlen_k": (200, 70, 301)}
    sizes = lengths | COPIED[kind] | changed
    dout = sizes.pop("dout", "contiguous")
    case = Case(**sizes, num_heads_q=4, num_heads_k=2, dtype=dtype)
    return Call(case=case, dout=dout, deterministic=True)


@pytest.mark.parametrize(
    ("kind", "dtype", "packed"),
    [
        (kind, "bfloat16" if packed ^ number % 2 else "float16", packed)
        for number, kind in enumerate(COPIED)
        for packed in (False, True)
    ],
)
def test_arrays_that_are_not_aligned(kind: str, dtype: str, packed: bool) -> None:
    """They are copied, and then the very same is computed as of aligned ones. Memory between their elements is NaN."""
    cupy = framework("cupy")
    call = copied_call(kind, dtype, packed)
    found = call.right(cupy)
    replace(call, case=replace(call.case, values="garbage"), results=("padded", "offset", "strided")).right(cupy)
    arrays = call.arrays()
    wide = {name: lay_out(arrays[name], "wide", cupy) for name in ("q", "k", "v", "out", "dout")}
    assert all(map(same, call.run(cupy, **wide), found))


@pytest.mark.parametrize("head_dim", [33, 129])
def test_jax_has_memory_for_copies(head_dim: int) -> None:
    copied_call("33", "bfloat16", False, head_dim=head_dim, head_dim_v=head_dim).right(framework("jax").numpy)


# --- streams and graphs -----------------------------------------------------------------------------


def after_forward(xp: Any) -> dict[str, Any]:
    """A call that keeps a GPU busy for longer than it takes to make."""
    sizes = {"batch": 2, "seqlen_q": 2048, "seqlen_k": 2048, "num_heads_q": 8, "num_heads_k": 8}
    case = Case(**sizes, head_dim=64, head_dim_v=64, dtype="float16")
    q, k, v = (case.view(name).on(case.flat(name), xp) for name in "qkv")
    out, lse = cufa.attention(q, k, v, return_lse=True)
    return {"dout": v, "q": q, "k": k, "v": v, "out": out, "lse": lse}


def test_gradients_run_on_the_current_stream_without_waiting() -> None:
    cupy = framework("cupy")
    arrays = after_forward(cupy)
    expected = cufa.attention_backward(**arrays, deterministic=True)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        late = {name: cupy.zeros_like(array) for name, array in arrays.items()}
        for _ in range(200):  # keeps the stream busy, so that a launch elsewhere would read zeros
            cufa.attention_backward(**late, deterministic=True)
        for name, array in arrays.items():
            late[name][...] = array
        found = cufa.attention_backward(**late, deterministic=True)
        busy = not stream.done
    stream.synchronize()
    assert busy, "the call waited for the GPU"
    assert all(to_numpy(one).any() and same(one, other) for one, other in zip(found, expected, strict=True))


def test_torch_stream_is_honoured() -> None:
    torch = framework("torch")
    arrays = after_forward(torch)
    expected = cufa.attention_backward(**arrays, deterministic=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(array) for name, array in arrays.items()}
        for _ in range(200):
            cufa.attention_backward(**late, deterministic=True)
        for name, array in arrays.items():
            late[name].copy_(array)
        found = cufa.attention_backward(**late, deterministic=True)
    stream.synchronize()
    assert all(to_numpy(one).any() and same(one, other) for one, other in zip(found, expected, strict=True))


STEADY = Call(
    case=Case(
        batch=2, seqlen_q=300, seqlen_k=300, num_heads_q=4, num_heads_k=2, head_dim=64, head_dim_v=64, dtype="float16"
    ),
    deterministic=True,
    results=("contiguous",) * 3,
)


def test_capture_and_replay() -> None:
    cupy = framework("cupy")
    arrays, into = STEADY.arrays(cupy), STEADY.into(cupy)
    changed = {name: cupy.asarray(to_numpy(array)[::-1].copy()) for name, array in arrays.items()}
    expected = [to_numpy(gradient)[::-1].copy() for gradient in STEADY.right(cupy)]
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cufa.attention_backward(**arrays, **into, deterministic=True)  # leaves memory in the pool for the next
        stream.begin_capture()
        cufa.attention_backward(**arrays, **into, deterministic=True)
        graph = stream.end_capture()
        for name, array in arrays.items():
            array[...] = changed[name]
        for gradient in into.values():
            gradient[...] = 0
        graph.launch(stream)
    stream.synchronize()
    assert all(map(same, into.values(), expected))


@pytest.mark.parametrize("copied", [None, 33, 129])
def test_capture_and_replay_by_torch(copied: int | None) -> None:
    """With gradients and workspace of the graph's own, and copies in it of arrays that are not aligned."""
    torch = framework("torch")
    call = replace(STEADY, results=None)
    if copied is not None:
        call = copied_call("33", "float16", False, head_dim=copied, head_dim_v=copied)
    arrays = call.arrays(torch)
    expected = [to_numpy(gradient)[::-1].copy() for gradient in call.right(torch)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cufa.attention_backward(**arrays, deterministic=True)
    for array in arrays.values():
        array.copy_(array.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same, found, expected))
