"""A mask whose blocks are a list is added from a directory outside the package, by a row of `MASKS`."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import plans
import pytest
import sass
from sampling import paired, sampled

from cufa._compile import jit as _jit
from cufa._kernels import Kernel, choose, kernel
from cufa._operations.backward import ATTENTION_BACKWARD, BACKWARD
from cufa._operations.call import call
from cufa._operations.forward import ATTENTION, FORWARD
from cufa._terms.alibi import Alibi
from cufa.testing import to_numpy

HEADER = """\
// attention: a mask of stripes of 128 positions. A query sees the keys up to its own position that are of its stripe or
// of every other stripe before that; the queries of stripe 2 see no key.
#pragma once

#include "attention/masks.cuh"
#include "core/types.cuh"
#include "ptx/opaque.cuh"

namespace attention {

inline constexpr int stripe = 128, blind_stripe = 2, longest = 1024;

// Which blocks of keys each tile of queries needs, and which tiles each block does: entries as BlockList wants them.
template <int block_m, int block_n>
struct StripedBlocks {
  static_assert(stripe % block_m == 0 && stripe % block_n == 0, "a block is of one stripe");
  static constexpr int tiles = longest / block_m, blocks = longest / block_n;

  i32 keys[tiles][blocks] = {}, queries[blocks][tiles] = {};
  i32 keys_count[tiles] = {}, queries_count[blocks] = {};

  constexpr StripedBlocks() {
    for (int m = 0; m < tiles; ++m) {
      for (int n = 0; n < blocks; ++n) {
        const int first_query = m * block_m, first_key = n * block_n, last_key = first_key + block_n - 1;
        if (first_query / stripe == blind_stripe || first_key >= first_query + block_m) continue;
        if ((first_query / stripe - first_key / stripe) % 2 != 0) continue;
        const bool all = last_key <= first_query;
        keys[m][keys_count[m]++] = 2 * n + all;
        queries[n][queries_count[n]++] = 2 * m + all;
      }
    }
  }
};

// They are told to be opaque: whoever finds work has no registers to hold their addresses in.
template <int block_m, int block_n>
__device__ constexpr StripedBlocks<block_m, block_n> striped_blocks{};

struct StripesMask : CausalMask {
  using Blocks = BlockList;
  using Tiles = BlockList;

  static constexpr int last_key(const Params& params, const Seqlen& seqlen, int row) {
    return row / stripe == blind_stripe ? -1 : CausalMask::last_key(params, seqlen, row);
  }

  template <class Config>
  static Blocks key_blocks(const Params&, int, int, int m_block) {
    const auto& all = ptx::opaque(striped_blocks<Config::block_m, Config::block_n>);
    return {all.keys[m_block], 0, all.keys_count[m_block], 0};
  }

