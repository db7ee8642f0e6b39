"""Score and mask functions: what becomes of them, and what is computed of them on the CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import own_functions as own
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_problem import Launched, OnGpu, unpacked

import cufa
from cufa import functions
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._kernels import unit as units
from cufa._terms.function import mask_feature, score_feature
from cufa._terms.term import Point
from cufa._terms.trace import trace

UNITS: dict[Any, float] = {
    np.float64: 2.0**-32,  # of differences in the reference
    np.float32: 2.0**-19,
    np.float16: 2.0**-7,  # of out and dout, from which gradients are made that cancel
    ml_dtypes.bfloat16: 2.0**-4,
}


PROBLEMS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(UNITS)),
        "packed": st.booleans(),
        "rows": st.integers(1, 24),
        "keys": st.integers(1, 40),
        "heads": st.sampled_from([(4, 2), (2, 2), (3, 1)]),
        "sinks": st.booleans(),
        "alibi": st.booleans(),
        "dlse": st.booleans(),
        "causal": st.booleans(),
        "window_size": st.sampled_from([None, (7, 3), (-1, 4)]),
        "softcap": st.sampled_from([0.0, 2.0]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=120)
@given(
    functions=st.tuples(st.sampled_from([None, *own.SCORES]), st.sampled_from([None, *own.MASKS])).filter(any),
    asked=PROBLEMS,
)
def test_functions_are_computed_on_the_cpu(functions: tuple[str, str], asked: dict[str, Any]) -> None:
    problem = own.problem(own.SCORES.get(functions[0]), own.MASKS.get(functions[1]), **asked)
    own.check(problem.both(), problem.right(), UNITS[asked["dtype"]])


@pytest.mark.parametrize("name", ["tables", "capped", "smooth", "shifted"])
def test_gradients_are_differences(name: str) -> None:
    """Of sum(dout · out) + sum(dlse · lse), along a direction of each array."""
    problem = own.problem(own.SCORES[name], own.MASKS["sliding"], dtype=np.float64, sinks=True, softcap=3.0)
    rng, step = np.random.default_rng(1), 1e-5
    dout, dlse = problem.arrays["dout"], problem.arrays["dlse"]
    gradients = problem.both()[2:]

    def loss(arrays: dict[str, Any], given: list[Any]) -> float:
        moved = problem._replace(arrays=problem.arrays | arrays, given=(given, problem.given[1]))
        out, lse = moved.run(False)
        return float((dout * out).sum() + (dlse * lse)[np.isfinite(lse)].sum())

    names, tables = ("q", "k", "v", "sinks"), problem.given[0]
    assert len(gradients) == len(names) + len(tables)
    for index, gradient in enumerate(gradients):
        x = problem.arrays[names[index]] if index < 4 else tables[index - 4]
        along = rng.standard_normal(x.shape)
        values = []
        for sign in (1, -1):
            y = x + sign * step * along
            if index < 4:
                values.append(loss({names[index]: y}, tables))
            else:
                values.append(loss({}, [y if place == index - 4 else each for place, each in enumerate(tables)]))
        difference = (values[0] - values[1]) / (2 * step)
        assert abs(difference - (gradient * along).sum()) <= 1e-6 * np.linalg.norm(gradient)


def test_what_is_computed_once_more_counts_once() -> None:
    """The gradient by out of a row that sees no key may be NaN."""
    problem = own.problem(own.SCORES["tables"], rows=31, keys=23, causal=True)
    problem.arrays["dout"][1, 2, 3] = np.nan
    own.check(problem.both()[2:], problem.right()[2:], 2.0**-18)


def test_keys_that_a_function_hides_may_be_nan() -> None:
    problem = own.problem(own.SCORES["tables"], own.MASKS["documents"])
    problem.arrays["k"][:, 8:] = problem.arrays["v"][:, 8:] = np.nan
    problem.given[1][0][:2] = 7  # of the first eight queries, which see the first eight keys alone
    problem.given[1][0][2:] = 8
    out = problem.run(False)[0]
    assert np.isfinite(out[:, :8]).all() and np.isnan(out[:, 8:]).any()


def arrays_of(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


slopes_of_module = np.array([0.5, 0.25], np.float32)
cap_of_module = 2.0


def of_module(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    def inner() -> Any:
        return helper(score)

    return inner() - slopes_of_module[head] * abs(query.position - key)


def helper(score: Any) -> Any:
    return cap_of_module * functions.tanh(score / cap_of_module)


def test_arrays_and_numbers_are_found_where_python_finds_them() -> None:
    """In modules, closures and defaults, and by functions inside too; gradients come in the order of finding."""
    q, k, v, dout = arrays_of(*[(2, 9, 2, 4)] * 4)
    slopes, cap = slopes_of_module, cap_of_module
    expected, lse = cufa.attention(q, k, v, softcap=cap, alibi_slopes=slopes, return_lse=True)
    gradients = cufa.attention_backward(dout, q, k, v, expected, lse, softcap=cap, alibi_slopes=slopes)

    def by_default(s: Any, b: Any, h: Any, q: Any, k: Any, t: Any = slopes, *, c: float = cap) -> Any:
        return c * functions.tanh(s / c) - t[h] * abs(q.position - k)

    class Capped:
        def method(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return of_module(s, b, h, q, k)

    chosen: list[Any] = [
        of_module,
        by_default,
        lambda s, b, h, q, k: cap * functions.tanh(s / cap) - slopes[h] * abs(q.position - k),
        (lambda s, b, h, q, k, t, c: c * np.tanh(s / c) - t[h] * np.absolute(q.position - k), slopes, cap),
        Capped().method,
    ]
    for score in chosen:
        out = cufa.attention(q, k, v, score=score)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        *found, dslopes = cufa.attention_backward(dout, q, k, v, expected, lse, score=score)
        for one, other in zip(found, gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert dslopes.shape == (2,) and dslopes.dtype == np.float32 and dslopes.all()


def feature(score: Any) -> Any:
    return score_feature("attention", score)


def test_numbers_are_no_part_of_a_kernel() -> None:
    def scaled(factor: Any) -> Any:
        return lambda s, b, h, q, k: s * factor

    one, other, whole = feature(scaled(2.0)), feature(scaled(np.float32(3))), feature(scaled(2))
    assert one.term is other.term and (one.options, other.options) == ((2.0,), (3.0,))
    assert whole.term != one.term and whole.options == (2,)
    literal = feature(lambda s, b, h, q, k: s * 2.0)
    assert literal.term != one.term and literal.options == ()
    assert literal.term == feature(lambda score, *places: 2.0 * score * 1.0).term
    assert literal.term != feature(lambda s, b, h, q, k: s * 2.5).term
    x = arrays_of((1, 5, 2, 4))[0]
    for factor in (0.5, 4.0):
        found, right = cufa.attention(x, x, x, score=scaled(factor)), cufa.attention(x, x, x, softmax_scale=factor / 2)
        np.testing.assert_allclose(found, right, rtol=1e-5)


def test_many_numbers_are_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in the arguments of launches as floats and ints, each where its name has it."""

    def score(by: Any, until: Any) -> Any:
        return lambda s, b, h, q, k: functions.where(k < until, s * by, s)

    def in_cuda(by: Any, until: Any) -> Any:
        return cufa.cuda_function("key < until ? by * score : score", scalars={"by": by, "until": until})

    def mask(first: Any) -> Any:
        return lambda b, h, q, k: k >= first

    x = OnGpu(2, 200, 4, 64)
    numbers = ((0.5, 3, 5), (math.nan, -(2**31), 2**31 - 1), (float(np.finfo(np.float32).max), 7, -1))
    for function in (score, in_cuda):
        with monkeypatch.context() as patch:
            launched = Launched(patch)
            for by, until, first in numbers:
                cufa.attention(x, x, x, score=function(by, until), mask=mask(first))
            assert _problem._checked.cache_info().misses == len(launched.plans) == 1
        _problem._checked.cache_clear()
        (plan,) = launched.plans.values()
        for (by, until, first), (_, argument) in zip(numbers, launched.kernels, strict=True):
            terms = unpacked(units.record_of(plan, _jit.headers()), argument)["params"]["terms"]
            assert [*terms["mask_function"].values()] == [first]
            np.testing.assert_equal({type(x): x for x in terms["score"].values()}, {float: np.float32(by), int: until})


