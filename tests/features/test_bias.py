"""Biases, relative biases and masks that are arrays, on the CPU and beside the reference."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import featured
import numpy as np
import pytest
from featured import MAKERS
from gradients import Call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_problem import OnGpu

import cufa
from cufa import reference
from cufa._call import arrays as _arrays
from cufa._call import options as _options
from cufa._call import problem as _problem
from cufa._driver.driver import Device
from cufa._operations.backward import ATTENTION_BACKWARD
from cufa._operations.call import Planned, planned_for
from cufa._operations.features import extended
from cufa._operations.forward import ATTENTION, ATTENTION_VARLEN
from cufa._terms.bias import BIAS
from cufa._terms.mask_array import MASK_ARRAY
from cufa.testing import Case, dense_cases, varlen_cases

FEATURES = ("bias", "rel_bias", "mask")
FEW: dict[str, Any] = {"max_seqlen": 33, "head_dims": (8, 31), "layouts": ("contiguous", "transposed")}
FEW |= {"dtypes": ("float16", "bfloat16", "float32", "float64"), "values": ("normal", "garbage"), "features": FEATURES}


@settings(max_examples=25)
@given(case=dense_cases(**FEW) | varlen_cases(**FEW, offsets=("exact", "zeros", "totals", "short")))
def test_forward_equals_reference(case: Case) -> None:
    featured.forward(dataclasses.replace(case, use_out=False))


@settings(max_examples=20)
@given(case=dense_cases(**FEW) | varlen_cases(**FEW, offsets=("exact", "zeros", "short")), dlse=st.booleans())
def test_gradients_equal_reference(case: Case, dlse: bool) -> None:
    if case.num_heads_q == 0:
        case = dataclasses.replace(case, num_heads_q=1, num_heads_k=1)
    featured.backward(Call(case=case, dlse=dlse))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("axes", ["xxxx", "1x1x", "x1x1", "1111"])
def test_gradients_are_differences(packed: bool, axes: str) -> None:
    """Of sum(dout · out) + sum(dlse · lse), along a direction of each array."""
    lengths: dict[str, Any] = (
        {"seqlen_q": (11, 20), "seqlen_k": (25, 14)} if packed else {"seqlen_q": 20, "seqlen_k": 25}
    )
    case = Case(batch=2, num_heads_q=4, num_heads_k=2, dtype="float64", window_size=(9, 3), softcap=4.0, sinks=True,
                bias=axes, rel_bias=5, mask="xxxx", **lengths)  # fmt: skip
    made = Call(case=case)
    arrays = made.arrays()
    *_, dbias, drel_bias = featured.backward(made)
    rng, step = np.random.default_rng(0), 1e-5

    def loss(**changed: Any) -> float:
        operation = ATTENTION_VARLEN if packed else ATTENTION
        out, lse = featured.run(operation, case.arrays() | changed, case.options, True, False)
        return float((arrays["dout"] * out).sum() + (arrays["dlse"] * np.where(np.isfinite(lse), lse, 0)).sum())

    for name, gradient in (("bias", dbias), ("rel_bias", drel_bias)):
        x = arrays[name].astype(np.float64)
        along = rng.standard_normal(x.shape)
        difference = (loss(**{name: x + step * along}) - loss(**{name: x - step * along})) / (2 * step)
        assert gradient.shape == x.shape and np.linalg.norm(gradient) > 0.01
        assert abs(difference - (gradient * along).sum()) <= 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(along)


def test_the_public_functions_take_them() -> None:
    case = Case(batch=2, seqlen_q=20, seqlen_k=25, num_heads_q=4, num_heads_k=2, bias="1xxx", rel_bias=3, sinks=True)
    made = Call(case=case)
    arrays = made.arrays()
    out, lse = cufa.attention(**case.arrays(), return_lse=True)
    np.testing.assert_array_equal(out, featured.forward(case)[0])
    gradients = cufa.attention_backward(**arrays | {"out": out, "lse": lse})
    made.check(gradients)
    wide = {name: arrays[name].astype(np.float64) for name in ("bias", "rel_bias")}  # NumPy's own, beside float32
    for one, other in zip(gradients, cufa.attention_backward(**arrays | wide | {"out": out, "lse": lse}), strict=True):
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_masks_may_be_bytes() -> None:
    """Any but 0 is true, in the specification too."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 9, 2, 8))
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (2, 2, 9, 9))
    out, lse = cufa.attention(q, k, v, mask=mask, return_lse=True)
    np.testing.assert_array_equal(out, cufa.attention(q, k, v, mask=mask != 0))
    np.testing.assert_allclose(reference.attention(q, k, v, mask=mask), out, atol=1e-12)
    found = reference.attention_backward(q, q, k, v, mask=mask)
    for one, other in zip(found, cufa.attention_backward(q, q, k, v, out, lse, mask=mask), strict=False):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_hidden_does_not_show(name: str, number: float) -> None:
    """Numbers of a bias where the causal mask, or a mask that is an array, removes the key."""
    case = Case(batch=2, seqlen_q=30, seqlen_k=30, causal=name == "bias", bias="xxxx", mask="xxxx", sinks=True)
    arrays = case.arrays()
    hidden = np.triu(np.ones((30, 30), bool), 1) if name == "bias" else ~arrays["mask"]
    spoilt = arrays | {"bias": np.where(hidden, np.float32(number), arrays["bias"])}
    for one, other in zip(
        *(featured.run(ATTENTION, x, case.options, True, False) for x in (arrays, spoilt)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
    made = Call(case=case)
    gradients = [featured.run(ATTENTION_BACKWARD, made.arrays() | {"bias": x["bias"]}, case.options, False, False)
                 for x in (arrays, spoilt)]  # fmt: skip
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    assert not gradients[1][4][np.broadcast_to(hidden, gradients[1][4].shape)].any()


def test_rows_without_keys() -> None:
    """Whether a mask hides all keys, or a bias is -inf for all of them."""
    case = Case(batch=1, seqlen_q=9, seqlen_k=12, num_heads_q=2, num_heads_k=2, bias="11xx", mask="11xx")
    arrays = Call(case=case).arrays()
    arrays["mask"][..., 3, :] = False
    arrays["bias"][..., 5, :] = -np.inf
    out, lse = featured.run(ATTENTION, arrays, case.options, True, False)
    assert (
        not out[:, [3, 5]].any() and np.isneginf(lse[..., [3, 5]]).all() and np.isfinite(lse[..., [0, 1, 2, 4]]).all()
    )
    dq, *_, dbias = featured.run(ATTENTION_BACKWARD, arrays | {"out": out, "lse": lse}, case.options, False, False)
    assert not dq[:, [3, 5]].any() and not dbias[..., [3, 5], :].any() and dbias.any()


def q_k_v(shape: tuple[int, ...] = (2, 20, 4, 8), keys: int = 30) -> tuple[Any, Any, Any]:
    q = np.zeros(shape, np.float32)
    k = np.zeros((shape[0], keys, 2, 8), np.float32)
    return q, k, k


EXPECTED = "that is (batch, num_heads_q, seqlen_q, seqlen_k), is expected, and any axis may be 1."
ODD = "(4, an odd number), that is (num_heads_q, 2 * reach + 1), is expected."


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        ("bias", (2, 4, 20, 29), "float32", f"bias has shape (2, 4, 20, 29); (2, 4, 20, 30), {EXPECTED}"),
        ("bias", (20, 30), "float32", f"bias has shape (20, 30); (2, 4, 20, 30), {EXPECTED}"),
        ("mask", (3, 4, 20, 30), "bool", f"mask has shape (3, 4, 20, 30); (2, 4, 20, 30), {EXPECTED}"),
        ("rel_bias", (4, 8), "float32", f"rel_bias has shape (4, 8); {ODD}"),
        ("rel_bias", (2, 9), "float32", f"rel_bias has shape (2, 9); {ODD}"),
        ("bias", (2, 1, 20, 30), "float16", "bias has dtype float16; pass float32."),
        ("bias", (2, 1, 20, 30), "bool", "bias has dtype bool; pass float32."),
        ("mask", (2, 4, 20, 30), "float32", "mask has dtype float32; pass bool or uint8."),
        ("rel_bias", (4, 9), "float16", "rel_bias has dtype float16; pass float32."),
    ],
)
def test_arrays_that_will_not_do_are_refused(name: str, shape: tuple[int, ...], dtype: str, words: str) -> None:
    (q, k, v), array = q_k_v(), np.zeros(shape, dtype)
    with pytest.raises(ValueError) as refusal:
        featured.run(ATTENTION, {"q": q, "k": k, "v": v, name: array}, {"causal": False, "softcap": 0.0}, False, False)
    assert str(refusal.value) == f"attention: {words}"
    if "dtype" not in words:  # the reference takes any numbers
        with pytest.raises(ValueError) as refusal:
            reference.attention(q, k, v, **{name: array})
        assert str(refusal.value) == f"attention: {words}"


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_arrays_reach_over_packed_sequences(name: str) -> None:
    q, k, v = np.zeros((20, 2, 8), np.float32), np.zeros((30, 2, 8), np.float32), np.zeros((30, 2, 8), np.float32)
    arrays = {"q": q, "k": k, "v": v, "cu_seqlens_q": np.array([0, 5, 20], np.int32)}
    arrays |= {"cu_seqlens_k": np.array([0, 20, 30], np.int32)}
    dtype = np.float32 if name == "bias" else bool
    options = {"causal": False, "softcap": 0.0}
    for shape in ((2, 2, 15, 20), (1, 1, 15, 1), (1, 1, 40, 50)):
        featured.run(ATTENTION_VARLEN, arrays | {name: np.ones(shape, dtype)}, options, False, False)
    for shape in ((2, 2, 14, 20), (1, 1, 15, 19)):
        with pytest.raises(ValueError) as refusal:
            featured.run(ATTENTION_VARLEN, arrays | {name: np.ones(shape, dtype)}, options, False, False)
        assert str(refusal.value) == (
            f"attention_varlen: {name} has shape {shape}, but the longest sequences have 15 queries and 20 keys; its "
            "last two axes must be as long, or 1."
        )


