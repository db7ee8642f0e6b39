"""The facts of calls with caches that kernels need, told by layouts alone, and plans that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_problem import OnGpu

import cufa
from cufa._call import arrays as _arrays
from cufa._call import options as _options
from cufa._call import problem as _problem
from cufa._call.align import copies_of
from cufa._call.kvcache import NO_SLOTS, KVCacheProblem, PlanFacts, Slots, slots_of
from cufa._call.options import Owned
from cufa._kernels import choose
from cufa._operations.kvcache import ATTENTION_WITH_KVCACHE as OPERATION
from cufa._terms import Term

INT32 = {"dtype": "int32"}


def problem_of(plan: PlanFacts | None = None, options: dict[str, Any] | None = None, **changed: Any) -> KVCacheProblem:
    arrays: dict[str, Any] = {"q": OnGpu(4, 1, 8, 64), "k_cache": OnGpu(4, 100, 2, 64), "v_cache": OnGpu(4, 100, 2, 32)}
    arrays |= {"cache_seqlens": OnGpu(4, **INT32)} | changed
    asked: dict[str, Any] = {"causal": True, "window_size": None, "softmax_scale": None, "softcap": 0.0}
    asked |= {"return_lse": False, "deterministic": False, "rotary_interleaved": True, "num_splits": 0, "plan": plan}
    asked |= {"cache_dtype": None}
    given = tuple(arrays.get(name) for name in OPERATION.arrays)
    for index, array in enumerate(given):
        if array is not None:
            array.pointer = (index + 1) << 41  # apart from the others
    view = _arrays.view(OPERATION.name, OPERATION.arrays, given, OPERATION.uncopied_indices)
    plain = _options.of(OPERATION.name, tuple((asked | (options or {})).values()), OPERATION.owned)
    found = _problem.checked(OPERATION, view, plain)
    assert isinstance(found, KVCacheProblem) and found.static is not None
    return found


def static(**changed: Any) -> Any:
    return problem_of(**changed).static


PAGES = {"k_cache": OnGpu(50, 48, 2, 64), "v_cache": OnGpu(50, 48, 2, 32), "block_table": OnGpu(4, 7, **INT32)}
NEW = {"k": OnGpu(4, 1, 2, 64), "v": OnGpu(4, 1, 2, 32)}
ROTARY = {"rotary_cos": OnGpu(100, 16, dtype="float32"), "rotary_sin": OnGpu(100, 16, dtype="float32")}


def test_facts_of_contiguous_caches() -> None:
    problem = problem_of()
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.num_caches) == (4, 1, 100, 4)
    assert (problem.num_heads_q, problem.num_heads_k, problem.head_dim, problem.head_dim_v) == (8, 2, 64, 32)
    assert (problem.page_size, problem.seqlen_new, problem.rotary_dim, problem.leftpad) == (0, 0, 0, False)
    assert (problem.window_left, problem.window_right) == (None, None)  # one query sees every key
    assert problem.out_shape == (4, 1, 8, 32) and problem.lse_shape == (4, 8, 1)
    assert not problem.varlen and not problem.changes and problem.written_indices == ()
    found = problem.static
    assert found is not None
    assert (found.mask, found.few_rows, found.page_rows, found.rotary, found.appends) == ("none", 16, 0, "", False)


def test_facts_of_pages_and_new_rows() -> None:
    problem = problem_of(**PAGES, **NEW, **ROTARY, options={"num_splits": 3, "rotary_interleaved": False})
    assert (problem.num_caches, problem.page_size, problem.seqlen_k) == (50, 48, 336)
    assert (problem.seqlen_new, problem.rotary_dim, problem.rotary_interleaved) == (1, 32, False)
    assert problem.num_splits == 3 and problem.changes
    assert problem.written_indices == tuple(map(OPERATION.arrays.index, ("k_cache", "v_cache")))
    found = problem.static
    assert found is not None
    assert (found.page_rows, found.rotary, found.appends) == (16, "halves", True)


@pytest.mark.parametrize(("page_size", "rows"), [(1, 1), (7, 1), (24, 8), (64, 64), (256, 64), (96, 32)])
def test_rows_that_lie_side_by_side_in_a_page(page_size: int, rows: int) -> None:
    pages = {"k_cache": OnGpu(50, page_size, 2, 64), "v_cache": OnGpu(50, page_size, 2, 32)}
    assert static(**pages, block_table=OnGpu(4, 7, **INT32)).page_rows == rows


def strided(pages: int, rows: int, page_step: int, row_step: int, width: int = 64) -> OnGpu:
    return OnGpu(pages, rows, 2, width, strides=(page_step, row_step, width, 1))


@pytest.mark.parametrize(
    ("k", "v", "slots"),
    [
        ((50, 16, 2048, 128), (50, 16, 2048, 128), Slots(16, 1, 256, 256)),
        ((50, 16, 2048, 128), (50, 16, 1024, 64, 32), Slots(16, 1, 256, 128)),  # as many rows, of other widths
        ((50, 1, 128, 7), (50, 1, 256, 9), Slots(1, 0, 256, 512)),  # pages of one row have no step of rows
        ((1, 16, 7, 128), (1, 16, 9, 128), Slots(0, 1, 256, 256)),
        ((1, 1, 7, 7), (1, 1, 9, 9), Slots(0, 0, 1, 1)),
        ((50, 16, -2048, 128), (50, 16, -2048, 128), Slots(-16, 1, 256, 256)),
        ((50, 16, 5120, 384), (50, 16, 5120, 384), Slots(40, 3, 256, 256)),
        ((50, 16, 2048, 128), (50, 16, 2048, -128), NO_SLOTS),
        ((50, 16, 2048, 128), (50, 16, 4096, 128), NO_SLOTS),
        ((50, 16, 0, 128), (50, 16, 0, 128), Slots(0, 1, 256, 256)),
        ((50, 1, 1 << 30, 0), (50, 1, 1 << 30, 0), NO_SLOTS),  # 2 GB from slot to slot
        ((1 << 20, 2, 1 << 20, 8), (1 << 20, 2, 1 << 20, 8), NO_SLOTS),  # 2^37 slots
        ((1 << 20, 2, 1 << 20, 1 << 10), (1 << 20, 2, 1 << 20, 1 << 10), Slots(1 << 10, 1, 1 << 11, 1 << 11)),
    ],
)
def test_slots_of_pages(k: tuple[int, ...], v: tuple[int, ...], slots: Slots) -> None:
    problem = problem_of(k_cache=strided(*k), v_cache=strided(*v), block_table=OnGpu(4, 7, **INT32))
    assert slots_of(problem.specs) == slots
    assert problem.static is not None and problem.static.slots == (slots != NO_SLOTS)


@pytest.mark.parametrize(("queries", "rows"), [(1, 16), (4, 16), (5, 32), (9, 64), (500, 64)])
def test_tiles_hold_the_rows_of_a_key_head(queries: int, rows: int) -> None:
    assert static(q=OnGpu(4, queries, 8, 64)).few_rows == rows
    packed = {"q": OnGpu(4 * queries, 8, 64), "cu_seqlens_q": OnGpu(5, **INT32)}
    assert static(**packed).few_rows == rows
    assert static(**packed).varlen and problem_of(**packed).lse_shape == (8, 4 * queries)


@pytest.mark.parametrize(
    ("q", "num_splits", "full"),
    [
        ((4, 512, 8, 64), 0, True),
        ((1, 64, 64, 64), 0, True),
        ((2, 40, 64, 64), 0, True),  # heads share tiles
        ((4, 512, 8, 64), 1, True),
        ((4, 512, 8, 64), 2, False),
        ((1, 300, 8, 64), 0, False),  # few tiles
        ((1, 300, 8, 64), 1, True),  # as in any batch
        ((400, 1, 8, 64), 0, False),
        ((600, 8, 64), 0, True),
        ((250, 8, 64), 0, False),
        ((600, 8, 64), 1, False),  # what others have would decide
    ],
)
def test_queries_fill_large_tiles(q: tuple[int, ...], num_splits: int, full: bool) -> None:
    batch = q[0] if len(q) == 4 else 4
    arrays: dict[str, Any] = {"q": OnGpu(*q), "cache_seqlens": OnGpu(batch, **INT32)}
    arrays |= {name: OnGpu(batch, 1000, 2, 64) for name in ("k_cache", "v_cache")}
    if len(q) == 3:
        arrays["cu_seqlens_q"] = OnGpu(5, **INT32)
    found = static(**arrays, options={"num_splits": num_splits})
    assert found.full_tiles == full
    assert (choose(OPERATION.kernels, found, 90).name == "attention_forward_cache_sm90") == full
    assert choose(OPERATION.kernels, found, 100).name != "attention_forward_cache_sm90"


MANY = {"q": OnGpu(4, 512, 8, 64), "k": OnGpu(4, 512, 2, 64), "v": OnGpu(4, 512, 2, 32)}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"q": OnGpu(4, 512, 8, 64, strides=(512 * 8 * 65, 8 * 65, 65, 1))}, "rows of q are not aligned"),
        ({"k_cache": OnGpu(4, 900, 2, 64, strides=(-900 * 128, 128, 64, 1))}, "a stride of q, k or v is negative"),
        (PAGES | {"block_table": OnGpu(4, 27, **INT32)}, ""),
        (PAGES | {"block_table": OnGpu(4, 27, **INT32), "cache_leftpad": OnGpu(4, **INT32)}, "tensor copies load"),
        ({"cache_leftpad": OnGpu(4, **INT32)}, ""),
    ],
)
def test_what_tensor_copies_cannot_load_is_left_to_others(changed: dict[str, Any], why: str) -> None:
    caches = {"k_cache": OnGpu(4, 900, 2, 64), "v_cache": OnGpu(4, 900, 2, 32)}
    plan = choose(OPERATION.kernels, static(**MANY | caches | changed), 90)
    assert plan.name == f"attention_forward_cache_sm{'80' if why else '90'}"
    assert plan.reason.startswith(why)


def test_caches_alone_say_how_they_are_copied_and_never_are_first() -> None:
    q = OnGpu(4, 300, 8, 64, strides=(300 * 8 * 65, 8 * 65, 65, 1))
    assert (static(q=q).copy_bytes, static(q=q).q_copy_bytes) == (16, 2)
    cache = OnGpu(4, 100, 2, 64, strides=(200 * 65, 2 * 65, 65, 1))
    problem = problem_of(q=OnGpu(4, 300, 8, 64), k_cache=cache)
    assert problem.static is not None
    assert (problem.static.copy_bytes, problem.static.q_copy_bytes) == (2, 16)
    assert copies_of(problem, 80) is None and copies_of(problem, 90) is None


def test_plans_must_be_of_calls_like_this() -> None:
    problem = problem_of()
    facts = PlanFacts.of(problem)
    assert problem_of(plan=facts).static == problem.static
    with pytest.raises(
        ValueError, match="plan was made for seqlen_q 1, and this call has 2; make one with decode_plan"
    ):
        problem_of(plan=facts, q=OnGpu(4, 2, 8, 64), options={"causal": False})
    with pytest.raises(ValueError, match="plan was made for page_size 0, and this call has 48"):
        problem_of(plan=facts._replace(seqlen_k=336), **PAGES)
    with pytest.raises(ValueError, match="plan was made for window_left 5, and this call has None"):
        problem_of(plan=facts._replace(window_left=5))
    with pytest.raises(TypeError, match="plan is a tuple; pass what decode_plan gives"):
        problem_of(plan=tuple(facts))  # type: ignore[arg-type]


def test_float64_is_refused_on_a_gpu() -> None:
    arrays = {name: OnGpu(4, 9, 2, 64, dtype="float64") for name in ("q", "k_cache", "v_cache")}
    with pytest.raises(cufa.UnsupportedError, match="float64 on a GPU"):
        problem_of(**arrays)


def test_long_caches_are_refused() -> None:
    many = {"block_table": OnGpu(4, 1 << 25, **INT32)}
    with pytest.raises(cufa.UnsupportedError, match="a cache has 1610612736 rows"):
        problem_of(**(PAGES | many))


EIGHT_BITS = {name: OnGpu(4, 100, 2, 64, dtype="float8_e4m3fn") for name in ("k_cache", "v_cache")}
BYTES = {name: OnGpu(4, 100, 2, 64, dtype="uint8") for name in ("k_cache", "v_cache")}


def test_facts_of_caches_of_eight_bits() -> None:
    q = OnGpu(4, 1, 8, 64, dtype="bfloat16")
    named = {"options": {"cache_dtype": "float8_e4m3fn"}}
    for own in (EIGHT_BITS, EIGHT_BITS | named, BYTES | named):
        problem = problem_of(q=q, **own)
        assert problem.static is not None
        assert (problem.dtype, problem.cache_dtype) == ("bfloat16", "float8_e4m3fn")
        assert (problem.static.element, problem.static.kv_element) == ("bf16", "e4m3")
        assert (problem.static.copy_bytes, problem.static.q_copy_bytes) == (16, 16)
        assert PlanFacts.of(problem).cache_dtype == "float8_e4m3fn"
    odd = {name: OnGpu(4, 100, 2, 65, dtype="float8_e4m3fn") for name in ("k_cache", "v_cache")}
    assert static(q=OnGpu(4, 1, 8, 65), **odd).copy_bytes == 1
    assert static().kv_element == ""


def test_caches_of_eight_bits_want_queries_of_sixteen_on_a_gpu() -> None:
    with pytest.raises(cufa.UnsupportedError, match="q has dtype float32 and k_cache float8_e4m3fn; pass q of float16"):
        problem_of(q=OnGpu(4, 1, 8, 64, dtype="float32"), **EIGHT_BITS)


class _Splits(Term):
    name = "splits"
    header = type = data = ""
    option_names = ("num_splits",)


def test_options_of_operations_and_terms_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="num_splits, plan, cache_dtype, num_splits, two have the same name"):
        OPERATION.having(_Splits())
    asked = (False, None, None, 0.0, False, False, True, 2, None, None)
    assert _options.of("f", asked, OPERATION.owned).own("num_splits") == 2
    with pytest.raises(TypeError, match="f: 3 further options are given; those of it and its score terms are rotary_"):
        _options.of("f", asked[:-1], OPERATION.owned)


class _Late(_Splits):
    option_names = ()
    late_names = ("num_splits",)


class _LateOut(_Late):
    name = "late_out"
    option_names = ("bound",)
    late_names = ("out",)


def test_late_options_come_behind_those_of_their_term() -> None:
    with pytest.raises(ValueError, match="num_splits, plan, cache_dtype, num_splits, two have the same name"):
        OPERATION.having(_Late())
    with pytest.raises(ValueError, match="out, two have the same name"):
        OPERATION.having(_LateOut())
    owned = Owned((_Late(), _LateOut()))
    assert owned.names == ("num_splits", "bound", "out")
    options = _options.of("f", (False, None, None, 0.0, False, False, 1, 2, 3), owned)
    assert (options.more, options.late) == ((("bound", 2),), (("num_splits", 1), ("out", 3)))
    assert owned.given(options) == (1, 2, 3) and owned.late_members(options.late) == [1, 3]
    assert options.lasting == options._replace(late=())
    with pytest.raises(TypeError, match=r"^f: 2 further options are given; those of it and its score terms are num_"):
        _options.of("f", (False, None, None, 0.0, False, False, 1, 2), owned)


def test_options_that_are_remembered_are_told_apart_by_type() -> None:
    asked = (False, None, None, 0.0, False, False)
    for _ in range(2):
        assert _options.of("f", (*asked, True, 1, None, None), OPERATION.owned).own("num_splits") == 1
        with pytest.raises(TypeError, match="f: num_splits is a bool"):
            _options.of("f", (*asked, True, True, None, None), OPERATION.owned)
        with pytest.raises(TypeError, match="f: rotary_interleaved is a int"):
            _options.of("f", (*asked, 1, 1, None, None), OPERATION.owned)
    changing = np.array(2)
    for number in (2, 3):
        changing[...] = number
        assert _options.of("f", (*asked, True, changing, None, None), OPERATION.owned).own("num_splits") == number
    for number in range(2 * OPERATION.owned.MAX_KNOWN):
        assert _options.of("f", (*asked, True, number, None, None), OPERATION.owned).own("num_splits") == number


def test_an_operation_without_kernels_says_so() -> None:
    found = problem_of()
    assert found.static is not None
    with pytest.raises(cufa.UnsupportedError, match="no kernel serves this operation on a GPU"):
        choose((), found.static, 80)


def test_values_are_not_looked_at_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(OPERATION, "check_values", lambda *_: called.append(1))
    problem_of()
    assert not called
    q, cache = np.zeros((1, 1, 1, 4)), np.zeros((1, 3, 1, 4))
    cufa.attention_with_kvcache(q, cache, cache)
    assert called
