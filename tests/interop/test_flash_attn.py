"""`cufa.flash_attn` against a formula of its own in float64: every argument of every function, and gradients."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import cufa
import cufa.flash_attn as flash_attn
from cufa import UnsupportedError, reference
from cufa.flash_attn import flash_attn_3, flash_attn_interface

torch: Any = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

# --- The signatures of flash_attn 2.8 and FlashAttention-3, as facts ----------------------------------

NEEDED = inspect.Parameter.empty
WINDOW = (-1, -1)
OPTIONS = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": WINDOW, "softcap": 0.0}
OPTIONS |= {"alibi_slopes": None, "deterministic": False, "return_attn_probs": False}


def needed(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, NEEDED)


OFFSETS = needed("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
SIGNATURES: dict[str, dict[str, Any]] = {
    "flash_attn_func": {**needed("q", "k", "v"), **OPTIONS},
    "flash_attn_kvpacked_func": {**needed("q", "kv"), **OPTIONS},
    "flash_attn_qkvpacked_func": {**needed("qkv"), **OPTIONS},
    "flash_attn_varlen_func": {**needed("q", "k", "v"), **OFFSETS, **OPTIONS, "block_table": None},
    "flash_attn_varlen_kvpacked_func": {**needed("q", "kv"), **OFFSETS, **OPTIONS},
    "flash_attn_varlen_qkvpacked_func": {**needed("qkv", "cu_seqlens", "max_seqlen"), **OPTIONS},
    "flash_attn_with_kvcache": {
        **needed("q", "k_cache", "v_cache"),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")),
        **dict.fromkeys(("cache_leftpad", "block_table", "softmax_scale")),
        "causal": False,
        "window_size": WINDOW,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}
DESCALES = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
TUNING = {"num_splits": 1, "pack_gqa": None, "deterministic": False, "sm_margin": 0, "return_attn_probs": False}
MIDDLE = {"window_size": WINDOW, "attention_chunk": 0, "softcap": 0.0}
SCALED = {"softmax_scale": None, "causal": False}
SIGNATURES_3: dict[str, dict[str, Any]] = {
    "flash_attn_func": {**needed("q", "k", "v"), **SCALED, "qv": None, **DESCALES, **MIDDLE, **TUNING},
    "flash_attn_qkvpacked_func": {
        **needed("qkv"),
        **SCALED,
        **DESCALES,
        **MIDDLE,
        "deterministic": False,
        "num_heads_q": None,
        "sm_margin": 0,
        "return_attn_probs": False,
    },
    "flash_attn_varlen_func": {
        **needed("q", "k", "v"),
        **OFFSETS,
        "seqused_q": None,
        "seqused_k": None,
        **SCALED,
        "qv": None,
        **DESCALES,
        **MIDDLE,
        **TUNING,
    },
    "flash_attn_with_kvcache": {
        **needed("q", "k_cache", "v_cache"),
        **dict.fromkeys(("k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")),
        **dict.fromkeys(("cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q")),
        "rotary_seqlens": None,
        **DESCALES,
        **SCALED,
        **MIDDLE,
        "rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
        "return_softmax_lse": False,
    },
    "flash_attn_combine": {**needed("out_partial", "lse_partial"), "out": None, "out_dtype": None},
}


@pytest.mark.parametrize("module", [flash_attn, flash_attn_3], ids=["2", "3"])
def test_signatures_are_those_of_flash_attn(module: Any) -> None:
    table = SIGNATURES if module is flash_attn else SIGNATURES_3
    for name, wanted in table.items():
        parameters = inspect.signature(getattr(module, name)).parameters
        assert list(parameters) == list(wanted), name
        assert {each.name: each.default for each in parameters.values()} == wanted, name
        assert all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters.values())


# --- What they mean -----------------------------------------------------------------------------------


def eager(
    q: Any,
    k: Any,
    v: Any,
    slopes: Any = None,
    kept: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WINDOW,
    softcap: float = 0.0,
    attention_chunk: int = 0,
    dropout_p: float = 0.0,
) -> tuple[Any, Any, Any]:
    """out, lse and probabilities of one sequence: (rows, heads, columns)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    position, key = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (position - key).abs()
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    left, right = window_size[0], 0 if causal else window_size[1]
    seen &= (key >= position - left) if left >= 0 else seen
    seen &= (key <= position + right) if right >= 0 else seen
    seen &= (key // attention_chunk == position // attention_chunk) if attention_chunk else seen
    lse = s.masked_fill(~seen, -torch.inf).logsumexp(-1)
    p = torch.where(seen, s - lse[..., None], -torch.inf).exp()
    p = torch.where(seen, p, 0.0)
    dropped = p if kept is None else p * kept / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", dropped, v), torch.where(seen.any(-1), lse, torch.inf), p


class Case(NamedTuple):
    """A function's arguments, and what sequences they are.

    Attributes
    ----------
    arguments : dict
    leaves : list of tensor
        That require grad.
    sequences : list of (q, k, v)
        As views of the leaves.
    stacked : callable
        Puts the outs of sequences together.
    """

    arguments: dict[str, Any]
    leaves: list[Any]
    sequences: list[tuple[Any, Any, Any]]
    stacked: Callable[[list[Any]], Any]


ROWS, KEYS, HEADS, WIDTH = (5, 3), (8, 6), 4, 16


def random(*shape: int, seed: int = 0, dtype: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype or torch.float64)


def case_of(name: str, dtype: Any) -> Case:
    packed = "qkv" if "qkvpacked" in name else "kv" if "kvpacked" in name else ""
    varlen, rows = "varlen" in name, KEYS if packed == "qkv" else ROWS
    front = ((sum(rows),), (sum(KEYS),)) if varlen else ((2, rows[0]), (2, KEYS[0]))
    heads = HEADS if packed == "qkv" else 2
    leaves = [] if packed == "qkv" else [random(*front[0], HEADS, WIDTH, dtype=dtype)]
    if packed:
        leaves.append(random(*front[1], len(packed), heads, WIDTH, seed=1, dtype=dtype))
    else:
        leaves += [random(*front[1], heads, WIDTH, seed=seed, dtype=dtype) for seed in (1, 2)]
    for leaf in leaves:
        leaf.requires_grad_()
    whole = [*leaves[:-1], *leaves[-1].unbind(-3)] if packed else leaves
    offsets = [torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32) for lengths in (rows, KEYS)]
    if varlen:
        parts = zip(whole, (rows, KEYS, KEYS), strict=True)
        sequences = list(zip(*(x.split(list(lengths)) for x, lengths in parts), strict=True))
    else:
        sequences = list(zip(*(x.unbind(0) for x in whole), strict=True))
    names = [packed] if packed == "qkv" else ["q", packed] if packed else ["q", "k", "v"]
    arguments = dict(zip(names, leaves, strict=True))
    if varlen and packed == "qkv":
        arguments |= {"cu_seqlens": offsets[1], "max_seqlen": max(KEYS)}
    elif varlen:
        arguments |= {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
        arguments |= {"max_seqlen_q": max(rows), "max_seqlen_k": max(KEYS)}
    return Case(arguments, leaves, sequences, torch.cat if varlen else torch.stack)


SLOPES = 0.1 * torch.arange(1.0, HEADS + 1)
CHANGED: dict[str, Any] = {
    "dropout_p": 0.25,
    "softmax_scale": 0.7,
    "causal": True,
    "window_size": (3, 1),
    "softcap": 1.5,
    "alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]),
    "deterministic": True,
    "return_attn_probs": True,
}
FUNCTIONS = [name for name in SIGNATURES if name != "flash_attn_with_kvcache"]


def check(name: str, options: dict[str, Any], dtype: Any, module: Any = flash_attn) -> None:
    """Compare a call and its gradients with the formula."""
    case = case_of(name, dtype)
    torch.manual_seed(3)
    found = getattr(module, name)(**case.arguments, **options)
    meant = {key: x for key, x in options.items() if key in inspect.signature(eager).parameters}
    slopes = options.get("alibi_slopes")
    kept = None
    if options.get("dropout_p"):
        torch.manual_seed(3)
        seed = importlib.import_module("cufa.flash_attn._torch").next_seed(case.leaves[0])
        kept = torch.as_tensor(cufa.dropout_mask((2, HEADS, 8, 8), options["dropout_p"], seed))
    outs, lses = [], []
    for b, (q, k, v) in enumerate(case.sequences):
        own = None if slopes is None else slopes if slopes.ndim == 1 else slopes[b]
        out, lse, _ = eager(q, k, v, own, None if kept is None else kept[b, :, : len(q), : len(k)], **meant)
        outs.append(out)
        lses.append(lse)
    out, *more = found if isinstance(found, tuple) else (found,)
    wanted = case.stacked(outs)
    limit = 1e-4 if dtype is torch.float32 else 1e-10
    close = {"atol": limit, "rtol": limit, "check_dtype": False}
    torch.testing.assert_close(out, wanted, **close)
    assert len(more) == (0 if not options.get("return_attn_probs") else 2 if module is flash_attn else 1)
    loss, right = out.square().sum(), wanted.square().sum()
    if more:
        lse = torch.cat(lses, -1) if case.stacked is torch.cat else torch.stack(lses)
        torch.testing.assert_close(more[0], lse, **close)
        loss, right = loss + more[0].sum(), right + lse.sum()
    gradients = torch.autograd.grad(loss, case.leaves)
    for one, other in zip(gradients, torch.autograd.grad(right, case.leaves), strict=True):
        torch.testing.assert_close(one, other, **close)
        assert one.is_contiguous()


def named(functions: list[str], table: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, key) for name in functions for key, default in table[name].items() if default is not NEEDED]