def test_what_may_change_is_looked_at_anew() -> None:
    """What is read from attributes, of objects, classes and functions."""

    class Settings:
        factor = 1.0

    def helper(s: Any) -> Any:
        return s * helper.factor  # type: ignore[attr-defined]

    settings, numbers = Settings(), [1.0]
    helper.factor = 1.0  # type: ignore[attr-defined]
    functions_of_them: list[Any] = [
        lambda s, *_: s * settings.factor,
        lambda s, *_: s * Settings.factor,
        lambda s, *_: s * numbers[0],
        lambda s, *_: helper(s),
    ]
    first = [feature(each).term for each in functions_of_them]
    assert not any(each.bends for each in first)
    Settings.factor = numbers[0] = helper.factor = 3.0  # type: ignore[attr-defined]
    for each in functions_of_them:
        assert feature(each).term.bends and "0x1.8" in str(feature(each).term.headers)


def test_derivatives_of_1_do_not_bend() -> None:
    table = np.ones((2, 3), np.float32)
    term = feature(lambda s, b, h, q, k: (s + table[h, k]) - 0.5 * (q - k)).term
    assert not term.bends and term.gradients == ("dscore_table",) and not term.reads_score
    term = feature(lambda s, b, h, q, k: functions.maximum(s, 0) * functions.stop_gradient(table[h, k])).term
    assert term.bends and term.gradients == () and not term.foldable
    assert feature(lambda s, b, h, q, k: s * table[k, q]).term.reads_score
    mask = mask_feature("attention", lambda b, h, q, k: h > 0).term
    assert mask.hides and mask.per_head and not mask.bends
    assert not mask_feature("attention", lambda b, h, q, k: q > k).term.per_head


