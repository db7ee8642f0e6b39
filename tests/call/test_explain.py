"""`cufa.explain` of every function: it checks what the call would, writes nothing, and says what would run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradients
import numpy as np
import pytest
import rotary
import states
from test_problem import OnGpu, pretend

import cufa
from cufa._api.functions import FUNCTIONS
from cufa._call.kvcache import DecodePlan, PlanFacts
from cufa._operations.asked import asked_by, problem_of
from cufa._operations.sketch import OPERATIONS
from cufa.testing import Case, KVCacheCase

DENSE = Case(seqlen_q=4, seqlen_k=9, num_heads_q=2, num_heads_k=1, head_dim=16, head_dim_v=16)
PACKED = replace(DENSE, batch=2, seqlen_q=(3, 1), seqlen_k=(5, 2))
CACHES = KVCacheCase(batch=2, lengths=(3, 9), seqlen_new=1, capacity=16, page_size=4, rotary_dim=8)


PLANNED = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table")
"""What a plan of `CACHES` is made of."""


def host_calls() -> dict[str, dict[str, Any]]:
    """Arguments of a call of each function, by its name."""
    turned = rotary.Call().host()
    merged = states.Call(shape=(2, 3, 4, 16)).host()
    cached = CACHES.arrays()
    planned = {name: x for name, x in cached.items() if name in PLANNED}
    return {
        "attention": DENSE.arrays() | DENSE.options,
        "attention_varlen": PACKED.arrays() | PACKED.options,
        "attention_backward": gradients.Call(case=DENSE).arrays() | DENSE.options,
        "attention_varlen_backward": gradients.Call(case=PACKED).arrays() | PACKED.options,
        "attention_with_kvcache": cached | CACHES.options,
        "decode_plan": planned,
        "merge_states": {name: x for name, x in merged.items() if name[0] != "d"},
        "merge_states_backward": merged,
        "rotary": turned,
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_explained_and_nothing_is_written(name: str) -> None:
    call = host_calls()[name]
    before = {key: x.tobytes() for key, x in call.items() if isinstance(x, np.ndarray)}
    told = cufa.explain(FUNCTIONS[name], **call)
    assert (told.function, told.kernel, told.state) == (name, "cpu", "not needed")
    assert before == {key: call[key].tobytes() for key in before}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("attention_with_kvcache", {"cache_seqlens": np.array([3, 16], np.int32)}),  # no room
        ("attention_with_kvcache", {"plan": 3}),
        ("attention_with_kvcache", {"num_splits": -1}),
        ("decode_plan", {"v": None}),
        ("rotary", {"positions": np.array([[99] * 9] * 2, np.int32)}),
        ("rotary", {"interleaved": 1}),
        ("merge_states", {"lse_b": None}),
        ("attention_backward", {"lse": None}),
    ],
)
def test_what_a_call_refuses_is_refused_alike(name: str, wrong: dict[str, Any]) -> None:
    call = host_calls()[name] | wrong
    with pytest.raises((TypeError, ValueError)) as expected:
        FUNCTIONS[name](**call)
    with pytest.raises(type(expected.value)) as raised:
        cufa.explain(FUNCTIONS[name], **call)
    assert str(raised.value) == str(expected.value)


def test_jax_arrays_are_refused_where_the_call_refuses_them() -> None:
    jax = pytest.importorskip("jax")
    call = {name: jax.numpy.asarray(x) for name, x in CACHES.arrays().items()}
    for function in (cufa.attention_with_kvcache, lambda **call: cufa.explain(cufa.attention_with_kvcache, **call)):
        with pytest.raises(cufa.UnsupportedError, match="JAX arrays cannot change in place"):
            function(**call)
    q = jax.numpy.ones((1, 2, 2, 8))
    table = jax.numpy.ones((2, 4))
    assert cufa.explain(cufa.rotary, q, q, table, table).kernel == "cpu"
    with pytest.raises(cufa.UnsupportedError, match="q_out is not supported for JAX arrays"):
        cufa.explain(cufa.rotary, q, q, table, table, q_out=q)


Q = np.zeros((1, 4, 2, 8), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "explain: attention is called otherwise: missing a required argument: 'q'."),
        ((Q, Q, Q), {"seqused_k": np.ones(1, np.int32)}, "explain: attention is called otherwise: got an unexpected "),
        ((Q, Q, Q, None, None, 3), {}, "explain: attention is called otherwise: too many positional arguments."),
        ((cufa.attention, Q, Q, Q, None), {}, "explain: attention is called otherwise: too many positional arguments."),
        ((cufa.attention_shared_prefix, Q), {}, "explain: <function attention_shared_prefix "),
        ((print, Q), {}, "explain: <built-in function print> is not one of the functions attention, "),
    ],
    ids=range(6),
)
def test_other_arguments_are_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        cufa.explain(*arguments, **options)
    assert str(raised.value).startswith(message)


def of_caches(**changed: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"q": OnGpu(8, 1, 32, 64), "k": OnGpu(8, 1, 8, 64), "v": OnGpu(8, 1, 8, 64)}
    call |= {name: OnGpu(600, 16, 8, 64, pointer=place << 41) for place, name in ((2, "k_cache"), (3, "v_cache"))}
    call |= {"cache_seqlens": OnGpu(8, dtype="int32"), "block_table": OnGpu(8, 300, dtype="int32")}
    return call | changed


def test_a_step_of_decoding_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 80)
    told = cufa.explain(cufa.attention_with_kvcache, **of_caches())
    assert told.kernel == "attention_forward_cache_sm80 (sm_80)"
    preparing, computing = told.launches
    assert preparing == ("attention_cache_prepare", 9, 256)  # one for each new row, and one that plans
    assert computing[0] == "attention_forward_cache_sm80" and computing[1] > 132
    assert told.num_blocks == 9 + computing[1] and told.num_threads == computing[2]
    assert f"launches   attention_cache_prepare of 9 × 256, attention_forward_cache_sm80 of {computing[1]} × " in str(
        told
    )


def test_a_plan_spares_a_call_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 80)
    call = of_caches(k=None, v=None)
    told = cufa.explain(cufa.decode_plan, **call)
    assert told.launches == (("attention_cache_prepare", 1, 256),) and told.smem_bytes == 0
    operation = OPERATIONS["decode_plan"]
    problem: Any = problem_of(operation, *asked_by(operation, call | {"num_splits": 0}))
    (words,) = operation.results(problem)[0].shape
    plan = DecodePlan(OnGpu(words, dtype="int32"), PlanFacts.of(problem), lambda *_: None)
    own, planned = (cufa.explain(cufa.attention_with_kvcache, **call, plan=each) for each in (None, plan))
    assert [entry for entry, *_ in own.launches] == ["attention_cache_prepare", "attention_forward_cache_sm80"]
    assert planned.launches == own.launches[1:]
    with pytest.raises(ValueError, match="plan was made for num_splits 0, and this call has 3"):
        cufa.explain(cufa.attention_with_kvcache, **call, plan=plan, num_splits=3)


def test_a_plan_of_calls_that_clusters_serve_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)
    call = of_caches(k=None, v=None)
    told = cufa.explain(cufa.decode_plan, **call)
    assert told.launches == () and told.num_blocks == 0
    assert told.reason.startswith("clusters of thread blocks serve such calls")
    operation = OPERATIONS["decode_plan"]
    problem: Any = problem_of(operation, *asked_by(operation, call | {"num_splits": 0}))
    assert operation.results(problem)[0].shape == (0,)
    plan = DecodePlan(OnGpu(0, dtype="int32"), PlanFacts.of(problem), lambda *_: None)
    own, planned = (cufa.explain(cufa.attention_with_kvcache, **call, plan=each) for each in (None, plan))
    assert own.kernel == "attention_forward_cluster_cache_sm90 (sm_90)" and planned == replace(own, state="cached")


HEADS, LSE = OnGpu(2, 9, 4, 64), OnGpu(2, 4, 9, dtype="float32")
TABLE = OnGpu(9, 32)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ((cufa.rotary, HEADS, HEADS, TABLE, TABLE), "attention_rotary"),
        ((cufa.merge_states, HEADS, LSE, HEADS, LSE), "attention_merge_states"),
    ],
    ids=["rotary", "merge_states"],
)
def test_what_has_no_tiles(call: tuple[Any, ...], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)
    told = cufa.explain(*call)
    assert told.kernel == f"{kernel} (sm_90)" and (told.block_m, told.block_n) == (0, 0)
    assert told.launches == ((kernel, told.num_blocks, 256),) and told.num_blocks > 0
    assert f"\n  runs       {told.num_blocks} blocks of 256 threads\n" in str(told) and "launches" not in str(told)