# Pages, which have no gradient, have a test of their own.
@pytest.mark.parametrize(("name", "argument"), [x for x in named(FUNCTIONS, SIGNATURES) if x[1] != "block_table"])
def test_every_argument_is_what_flash_attn_means(name: str, argument: str) -> None:
    check(name, {argument: CHANGED[argument]}, torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_together_in_float32(name: str) -> None:
    plain = ("softmax_scale", "causal", "window_size", "softcap", "dropout_p")
    check(name, {key: CHANGED[key] for key in plain} | {"alibi_slopes": SLOPES}, torch.float32)
    check(name, {"causal": True}, torch.float32)


REFUSED_3 = {"qv": 1, "q_descale": 1, "k_descale": 1, "v_descale": 1, "pack_gqa": True, "sm_margin": 2}
REFUSED_3 |= {"seqused_q": 1, "num_splits": 4}
CHANGED_3 = {**CHANGED, "attention_chunk": 3, "num_heads_q": HEADS}


@pytest.mark.parametrize(("name", "argument"), named(list(SIGNATURES_3)[:3], SIGNATURES_3))
def test_every_argument_of_flash_attention_3(name: str, argument: str) -> None:
    if argument in REFUSED_3:
        with pytest.raises(UnsupportedError, match=f"{argument} is"):
            getattr(flash_attn_3, name)(**case_of(name, torch.float64).arguments, **{argument: REFUSED_3[argument]})
    elif argument == "seqused_k":
        case = case_of(name, torch.float64)
        out = flash_attn_3.flash_attn_varlen_func(**case.arguments, seqused_k=torch.tensor([4, 6], dtype=torch.int32))
        (q, k, v), second = case.sequences
        torch.testing.assert_close(out, torch.cat([eager(q, k[:4], v[:4])[0], eager(*second)[0]]))
    else:
        check(name, {argument: CHANGED_3[argument]}, torch.float64, flash_attn_3)


def test_heads_side_by_side_are_packed_too() -> None:
    qkv = random(2, 7, 8, WIDTH).requires_grad_()
    out = flash_attn_3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    wanted = flash_attn.flash_attn_func(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], causal=True)
    torch.testing.assert_close(out, wanted)
    found, right = (torch.autograd.grad(each.square().sum(), qkv)[0] for each in (out, wanted))
    torch.testing.assert_close(found, right)
    for heads, error in ((None, ValueError), (3, ValueError), (4.0, TypeError)):
        with pytest.raises(error, match="num_heads_q"):
            flash_attn_3.flash_attn_qkvpacked_func(qkv, num_heads_q=heads)
    for number in ("attention_chunk", "sm_margin"):  # False is 0, but no number
        with pytest.raises(TypeError, match=number):
            flash_attn_3.flash_attn_qkvpacked_func(qkv, num_heads_q=4, **{number: False})