def on_gpu(shape: tuple[int, ...], dtype: str = "float16", **more: Any) -> tuple[dict[str, Any], Any]:
    """Arrays of a call of the gradients on a GPU with a bias of a shape."""
    q, k = OnGpu(2, 200, 4, 64, dtype="float16"), OnGpu(2, 300, 2, 64, dtype="float16")
    arrays = {"q": q, "k": k, "v": k, "out": q, "dout": q, "lse": OnGpu(2, 4, 200, dtype="float32")}
    return arrays | {"bias": OnGpu(*shape, dtype=dtype, **more)}, {"causal": False, "softcap": 0.0}


H200 = Device(90, 132)


def planned(arrays: dict[str, Any], deterministic: bool) -> Planned:
    """What will run for gradients on a GPU."""
    features = [MAKERS[name]("attention_backward", arrays[name]) for name in MAKERS if name in arrays]
    given = tuple(arrays.get(name) for name in ATTENTION_BACKWARD.arrays)
    asked = False, None, None, 0.0, False, deterministic
    operation, given, asked = extended(ATTENTION_BACKWARD, given, asked, features)
    view = _arrays.view(operation.name, operation.arrays, given, operation.uncopied_indices)
    return planned_for(_problem.check(operation, view, _options.of(operation.name, asked, operation.owned)), H200)


