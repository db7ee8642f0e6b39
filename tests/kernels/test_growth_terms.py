"""Score terms are added from a directory outside the package: on the CPU, under JAX, and in kernels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import plans
import pytest
from sampling import paired
from test_problem import Launched, OnGpu, unpacked

import cufa
from cufa import reference
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._cpu import forward as _cpu
from cufa._kernels import unit as units
from cufa._operations.call import call
from cufa._operations.forward import ATTENTION
from cufa._operations.operation import gradients_of
from cufa._terms import TERMS
from cufa.testing import to_numpy

TABLE = """\
// attention: the score term that adds a number for each head and distance.
#pragma once

#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

struct TableData {
  const float* table;  // (heads, reach)
  float* dtable;       // (heads, reach), contiguous
  i64 head_stride, distance_stride;
  i32 heads, reach;
};

// A score s becomes s + table[head][distance]; distances beyond the table have what its ends say.
struct Table : Term {
  using Data = TableData;
  static constexpr bool bends = false, has_gradient = true;

  const float* row;
  float* drow;
  i64 stride;
  int reach;

  Table(const Data& data, int, int head)
      : row(data.table + head * data.head_stride),
        drow(data.dtable + i64(head) * data.reach),
        stride(data.distance_stride),
        reach(data.reach) {}

  int place(const Point& at) const { return clamp(int(at.distance), 0, reach - 1); }

  float score(float s, const Point& at) const { return at.live ? s + row[place(at) * stride] : s; }

  void gradient(float ds, const Point& at) const { atomicAdd(drow + place(at), ds); }

  static void begin(const Data& data, i64 thread, i64 threads) {
    for (i64 i = thread; i < i64(data.heads) * data.reach; i += threads) data.dtable[i] = 0.0f;
  }
};

}  // namespace attention
"""

CHECKERS = """\
// attention: the score term that draws scores in, and drops the probabilities on the dark squares of a chessboard.
#pragma once

#include "attention/term.cuh"
#include "core/types.cuh"

namespace attention {

struct CheckersData {
  float inverse;  // 1 / bound
  i32 seed;
};

// A score s becomes s / (1 + |s| / bound), whose derivative is (1 - |that| / bound)^2.
struct Checkers : Term {
  using Data = CheckersData;
  static constexpr bool per_head = false, scales = true;

  float inverse;
  int seed;

  Checkers(const Data& data, int, int) : inverse(data.inverse), seed(data.seed) {}

  float score(float s, const Point&) const { return s / fmaf(fabsf(s), inverse, 1.0f); }

  float dscore(float scored, const Point&) const {
    const float left = fmaf(-fabsf(scored), inverse, 1.0f);
    return left * left;
  }