def test_combining_parts() -> None:
    q, k, v = (random(2, 9, 4, WIDTH, seed=seed) for seed in range(3))
    parts = [cufa.attention(q, k[:, each], v[:, each], return_lse=True) for each in (slice(4), slice(4, 9))]
    outs, lses = torch.stack([each[0] for each in parts]), torch.stack([each[1].mT for each in parts])
    out, lse = flash_attn_3.flash_attn_combine(outs, lses)
    wanted = cufa.attention(q, k, v, return_lse=True)
    torch.testing.assert_close((out, lse.mT), wanted)
    given = torch.empty_like(out)
    assert flash_attn_3.flash_attn_combine(outs, lses, given)[0] is given
    assert flash_attn_3.flash_attn_combine(outs, lses, out_dtype=torch.float32)[0].dtype is torch.float32
    half = torch.empty_like(out, dtype=torch.bfloat16)
    assert flash_attn_3.flash_attn_combine(outs, lses, half)[0] is half
    with pytest.raises(ValueError, match="out_dtype"):
        flash_attn_3.flash_attn_combine(outs, lses, half, torch.float32)
    with pytest.raises(UnsupportedError, match="out_dtype"):
        flash_attn_3.flash_attn_combine(outs.numpy(), lses.numpy(), out_dtype=np.float32)
    with pytest.raises(ValueError, match="out has shape"):  # into which the result would broadcast
        flash_attn_3.flash_attn_combine(outs, lses, half.new_empty(5, *half.shape)[..., :1, :, :])
    for wrong, what in (("out", half.float().numpy()), ("out_dtype", torch.int32), ("lse_partial", [1])):
        with pytest.raises(TypeError, match=wrong):
            flash_attn_3.flash_attn_combine(**{"out_partial": outs, "lse_partial": lses, wrong: what})


@pytest.mark.parametrize(("given", "meant"), [((-2, -7), WINDOW), ([-3, 1], (-1, 1)), ((np.int64(-4), None), WINDOW)])
def test_any_negative_side_of_a_window_is_unbounded(given: Any, meant: tuple[int, int]) -> None:
    """As flash_attn has it, and in caches, where it decides what q is turned for."""
    for module, name in ((flash_attn, name) for name in FUNCTIONS):
        arguments = case_of(name, torch.float64).arguments
        found, wanted = (getattr(module, name)(**arguments, window_size=window) for window in (given, meant))
        assert torch.equal(found, wanted), name
    for module in (flash_attn, flash_attn_3):
        found, wanted = (
            module.flash_attn_with_kvcache(**caches(), **TURNED, window_size=window) for window in (given, meant)
        )
        assert torch.equal(found, wanted)
    q, k, v = case_of("flash_attn_func", torch.float64).arguments.values()
    sides = (-1 if side is None else side for side in given)
    parts = flash_attn_interface._flash_attn_forward(q, k, v, 0.0, 0.25, False, *sides, 0.0, None, False)
    torch.testing.assert_close(parts[0], flash_attn_3.flash_attn_func(q, k, v, window_size=meant).detach())
    with pytest.raises(TypeError, match="side of window_size is a ndarray"):  # which is compared with no number
        flash_attn.flash_attn_func(q, k, v, window_size=(np.array([1, 2]), 0))


def test_rows_without_keys() -> None:
    q, k = random(1, 6, 2, WIDTH).requires_grad_(), random(1, 4, 2, WIDTH, seed=1)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert not out[:, :2].any() and bool((lse[..., :2] == torch.inf).all()) and bool(lse[..., 2:].isfinite().all())
    (gradient,) = torch.autograd.grad(out.sum() + lse[..., 2:].sum(), q)
    assert bool(gradient.isfinite().all()) and not gradient[:, :2].any()
    third = flash_attn_3.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)[1]
    assert bool((third[..., :2] == -torch.inf).all())
    host = flash_attn.flash_attn_func(*(x.detach().numpy() for x in (q, k, k)), causal=True, return_attn_probs=True)
    np.testing.assert_array_equal(host[1], lse.detach())
    assert host[2].shape == (0,)


# --- Dropout ------------------------------------------------------------------------------------------


def test_probabilities_say_what_is_dropped() -> None:
    case = case_of("flash_attn_func", torch.float64)
    options = {"dropout_p": 0.25, "causal": True, "softcap": 1.5, "alibi_slopes": SLOPES}
    for name in ("flash_attn_func", "flash_attn_kvpacked_func"):
        case = case_of(name, torch.float64)
        out, _, signed = getattr(flash_attn, name)(**case.arguments, **options, return_attn_probs=True)
        for b, (q, k, v) in enumerate(case.sequences):
            kept = signed[b] >= 0
            wanted, _, p = eager(q, k, v, SLOPES, kept, dropout_p=0.25, causal=True, softcap=1.5)
            torch.testing.assert_close(out[b], wanted)
            torch.testing.assert_close(signed[b].abs(), p)
        assert 0 < float((signed < 0).double().mean()) < 0.25
    with pytest.raises(UnsupportedError, match="return_attn_probs"):
        arguments = case_of("flash_attn_varlen_func", torch.float64).arguments
        flash_attn.flash_attn_varlen_func(**arguments, dropout_p=0.25, return_attn_probs=True)


def test_seeds_are_those_of_torch() -> None:
    """The same after the same seed, another in the next call, and the same again in a checkpoint."""
    qkv = random(1, 8, 3, 2, WIDTH).requires_grad_()

    def attend(x: Any) -> Any:
        return flash_attn.flash_attn_qkvpacked_func(x, dropout_p=0.5)

    torch.manual_seed(5)
    first, second = attend(qkv), attend(qkv)
    torch.manual_seed(5)
    again = torch.utils.checkpoint.checkpoint(attend, qkv, use_reentrant=False)
    assert torch.equal(first, again) and not torch.equal(first, second)
    one, other = (torch.autograd.grad(each.square().sum(), qkv)[0] for each in (first, again))
    assert torch.equal(one, other)


