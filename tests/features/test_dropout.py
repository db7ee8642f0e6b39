"""Dropout: its numbers, what is dropped, results on the CPU, and kernels as compiled."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import plans
import pytest
from dropping import Problem, problem, telling, told
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import paired, sampled
from test_problem import Launched, OnGpu, OnGpuAdapter, pretend, unpacked

import cufa
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._cpu import forward as _cpu
from cufa._kernels import unit as units
from cufa._specification.dropout import Dropout as Twin
from cufa._terms.dropout import Dropout, Rate, SeededDropout
from cufa._terms.philox import philox, round_keys
from cufa.reference import At

KNOWN = (
    ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
)
"""Counters, keys and numbers of philox4x32-7 that Random123 1.14 lists among its known answers."""


@pytest.mark.parametrize(("counter", "key", "numbers"), KNOWN)
def test_philox_gives_known_answers(counter: Any, key: int, numbers: Any) -> None:
    assert tuple(map(int, philox(counter, key))) == numbers


def test_philox_broadcasts_counters() -> None:
    words = philox((np.arange(3)[:, None], np.arange(5), 7, 2**32 - 1), -5)
    assert {word.shape for word in words} == {(3, 5)}
    alone = philox((2, 4, 7, 2**32 - 1), 2**64 - 5)
    assert [int(word[2, 4]) for word in words] == [int(word) for word in alone]


@pytest.mark.parametrize("word", range(4))
def test_a_bit_of_a_counter_turns_half_of_the_bits(word: int) -> None:
    """Of the numbers of counters as calls have them: each bit of them in half of 4096 cases, within 6 deviations."""
    cases = 1 << 12
    counters = np.random.default_rng(word).integers(0, [[1 << 16], [64], [1 << 15], [64]], (4, cases))
    numbers = np.stack(philox(tuple(counters), 2024))
    for bit in range(16):
        counters[word] ^= 1 << bit
        changed = np.stack(philox(tuple(counters), 2024)) ^ numbers
        counters[word] ^= 1 << bit
        turned = (changed[..., None] >> np.arange(32, dtype=np.uint32) & 1).mean(axis=1)
        np.testing.assert_allclose(turned, 0.5, rtol=0, atol=3 / np.sqrt(cases))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 60), st.integers(0, 60)),
    dropout_p=st.sampled_from((1e-9, 0.1, 0.25, 0.5, 0.50001, 0.9, 0.99999999)),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_the_mask_is_the_references(shape: tuple[int, ...], dropout_p: float, seed: int) -> None:
    batch, heads, rows, keys = (np.arange(extent) for extent in shape)
    at = At(batch[:, None, None, None], heads[:, None, None], rows[:, None], keys, rows[:, None] - keys)
    kept = cufa.dropout_mask(shape, dropout_p, seed)
    assert kept.dtype == np.bool_ and kept.shape == shape
    np.testing.assert_array_equal(kept, Twin(dropout_p, seed).factor(at) > 0)


def test_the_mask_of_a_part_is_a_part_of_the_mask() -> None:
    whole = cufa.dropout_mask((3, 4, 100, 130), 0.4, 5)
    np.testing.assert_array_equal(cufa.dropout_mask((2, 3, 37, 81), 0.4, np.int64(5)), whole[:2, :3, :37, :81])


@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.7])
def test_entries_are_dropped_at_the_rate_and_independently(dropout_p: float) -> None:
    """Counts, of all entries and of pairs of neighbours and of seeds, lie within 5 standard deviations."""
    kept = cufa.dropout_mask((2, 4, 256, 512), dropout_p, 3)
    other = cufa.dropout_mask((2, 4, 256, 512), dropout_p, 4)
    assert kept.mean() == pytest.approx(1 - dropout_p, abs=5 * np.sqrt(dropout_p * (1 - dropout_p) / kept.size))
    both = (1 - dropout_p) ** 2
    pairs = [(kept, other), (kept[1], kept[0]), (kept[:, 1:], kept[:, :-1])]
    for step in (1, 2, 4, 8, 16):
        pairs += [(kept[..., step:, :], kept[..., :-step, :]), (kept[..., step:], kept[..., :-step])]
    for one, two in pairs:
        assert (one & two).mean() == pytest.approx(both, abs=5 * np.sqrt(2 * both * (1 - both) / one.size))


def test_rates_are_multiples_of_2_to_the_minus_15() -> None:
    numbers = np.arange(2**15)
    for dropout_p, dropped in ((0.25, 2**13), (0.5, 2**14), (0.75, 3 * 2**13), (1e-9, 0), (1 - 1e-9, 2**15 - 1)):
        rate = Rate.of(dropout_p)
        assert (~rate.keeps(numbers)).sum() == dropped and rate.gain == 2**15 / (2**15 - dropped)
        assert rate.bound <= 2**14


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    window = draw(st.sampled_from((None, (9, 4), (40, None), (0, 0))))
    return problem(
        draw(st.sampled_from(("float16", "bfloat16", "float32", "float64"))),
        batch=draw(st.integers(1, 3)),
        rows=draw(st.sampled_from((1, 17, 40))),
        keys=draw(st.sampled_from((1, 16, 45))),
        heads=draw(st.sampled_from(((4, 2), (3, 1), (2, 2)))),
        head_dims=draw(st.sampled_from(((8, 8), (24, 5)))),
        packed=draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.1, 0.5, 0.8))),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 2.0))),
        causal=draw(st.booleans()),
        window_size=window,
    )


@settings(max_examples=80)
@given(given=problems())
def test_the_cpu_equals_the_reference(given: Problem) -> None:
    given.check(given.run())


def test_the_cpu_drops_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem("float64", rows=70, keys=90, causal=True)
    whole = given.run()
    monkeypatch.setattr(_cpu, "block_sizes", lambda *_: _cpu.Blocks(1, 1, 13, 21))
    for one, other in zip(given.run(), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_out_and_dv_tell_the_mask() -> None:
    given = telling("float32", 40, 50, (8, 64))
    kept = cufa.dropout_mask((2, 2, 40, 50), given.dropout_p, given.seed)
    for found in told(given, given.run()):
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_are_differences(packed: bool) -> None:
    """Of sum(dout · out) + sum(dlse · lse), along a direction of each array."""
    given, rng, step = problem("float64", packed=packed, sinks=True, softcap=3.0), np.random.default_rng(1), 1e-5

    def loss(name: str, x: Any) -> float:
        out, lse, *_ = given._replace(arrays=given.arrays | {name: x}).run()
        finite = np.where(np.isfinite(lse), lse, 0)
        return float((given.arrays["dout"] * out).sum() + (given.arrays["dlse"] * finite).sum())

    for name, gradient in zip(("q", "k", "v", "sinks"), given.run()[2:], strict=True):
        x = given.arrays[name]
        along = rng.standard_normal(x.shape)
        difference = (loss(name, x + step * along) - loss(name, x - step * along)) / (2 * step)
        assert difference == pytest.approx(float((gradient * along).sum()), rel=1e-6, abs=1e-6)


def test_the_mean_over_seeds_is_what_nothing_dropped_gives() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 8, 1, 16))
    plain, seeds = cufa.attention(q, k, v), 1000
    outs = np.stack([cufa.attention(q, k, v, dropout_p=0.6, seed=seed) for seed in range(seeds)])
    assert (np.abs(outs.mean(axis=0) - plain) <= 5 * outs.std(axis=0) / np.sqrt(seeds)).all()


def test_lse_and_rows_without_keys_are_as_ever() -> None:
    given = problem("float32", rows=60, keys=40, causal=True, dropout_p=0.9)
    q, k, v = (given.arrays[name] for name in "qkv")
    out, lse, dq, *_ = given.run()
    _, plain = cufa.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(lse, plain)
    assert not out[:, :20].any() and np.isneginf(lse[..., :20]).all() and not dq[:, :20].any()


@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_is_dropped_at_0(seed: int | None) -> None:
    given = problem("float32", causal=True)
    q, k, v, dout = (given.arrays[name] for name in ("q", "k", "v", "dout"))
    plain, lse = cufa.attention(q, k, v, return_lse=True)
    for p in (0, 0.0, np.float32(0)):
        np.testing.assert_array_equal(cufa.attention(q, k, v, dropout_p=p, seed=seed), plain)
        for one, other in zip(
            cufa.attention_backward(dout, q, k, v, plain, lse, dropout_p=p, seed=seed),
            cufa.attention_backward(dout, q, k, v, plain, lse),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    assert cufa.dropout_mask((1, 2, 3, 4), 0.0, seed).all()


def test_options_may_be_any_numbers() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 30, 2, 8))
    out = cufa.attention(q, k, v, dropout_p=0.5, seed=9)
    for p, seed in ((np.float32(0.5), np.uint8(9)), (np.array(0.5), np.array(9))):
        np.testing.assert_array_equal(cufa.attention(q, k, v, dropout_p=p, seed=seed), out)
    assert (cufa.attention(q, k, v, dropout_p=0.5, seed=9 + 2**32) != out).any()


RANGE = "dropout_p is {}; it must be from 0, which is off, to less than 1."
ERRORS: tuple[tuple[Any, Any, type[Exception], str], ...] = (
    (1.0, 1, ValueError, RANGE.format("1.0")),
    (-0.25, 1, ValueError, RANGE.format("-0.25")),
    (float("nan"), 1, ValueError, RANGE.format("nan")),
    (0.5, None, ValueError, "dropout_p is 0.5, but there is no seed; pass an integer that int64 holds."),
    (0.5, 2**63, ValueError, f"seed is {2**63}; it must be an integer that int64 holds."),
    (0.0, -(2**63) - 1, ValueError, f"seed is {-(2**63) - 1}; it must be an integer that int64 holds."),
    (0.5, 1.0, TypeError, "seed is a float; pass an integer."),
    (0.5, True, TypeError, "seed is a bool; pass an integer."),
    (0.5, np.array([3]), TypeError, "seed is a ndarray; pass an integer."),
    (0.0, np.array(3.0), TypeError, "seed is a ndarray; pass an integer."),
    (True, 1, TypeError, "dropout_p is a bool; pass a number."),
    ("0.5", 1, TypeError, "dropout_p is a str; pass a number."),
    (None, 1, TypeError, "dropout_p is a NoneType; pass a number."),
)


@pytest.mark.parametrize(("dropout_p", "seed", "error", "words"), ERRORS)
def test_what_will_not_do_is_refused(dropout_p: Any, seed: Any, error: type[Exception], words: str) -> None:
    x, lse = np.zeros((1, 4, 2, 8), np.float32), np.zeros((1, 2, 4), np.float32)
    packed, packed_lse, offsets = x[0], lse[0], np.array([0, 4], np.int32)
    calls = {
        "attention": (x, x, x),
        "attention_backward": (x, x, x, x, x, lse),
        "attention_varlen": (packed, packed, packed, offsets, offsets),
        "attention_varlen_backward": (packed, packed, packed, packed, packed, packed_lse, offsets, offsets),
    }
    for name, arrays in calls.items():
        with pytest.raises(error) as refusal:
            getattr(cufa, name)(*arrays, dropout_p=dropout_p, seed=seed)
        assert str(refusal.value) == f"{name}: {words}"
        given = (*arrays[:4], *arrays[6:]) if name.endswith("backward") else arrays  # out and lse are its own
        with pytest.raises(error) as refusal:
            getattr(cufa.reference, name)(*given, dropout_p=dropout_p, seed=seed)
        assert str(refusal.value) == f"{name}: {words}"
    with pytest.raises(error) as refusal:
        cufa.dropout_mask((1, 2, 3, 4), dropout_p, seed)
    assert str(refusal.value) == f"dropout_mask: {words}"


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_seed_may_be_an_array(name: str) -> None:
    """Of no dimensions; other arrays are refused, and nothing is dropped at 0."""
    given = problem("float32", causal=True)
    xp = pytest.importorskip(name if name == "torch" else "jax.numpy")
    for dtype, seed in (("int32", -5), ("uint32", 2**32 - 7), ("int64", 11)):
        if dtype == "int64" and name == "jax":  # which has them if asked for
            continue
        expected = given._replace(seed=seed).run()
        for one, other in zip(expected, given._replace(seed=np.array(seed, dtype)).run(xp.asarray), strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.array_equal(cufa.dropout_mask((1, 2, 3, 4), 0.5, xp.asarray(np.array(seed, dtype))),
                              cufa.dropout_mask((1, 2, 3, 4), 0.5, seed))  # fmt: skip
    q = xp.asarray(given.arrays["q"])
    for wrong in (np.zeros(1, np.int32), np.float32(1), np.int8(1)):
        with pytest.raises(
            ValueError, match=r"^attention: seed has dtype \w+ and shape .*; pass an integer, or an array"
        ):
            cufa.attention(q, q, q, dropout_p=0.5, seed=xp.asarray(wrong))
    with pytest.raises(TypeError, match=rf"^attention: seed is a {name} array but q is (a numpy|not) one; pass"):
        cufa.attention(*[given.arrays["q"]] * 3, dropout_p=0.5, seed=xp.asarray(5))
    np.testing.assert_array_equal(cufa.attention(q, q, q, dropout_p=0, seed=xp.asarray(5)), cufa.attention(q, q, q))


def test_a_seed_that_is_traced_makes_one_program() -> None:
    """And is mapped by `vmap`, as torch's is."""
    jax, given = pytest.importorskip("jax"), problem("float32", causal=True)
    q, k, v, dout = (jax.numpy.asarray(given.arrays[name]) for name in ("q", "k", "v", "dout"))
    traced = []

    @jax.jit
    def step(q: Any, seed: Any) -> Any:
        traced.append(seed)

        def loss(q: Any) -> Any:
            return (dout * cufa.attention(q, k, v, dropout_p=0.3, seed=seed)).sum()

        return jax.grad(loss)(q)

    found = [step(q, jax.numpy.int32(seed)) for seed in (3, 4)]
    assert len(traced) == 1
    host = [np.asarray(x) for x in (q, k, v, dout)]
    for seed, gradient in zip((3, 4), found, strict=True):
        out, lse = cufa.attention(*host[:3], dropout_p=0.3, seed=seed, return_lse=True)
        right, *_ = cufa.attention_backward(host[3], *host[:3], out, lse, dropout_p=0.3, seed=seed)
        np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.vmap(step, (None, 0))(q, jax.numpy.arange(3, 5)), found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shape", "error", "words"),
    [
        ((1, 2, 3), TypeError, "shape is (1, 2, 3); pass (batch, num_heads_q, seqlen_q, seqlen_k)."),
        (7, TypeError, "shape is 7; pass (batch, num_heads_q, seqlen_q, seqlen_k)."),
        ("1234", TypeError, "shape is '1234'; pass (batch, num_heads_q, seqlen_q, seqlen_k)."),
        ((1, 2, 3.0, 4), TypeError, "an extent of shape is a float; pass an integer."),
        ((1, 2, -3, 4), ValueError, f"shape is (1, 2, -3, 4); extents must be from 0 to {2**30 - 1}."),
    ],
)
def test_shapes_that_will_not_do_are_refused(shape: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as refusal:
        cufa.dropout_mask(shape, 0.5, 1)
    assert str(refusal.value) == f"dropout_mask: {words}"


def plan(dtype: str, head_dim: int, arch: int, of: Any, **facts: Any) -> Any:
    return of(plans.static(dtype, head_dim, head_dim, mask="causal", **facts)._replace(terms=(Dropout(),)), arch)


TILES = ("bf16", 64), ("f16", 128), ("f16", 256), ("f32", 64)
"""dtype and head_dim."""
WAYS = {"forward": plans.forward, "backward": plans.backward}
KINDS = ("forward", 80), ("backward", 80), ("backward", 90), ("forward", 90)


@pytest.mark.parametrize(("tile", "kind"), sampled(paired(TILES, KINDS), 1), ids=str)
def test_kernels_compile(tile: tuple[str, int], kind: tuple[str, int]) -> None:
    (dtype, head_dim), (of, arch) = tile, (WAYS[kind[0]], kind[1])
    assert plans.compile_plan(plan(dtype, head_dim, arch, of)).cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize(("arch", "head_dim"), paired([80, 90], [64, 128]))
def test_gradients_spill_nothing(arch: int, head_dim: int) -> None:
    """A seed in memory takes more registers than one that the host has made round keys of."""
    facts = plans.static("bf16", head_dim, head_dim, mask="causal")._replace(terms=(SeededDropout("int32"),))
    compiled = plans.compile_plan(plans.backward(facts, arch))
    assert _jit.resources_of(compiled.log).spill_bytes == 0, compiled.log


@pytest.mark.parametrize(("term", "head_dim"), paired([Dropout(), SeededDropout("int64")], [64, 96, 128, 192]), ids=str)
def test_the_forward_for_hopper_spills_nothing(term: Dropout, head_dim: int) -> None:
    planned = plans.forward(plans.static("bf16", head_dim, head_dim)._replace(terms=(term,)), 90)
    compiled = plans.compile_plan(planned)
    assert _jit.resources_of(compiled.log).spill_bytes == 0 and "C75" not in compiled.log, compiled.log


@pytest.mark.parametrize(("arch", "way"), paired([80, 90], WAYS))
def test_kernels_compile_beside_other_terms(arch: int, way: str) -> None:
    dropout = SeededDropout("int32") if arch == 90 else Dropout()
    facts = plans.static("bf16", 128, 128, mask="window", varlen=True, sinks=True)._replace(
        terms=(*plans.ALL_TERMS, dropout)
    )
    assert plans.compile_plan(WAYS[way](facts, arch)).cubin[:4] == b"\x7fELF"


def test_rate_and_seed_are_no_part_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are numbers that it is given: the words of the keys, and what 15 bits are compared with."""
    q, lse = OnGpu(2, 200, 4, 64, dtype="bfloat16"), OnGpu(2, 4, 200, dtype="float32")
    with monkeypatch.context() as patch:
        launched = Launched(patch)
        for p, seed in ((0.25, 7), (0.75, -1)):
            cufa.attention(q, q, q, dropout_p=p, seed=seed)
            cufa.attention_backward(q, q, q, q, q, lse, dropout_p=p, seed=seed)
        assert len(launched.plans) == 2
    _problem._checked.cache_clear()
    found = []
    for function, argument in launched.kernels:
        (of,) = (plan for plan in launched.plans.values() if function in plan.entries)
        params = unpacked(units.record_of(of, _jit.headers()), argument)["params"]
        found.append(params.get("forward", params)["terms"]["dropout"])
    for p, seed in ((0.25, 7), (0.75, -1)):
        flip, keys = (0 if p > 0.5 else 2**32 - 1), tuple(round_keys(seed))
        expected = {"keys": keys, "bound": 2**13 << 16 | 2**13, "flip": flip, "gain": np.float32(1 / (1 - p))}
        assert found.count(expected) == len(found) // 2 >= 2
    assert round_keys(-1)[:4] == [2**32 - 1, 2**32 - 1, 0x9E3779B8, 0xBB67AE84]


SEEDS = (7, 0, -1, 2**63 - 1, -(2**63))
LATE: dict[str, tuple[int, Any, Any]] = {
    "aligned": (90, OnGpu(2, 200, 4, 64), OnGpu(2, 200, 4, 64)),
    "copied": (90, OnGpu(2, 200, 4, 64, pointer=(1 << 44) + 2), OnGpu(2, 200, 4, 64)),
    "splitting": (80, OnGpu(1, 4, 4, 64), OnGpu(1, 4096, 4, 64)),
    "copied and splitting": (80, OnGpu(1, 64, 4, 64, pointer=(1 << 44) + 2), OnGpu(1, 4096, 4, 64)),
}


@pytest.mark.parametrize("case", LATE)
def test_many_seeds_are_one_problem(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments differ by their keys alone, wherever addresses of copies and of memory that is shared lie."""
    arch, q, k = LATE[case]
    lse = OnGpu(q.shape[0], q.shape[2], q.shape[1], dtype="float32")
    with monkeypatch.context() as patch:
        launched = Launched(patch)
        pretend(patch, arch)
        patch.setattr(OnGpuAdapter, "empty", lambda _, shape, dtype, like: (OnGpu(*shape, dtype=dtype), 3 << 40))
        found = []
        for seed in SEEDS:
            before = len(launched.kernels)
            cufa.attention(q, k, k, dropout_p=0.25, seed=seed)
            cufa.attention_backward(q, q, k, k, q, lse, dropout_p=0.25, seed=seed)
            found.append(launched.kernels[before:])
        assert _problem._checked.cache_info().misses == 2
        cufa.attention(q, k, k, dropout_p=0.5, seed=seed)
        assert _problem._checked.cache_info().misses == 3
    _problem._checked.cache_clear()
    names = [{function.removeprefix("attention_") for function, _ in kernels} for kernels in found]
    assert names == names[:1] * len(SEEDS) and ("align" in names[0]) == ("copied" in case)
    assert ("splitting" not in case) or any("split" in name for name in names[0])
    keys = [struct.pack("<14I", *round_keys(seed)) for seed in SEEDS]
    for index, (function, first) in enumerate(found[0]):
        of = next(plan for plan in launched.plans.values() if function in plan.entries)
        size = units.record_of(of, _jit.headers()).size
        for its_keys, kernels in zip(keys, found, strict=True):
            argument = kernels[index][1][:size]
            assert argument.replace(its_keys, keys[0]) == first[:size]
            assert argument.count(its_keys) == (0 if function == "attention_align" else 1)


def test_many_seeds_are_one_problem_on_the_cpu() -> None:
    given = problem("float32")
    _problem._checked.cache_clear()
    outs = []
    for seed in SEEDS:
        one = given._replace(seed=seed)
        found = one.run()
        one.check(found)
        outs.append(found[0])
    assert _problem._checked.cache_info().misses == 2
    assert len({out.tobytes() for out in outs}) == len(SEEDS)