  float factor(const Point& at) const { return (at.batch + at.query + at.key + seed) % 2 == 0 ? 2.0f : 0.0f; }
};

}  // namespace attention
"""

MODULE = '''\
"""Two score terms, and operations that have them."""

from pathlib import Path

import numpy as np

from cufa._call import options as _options
from cufa._operations.backward import ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD
from cufa._operations.forward import ATTENTION, ATTENTION_VARLEN
from cufa._terms import Term

HERE = Path(__file__).parent


class Table(Term):
    """Its array is (num_heads_q, reach)."""

    name = "table"
    header = "attention/table.cuh"
    type = "attention::Table"
    data = "TableData"
    headers = {header: (HERE / "table.cuh").read_text()}
    arrays = ("table",)
    gradients = ("dtable",)
    bends = False
    foldable = True

    def check(self, call):
        table, heads = call.specs.get("table"), call.specs["q"].shape[-2]
        if table is None:
            return
        call.check_float32("table", table)
        if len(table.shape) != 2 or table.shape[0] != heads or table.shape[1] < 1:
            call.value_error(f"table has shape {table.shape}; ({heads}, reach), of heads and distances, is expected.")

    def results(self, problem):
        return {"dtable": (problem.specs["table"].shape, problem.lse_dtype)}

    def values(self, problem):
        strides, (heads, reach) = problem.strides["table"], problem.specs["table"].shape
        return {"head_stride": strides[0], "distance_stride": strides[1], "heads": heads, "reach": reach}

    def fits(self, given, farthest, largest):
        return float(np.abs(given["table"]).max(initial=0)) < largest

    def place(self, at, given):
        return np.clip(at.distance, 0, given["table"].shape[1] - 1)

    def score(self, s, at, given):
        s += given["table"][at.head, self.place(at, given)]
        return s

    def gradient(self, dscored, at, given, into):
        np.add.at(into["dtable"], (at.head, self.place(at, given)), dscored.sum(axis=0, dtype=np.float64))


class Checkers(Term):
    """It has two options, bound and seed; with a bound of 0 it is not there."""

    name = "checkers"
    header = "attention/checkers.cuh"
    type = "attention::Checkers"
    data = "CheckersData"
    headers = {header: (HERE / "checkers.cuh").read_text()}
    option_names = ("bound", "seed")
    per_head = False
    scales = True

    def plain(self, function, values):
        bound, seed = values
        return _options.number(function, "bound", bound), _options.integer(function, "seed", seed)

    def asked(self, specs, options):
        return options.own("bound") > 0

    def check(self, call):
        bound = call.options.own("bound")
        if not 0 <= bound < 2**20:
            call.value_error(f"bound is {bound}; it must be from 0, which is off, to 2^20.")

    def values(self, problem):
        return {"inverse": 1 / problem.options.own("bound"), "seed": problem.options.own("seed")}

    def options(self, problem):
        return dict(problem.options.more)

    def score(self, s, at, given):
        return s / (1 + np.abs(s) / given["bound"])

    def dscore(self, scored, at, given):
        return (1 - np.abs(scored) / given["bound"]) ** 2

    def factor(self, at, given):
        return np.where((at.batch + at.query + at.key + given["seed"]) % 2 == 0, 2, 0)


TERMS = (Table(), Checkers())
FORWARD = [each.having(*TERMS, name=f"{each.name}_added") for each in (ATTENTION, ATTENTION_VARLEN)]
BACKWARD = [
    each.having(*TERMS, of=forward)
    for each, forward in zip((ATTENTION_BACKWARD, ATTENTION_VARLEN_BACKWARD), FORWARD, strict=True)
]
'''


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the terms, found in a directory of its own."""
    folder = tmp_path_factory.mktemp("terms")
    for name, text in (("table.cuh", TABLE), ("checkers.cuh", CHECKERS), ("added_terms.py", MODULE)):
        (folder / name).write_text(text)
    spec = importlib.util.spec_from_file_location("added_terms", folder / "added_terms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["added_terms"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["added_terms"]


class TableTwin:
    """The table as the reference takes it."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float64)

    def score(self, s: np.ndarray, at: reference.At) -> np.ndarray:
        for distance in range(int(at.distance.min(initial=0)), int(at.distance.max(initial=0)) + 1):
            column = self.table[:, min(max(distance, 0), self.table.shape[1] - 1)]
            s = np.where(at.distance == distance, s + column[:, None, None], s)
        return s

    def slope(self, s: np.ndarray, at: reference.At) -> float:
        return 1.0

    def keep(self, at: reference.At) -> bool:
        return True

    def factor(self, at: reference.At) -> float:
        return 1.0

    def gradient(self, ds: np.ndarray, s: np.ndarray, at: reference.At) -> tuple[np.ndarray]:
        reach = self.table.shape[1]
        sums = np.zeros(self.table.shape)
        for column in range(reach):
            first, last = column == 0, column == reach - 1
            there = (at.distance == column) | (first & (at.distance < 0)) | (last & (at.distance > column))
            sums[:, column] = np.where(there, ds, 0).sum(axis=(0, 2, 3))
        return (sums,)


class CheckersTwin:
    """The chessboard as the reference takes it."""

    def __init__(self, bound: float, seed: int) -> None:
        self.bound, self.seed = bound, seed

    def score(self, s: np.ndarray, at: reference.At) -> np.ndarray:
        return s * self.bound / (self.bound + np.abs(s))

    def slope(self, s: np.ndarray, at: reference.At) -> np.ndarray:
        return self.bound**2 / (self.bound + np.abs(s)) ** 2

    def keep(self, at: reference.At) -> bool:
        return True

    def factor(self, at: reference.At) -> np.ndarray:
        return 1.0 + (-1.0) ** (at.batch + at.query + at.key + self.seed)

    def gradient(self, ds: np.ndarray, s: np.ndarray, at: reference.At) -> tuple[()]:
        return ()


class Problem(NamedTuple):
    """Arrays by name, dense or packed; options in the order of a call, and those of the terms' own."""

    arrays: dict[str, Any]
    causal: bool = False
    window_size: tuple[int, int] | None = (40, 15)
    bound: float = 3.0
    seed: int = 7

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.arrays

    @property
    def right(self) -> dict[str, Any]:
        """What the reference takes beside q, k, v and offsets."""
        terms = [TableTwin(self.arrays["table"]), CheckersTwin(self.bound, self.seed)]
        masks = {"causal": self.causal, "window_size": self.window_size}
        return masks | {"softcap": 4.0, "terms": terms} | {n: self.arrays[n] for n in ("alibi_slopes", "sinks")}

    def offsets(self) -> tuple[Any, ...]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k") if self.packed else ()
        return tuple(self.arrays[name] for name in names)

    def attend(self) -> tuple[np.ndarray, np.ndarray]:
        """By the reference: out and lse."""
        attend = reference._attend_packed if self.packed else reference._attend
        return attend(*(self.arrays[name] for name in "qkv"), *self.offsets(), **self.right)

    def differentiate(self) -> tuple[np.ndarray, ...]:
        """By the reference: dq, dk, dv, dsinks and dtable."""
        differentiate = reference._differentiate_packed if self.packed else reference._differentiate
        dout, q, k, v, dlse = (self.arrays[name] for name in ("dout", "q", "k", "v", "dlse"))
        return differentiate(dout, q, k, v, *self.offsets(), dlse, **self.right)

    def run(self, operation: Any, *, return_lse: bool = False, **more: Any) -> Any:
        """An operation with the arrays, and with `more`."""
        arrays = self.arrays | more
        asked = self.causal, self.window_size, None, 4.0, return_lse, False, self.bound, self.seed
        return call(operation, tuple(arrays.get(name) for name in operation.arrays), asked)

    def both(self, added: Any) -> tuple[Any, ...]:
        """What is computed forward, and from that backward: out, lse, dq, dk, dv, dsinks and dtable."""
        out, lse = self.run(added.FORWARD[self.packed], return_lse=True)
        return out, lse, *self.run(added.BACKWARD[self.packed], out=out, lse=lse)


def problem(
    packed: bool, dtype: Any = np.float32, rows: int = 50, keys: int = 70, head_dim: int = 24, **options: Any
) -> Problem:
    """Three sequences, of one length, or of different ones."""
    rng = np.random.default_rng(0)
    wide = np.float64 if dtype == np.float64 else np.float32
    shape_q, shape_k, shape_lse = (3, rows, 4, head_dim), (3, keys, 2, head_dim), (3, 4, rows)
    arrays: dict[str, Any] = {}
    if packed:
        shape_q, shape_k, shape_lse = (3 * rows, 4, head_dim), (3 * keys, 2, head_dim), (4, 3 * rows)
        starts = [[0, rows // 2, 2 * rows, 3 * rows], [0, keys, keys + keys // 2, 3 * keys]]
        lengths = [keys - 5, keys // 2, keys]
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
        arrays |= {name: np.array(x, np.int32) for name, x in zip(names, (*starts, lengths), strict=True)}
    arrays |= {name: rng.standard_normal(shape_k).astype(dtype) for name in "kv"}
    arrays |= {name: rng.standard_normal(shape_q).astype(dtype) for name in ("q", "dout")}
    arrays |= {"dlse": rng.standard_normal(shape_lse).astype(wide), "sinks": rng.standard_normal(4).astype(wide)}
    arrays["alibi_slopes"] = rng.uniform(0, 0.1, (3, 4)).astype(wide)
    arrays["table"] = rng.standard_normal((33, 4)).astype(wide).T
    return Problem(arrays, **options)


def check(found: tuple[Any, ...], right: Problem, unit: float = 2.0**-20) -> None:
    """Within a few times `unit`, by the norm of each result; `found` are all of them, or the gradients alone."""
    expected = (*right.attend(), *right.differentiate())[-len(found) :]
    assert len(found) == len(expected) >= 5
    for each, exact in zip(found, expected, strict=True):
        each = to_numpy(each).astype(np.float64)
        seen = np.isfinite(exact)  # lse is -inf where no key is seen
        assert (
            each.shape == exact.shape and np.array_equal(np.isfinite(each), seen) and np.abs(exact[seen]).max() > 0.01
        )
        assert np.linalg.norm((each - exact)[seen]) <= 4 * unit * np.linalg.norm(exact[seen])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": None, "seed": -8}], ids=["window", "causal"])
def test_terms_are_computed_on_the_cpu(added: Any, packed: bool, dtype: Any, options: dict[str, Any]) -> None:
    given = problem(packed, dtype, **options)
    check(given.both(added), given, 2.0**-20 if dtype == np.float32 else 2.0**-48)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_are_differences(added: Any, packed: bool) -> None:
    """Of sum(dout · out) + sum(dlse · lse), along a direction of each array."""
    given = problem(packed, np.float64)
    names, rng, step = ("q", "k", "v", "sinks", "table"), np.random.default_rng(1), 1e-5
    *_, dq, dk, dv, dsinks, dtable = given.both(added)

    def loss(**changed: Any) -> float:
        out, lse = given.run(added.FORWARD[packed], return_lse=True, **changed)
        finite = np.where(np.isfinite(lse), lse, 0)
        return float((given.arrays["dout"] * out).sum() + (given.arrays["dlse"] * finite).sum())

    for name, gradient in zip(names, (dq, dk, dv, dsinks, dtable), strict=True):
        x, along = given.arrays[name], rng.standard_normal(given.arrays[name].shape)
        difference = (loss(**{name: x + step * along}) - loss(**{name: x - step * along})) / (2 * step)
        assert abs(difference - (gradient * along).sum()) <= 1e-7 * np.linalg.norm(gradient)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_what_is_computed_once_more_counts_once(added: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient by out of a row that sees no key may be NaN: that is met when others have been added up."""
    for name, value in (("BLOCK_M", 16), ("BLOCK_N", 16), ("MAX_BLOCK_N", 32), ("TILE_ELEMENTS", 256)):
        monkeypatch.setattr(_cpu, name, value)
    given = problem(packed, rows=70, keys=50, causal=True, window_size=None)
    given.arrays["dout"][(151, 3) if packed else (2, 17, 3)] = np.nan
    check(given.both(added)[2:], given)


def test_keys_behind_the_mask_give_no_gradient(added: Any) -> None:
    """Rows see one key each, and one of those has a NaN in v: the gradient at other distances is not touched."""
    given = problem(packed=False, rows=50, keys=50, window_size=(0, 0))
    given.arrays["v"][:, 10, 1] = np.nan
    *_, dtable = given.both(added)
    expected = given.differentiate()[4]
    assert np.isnan(expected[2:, 0]).all() and not expected[:, 1:].any()
    np.testing.assert_allclose(dtable, expected, rtol=1e-4, atol=1e-4)


def test_terms_serve_jax_under_jit(added: Any) -> None:
    jax = pytest.importorskip("jax")
    given = problem(packed=True)

    @jax.jit
    def both(arrays: dict[str, Any]) -> tuple[Any, ...]:
        return given._replace(arrays=arrays).both(added)

    check(both({name: jax.numpy.asarray(x) for name, x in given.arrays.items()}), given)


def test_what_is_not_asked_for_gives_nothing(added: Any) -> None:
    """Without its array and with a bound of 0, the operation gives what that gives from which it was made."""
    arrays = {name: x for name, x in problem(packed=False).arrays.items() if name != "table"}
    given = Problem(arrays, bound=0.0)
    options: dict[str, Any] = {"window_size": (40, 15), "softcap": 4.0}
    options |= {name: arrays[name] for name in ("alibi_slopes", "sinks")}
    q, k, v, dout, dlse = (arrays[name] for name in ("q", "k", "v", "dout", "dlse"))
    out, lse = cufa.attention(q, k, v, return_lse=True, **options)
    expected = out, lse, *cufa.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    np.testing.assert_equal(given.both(added), expected)


def test_arrays_and_options_of_terms_are_checked(added: Any) -> None:
    given, forward = problem(packed=False), added.FORWARD[0]
    table = given.arrays["table"]
    for wrong in (table[:3], table[:, :0], table[0]):
        with pytest.raises(ValueError, match=r"^attention_added: table has shape .*\(4, reach\)"):
            given.run(forward, table=wrong)
    with pytest.raises(ValueError, match=r"^attention_added: table has dtype float16; pass float32"):
        given.run(forward, table=table.astype(np.float16))
    with pytest.raises(ValueError, match=r"^attention_added: bound is -1.0; it must be from 0"):
        given._replace(bound=-1.0).run(forward)
    with pytest.raises(TypeError, match=r"^attention_added: seed is a float; pass an integer"):
        given._replace(seed=0.5).run(forward)  # type: ignore[arg-type]
    arrays = tuple(given.arrays.get(name) for name in forward.arrays)
    for more in ((), (1.0,), (1.0, 2, 3)):
        words = rf"^attention_added: {len(more)} further options .* its score terms are bound, seed"
        with pytest.raises(TypeError, match=words):
            call(forward, arrays, (False, None, None, 0.0, False, False, *more))
    with pytest.raises(TypeError, match=r"^attention: 1 further options are given; its score terms have none"):
        call(ATTENTION, arrays[:-1], (False, None, None, 0.0, False, False, 1.0))


def test_gradients_in_no_order_are_not_called_deterministic(added: Any) -> None:
    given, backward = problem(packed=False), added.BACKWARD[0]
    out, lse = given.run(added.FORWARD[0], return_lse=True)
    arrays = given.arrays | {"out": out, "lse": lse}
    asked = given.causal, given.window_size, None, 4.0, False, True, given.bound, given.seed
    check(call(backward, tuple(arrays.get(name) for name in backward.arrays), asked), given)  # on the CPU they are
    q, k, lse = OnGpu(2, 200, 4, 64), OnGpu(2, 300, 2, 64), OnGpu(2, 4, 200, dtype="float32")
    arrays = {"q": q, "k": k, "v": k, "out": q, "dout": q, "lse": lse, "table": OnGpu(4, 33, dtype="float32")}
    with pytest.raises(cufa.UnsupportedError, match=r"the gradients of table add up in no fixed order"):
        call(backward, tuple(arrays.get(name) for name in backward.arrays), asked)
    _problem._checked.cache_clear()


def test_options_of_one_value_and_two_types_are_one_problem(added: Any) -> None:
    given = problem(packed=False)._replace(bound=3)
    out = given.run(added.FORWARD[0])
    before = _problem._checked.cache_info().misses
    for bound in (3.0, np.float32(3), np.array(3)):
        np.testing.assert_array_equal(given._replace(bound=bound).run(added.FORWARD[0]), out)
    assert _problem._checked.cache_info().misses == before
    assert (given._replace(seed=np.int64(8)).run(added.FORWARD[0]) != out).any()


def test_names_are_not_given_twice(added: Any) -> None:
    with pytest.raises(ValueError, match="table, table, two have the same name"):
        added.FORWARD[0].having(added.Table())
    with pytest.raises(ValueError, match="bound, seed, bound, seed, two have the same name"):
        ATTENTION.having(added.Checkers(), added.Checkers())


def test_gradients_are_found_by_their_operation(added: Any) -> None:
    assert [gradients_of(each) for each in added.FORWARD] == added.BACKWARD
    assert gradients_of(ATTENTION) is not added.BACKWARD[0] and gradients_of(added.BACKWARD[0]) is None
    with pytest.raises(ValueError, match="gradients, and they alone, are those of an operation"):
        added.BACKWARD[0].having()


def test_the_package_knows_nothing_of_them(added: Any) -> None:
    root = Path(cufa.__file__).parents[1]
    texts = [path.read_text() for path in (root / "cufa").rglob("*.py")]
    assert not [name for name in ("Checkers", "CheckersData", "dtable") if any(name in text for text in texts)]
    assert ATTENTION.terms == TERMS and ATTENTION.arrays == added.FORWARD[0].arrays[:-1]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window_size": None, "seed": -8},
        {"head_dim": 160, "causal": True, "window_size": None},  # a kernel of two passes on Hopper
        {"rows": 30, "keys": 40},  # small tiles
    ],
    ids=["window", "causal", "wide", "short"],
)
def test_terms_are_computed_on_a_gpu(added: Any, packed: bool, dtype: str, options: dict[str, Any]) -> None:
    cupy = pytest.importorskip("cupy")
    # The last number of a head of the table adds up most gradients, in float32 and in the order in which they come: of
    # 300 rows and 420 keys tens of thousands, whose sums pass through numbers many times as large as the last.
    element, unit, rows, keys = {
        "float32": (np.float32, 2.0**-18, 150, 210),
        "bfloat16": (ml_dtypes.bfloat16, 2.0**-8, 300, 420),
    }[dtype]
    given = problem(packed, element, **({"rows": rows, "keys": keys} | options))
    arrays = {name: cupy.asarray(x) for name, x in given.arrays.items()}
    check(given._replace(arrays=arrays).both(added), given, unit)


def kernel(terms: tuple[Any, ...], dtype: str, arch: int, packed: bool, of: Any) -> Any:
    """The plan of a kernel that has these terms, by `plans.forward` or `plans.backward`."""
    return of(plans.static(dtype, 64, 64, mask="window", varlen=packed)._replace(terms=terms), arch)


@pytest.mark.parametrize(("arch", "kind"), paired([80, 90], [("f32", True), ("bf16", False)]), ids=str)
@pytest.mark.parametrize("of", [plans.forward, plans.backward], ids=["forward", "backward"])
def test_kernels_compile_with_headers_of_terms(added: Any, arch: int, kind: tuple[str, bool], of: Any) -> None:
    dtype, packed = kind
    plan = kernel((*plans.ALL_TERMS, *added.TERMS), dtype, arch, packed, of)
    assert "softcap, alibi, table, checkers" in plan.words()
    assert plans.compile_plan(plan).cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("flag", "said", "says_otherwise"),
    [
        ("per_head", "true", {"per_head": True}),
        ("bends", "false", {"bends": False}),
        ("scales", "false", {"scales": False}),
        ("has_gradient", "true", {"gradients": ("dsquares",)}),
    ],
)
def test_halves_of_a_term_that_disagree_do_not_compile(
    added: Any, flag: str, said: str, says_otherwise: dict[str, Any]
) -> None:
    wrong = type("Wrong", (added.Checkers,), says_otherwise)()
    plan = kernel((*plans.ALL_TERMS, added.Table(), wrong), "bf16", 80, False, plans.forward)
    sentence = f"{flag} of the score term checkers is {said} in its Python class, but not in its C\\+\\+ struct"
    with pytest.raises(_jit.CompileError, match=sentence) as refusal:
        plans.compile_plan(plan)
    assert str(refusal.value).count("static assertion failed") == 1


def test_no_term_bends_between_two_with_gradients(added: Any) -> None:
    """Behind the last it may: so does the chessboard in `test_kernels_compile_with_headers_of_terms`."""
    plan = kernel((added.Table(), added.Checkers(), added.Table()), "bf16", 80, False, plans.forward)
    with pytest.raises(_jit.CompileError, match="none may bend up to the last one with a gradient"):
        plans.compile_plan(plan)


def test_the_header_of_a_term_is_in_the_key(added: Any) -> None:
    unit = _jit.unit_of(kernel(added.TERMS, "bf16", 80, False, plans.forward))
    other = unit._replace(headers=unit.headers | {"attention/table.cuh": b""})
    assert _jit.key_of(unit) != _jit.key_of(other)


def test_what_kernels_are_given(added: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms' own numbers, and the addresses of their arrays and gradients, are packed by name."""
    q, k = OnGpu(2, 200, 4, 64, dtype="bfloat16"), OnGpu(2, 300, 2, 64, dtype="bfloat16")
    lse, table = OnGpu(2, 4, 200, dtype="float32"), OnGpu(4, 33, dtype="float32", pointer=3 << 44, strides=(1, 4))
    given = Problem({"q": q, "k": k, "v": k, "out": q, "dout": q, "lse": lse, "table": table}, bound=0.25)
    with monkeypatch.context() as patch:
        launched = Launched(patch)
        *_, dtable = given.run(added.BACKWARD[0])
        (plan,) = launched.plans.values()
    _problem._checked.cache_clear()
    assert (dtable.shape, dtable.dtype) == ((4, 33), "float32")
    for _, argument in launched.kernels:
        terms = unpacked(units.record_of(plan, _jit.headers()), argument)["params"]["forward"]["terms"]
        assert [*terms] == ["softcap", "table", "checkers"] and terms["checkers"] == {"inverse": 4.0, "seed": 7}
        strides = {"head_stride": 1, "distance_stride": 4, "heads": 4, "reach": 33}
        assert terms["table"] == {"table": table.pointer, "dtable": dtable.pointer, **strides}


@pytest.mark.parametrize("bound", [0.0, 3.0])
@pytest.mark.parametrize("packed", [False, True])
def test_jax_differentiates_and_maps_what_is_added(added: Any, packed: bool, bound: float) -> None:
    """By the records alone: gradients by all arrays that have some, the terms' own included, and vmap of it.

    The chessboard asks for the number of a sequence, and so cannot be part of a larger call.
    """
    jax = pytest.importorskip("jax")
    given = problem(packed, bound=bound)
    arrays = {name: jax.numpy.asarray(x) for name, x in given.arrays.items()}
    names = ("q", "k", "v", "sinks", "table")
    beside = given._replace(arrays=arrays)
    _, _, *expected = beside.both(added)

    def attend(*chosen: Any) -> Any:
        more = dict(zip(names, chosen, strict=True))
        return beside.run(added.FORWARD[packed], return_lse=True, **more)

    def pulled(*chosen: Any) -> Any:
        return jax.vjp(attend, *chosen)[1]((arrays["dout"], arrays["dlse"]))

    chosen = [arrays[name] for name in names]
    for one, other in zip(jax.jit(pulled)(*chosen), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    double = [jax.numpy.stack([x, 0.5 * x]) for x in chosen]
    for function, axes in ((attend, (0,) * 5), (attend, (0, 0, 0, None, None)), (pulled, (0,) * 5)):
        taken = [x[0] if axis is None else x for x, axis in zip(double, axes, strict=True)]
        apart = [function(*(y if axis is None else y[i] for y, axis in zip(taken, axes, strict=True))) for i in (0, 1)]
        for one, *others in zip(jax.vmap(function, axes)(*taken), *apart, strict=True):
            np.testing.assert_allclose(one, np.stack(others), rtol=2e-4, atol=2e-4)