def test_mapped_calls_drop_the_same_only_if_asked_to() -> None:
    """A seed is one for all calls, on a GPU without a word of torch's."""
    qkv = random(1, 8, 3, 2, WIDTH).expand(2, 1, 8, 3, 2, WIDTH)

    def mapped(randomness: str) -> Any:
        return torch.func.vmap(lambda x: flash_attn.flash_attn_qkvpacked_func(x, 0.5), randomness=randomness)(qkv)

    for randomness in ("error", "different"):
        with pytest.raises(UnsupportedError, match="vmap"):
            mapped(randomness)
    same = mapped("same")
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("varlen", [False, True])
def test_forward_and_backward_one_by_one(varlen: bool) -> None:
    """What rings of devices are built of: the parts' gradients follow from out and lse of the whole."""
    from cufa.flash_attn import flash_attn_interface as interface

    name, kind = ("flash_attn_varlen_func", "varlen_") if varlen else ("flash_attn_func", "")
    case = case_of(name, torch.float64)
    q, k, v, *offsets = case.arguments.values()
    options = (0.25, WIDTH**-0.5, True, -1, -1, 1.5, SLOPES)
    forward, backward = (getattr(interface, f"_flash_attn_{kind}{way}") for way in ("forward", "backward"))
    torch.manual_seed(3)
    out, lse, _, rng_state = forward(q, k, v, *offsets, *options, False)
    assert out.grad_fn is None
    torch.manual_seed(3)
    own = {"dropout_p": 0.25, "causal": True, "softcap": 1.5, "alibi_slopes": SLOPES}
    wanted = getattr(flash_attn, name)(**case.arguments, **own)
    torch.testing.assert_close(out, wanted)
    dout = torch.ones_like(out)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    backward(dout, q, k, v, out, lse, *gradients, *offsets, *options, True, rng_state)
    torch.testing.assert_close(gradients, [*torch.autograd.grad(wanted, (q, k, v), dout)])
    assert getattr(interface, f"_wrapped_flash_attn_{kind}forward") is forward
    for wrong in ((), (None,), ([3, 0],), (rng_state[:1],), (rng_state.double(),)):
        with pytest.raises(UnsupportedError, match="rng_state"):
            backward(dout, q, k, v, out, lse, *gradients, *offsets, *options, True, *wrong)
    with pytest.raises(UnsupportedError, match="return_softmax"):
        forward(q, k, v, *offsets, *options, True)
    with pytest.raises(TypeError, match="torch tensors"):
        forward(q.detach().numpy(), k, v, *offsets, *options, False)
    if varlen:
        used = interface._flash_attn_varlen_forward(
            q, k, v, *offsets, 0.0, 0.25, True, seqused_k=torch.tensor([2, 6], dtype=torch.int32)
        )
        rows = case.sequences[0][0][3:], *(x[:2] for x in case.sequences[0][1:])
        torch.testing.assert_close(used[0][3:5], eager(*rows, causal=True)[0].detach())
        assert bool((used[1][:, :3] == torch.inf).all())
        for refused in ("block_table", "leftpad_k"):
            with pytest.raises(UnsupportedError, match=refused):
                forward(q, k, v, *offsets, *options, **{refused: 1})


# --- Caches -------------------------------------------------------------------------------------------


def caches() -> dict[str, Any]:
    return {
        "q": random(2, 3, HEADS, WIDTH),
        "k_cache": random(2, 12, 2, WIDTH, seed=1),
        "v_cache": random(2, 12, 2, WIDTH, seed=2),
    }


def integers(*values: Any) -> Any:
    return torch.tensor(values, dtype=torch.int32)


NEW = {"k": random(2, 3, 2, WIDTH, seed=3), "v": random(2, 3, 2, WIDTH, seed=4), "cache_seqlens": integers(4, 7)}
TURNED = {**NEW, "rotary_cos": random(12, 4, seed=5), "rotary_sin": random(12, 4, seed=6)}
PAGES = {"block_table": integers([2, 0, 1, 4], [5, 3, 7, 6]), "cache_seqlens": integers(5, 9)}
CACHE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "k": NEW,
    "v": NEW,
    "rotary_cos": TURNED,
    "rotary_sin": {**TURNED, "causal": True},
    "cache_seqlens": {"cache_seqlens": integers(4, 7)},
    "cache_batch_idx": {"cache_batch_idx": integers(1, 0)},
    "cache_leftpad": {"cache_leftpad": integers(2, 1), "cache_seqlens": integers(6, 9)},
    "block_table": PAGES,
    "softmax_scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window_size": {"window_size": (3, 1)},
    "softcap": {"softcap": 1.5},
    "rotary_interleaved": {**TURNED, "rotary_interleaved": False},
    "alibi_slopes": {"alibi_slopes": SLOPES, "causal": True},
    "num_splits": {"num_splits": 3},
    "return_softmax_lse": {"return_softmax_lse": True, "cache_seqlens": integers(0, 7)},
}