@pytest.mark.parametrize("shape", [(2, 1, 200, 300), (1, 4, 1, 300), (1, 1, 1, 1)], ids=str)
def test_sums_in_order_take_memory_for_elements_of_the_bias(shape: tuple[int, ...]) -> None:
    arrays = on_gpu(shape)[0] | {"rel_bias": OnGpu(4, 7, dtype="float32")}
    ordered, loose = (planned(arrays, deterministic) for deterministic in (True, False))
    assert [term.ordered for term in ordered.plan.config.variant] == [True, True]
    assert [term.ordered for term in loose.plan.config.variant] == [False, False]
    words = [16 * math.prod(each) for each in (shape, (4, 7))]
    begins = [ordered.scratch.parts[name] for name in ("dbias_words", "drel_bias_words")]
    assert begins[1] - begins[0] >= words[0] and ordered.scratch.floats - begins[1] >= words[1]
    assert ordered.scratch.floats - loose.scratch.floats < sum(words) + 128
    assert {*ordered.plan.entries} - {*loose.plan.entries} == {"attention_backward_terms"}
    assert "dbias_words" not in loose.scratch.parts


def test_a_bias_whose_gradient_is_stored_is_in_order_as_it_is() -> None:
    arrays, _ = on_gpu((2, 4, 200, 300))
    assert planned(arrays, True).plan.entries == planned(arrays, False).plan.entries


