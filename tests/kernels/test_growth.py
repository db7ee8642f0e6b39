"""A kernel and an operation are added from a directory outside the package, by the rows of README's table."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from test_problem import Launched, OnGpu, unpacked

import cufa
from cufa import reference
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._kernels import choose
from cufa._operations.call import call
from cufa._operations.forward import ATTENTION, FORWARD
from cufa.testing import to_numpy

HEADER = """\
// attention: the log-sum-exp of scores alone, one row per thread.
#pragma once

#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/variant.cuh"
#include "core/math.cuh"

namespace attention {

template <class Config>
inline void naive_lse(const Params& params) {
  using Mask = typename Config::mask;
  const i64 number = i64(blockIdx.x) * Config::num_threads + threadIdx.x;
  const int heads = params.num_heads_q;
  if (number >= i64(params.batch) * heads * params.seqlen_q) return;
  const int row = int(number % params.seqlen_q), head = int(number / params.seqlen_q % heads);
  const int batch = int(number / params.seqlen_q / heads);
  const Seqlen seqlen = dense_seqlen(params);
  const typename Config::variant variant(params, batch, head);
  const float* const q = static_cast<const float*>(params.q) + batch * params.q_strides.batch +
                         head * params.q_strides.head + row * params.q_strides.seqlen;
  float largest = -infinity, sum = 0.0f;
  for (int key = Mask::first_key(params, seqlen, row); key <= Mask::last_key(params, seqlen, row); ++key) {
    const float* const k = static_cast<const float*>(params.k) + batch * params.k_strides.batch +
                           head / params.qheads_per_khead * params.k_strides.head + key * params.k_strides.seqlen;
    float score = 0.0f;
    for (int i = 0; i < Config::head_dim; ++i) score += q[i * params.q_strides.dim] * k[i * params.k_strides.dim];
    const Point at{batch, head, row, key, float(row + seqlen.diagonal() - key)};
    score = variant.score(score * params.softmax_scale, at);
    const float higher = score > largest ? score : largest;
    sum = sum * expf(largest - higher) + expf(score - higher);
    largest = higher;
  }
  params.lse[number] = largest + logf(sum);
}

}  // namespace attention
"""

MODULE = '''\
"""The log-sum-exp of scores alone: a kernel and an operation."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cufa._call.problem import of_attention
from cufa._cpu import forward as _cpu
from cufa._kernels.kernel import Config, Kernel, common
from cufa._kernels.params import params_of
from cufa._operations.forward import ATTENTION, FORWARD
from cufa._terms import TERMS
from cufa._operations.operation import Operation
from cufa._terms import TERMS


@dataclass(frozen=True, kw_only=True)
class NaiveConfig(Config):
    """Nothing but what every kernel has."""


class NaiveGrid(NamedTuple):
    blocks: tuple