def attended(given: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the specification gives, with the caches as it leaves them."""
    names = {"return_softmax_lse": "return_lse", "page_table": "block_table"}
    own = {names.get(key, key): x.numpy().copy() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    own.pop("num_splits", None)
    arrays = {key: x.numpy().copy() for key, x in given.items()}
    return reference.attention_with_kvcache(**arrays, **own)


@pytest.mark.parametrize("argument", [name for _, name in named(["flash_attn_with_kvcache"], SIGNATURES)])
def test_every_argument_of_caches(argument: str) -> None:
    options = CACHE_ARGUMENTS[argument]
    given = caches()
    if argument == "block_table":
        given |= {name: random(8, 3, 2, WIDTH, seed=seed) for name, seed in (("k_cache", 1), ("v_cache", 2))}
    wanted = attended(given, options)
    found = flash_attn.flash_attn_with_kvcache(**given, **options)
    out, *lse = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(out, torch.as_tensor(wanted.out))
    torch.testing.assert_close(given["k_cache"], torch.as_tensor(wanted.k_cache))
    assert len(lse) == ("return_softmax_lse" in options)
    for each in lse:
        right = np.where(wanted.lse == -np.inf, np.inf, wanted.lse)
        torch.testing.assert_close(each, torch.as_tensor(right))
        assert bool((each[0] == torch.inf).all())


def test_lengths_of_caches_may_be_a_number_and_caches_more_than_sequences() -> None:
    given = caches()
    more = {name: torch.cat([given[name], given[name]]) for name in ("k_cache", "v_cache")}
    wanted = flash_attn.flash_attn_with_kvcache(**given, cache_seqlens=integers(5, 5))
    torch.testing.assert_close(flash_attn.flash_attn_with_kvcache(given["q"], **more, cache_seqlens=5), wanted)
    host = [x.numpy() for x in (given["q"], *more.values())]
    np.testing.assert_allclose(flash_attn.flash_attn_with_kvcache(*host, cache_seqlens=5), wanted)
    # A side that no cache is long enough for is none, so that all rows of q are turned alike.
    turned = [
        flash_attn.flash_attn_with_kvcache(**caches(), **TURNED, window_size=window) for window in (WINDOW, (12, -1))
    ]
    torch.testing.assert_close(*turned)
    for module in (flash_attn, flash_attn_3):
        with pytest.raises(TypeError, match="cache_seqlens is a bool"):
            module.flash_attn_with_kvcache(**given, cache_seqlens=True)
    with pytest.raises(UnsupportedError, match="requires grad"):
        flash_attn.flash_attn_with_kvcache(given["q"].requires_grad_(), given["k_cache"], given["v_cache"])


REFUSED_CACHES = {"qv": 1, "rotary_seqlens": 1, "q_descale": 1, "pack_gqa": True, "sm_margin": 2, "attention_chunk": 4}
REFUSED_CACHES |= {"cu_seqlens_k_new": integers(0, 3, 6)}


@pytest.mark.parametrize("argument", [name for _, name in named(["flash_attn_with_kvcache"], SIGNATURES_3)])
def test_every_argument_of_caches_of_flash_attention_3(argument: str) -> None:
    given = caches()
    packed = {"cu_seqlens_q": integers(0, 2, 6)}
    own = {
        "page_table": {"page_table": PAGES["block_table"], "cache_seqlens": PAGES["cache_seqlens"]},
        "cu_seqlens_q": packed,
        "max_seqlen_q": {**packed, "max_seqlen_q": 4},
        "scheduler_metadata": {"scheduler_metadata": cufa.decode_plan(**given)},
    }
    if argument in REFUSED_CACHES:
        with pytest.raises(UnsupportedError, match=f"{argument} is"):
            flash_attn_3.flash_attn_with_kvcache(**given, **{argument: REFUSED_CACHES[argument]})
        return
    if argument in ("k_descale", "v_descale"):  # the reference takes caches of 8 bits as ml_dtypes has them
        with pytest.raises(ValueError, match=argument):
            flash_attn_3.flash_attn_with_kvcache(**given, **{argument: torch.ones(2, 2)})
        return
    options = own.get(argument) or CACHE_ARGUMENTS[argument]
    if argument == "page_table":
        given |= {name: random(8, 3, 2, WIDTH, seed=seed) for name, seed in (("k_cache", 1), ("v_cache", 2))}
    if "cu_seqlens_q" in options:
        given["q"] = random(6, HEADS, WIDTH)
    plain = {key: x for key, x in options.items() if key not in ("scheduler_metadata", "max_seqlen_q", "alibi_slopes")}
    wanted = attended(given, plain)
    found = flash_attn_3.flash_attn_with_kvcache(**given, **options)
    out, *more = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(out, torch.as_tensor(wanted.out))
    if more:
        torch.testing.assert_close(more[0], torch.as_tensor(wanted.lse))
        assert [x.numel() for x in more[1:]] == [0, 0]


def test_packed_queries_over_pages() -> None:
    q = random(6, HEADS, WIDTH)
    k, v = (random(8, 3, 2, WIDTH, seed=seed) for seed in (1, 2))
    offsets, keys = integers(0, 2, 6), integers(0, 5, 14)
    pages = {"block_table": PAGES["block_table"], "alibi_slopes": SLOPES, "causal": True}
    found = flash_attn.flash_attn_varlen_func(q, k, v, offsets, keys, 4, 9, **pages, return_attn_probs=True)
    wanted = attended({"q": q, "k_cache": k, "v_cache": v}, {**pages, **PAGES, "cu_seqlens_q": offsets})
    torch.testing.assert_close(found[:2], (torch.as_tensor(wanted.out), torch.as_tensor(wanted.lse)))
    pages = {"block_table": PAGES["block_table"]}
    with pytest.raises(UnsupportedError, match="dropout_p"):
        flash_attn.flash_attn_varlen_func(q, k, v, offsets, keys, 4, 9, 0.1, **pages)
    with pytest.raises(TypeError, match="deterministic"):
        flash_attn.flash_attn_varlen_func(q, k, v, offsets, keys, 4, 9, deterministic="yes", **pages)
    with pytest.raises(TypeError, match="cu_seqlens_k is a NoneType"):
        flash_attn.flash_attn_varlen_func(q, k, v, offsets, None, 4, 9, **pages)


# --- Frameworks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", "jax"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_frameworks_give_what_torch_gives(name: str, framework: str) -> None:
    xp = np if framework == "numpy" else pytest.importorskip("jax").numpy
    case = case_of(name, torch.float32)

    def of(x: Any) -> Any:
        return xp.asarray(x.detach().numpy()) if isinstance(x, torch.Tensor) else x

    options = {"causal": True, "window_size": (3, -1), "softcap": 1.5, "alibi_slopes": SLOPES, "deterministic": True}
    wanted = getattr(flash_attn, name)(**case.arguments, **options, return_attn_probs=True)
    function = getattr(flash_attn, name)
    arrays = {key: of(x) for key, x in case.arguments.items()}
    own = {key: of(x) for key, x in options.items()}
    found = function(**arrays, **own, return_attn_probs=True)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert type(one) is type(arrays[next(iter(arrays))])
        np.testing.assert_allclose(one, other.detach(), atol=1e-5)
    assert found[2].shape == (0,)
    with pytest.raises(UnsupportedError, match="dropout_p"):
        function(**arrays, dropout_p=0.5)
    if framework == "jax":
        jax = pytest.importorskip("jax")
        leaf = next(key for key in arrays if key in ("qkv", "kv", "v"))

        def loss(x: Any) -> Any:
            return (function(**{**arrays, leaf: x}, **own) ** 2).sum()

        right = torch.autograd.grad(wanted[0].square().sum(), case.arguments[leaf])[0]
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(arrays[leaf]), right, atol=1e-4)


def test_a_compiled_function_is_one_graph() -> None:
    torch._dynamo.reset()

    def attend(qkv: Any) -> Any:
        q, kv = qkv[:, :, 0], qkv[:, :, 1:]
        first = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], causal=True)
        second, lse, _ = flash_attn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
        return first + second + flash_attn.flash_attn_kvpacked_func(q, kv, window_size=(3, 0)) + lse.mT[..., None]

    qkv = random(2, 8, 3, 2, WIDTH).requires_grad_()
    outs = attend(qkv), torch.compile(attend, backend="aot_eager", fullgraph=True)(qkv)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), qkv)[0] for out in outs))
    torch.manual_seed(2)
    wanted = flash_attn.flash_attn_qkvpacked_func(qkv, 0.5)
    torch.manual_seed(2)
    torch.testing.assert_close(torch.compile(flash_attn.flash_attn_qkvpacked_func, backend="eager")(qkv, 0.5), wanted)


def test_what_torch_sees_of_packed_tensors() -> None:
    """One node of autograd, but under autocast, which casts, and torch.func, which maps, that of `cufa.attention`."""
    qkv = random(2, 8, 3, 2, WIDTH, dtype=torch.float32).requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv)
    assert out.grad_fn.name() == "PackedBackward"
    with torch.no_grad():
        assert flash_attn.flash_attn_qkvpacked_func(qkv).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        cast = flash_attn.flash_attn_qkvpacked_func(qkv)
    assert cast.dtype is torch.bfloat16
    gradient = torch.autograd.grad(cast.float().sum(), qkv)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(out.sum(), qkv)[0], atol=0.05, rtol=0.05)
    mapped = torch.func.vmap(flash_attn.flash_attn_qkvpacked_func)(qkv[:, None])
    torch.testing.assert_close(mapped[:, 0], out)
    slopes = SLOPES[:2].clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="alibi_slopes requires grad"):
        flash_attn.flash_attn_qkvpacked_func(qkv, alibi_slopes=slopes)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_hear_of_deterministic(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which changes nothing on the CPU, whose sums have an order anyway."""
    heard = []
    module = importlib.import_module("cufa._operations.call")
    before = module.call_plain

    def call_plain(operation: Any, given: Any, options: Any) -> Any:
        heard.append(options.deterministic if operation.gradient else None)
        return before(operation, given, options)

    monkeypatch.setattr(module, "call_plain", call_plain)
    qkv = random(2, 8, 3, 2, WIDTH).requires_grad_()
    flash_attn.flash_attn_func(*qkv.unbind(2), deterministic=deterministic).sum().backward()
    flash_attn.flash_attn_qkvpacked_func(qkv, deterministic=deterministic).sum().backward()
    assert [each for each in heard if each is not None] == [deterministic] * 2
    jax = pytest.importorskip("jax")
    interop = importlib.import_module("cufa.interop.jax")
    made = interop._program
    monkeypatch.setattr(interop, "_program", lambda *given: (heard.append(given[-1]), made(*given))[1])
    q = jax.numpy.ones((1, 4, 2, 8))
    flash_attn.flash_attn_func(q, q, q, deterministic=deterministic)
    assert heard[-1] is deterministic


WRONG: dict[str, Any] = {
    "causal": 1,
    "deterministic": "yes",
    "return_attn_probs": 1,
    "softmax_scale": torch.tensor(0.5, requires_grad=True),
    "softcap": torch.tensor(1.5, requires_grad=True),
    "dropout_p": "much",
    "window_size": (1.0, 0),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_options_are_refused(argument: str) -> None:
    """Of packed tensors too, which autograd records with options that only backward reads."""
    named = "return_lse" if argument == "return_attn_probs" else argument
    calls = [(flash_attn, name) for name in FUNCTIONS]
    if argument != "dropout_p":
        calls.append((flash_attn_3, "flash_attn_qkvpacked_func"))
    for module, name in calls:
        with pytest.raises(TypeError, match=named):
            getattr(module, name)(**case_of(name, torch.float64).arguments, **{argument: WRONG[argument]})


def test_no_seed_is_drawn_for_a_wrong_rate() -> None:
    state = torch.get_rng_state()
    for name in FUNCTIONS:
        with pytest.raises(ValueError, match=r"dropout_p is 1\.0"):
            getattr(flash_attn, name)(**case_of(name, torch.float64).arguments, dropout_p=1.0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "packed" in name])
def test_packed_shapes_are_checked(name: str) -> None:
    arguments = case_of(name, torch.float64).arguments
    packed = "qkv" if "qkv" in name else "kv"
    for wrong in (arguments[packed][..., 0, :], arguments[packed][..., :1, :, :]):
        with pytest.raises(ValueError, match=f"{packed} has shape"):
            getattr(flash_attn, name)(**{**arguments, packed: wrong})


# --- The rest of the package --------------------------------------------------------------------------


def test_padding() -> None:
    from cufa.flash_attn.bert_padding import (
        index_first_axis,
        index_first_axis_residual,
        index_put_first_axis,
        pad_input,
        unpad_input,
        unpad_input_for_concatenated_sequences,
    )

    x, mask = random(2, 4, 3).requires_grad_(), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    packed, indices, offsets, longest, used = unpad_input(x, mask)
    assert (indices.tolist(), offsets.tolist(), longest, used.tolist()) == ([0, 1, 5, 6, 7], [0, 2, 5], 3, [2, 3])
    assert offsets.dtype is used.dtype is torch.int32
    padded = pad_input(packed, indices, 2, 4)
    torch.testing.assert_close(padded, x * mask[..., None])
    torch.testing.assert_close(torch.autograd.grad(padded.sum(), x)[0], mask[..., None].expand(2, 4, 3).double())
    room = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    _, indices, offsets, longest, used = unpad_input(x, mask, room)
    assert (offsets.tolist(), longest, used.tolist()) == ([0, 3, 6], 3, [2, 3])
    numbered, *more = unpad_input(x, torch.tensor([[3, 7, 0, 0], [0, 1, 2, 2]]), 2 * mask)
    assert torch.equal(numbered, packed)  # tokens are where a mask is not 0, and count once
    assert [each.tolist() for each in (more[1], more[3])] == [[0, 2, 5], [2, 3]]
    for masks in ((mask[:, :3],), (mask, room[:1])):
        with pytest.raises(ValueError, match="mask has shape"):
            unpad_input(x, *masks)
    with pytest.raises(ValueError, match="attention_mask_in_length has shape"):
        unpad_input_for_concatenated_sequences(x, mask[:1])
    lengths = torch.tensor([[2, 1, 0, 0], [3, 0, 0, 0]])
    packed, indices, offsets, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert (indices.tolist(), offsets.tolist(), longest) == ([0, 1, 2, 4, 5, 6], [0, 2, 3, 6], 3)
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(index_first_axis(x[0], rows), x[0, rows])
    torch.testing.assert_close(index_put_first_axis(x[0, rows], rows, 4)[rows], x[0, rows])
    assert index_first_axis_residual(x[0], rows)[1].shape == (4, 3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embeddings(interleaved: bool) -> None:
    from cufa.flash_attn.layers import rotary

    angles = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().double(), angles.sin().double()
    x = random(2, 5, 4, WIDTH).requires_grad_()
    wanted = rotary.apply_rotary_emb_torch(x, cos[2:7], sin[2:7], interleaved)
    pairs = (0, 1) if interleaved else (0, 4)
    first, second = (x[0, 3, 1, column] for column in pairs)
    torch.testing.assert_close(wanted[0, 3, 1, pairs[1]], first * sin[5, 0] + second * cos[5, 0])
    for offset in (2, torch.tensor([2, 2])):
        found = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(each.square().sum(), x, retain_graph=True)[0] for each in (found, wanted)]
        torch.testing.assert_close(*gradients)
    packed = rotary.apply_rotary_emb(
        x.flatten(0, 1), cos, sin, interleaved, False, 2, torch.tensor([0, 5, 10], dtype=torch.int32), 5
    )
    torch.testing.assert_close(packed, wanted.flatten(0, 1))
    given = x.detach().clone()
    assert rotary.apply_rotary_emb(given, cos[2:], sin[2:], interleaved, inplace=True) is given
    torch.testing.assert_close(given, wanted.detach())

    embedding = rotary.RotaryEmbedding(8, interleaved=interleaved)
    turned = rotary.apply_rotary_emb_torch(x, *(t[2:7].float().double() for t in (cos, sin)), interleaved)
    qkv = torch.stack([x, x, x], 2)  # not a leaf, which could not change in place
    found = embedding(qkv * 1.0, seqlen_offset=2)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(found, torch.stack([turned, turned, x], 2), **close)
    gradients = [torch.autograd.grad((w * each).sum(), x)[0] for w, each in ((0.5, found[:, :, :2]), (1.0, turned))]
    torch.testing.assert_close(*gradients, **close)
    heads = torch.cat([x, x[:, :, :1], x[:, :, :1]], 2).detach()
    found = embedding(heads.clone(), seqlen_offset=2, num_heads_q=4)
    torch.testing.assert_close(found, torch.cat([turned, turned[:, :, :1], x[:, :, :1]], 2), **close)
    q, kv = embedding(x * 1.0, torch.stack([x, x], 2) * 1.0, seqlen_offset=torch.tensor([2, 2]), max_seqlen=9)
    torch.testing.assert_close((q, kv), (turned, torch.stack([turned, x], 2)), **close)
    with pytest.raises(ValueError, match="max_seqlen"):
        embedding(x, torch.stack([x, x], 2), seqlen_offset=torch.tensor([2, 2]))
    scaled = rotary.RotaryEmbedding(8, interleaved=interleaved, scale_base=512)(qkv * 1.0)
    products = torch.einsum("bihd,bjhd->bhij", scaled[:, :, 0], scaled[:, :, 1])
    plain = torch.einsum(
        "bihd,bjhd->bhij", *rotary.RotaryEmbedding(8, interleaved=interleaved)(qkv * 1.0).unbind(2)[:2]
    )
    torch.testing.assert_close(products.diagonal(0, -2, -1), plain.diagonal(0, -2, -1), **close)  # at distance 0


def test_wrong_rotary_embeddings_are_refused_and_write_nothing() -> None:
    from cufa.flash_attn.layers import rotary

    cos, sin = random(9, 4), random(9, 4, seed=1)
    x = random(1, 3, 2, WIDTH)
    for offset, error in ((-8, ValueError), (2.0, TypeError), (None, TypeError), (torch.tensor([1.5]), ValueError)):
        with pytest.raises(error, match="seqlen_offsets"):  # of -8 the tables would be rows 1 to 9
            rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=offset)
    found = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=np.int64(2))
    torch.testing.assert_close(found, rotary.apply_rotary_emb(x, cos[2:], sin[2:]))
    before = random(1, 3, 3, 2, WIDTH)
    qkv, kv = before.clone(), before[:, :, :2].clone()
    with pytest.raises(ValueError, match="cos"):  # those of k, when q could be turned
        rotary.apply_rotary_emb_qkv_(qkv, cos, sin, cos[:2], sin[:2])
    heads = before.flatten(2, 3)
    for wrong, count in ((kv, None), (heads, None), (heads, 3), (heads, 6), (heads[0], 2)):
        with pytest.raises(ValueError, match=r"qkv has shape \(.*num_heads_q is"):
            rotary.apply_rotary_emb_qkv_(wrong, cos, sin, num_heads_q=count)
    with pytest.raises(ValueError, match="kv has shape"):
        rotary.apply_rotary_emb_kv_(qkv, cos, sin)
    q = x.clone()
    with pytest.raises(ValueError, match="kv has shape"):
        rotary.RotaryEmbedding(8)(q, qkv)
    assert torch.equal(q, x) and torch.equal(qkv, before) and torch.equal(kv, before[:, :, :2])


