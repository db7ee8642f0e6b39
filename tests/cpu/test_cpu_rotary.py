"""Rotary embedding on the CPU: the specification, and what it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from rotary import Call, calls

import cufa


@settings(max_examples=150)
@given(call=calls(("float16", "bfloat16", "float32", "float64")))
def test_rotary_equals_reference(call: Call) -> None:
    call.check(call.run())


@settings(max_examples=50)
@given(call=calls(("float64",)))
def test_turning_back(call: Call) -> None:
    host = call.host()
    turned = cufa.rotary(**({"k": None} | host), interleaved=call.interleaved)
    names = [name for name in "qk" if name in host]
    turned = dict(zip(names, turned if len(names) > 1 else (turned,), strict=True))
    again = cufa.rotary(**({"k": None} | host | turned), interleaved=call.interleaved, inverse=True)
    for name, found in zip(names, again if len(names) > 1 else (again,), strict=True):
        np.testing.assert_allclose(found, host[name], atol=1e-14)


def test_scores_depend_on_distances_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 32))
    angles = np.arange(60)[:, None] * 0.3 ** np.arange(16)
    for interleaved in (False, True):
        scores = []
        for shift in (0, 7, 40):
            at = [np.array([position + shift], np.int32) for position in (3, 11)]
            table = np.cos(angles), np.sin(angles)
            one, other = (
                cufa.rotary(x, None, *table, offsets=where, interleaved=interleaved)
                for x, where in zip((q, k), at, strict=True)
            )
            scores.append(float((one * other).sum()))
        assert max(scores) - min(scores) < 1e-12 and abs(scores[0] - float((q * k).sum())) > 0.1


def test_the_layouts_of_pairs_are_permutations_of_each_other() -> None:
    call = Call(head_dim=20, rotary_dim=12, dtype="float64")
    host = call.host()
    halves = np.concatenate([np.arange(0, 12, 2), np.arange(1, 12, 2), np.arange(12, 20)])
    one = cufa.rotary(host["q"], None, host["cos"], host["sin"])[..., halves]
    other = cufa.rotary(host["q"][..., halves], None, host["cos"], host["sin"], interleaved=False)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("places", ["positions", "offsets"])
def test_sequences_are_turned_alike_wherever_they_lie(places: str) -> None:
    """Packed, by positions of their own or by those that follow from cu_seqlens."""
    call = Call(batch=3, seqlen=5, places=places)
    host = call.host()
    dense = cufa.rotary(**host)
    packed = {name: x.reshape(15, *x.shape[2:]) if name in "qk" else x for name, x in host.items()}
    if places == "positions":
        packed["positions"] = host["positions"].ravel()
    else:
        packed["cu_seqlens"] = np.arange(0, 16, 5, dtype=np.int32)
    for one, other in zip(dense, cufa.rotary(**packed), strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)


HOST = Call().host()
WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"cos": None}, TypeError, "cos is None; pass an array"),
    ({"q": None}, TypeError, "q is a NoneType, not an array"),
    ({"k": HOST["k"][:, 1:]}, ValueError, "k has shape .* but q has .*; all but num_heads must agree"),
    ({"k": HOST["k"].astype(np.float16)}, ValueError, "k has dtype float16 but q has float32; q and k must agree"),
    ({"q": HOST["q"][0, 0], "k": None}, ValueError, r"q has shape \(4, 16\); \(batch, seqlen, num_heads, head_dim\)"),
    ({"cos": HOST["cos"][:, 0]}, ValueError, r"cos has shape \(16,\); \(max_position, rotary_dim / 2\) is expected"),
    ({"cos": np.ones((16, 9), np.float32)}, ValueError, "cos has shape .* with a rotary_dim from 2 to head_dim"),
    ({"sin": HOST["sin"][1:]}, ValueError, r"cos is float32 \(16, 8\) but sin is float32 \(15, 8\)"),
    ({"sin": HOST["sin"].astype(np.float64)}, ValueError, "sin has dtype float64; pass float32"),
    ({"cos": HOST["cos"][:4], "sin": HOST["sin"][:4]}, ValueError, "cos has 4 positions, and sequences 9 rows"),
    ({"offsets": np.array([0, 8], np.int32)}, ValueError, "rows have positions from offsets on from 0 to 16, but cos"),
    ({"offsets": np.array([-1, 0], np.int32)}, ValueError, "rows have positions from offsets on from -1 to"),
    ({"offsets": np.array([0], np.int32)}, ValueError, r"offsets has shape \(1,\); \(2,\), that is \(batch,\)"),
    (
        {"positions": np.full((2, 9), 16, np.int32)},
        ValueError,
        "positions from 16 to 16, but cos has those from 0",
    ),
    ({"positions": np.zeros((2, 9))}, ValueError, "positions has dtype float64; pass int32"),
    ({"positions": np.zeros((2, 8), np.int32)}, ValueError, r"positions has shape \(2, 8\); \(2, 9\), that is"),
    (
        {"positions": np.zeros((2, 9), np.int32), "offsets": np.zeros(2, np.int32)},
        TypeError,
        "positions and offsets are given",
    ),
    ({"cu_seqlens": np.zeros(2, np.int32)}, TypeError, "cu_seqlens is given, but sequences lie along an axis"),
    ({"q_out": HOST["q"]}, ValueError, "q_out overlaps q"),
    ({"k_out": np.empty_like(HOST["q"])}, ValueError, "k_out has shape"),
    ({"interleaved": 1}, TypeError, "interleaved is a int; pass True or False"),
)


@pytest.mark.parametrize(("changed", "kind", "message"), WRONG, ids=[each[2][:30] for each in WRONG])
def test_what_is_wrong_is_said(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^rotary: {message}"):
        cufa.rotary(**(HOST | changed))


def test_offsets_of_packed_sequences_are_checked() -> None:
    host = Call(packed=True, places="cu_seqlens").host()
    for bad in ([0, 5, 3, 9], [1, 5, 9], [0, 10]):
        with pytest.raises(ValueError, match=r"^rotary: cu_seqlens "):
            cufa.rotary(**(host | {"cu_seqlens": np.array(bad, np.int32)}))
    with pytest.raises(TypeError, match="k_out is given, but no k"):
        cufa.rotary(**(host | {"k": None, "k_out": np.empty_like(host["k"])}))


def test_rows_of_no_sequence_stay_as_they_are() -> None:
    host = replace(Call(packed=True, places="cu_seqlens", seqlen=12)).host()
    host["cu_seqlens"] = np.array([0, 5, 5, 8, 0], np.int32)
    q_out, _ = cufa.rotary(**host)
    np.testing.assert_array_equal(q_out[8:], host["q"][8:])
    assert (q_out[6:8] != host["q"][6:8]).any(axis=(1, 2)).all() and (q_out[5] == q_out[5]).all()