class NaiveLse(Kernel):
    name = "attention_naive_lse"
    record = "Params"
    headers = {"attention/naive_lse.cuh": (Path(__file__).parent / "naive_lse.cuh").read_text()}

    def refusal(self, static):
        if static.element != "f32":
            return "it reads float32 alone"
        return "it knows no packed sequences and no sinks" if static.varlen or static.sinks else ""

    def reason(self, static, arch):
        return "there is no other"

    def config(self, static, arch):
        return NaiveConfig(
            **common(static), tile_head_dim=0, tile_head_dim_v=0, block_m=128, block_n=1, num_threads=128, smem_bytes=0
        )

    def grid(self, config, problem, num_sms):
        return NaiveGrid((-(-problem.batch * problem.num_heads_q * problem.seqlen_q // config.num_threads),))

    def values(self, config, problem, grid):
        return params_of(problem, m_blocks=grid.blocks[0], heads_per_section=1)


def check(operation, specs, options):
    if options.return_lse:
        raise ValueError(f"{operation.name}: lse is all that it gives; leave return_lse out.")
    return of_attention(operation, specs, options)


def on_cpu(problem, arrays, results):
    q, k, v = (arrays[name] for name in "qkv")
    out = v[:, :1, :1].repeat(q.shape[1], axis=1).repeat(q.shape[2], axis=2)
    _cpu.forward(q, k, v, out, results["lse"], **problem.scoring(arrays))


LSE = Operation(
    name="attention_lse",
    arrays=ATTENTION.arrays,
    written=(),
    tiles=(),
    terms=TERMS,
    results=lambda problem: (problem.operation.result("lse", problem.lse_shape, problem.lse_dtype),),
    kernels=(NaiveLse(),),
    on_cpu=on_cpu,
    check=check,
)
'''


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the operation, found in a directory of its own."""
    folder = tmp_path_factory.mktemp("added")
    (folder / "naive_lse.cuh").write_text(HEADER)
    (folder / "naive_lse.py").write_text(MODULE)
    spec = importlib.util.spec_from_file_location("naive_lse", folder / "naive_lse.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["naive_lse"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["naive_lse"]


def given(xp: Any = np, **more: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Arrays and options of a call, and the arguments of the reference."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 50, 4, 24), dtype=np.float32), rng.standard_normal((2, 70, 2, 24), dtype=np.float32)
    slopes = rng.uniform(0, 0.5, 4).astype(np.float32)
    options = {"causal": True, "window_size": None, "softmax_scale": None, "softcap": 5.0} | more
    arrays = tuple(None if x is None else xp.asarray(x) for x in (q, k, k, slopes, None, None))
    right = {"q": q, "k": k, "v": k, "alibi_slopes": slopes, **options}
    return arrays, (*options.values(), False, False), right


def check(found: Any, right: dict[str, Any]) -> None:
    _, lse = reference.attention(**right, return_lse=True)
    assert found.shape == lse.shape and np.abs(lse).max() > 1
    np.testing.assert_allclose(to_numpy(found), lse, rtol=1e-5, atol=1e-5)


def test_an_operation_computes_on_the_cpu_and_is_checked(added: Any) -> None:
    arrays, options, right = given()
    check(call(added.LSE, arrays, options), right)
    with pytest.raises(ValueError, match=r"^attention_lse: v has seqlen 69 but k has 70"):
        call(added.LSE, (*arrays[:2], arrays[2][:, :69], *arrays[3:]), options)
    with pytest.raises(TypeError, match=r"^attention_lse: causal is a str"):
        call(added.LSE, arrays, ("yes", *options[1:]))
    with pytest.raises(ValueError, match=r"^attention_lse: lse is all that it gives"):
        call(added.LSE, arrays, (*options[:4], True, False))


def test_an_operation_serves_jax_under_jit(added: Any) -> None:
    jax = pytest.importorskip("jax")
    arrays, options, right = given(jax.numpy)
    found = jax.jit(lambda q, k, v, slopes: call(added.LSE, (q, k, v, slopes, None, None), options))(*arrays[:4])
    check(found, right)


def test_a_kernel_compiles_from_its_own_header(added: Any) -> None:
    static = _problem.Static("f32", 24, 24, "causal", plans.ALL_TERMS, False, False, 16, 16, False, False)
    plan = choose(added.LSE.kernels, static, 90)
    assert plan.words() == "attention_naive_lse (f32, head_dim 24, causal, softcap, alibi) for sm_90"
    unit = _jit.unit_of(plan)
    assert _jit.compile_unit(unit).cubin[:4] == b"\x7fELF"
    assert _jit.key_of(unit) != _jit.key_of(unit._replace(headers=unit.headers | {"attention/naive_lse.cuh": b""}))


def test_an_operation_is_launched_on_a_pretended_gpu(added: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = OnGpu(2, 50, 4, 24, dtype="float32"), OnGpu(2, 70, 2, 24, dtype="float32", pointer=1 << 44)
    with monkeypatch.context() as patch:
        launched = Launched(patch)
        lse = call(added.LSE, (q, k, k, None, None, None), (True, None, None, 0.0, False, False))
        ((entry, argument),) = launched.kernels
        assert (entry, launched.allocated) == ("attention_naive_lse", [(lse.shape, "float32")])
        named = unpacked("Params", argument)
        assert [named[name] for name in ("q", "k", "v", "lse", "out")] == [*(x.pointer for x in (q, k, k, lse)), 0]
    _problem._checked.cache_clear()


def test_kernels_are_asked_in_their_order(added: Any) -> None:
    """And say why they do not serve."""
    static = _problem.Static("bf16", 64, 64, "none", (), False, False, 16, 16, True, False)
    plan = choose((*added.LSE.kernels, *FORWARD), static, 90)
    assert plan.name == "attention_forward_sm90"
    assert plan.refusals[0] == ("attention_naive_lse", "it reads float32 alone")
    assert plan.reason == "it reads float32 alone"
    special = ("cluster_sm90", "split_sm80", "packed_sm90", "listed_sm90")
    assert [name for name, _ in plan.refusals[1:]] == [f"attention_forward_{name}" for name in special]
    with pytest.raises(cufa.UnsupportedError, match="no kernel serves: attention_naive_lse: it reads float32 alone"):
        choose(added.LSE.kernels, static, 80)
    assert choose((*added.LSE.kernels, *FORWARD), static._replace(element="f32"), 90).name == "attention_naive_lse"


@pytest.mark.gpu
def test_an_operation_runs_on_a_gpu(added: Any) -> None:
    cupy = pytest.importorskip("cupy")
    arrays, options, right = given(cupy)
    check(call(added.LSE, arrays, options), right)
    arrays, options, right = given(cupy, window_size=(20, 5), causal=False)
    check(call(added.LSE, arrays, options), right)
    with pytest.raises(cufa.UnsupportedError, match="it reads float32 alone"):
        call(added.LSE, (*(x.astype(np.float16) for x in arrays[:3]), *arrays[3:]), options)


def test_the_package_knows_nothing_of_them(added: Any) -> None:
    root = Path(cufa.__file__).parents[1]
    assert all("naive_lse" not in path.read_text() for path in (root / "cufa").rglob("*.py"))
    assert ATTENTION.kernels == FORWARD and "attention/naive_lse.cuh" not in _jit.headers()