def test_losses_and_norms() -> None:
    from cufa.flash_attn.losses.cross_entropy import CrossEntropyLoss
    from cufa.flash_attn.ops.rms_norm import RMSNorm, rms_norm

    logits, labels = random(4, 7), torch.tensor([1, -100, 6, 0])
    p = (0.5 * logits).float().log_softmax(-1)
    lse = (0.5 * logits).float().logsumexp(-1)
    rows = [0, 2, 3]
    smooth = 0.9 * -p[rows, labels[rows]] - 0.1 * p[rows].mean(-1) + 0.01 * lse[rows] ** 2
    options = {"label_smoothing": 0.1, "logit_scale": 0.5, "lse_square_scale": 0.01}
    losses, part = CrossEntropyLoss(**options, reduction="none", return_z_loss=True)(logits, labels)
    torch.testing.assert_close(losses[rows], smooth)
    torch.testing.assert_close(part[rows], 0.01 * lse[rows] ** 2)
    assert losses[1] == 0
    torch.testing.assert_close(CrossEntropyLoss(**options)(logits, labels), smooth.mean())
    torch.testing.assert_close(CrossEntropyLoss(**options, reduction="sum")(logits, labels), smooth.sum())
    for refused in ({"inplace_backward": True}, {"process_group": object()}):
        with pytest.raises(UnsupportedError, match=next(iter(refused))):
            CrossEntropyLoss(**refused)(logits, labels)
    with pytest.raises(UnsupportedError, match="precomputed_lse"):
        CrossEntropyLoss()(logits, labels, lse)
    with pytest.raises(ValueError, match="reduction"):
        CrossEntropyLoss(reduction="max")
    x, weight = random(3, 8).float(), random(8).float()
    wanted = x * (x.square().mean(-1, keepdim=True) + 1e-3) ** -0.5
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), wanted * weight)
    torch.testing.assert_close(RMSNorm(8, 1e-3)(x), wanted)