EXPRESSIONS: list[Callable[[Any, Any, Any], Any]] = [
    lambda s, q, k: s + 2 * q - k,
    lambda s, q, k: 1 / (s + 10) - (q + 1) / (k + 2),
    lambda s, q, k: (q - k) // 3 + (k - 5) // -2 + s * 0,
    lambda s, q, k: (q - k) % 3 + (k - 5) % -4 + s % 0.75 + s // 0.5,
    lambda s, q, k: s**3 + q**2 + (s * s + 1) ** -2 + (s * s) ** 0.5 + abs(s) ** 1.7 + (k + 1.0) ** (q * 0.1),
    lambda s, q, k: functions.where((q > k) & ~(k >= 3) | (q == 4) ^ (k != 2), -s, abs(s)),
    lambda s, q, k: functions.minimum(s, 0.5) + functions.maximum(q, k) + functions.clip(s, -1, 1) + np.minimum(s, q),
    lambda s, q, k: functions.exp(s) + functions.exp2(s) + np.log(s * s + 1) + functions.log2(functions.abs(s) + 1),
    lambda s, q, k: functions.tanh(s) * functions.sigmoid(2 * s) + functions.sqrt(s * s + q),
    lambda s, q, k: functions.floor(s) + functions.ceil(s) + functions.to_int(s * 3) + functions.to_float(k) / 7,
    lambda s, q, k: s * ((q & 3) + (k | 1) + (q ^ k) + (q << 2) + (q >> 1) + ~k),
    lambda s, q, k: s + (q <= k) * 2 + (q < 3) - -k + np.float32(0.25) * s + math.pi,
    lambda s, q, k: s + functions.where(q > 2, True, k > 1) + functions.where(q < 2, q, 7),
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_operators_and_functions_are_those_of_numpy(expression: Any) -> None:
    """A function gives the same where it is traced and where it is called with arrays; so do its derivatives."""
    found, _ = trace("f", "score", lambda s, b, h, q, k: expression(s, q, k), ())
    at = Point(np.arange(1), np.arange(1), np.arange(6)[:, None], np.arange(8), 2)
    score = np.random.default_rng(0).standard_normal((6, 8))
    assert found.differential is not None
    result, slope = found.graph.evaluate([found.differential.result, found.differential.slope], score, at, {})
    np.testing.assert_allclose(result, expression(score, at.query, at.key), rtol=1e-12)
    step = 1e-6
    values = [expression(score + sign * step, at.query, at.key) for sign in (1, -1)]
    difference = (values[0] - values[1]) / (2 * step)
    smooth = np.abs(difference) < 1e3  # no step lies between the two
    np.testing.assert_allclose(np.broadcast_to(slope, score.shape)[smooth], difference[smooth], rtol=1e-6, atol=1e-7)
    assert smooth.mean() > 0.9


def test_derivatives_of_each_operand() -> None:
    """Of functions of two numbers by both of them, which are read from arrays."""
    x, y = np.array([0.7], np.float64), np.array([1.9], np.float64)
    operations: list[Any] = [
        lambda a, b: a / b,
        lambda a, b: a**b,
        lambda a, b: b % a,
        lambda a, b: a - b,
        functions.minimum,
        functions.maximum,
        lambda a, b: functions.where(a < b, a * b, a),
        lambda a, b: functions.stop_gradient(a * b) * b,
        lambda a, b: functions.exp2(a) * functions.log2(b),
    ]
    at, score = Point(*(np.zeros((1, 1, 1, 1), int) for _ in range(4)), 0), np.ones((1, 1, 1, 1))
    for operation in operations:
        term = feature((lambda s, b, h, q, k, x, y: s + operation(x[h], y[h]), x, y)).term  # noqa: B023 - traced at once
        into = {f"dscore_{name}": np.zeros(1) for name in "xy"}
        term.gradient(score, at, {"score_x": x, "score_y": y}, into)
        for name, sign in (("x", (1, 0)), ("y", (0, 1))):
            step = 1e-6
            ends = [operation(x + e * sign[0] * step, y + e * sign[1] * step).item() for e in (1, -1)]
            stopped = operation is operations[7]
            right = (ends[0] - ends[1]) / (2 * step) if not stopped else {"x": 0.0, "y": 0.7 * 1.9}[name]
            assert math.isclose(into[f"dscore_{name}"].item(), right, rel_tol=1e-6, abs_tol=1e-8)


def test_indices_outside_read_the_nearest_numbers() -> None:
    table = np.array([1.0, 2.0, 3.0], np.float32)
    found, values = trace("f", "score", lambda s, b, h, q, k: s * 0 + table[k - 2], ())
    at = Point(*(np.zeros((1, 1), int) for _ in range(3)), np.arange(8), 0)
    (result,) = found.graph.evaluate([found.graph.results[0]], np.ones((1, 8)), at, {values[0].name: table})
    np.testing.assert_array_equal(result[0], [1, 1, 1, 2, 3, 3, 3, 3])


REFUSED: list[tuple[Any, str]] = [
    (
        lambda s, b, h, q, k: s if s > 0 else -s,
        "a traced value is not known while the kernel is made: if, and, or, not",
    ),
    (lambda s, b, h, q, k: s * (0 <= q < 3), "a traced value is not known while the kernel is made"),
    (lambda s, b, h, q, k: s * sum(range(k)), "a traced value cannot become a plain number"),
    (lambda s, b, h, q, k: s * int(k), "a traced value is not known while the kernel is made"),
    (lambda s, b, h, q, k: sum(s), "a traced value is not known while the kernel is made"),
    (lambda s, b, h, q, k: math.exp(s), "a traced value cannot become a plain number: instead of math's functions"),
    (lambda s, b, h, q, k: np.sin(s), "numpy.sin does not take what is traced; use cufa.functions"),
    (lambda s, b, h, q, k: s & 1, "&, |, ^, ~, << and >> take integers and conditions, and no floats"),
    (lambda s, b, h, q, k: functions.where(s, 1, 2), "the condition of where is no bool; compare it with something"),
    (lambda s, b, h, q, k: s + "a", "a str meets a traced value; numbers do, and arrays that the function finds"),
    (lambda s, b, h, q, k: s + (1 << 40), "1099511627776 is no number of 32 bits; write it as a float"),
    (lambda s, b, h, q, k: s + k.position, "only the query has a position"),
    (lambda s, b, h, q, k: s[0], "a traced value is one number, and has no items"),
    ((lambda s, b, h, q, k, t: s + t, np.ones(3, np.float32)), "an array is used as a number; index all of its 1 axes"),
    ((lambda s, b, h, q, k, t: s + t[-1], np.ones(3, np.float32)), "an array is indexed by -1; indices count from 0"),
    ((lambda s, b, h, q, k, t: s + t[s], np.ones(3, np.float32)), "an array is indexed by a number that is no integer"),
    (
        (lambda s, b, h, q, k, t: s + t[q, k], np.ones(3, np.float32)),
        "an array of 1 dimensions is indexed by 2 numbers",
    ),
    (
        (lambda s, b, h, q, k, t: s + t[1:], np.ones(3, np.float32)),
        "an array is indexed by slice; index it by an integer",
    ),
]


@pytest.mark.parametrize(("score", "text"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_name_the_line(score: Any, text: str) -> None:
    function = score[0] if isinstance(score, tuple) else score
    line = function.__code__.co_firstlineno
    error = AttributeError if "position" in text else TypeError
    with pytest.raises(error, match=rf"^attention: score: {re.escape(__file__)}, line {line}: {re.escape(text)}"):
        feature(score)


def test_functions_that_will_not_do() -> None:
    x = np.zeros((1, 3, 2, 4), np.float32)

    def refused(score: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as error:
            cufa.attention(x, x, x, score=score)
        return str(error.value)

    wanted = "it must return a score, which is a number."
    assert refused(lambda *_: None) == f"attention: score: the function returns None; {wanted}"
    assert refused(lambda s, *_: s > 0) == f"attention: score: the function returns a bool; {wanted}"
    assert refused(lambda s, *_: [s]) == f"attention: score: the function returns a list; {wanted}"
    assert refused(3) == "attention: score is a int; pass a Python function, or (function, array, ...)."
    text = refused(lambda s, b: s)
    assert "cannot be called with (score, batch, head, query, key): too many positional arguments" in text
    assert "a score function takes score, batch, head, query, key and what is given behind it." in text
    taken = (lambda s, b, h, q, k, t: s + t[h], None)
    assert refused(taken) == "attention: score is given None behind the function; pass arrays and numbers."
    half = np.ones(2, np.float16)
    assert refused(lambda s, b, h, q, k: s + half[h]) == (
        "attention: score: score_half has dtype float16; pass float32, int32 or bool."
    )
    empty = np.ones((2, 0), np.float32)
    assert refused(lambda s, b, h, q, k: s + empty[h, k]) == (
        "attention: score_empty has shape (2, 0); there is nothing in it that could be read."
    )
    huge = 1e39
    assert refused(lambda s, *_: s * huge) == "attention: score: score_huge is 1e+39, which is no number of float32."
    many = [np.ones((1, 1), np.float32) for _ in range(9)]
    with pytest.raises(
        cufa.UnsupportedError, match=r"^attention: the score function reads arrays and numbers that take"
    ):
        cufa.attention(x, x, x, score=(lambda s, b, h, q, k, *t: s + sum(each[h, h] for each in t), *many))
    with pytest.raises(TypeError, match=r"^f: mask: the function returns a number; it must return a bool, whether"):
        mask_feature("f", lambda b, h, q, k: q - k)


def test_arrays_are_those_of_q() -> None:
    jax = pytest.importorskip("jax")
    x, table = np.zeros((1, 3, 2, 4), np.float32), jax.numpy.ones(2)
    with pytest.raises(
        TypeError, match=r"^attention: score_table is a jax array but q is not one; pass arrays of one framework"
    ):
        cufa.attention(x, x, x, score=lambda s, b, h, q, k: s + table[h])


def test_jax_differentiates_functions() -> None:
    """By arrays that the function finds in its closure, and under jit."""
    jax = pytest.importorskip("jax")
    problem = own.problem(own.SCORES["tables"], dlse=False)
    q, k, v, dout = (jax.numpy.asarray(problem.arrays[name]) for name in ("q", "k", "v", "dout"))
    slopes, table = map(jax.numpy.asarray, problem.given[0])
    expected = problem.right()

    @jax.jit
    def loss(q: Any, k: Any, v: Any, slopes: Any, table: Any) -> Any:
        def score(s: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
            return s * slopes[h] + table[h, query.position - key + 4]

        return (dout * cufa.attention(q, k, v, score=score)).sum()

    for found, right in zip(jax.grad(loss, range(5))(q, k, v, slopes, table), expected[2:], strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4)


def twin(score: Any, batch: Any, head: Any, query: Any, key: Any, slopes: Any, cap: Any) -> Any:
    return cap * functions.tanh(score / cap) - slopes[head] * abs(query.position - key)


SOURCE = "cap * tanh(score / cap) - slopes(head) * abs(distance)"


def test_functions_in_cuda_have_twins() -> None:
    q, k, v, dout = arrays_of(*[(2, 9, 2, 4)] * 4)
    slopes, options = slopes_of_module, {"softcap": 2.0, "alibi_slopes": slopes_of_module}
    score = cufa.cuda_function(SOURCE, arrays={"slopes": slopes}, scalars={"cap": 2.0}, twin=twin)
    expected, lse = cufa.attention(q, k, v, return_lse=True, **options)
    np.testing.assert_allclose(cufa.attention(q, k, v, score=score), expected, rtol=1e-5, atol=1e-6)
    found = cufa.attention_backward(dout, q, k, v, expected, lse, score=score)
    for one, other in zip(found, cufa.attention_backward(dout, q, k, v, expected, lse, **options), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    again = cufa.cuda_function(SOURCE, arrays={"slopes": slopes}, scalars={"cap": 7.0}, twin=twin)
    assert feature(score).term == feature(again).term and feature(again).options == (7.0,)


def test_masks_in_cuda_have_twins() -> None:
    q, k, v, dout = arrays_of(*[(2, 9, 2, 4)] * 4)
    until = np.array([4, 9], np.int32)

    def seen(batch: Any, head: Any, query: Any, key: Any, until: Any, step: Any) -> Any:
        return (key < until[head]) | (key % step == 0)

    source = "key < until(head) || key % step == 0"
    mask = cufa.cuda_function(source, arrays={"until": until}, scalars={"step": 5}, twin=seen)
    keys = np.arange(9)
    options = {"mask": ((keys < until[:, None]) | (keys % 5 == 0))[None, :, None], "causal": True}
    expected, lse = cufa.attention(q, k, v, return_lse=True, **options)
    options["mask"] = mask
    np.testing.assert_array_equal(cufa.attention(q, k, v, **options), expected)
    found = cufa.attention_backward(dout, q, k, v, expected, lse, **options)
    right = cufa.attention_backward(dout, q, k, v, expected, lse, mask=(seen, until, 5), causal=True)
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one, other)


def test_functions_in_cuda_that_will_not_do() -> None:
    x, slopes = np.zeros((1, 3, 2, 4), np.float32), slopes_of_module
    for kind, source in (("score", "2.0f * score"), ("mask", "key < 2")):
        with pytest.raises(cufa.UnsupportedError) as refusal:
            cufa.attention(x, x, x, **{kind: cufa.cuda_function(source)})
        assert str(refusal.value) == (
            f"attention: the {kind} function is in C++, and q is on the CPU; give cuda_function a twin in Python, or "
            "pass arrays on a GPU."
        )
    for name in ("score", "tanh", "2a", "a__b", "head", "int", "and", "this"):
        with pytest.raises(ValueError, match=rf"^cuda_function: '{name}' cannot be the name of an array or a number"):
            cufa.cuda_function("score", scalars={name: 1.0})
    with pytest.raises(TypeError, match=r"^cuda_function: table has dtype float16; pass an array of float32, int32 or"):
        cufa.cuda_function("score", arrays={"table": np.ones(2, np.float16)})
    with pytest.raises(TypeError, match=r"^cuda_function: a is a str; pass a number\.$"):
        cufa.cuda_function("score", scalars={"a": "b"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"^cuda_function: source is a int; pass C\+\+ as a str\.$"):
        cufa.cuda_function(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^cuda_function: 3 is a int; the names of arrays are texts"):
        cufa.cuda_function("score", arrays={3: np.ones(2, np.float32)})  # type: ignore[dict-item]
    for source in ("", " \n"):  # which would hide all keys
        with pytest.raises(ValueError, match=r"^cuda_function: source is empty"):
            cufa.cuda_function(source)
    outside = cufa.cuda_function("score", twin=lambda s, b, h, q, k: s + slopes[h])
    with pytest.raises(TypeError, match=r"^attention: the twin of score finds slopes around itself; name all arrays"):
        cufa.attention(x, x, x, score=outside)


def test_explain_tells_of_functions() -> None:
    x = np.zeros((1, 3, 2, 4), np.float32)
    assert "cpu" in str(cufa.explain(x, x, x, score=lambda s, *_: s))


def test_results_may_be_given_beside_arrays_of_bools() -> None:
    problem = own.problem(own.SCORES["tables"], own.MASKS["documents"])
    expected = problem.run(False)[0]
    out = np.empty_like(expected)
    found = problem.run(False, out=out)[0]
    assert found is out
    np.testing.assert_array_equal(found, expected)


def test_jax_takes_arrays_of_integers_and_bools() -> None:
    jax = pytest.importorskip("jax")
    problem = own.problem(own.SCORES["stepped"], own.MASKS["documents"])
    own.check(problem.on(jax.numpy.asarray).both(), problem.right(), UNITS[np.float32])