@pytest.mark.parametrize(("name", "along"), [("bias", 0), ("rel_bias", 64)])
def test_sums_in_order_have_room_for_so_many_numbers(name: str, along: int) -> None:
    rows, most = 1 << 19, 1 << 20
    squares = rows // 16 - along
    x = OnGpu(1, 16 * squares, 1, 64, dtype="float16")
    shape = (1, 1, 1, 1) if name == "bias" else (1, 9)
    arrays: dict[str, Any] = {"q": x, "out": x, "dout": x, "lse": OnGpu(1, 1, 16 * squares, dtype="float32")}
    arrays |= {name: OnGpu(*shape, dtype="float32")}
    fewer, more = (
        OnGpu(1, keys, 1, 64, dtype="float16") for keys in (most - 16 * 2 * along, most + 16 * 2 * along + 1)
    )
    planned(arrays | {"k": fewer, "v": fewer}, True)
    planned(arrays | {"k": more, "v": more}, False)
    columns = -(-more.shape[1] // 16)
    numbers = squares * columns + along * (squares + columns)
    with pytest.raises(cufa.UnsupportedError) as refusal:
        planned(arrays | {"k": more, "v": more}, True)
    assert str(refusal.value) == (
        f"attention_backward: up to {numbers} numbers may add up in an element of the gradient of {name}; sums that "
        f"are the same bits in every run have room for {1 << 31}. Pass deterministic=False."
    )


def test_strides_that_kernels_cannot_multiply_are_refused() -> None:
    arrays, options = on_gpu((2, 4, 200, 300), strides=(1, 1, 1 << 30, 1))
    with pytest.raises(cufa.UnsupportedError, match=r"bias has strides .* must be less than 2\^31 bytes"):
        featured.run(ATTENTION_BACKWARD, arrays, options, False, False)
    _problem._checked.cache_clear()


class Spec:
    """A layout, as far as terms ask for it."""

    def __init__(self, *shape: int, strides: tuple[int, ...], dtype: str = "bfloat16", misalignment: int = 0) -> None:
        self.shape, self.strides, self.dtype, self.misalignment = shape, strides, dtype, misalignment

    def __str__(self) -> str:
        return f"{self.shape} {self.strides} {self.dtype} {self.misalignment}"


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        (Spec(2, 4, 20, 30, strides=(2400, 600, 30, 1)), "bf16, 1, true, false, false, true, true, false, false"),
        (Spec(2, 4, 20, 32, strides=(2560, 640, 32, 1)), "bf16, 1, true, true, false, true, true, false, false"),
        (Spec(2, 4, 20, 30, strides=(2400, 600, 31, 1)), "bf16, 1, false, false, false, true, true, false, false"),
        (Spec(2, 4, 20, 30, strides=(0, 0, 30, 1), misalignment=2),
         "bf16, 1, false, false, false, true, true, false, false"),
        (Spec(1, 1, 1, 30, strides=(7, 7, 7, 1)), "bf16, 1, true, false, false, false, false, true, false"),
        (Spec(2, 1, 20, 1, strides=(20, 7, 1, 1)), "bf16, 0, false, false, false, false, false, false, true"),
        (Spec(2, 4, 20, 30, strides=(0, 0, 1, 20)), "bf16, -1, false, false, false, true, true, false, false"),
        (Spec(2, 4, 20, 30, strides=(0, 0, 30, 1), dtype="float32"),
         "f32, 1, true, false, false, true, true, false, false"),
    ],
    ids=str,
)  # fmt: skip
def test_terms_are_specialised_by_layout(spec: Spec, arguments: str) -> None:
    keys = max(30, spec.shape[3])
    shapes: Any = {"q": Spec(2, 20, 4, 8, strides=()), "k": Spec(2, keys, 2, 8, strides=()), "bias": spec, "mask": spec}
    term = BIAS.specialised(shapes, False)
    boxed = str(spec.strides[2] == 32).lower()  # rows of whole chunks of 16 bytes
    assert term.struct("f16") == f"attention::Bias<{arguments}, false, false, {boxed}>"
    exact = str(not term.ordered).lower()
    assert term.in_order().struct("f16") == f"attention::Bias<{arguments}, {exact}, false, {boxed}>"
    assert term != BIAS or arguments.startswith("f32, -1")
    assert term == BIAS.specialised(shapes, False) and hash(term) == hash(BIAS.specialised(shapes, False))
    assert MASK_ARRAY.specialised(shapes, False) != term