# --- Installing ---------------------------------------------------------------------------------------


def there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_programs_find_what_is_installed() -> None:
    assert not there("flash_attn") and not there("flash_attn_interface")
    with flash_attn.install() as outer:
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import pad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.layers.rotary import apply_rotary_emb
        from flash_attn.losses.cross_entropy import CrossEntropyLoss
        from flash_attn.ops.triton.rotary import apply_rotary

        assert flash_attn_func is flash_attn.flash_attn_func
        homes = [pad_input, flash_attn_varlen_func, apply_rotary_emb, CrossEntropyLoss, apply_rotary]
        assert all(each.__module__.startswith("cufa.flash_attn.") for each in homes)
        module = sys.modules["flash_attn"]
        assert (
            module.__version__ == importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn")
        )
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        assert module.__spec__.name == "flash_attn" and cufa.flash_attn.__spec__.name == "cufa.flash_attn"
        for name in ("flash_attn.modules.mha", "flash_attn.ops.fused_dense", "flash_attn._torch", "flash_attn.cute"):
            with pytest.raises(ModuleNotFoundError, match=r"flash_attn\."):
                importlib.import_module(name)
        with pytest.raises(ImportError, match="get_scheduler_metadata"):
            from flash_attn import get_scheduler_metadata  # noqa: F401
        assert not there("flash_attn_interface")
        with flash_attn.install(flash_attn_3=True):
            import flash_attn_interface

            assert flash_attn_interface.flash_attn_combine is flash_attn_3.flash_attn_combine
            assert importlib.metadata.version("flash-attn-3") == "3.0.0"
        assert there("flash_attn") and not there("flash_attn_interface")
    assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn"] and not there("flash_attn")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")
    outer.remove()  # again, which does nothing