  template <class Config>
  static Tiles query_tiles(const Params&, int, int, int n_block) {
    const auto& all = ptx::opaque(striped_blocks<Config::block_m, Config::block_n>);
    return {all.queries[n_block], 0, all.queries_count[n_block], 0};
  }
};

}  // namespace attention
"""
NAME = "stripes"
STRIPE, BLIND_STRIPE = 128, 2


def masked(base: Kernel, header: str) -> Kernel:
    """A kernel of the package for problems that have the mask. Its tiles divide a stripe."""

    def config(self: Any, static: Any, arch: int) -> Any:
        return type(base).config(self, static._replace(mask=NAME, short=True, empty_rows=True), arch)

    members = {"config": config, "headers": {f"attention/{NAME}.cuh": header}}
    made: Kernel = types.new_class(
        f"Striped{type(base).__name__}", (type(base),), {}, lambda body: body.update(members)
    )()
    return made


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("added") / f"{NAME}.cuh"
    path.write_text(HEADER)
    return path.read_text()


@pytest.fixture
def kernels(header: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[tuple[Kernel, ...], tuple[Kernel, ...]]]:
    """Those of the forward and of the gradients, where the mask has its row."""
    row = kernel.Mask(NAME, f"attention/{NAME}.cuh", "attention::StripesMask", lists=True)
    monkeypatch.setattr(kernel, "MASKS", (*kernel.MASKS, row))
    yield tuple(masked(each, header) for each in FORWARD), tuple(masked(each, header) for each in BACKWARD)


HEAD_DIMS = (96, 256)
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chains": {"chains": True},
    "deterministic": {"deterministic": True},
    "slopes": {"terms": (Alibi(),)},
}


KINDS = ("forward", 80), ("forward", 90), ("backward", 90), ("backward", 80)


@pytest.mark.parametrize(("kind", "changed"), sampled(paired(KINDS, paired(CHANGES, HEAD_DIMS))), ids=str)
def test_it_compiles_into_every_kernel(kernels: Any, kind: tuple[str, int], changed: tuple[str, int]) -> None:
    (way, arch), (changes, head_dim) = kind, changed
    gradient = way == "backward"
    plan = choose(kernels[gradient], plans.static("f16", head_dim, head_dim)._replace(**CHANGES[changes]), arch)
    assert NAME in plan.words() and ("sm90" in plan.name) == (arch == 90)
    compiled = plans.compile_plan(plan)
    assert _jit.resources_of(compiled.log).spill_bytes == 0, compiled.log
    assert "C75" not in compiled.log
    for instructions in sass.disassemble(compiled.cubin).values():
        assert not sass.wgmma_hazards(instructions)


def sees(queries: int, keys: int) -> Any:
    """Which query sees which key."""
    query, key = np.arange(queries)[:, None], np.arange(keys)
    return (key <= query) & ((query // STRIPE - key // STRIPE) % 2 == 0) & (query // STRIPE != BLIND_STRIPE)


@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_its_lists_say_what_queries_see(block_m: int, block_n: int) -> None:
    longest = 1024
    tiles, blocks = longest // block_m, longest // block_n
    seen = sees(longest, longest).reshape(tiles, block_m, blocks, block_n)
    kinds = seen.any((1, 3)) + seen.all((1, 3)).astype(int)
    check = """
    template <int block_m, int block_n, int tiles, int blocks>
    constexpr bool right(const int (&kinds)[tiles][blocks]) {
      const attention::StripedBlocks<block_m, block_n> all;
      int queries_count[blocks] = {};
      for (int m = 0; m < tiles; ++m) {
        int keys_count = 0;
        for (int n = 0; n < blocks; ++n) {
          if (kinds[m][n] == 0) continue;
          if (all.keys[m][keys_count++] != 2 * n + kinds[m][n] - 1) return false;
          if (all.queries[n][queries_count[n]++] != 2 * m + kinds[m][n] - 1) return false;
        }
        if (all.keys_count[m] != keys_count) return false;
      }
      for (int n = 0; n < blocks; ++n) {
        if (all.queries_count[n] != queries_count[n]) return false;
      }
      return true;
    }
    """
    rows = ", ".join(f"{{{', '.join(map(str, row))}}}" for row in kinds.tolist())
    claim = f"right<{block_m}, {block_n}, {tiles}, {blocks}>({{{rows}}})"
    source = f'{HEADER.replace("#pragma once", "")}\n{check}\nstatic_assert({claim}, "");\n'
    _jit.compile_source(source, _jit.options_of(80), "stripes")


def expected(q: Any, k: Any, v: Any, dout: Any) -> dict[str, Any]:
    """Attention and its gradients in float64."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat(shared, axis=2) for x in (k, v))
    seen = sees(q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5
    scores = np.where(seen, scale * np.einsum("bqhd,bkhd->bhqk", q, k), -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    p = np.where(seen, np.exp(scores - np.where(seen.any(-1), lse, 0.0)[..., None]), 0.0)
    dp = np.einsum("bqhd,bkhd->bhqk", dout, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))

    def summed(x: Any) -> Any:
        return x.reshape(*x.shape[:2], -1, shared, x.shape[-1]).sum(3)

    return {
        "out": np.einsum("bhqk,bkhd->bqhd", p, v),
        "lse": lse,
        "dq": scale * np.einsum("bhqk,bkhd->bqhd", ds, k),
        "dk": summed(scale * np.einsum("bhqk,bqhd->bkhd", ds, q)),
        "dv": summed(np.einsum("bhqk,bqhd->bkhd", p, dout)),
    }


def test_what_is_expected_of_the_mask() -> None:
    """`expected` gives derivatives: of each array's first row, by differences."""
    rng = np.random.default_rng(1)
    given = [rng.standard_normal((1, 300, heads, 4)) for heads in (2, 1, 1, 2)]
    right = expected(*given)
    for index, name in enumerate("qkv"):
        step = np.zeros_like(given[index])
        step[0, 0, 0, 1] = 1e-5
        high, low = (expected(*(x + sign * step * (x is given[index]) for x in given))["out"] for sign in (1, -1))
        assert np.isclose(((high - low) * given[3]).sum() / 2e-5, right[f"d{name}"][0, 0, 0, 1], rtol=1e-6, atol=1e-9)
    assert np.isneginf(right["lse"][0, 0, 256:300]).all() and np.isfinite(right["lse"][0, 0, :256]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [True, False], ids=["maps", "no maps"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqlen", [128, 700, 1024])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_it_is_right_on_a_gpu(kernels: Any, head_dim: int, seqlen: int, deterministic: bool, tma: bool) -> None:
    cupy = pytest.importorskip("cupy")
    forward = dataclasses.replace(ATTENTION, kernels=kernels[False] if tma else kernels[False][-1:])
    backward = dataclasses.replace(ATTENTION_BACKWARD, kernels=kernels[True] if tma else kernels[True][-1:])
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, seqlen, heads, head_dim)).astype(np.float16) for heads in (4, 2, 2, 4))
    right = expected(q, k, v, dout)
    q, k, v, dout = map(cupy.asarray, (q, k, v, dout))
    options = (False, None, None, 0.0, True, deterministic)
    out, lse = call(forward, (q, k, v, None, None, None), options)
    beside = (dout, lse, None, None, None, None)
    dq, dk, dv = call(backward, (q, k, v, None, None, out, *beside), (*options[:4], False, deterministic))
    for name, found in {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items():
        largest = np.abs(right[name][np.isfinite(right[name])]).max()
        np.testing.assert_allclose(to_numpy(found), right[name], rtol=2e-3, atol=2e-3 * largest, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_what_it_hides_is_not_read_on_a_gpu(kernels: Any, head_dim: int) -> None:
    """Rows that are made again read no key of a block that is not listed, whatever it holds."""
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 512, 2, head_dim)).astype(np.float16) for _ in range(4))
    right = expected(q, k, v, dout)
    v[:, 200] = np.nan  # of stripe 1: queries of stripe 3 see it, and those of its own from 200 on
    k[:, 300] = np.nan  # of stripe 2: nobody sees it
    q, k, v, dout = map(cupy.asarray, (q, k, v, dout))
    operation = dataclasses.replace(ATTENTION, kernels=kernels[False])
    out = to_numpy(call(operation, (q, k, v, None, None, None), (False, None, None, 0.0, False, False)))
    blind = np.zeros(512, bool)
    blind[200:256] = blind[384:] = True
    assert np.isnan(out[:, blind]).all()
    np.testing.assert_allclose(out[:, ~blind], right["out"][:, ~blind], rtol=2e-3, atol=2e-3)