FOREIGN = Case(
    batch=2, seqlen_q=20, seqlen_k=26, num_heads_q=4, num_heads_k=2, bias="x1xx", rel_bias=4, causal=True, sinks=True
)
DIFFERENTIATED = ("q", "k", "v", "sinks", "bias", "rel_bias")


def test_jax_differentiates_and_maps() -> None:
    """By the records alone, in the bias's own dtype."""
    jax = pytest.importorskip("jax")
    made = Call(case=FOREIGN)
    host = made.arrays()
    arrays = {name: jax.numpy.asarray(x) for name, x in host.items()}

    def attend(*chosen: Any) -> Any:
        return cufa.attention(**dict(zip(DIFFERENTIATED, chosen, strict=True)), causal=True, return_lse=True)

    def pulled(*chosen: Any) -> Any:
        return jax.vjp(attend, *chosen)[1]((arrays["dout"], arrays["dlse"]))

    chosen = [arrays[name] for name in DIFFERENTIATED]
    made.check(tuple(np.asarray(x) for x in jax.jit(pulled)(*chosen)))
    double = [jax.numpy.stack([x, 0.5 * x]) for x in chosen]
    for one, *others in zip(jax.vmap(pulled)(*double), *(pulled(*(x[i] for x in double)) for i in (0, 1)), strict=True):
        np.testing.assert_allclose(one, np.stack(others), rtol=2e-4, atol=2e-4)
    q, k, v, _, bias, _ = (x.astype(jax.numpy.bfloat16) for x in chosen)

    def loss(bias: Any) -> Any:
        return cufa.attention(q, k, v, bias=bias, causal=True).astype(jax.numpy.float32).sum()

    assert jax.grad(loss)(bias).dtype == jax.numpy.bfloat16


def test_terms_go_to_other_processes() -> None:
    """As plans do, of which they are a part."""
    for term in (BIAS, BIAS.in_order(), BIAS.wanting(()), MASK_ARRAY):
        assert pickle.loads(pickle.dumps(term)) == term