def test_another_flash_attn_is_hidden_only_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    other, part = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.ops")
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    monkeypatch.setitem(sys.modules, "flash_attn.ops", part)
    with pytest.raises(ValueError, match="replace=True"):
        flash_attn.install()
    assert sys.modules["flash_attn"] is other
    handle = flash_attn.install(replace=True)
    assert importlib.import_module("flash_attn").flash_attn_func is flash_attn.flash_attn_func
    handle.remove()
    assert (sys.modules["flash_attn"], sys.modules["flash_attn.ops"]) == (other, part)


def test_transformers_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(utils, "is_torch_cuda_available", lambda: True)
    known = utils._package_distribution_mapping, utils.is_flash_attn_2_available, utils.is_flash_attn_3_available

    def found() -> tuple[bool, bool]:
        for function in known:
            function.cache_clear()
        return utils.is_flash_attn_2_available(), utils.is_flash_attn_3_available()

    assert found() == (False, False)
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    for name in vars(flash).keys() & {
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_pad_fn",
        "_unpad_fn",
    }:
        monkeypatch.setattr(flash, name, None)
    q, k, v = random(2, 5, HEADS, WIDTH), random(2, 5, 2, WIDTH, seed=1), random(2, 5, 2, WIDTH, seed=2)
    tokens = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with flash_attn.install():
        assert found() == (True, False)
        options = {"query_length": 5, "is_causal": True, "sliding_window": 3, "softcap": 1.5}
        out = flash._flash_attention_forward(q, k, v, tokens, **options, attn_implementation="flash_attention_2")
        for b, start in enumerate((0, 2)):
            wanted = eager(q[b, start:], k[b, start:], v[b, start:], causal=True, window_size=(2, 0), softcap=1.5)[0]
            torch.testing.assert_close(out[b, start:], wanted)
    with flash_attn.install(flash_attn_3=True):
        assert found() == (True, True)
    assert found() == (False, False)


EXAMPLE = Path(__file__).parents[2] / "examples" / "flash_attn_program.py"


def test_the_example_generates_what_it_would_read() -> None:
    with flash_attn.install():
        program = runpy.run_path(str(EXAMPLE))
    model = program["Model"]().eval()
    tokens = program["examples"](3)[0][:, :5]
    found = model.generate(tokens)
    for _ in range(found.shape[1]):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens[:, 5:])


SPAWNING = """
import multiprocessing, sys
from flash_attn import __version__

def told(depth):
    if depth == 0:
        return __version__, sys.argv[1:], __file__
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(told, (depth - 1,))

if __name__ == "__main__":
    print(told(0) == told(1), told(1))
"""


def test_a_program_is_found_by_what_it_spawns(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SPAWNING)
    command = [sys.executable, "-m", "cufa.flash_attn", program.name, "more"]
    places = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(Path(cufa.__file__).parents[1])}}
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, **places)
    assert run.stdout == f"True ('2.8.3', ['more'], {str(program)!r})\n"
    assert [each.name for each in tmp_path.iterdir()] == [program.name]  # and no bytecode is left


def test_a_program_runs_as_it_is(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cufa.flash_attn", str(EXAMPLE), "--steps", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert re.fullmatch(r"step 1: loss \d\.\d+\n\d+ of 100 sequences of 4 digits are sorted\n", run.stdout)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([*command[:3], str(tmp_path / "none.py")], capture_output=True, timeout=300, check=True)
    assert "usage" in subprocess.run(command[:3], capture_output=True, text=True, timeout=300).stderr
