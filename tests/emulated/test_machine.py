"""The machine that runs kernels: instructions do what the PTX ISA says, and what kernels must not do is seen."""

from __future__ import annotations

import doctest
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cufa
import emulated
from cufa._compile import jit as _jit
from cufa._operations.forward import ATTENTION
from cufa.testing import Case, assert_close
from emulated import EmulationError, Function, Gpu, Launched, Program, build, gpu

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

SOURCE = """
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/fma.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/movmatrix.cuh"
#include "ptx/red.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"
#include "ptx/sync.cuh"
#include "ptx/thread.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

struct Arguments {
  u32* x;
  u32* y;
};

#define KERNEL(name) extern "C" __global__ void name(const __grid_constant__ Arguments arguments)
#define X arguments.x
#define Y arguments.y

inline u32 dynamic() {
  extern __shared__ __align__(1024) char memory[];
  return ptx::shared_address(memory);
}

// --- instructions ---

KERNEL(convert) {  // X: a float per thread
  const float x = __uint_as_float(X[threadIdx.x + blockIdx.x * blockDim.x]);
  u32* const y = Y + 4 * (threadIdx.x + blockIdx.x * blockDim.x);
  y[0] = ptx::cvt_rn_x2<f16>(x, -x);
  y[1] = ptx::cvt_rn_x2<bf16>(x, -x);
  y[2] = __float_as_uint(ptx::cvt_f32(f16{u16(blockIdx.x * blockDim.x + threadIdx.x)}));
  y[3] = __float_as_uint(ptx::cvt_f32_x2<bf16>((blockIdx.x * blockDim.x + threadIdx.x) << 16).y);
}

KERNEL(convert_e4m3) {  // X: a float per thread
  const u32 index = threadIdx.x + blockIdx.x * blockDim.x, byte = index & 0xff;
  const uint2 wide = ptx::cvt_f16_x4(byte | (byte ^ 0x80) << 8 | (byte ^ 1) << 16 | (byte ^ 2) << 24);
  u32* const y = Y + 4 * index;
  y[0] = ptx::cvt_rn_satfinite_e4m3(__uint_as_float(X[index])).bits;
  y[1] = wide.x;
  y[2] = wide.y;
  y[3] = __float_as_uint(ptx::cvt_f32(e4m3{u8(byte)}));
}

// X: 16 x 16 elements of A, then 16 x 8 of B, both by rows; Y: 16 x 8 of D, to which the product is added.
template <class element>
inline void multiply(const Arguments& arguments) {
  const u32 lane = ptx::laneid(), smem = dynamic();
  for (int i = 0; i < 6; ++i) ptx::st_shared_u32(smem + 4 * (lane + 32 * i), X[lane + 32 * i]);
  __syncwarp();
  u32 a[4], b[4];
  ptx::ldmatrix_x4(a, smem + lane % 16 * 32 + lane / 16 * 16);
  ptx::ldmatrix_x4_trans(b, smem + 512 + lane % 16 * 16);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(Y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2]);
  ptx::mma_m16n8k16<element>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) Y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = __float_as_uint(d[i]);
}

KERNEL(multiply_f16) { multiply<f16>(arguments); }
KERNEL(multiply_bf16) { multiply<bf16>(arguments); }

KERNEL(multiply_tf32) {  // 16 x 8 of A, 8 x 8 of B
  const u32 g = ptx::laneid() / 4, q = ptx::laneid() % 4;
  const u32 a[4] = {X[8 * g + q], X[8 * (g + 8) + q], X[8 * g + q + 4], X[8 * (g + 8) + q + 4]};
  float d[4] = {};
  ptx::mma_m16n8k8_tf32(d, a, X[128 + 8 * q + g], X[128 + 8 * (q + 4) + g]);
  for (int i = 0; i < 4; ++i) Y[(g + i / 2 * 8) * 8 + q * 2 + i % 2] = __float_as_uint(d[i]);
}

KERNEL(matrices) {  // there and back: Y becomes X
  const u32 lane = ptx::laneid(), at = dynamic() + 16 * lane;
  ptx::st_shared_v4(at, reinterpret_cast<const uint4*>(X)[lane]);
  __syncwarp();
  u32 r[4];
  ptx::ldmatrix_x4(r, at);
  __syncwarp();
  ptx::stmatrix_x4(at, r);
  __syncwarp();
  reinterpret_cast<uint4*>(Y)[lane] = ptx::ld_shared_v4(at);
}

KERNEL(turned) { Y[ptx::laneid()] = ptx::movmatrix_trans(X[ptx::laneid()]); }

KERNEL(warp) {
  const u32 lane = ptx::laneid(), all = 0xffffffffu, x = X[lane];
  const u32 results[] = {__shfl_sync(all, x, 7),          __shfl_xor_sync(all, x, 5),
                         __shfl_up_sync(all, x, 3),       __shfl_down_sync(all, x, 4),
                         __shfl_sync(all, x, 9, 8),       __ballot_sync(all, x & 1),
                         u32(__any_sync(all, x == X[3])), u32(__all_sync(all, x != 0)),
                         __reduce_max_sync(all, x),       u32(__reduce_max_sync(all, int(x))),
                         u32(__syncthreads_or(x == X[3]))};
  for (int i = 0; i < 11; ++i) Y[32 * i + lane] = results[i];
}

KERNEL(copy) {  // the first 10 bytes of 16 by each thread, and zeros
  const u32 to = dynamic() + 16 * threadIdx.x;
  ptx::cp_async<16>(to, X + 4 * threadIdx.x, 10);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  reinterpret_cast<uint4*>(Y)[threadIdx.x] = ptx::ld_shared_v4(to);
}

KERNEL(neighbours) {
  __shared__ u32 held[64], sum;
  held[threadIdx.x] = X[threadIdx.x];
  __syncthreads();
  Y[threadIdx.x] = held[threadIdx.x ^ 63];
  if (threadIdx.x == 63) sum = held[0] + held[63];
  ptx::bar_sync(1, 64);
  if (threadIdx.x == 0) Y[0] = sum;
}

KERNEL(unwritten) {
  __shared__ float x;
  Y[threadIdx.x] = x != x;
}

KERNEL(in_turn) {  // blocks add to Y[0] one after the other, the last first
  if (threadIdx.x == 0) {
    while (ptx::ld_acquire_gpu(reinterpret_cast<i32*>(Y + 1)) != int(gridDim.x - 1 - blockIdx.x)) {
    }
    Y[0] = Y[0] * 2 + blockIdx.x;
    ptx::red_release_gpu_add(reinterpret_cast<i32*>(Y + 1), 1);
  }
}

KERNEL(last) {  // which block comes last
  __syncthreads();
  if (threadIdx.x == 0 && ptx::atom_acq_rel_gpu_add(reinterpret_cast<i32*>(Y + 1), 1) == int(gridDim.x) - 1) {
    Y[0] = blockIdx.x;
  }
}

KERNEL(side_by_side) {  // threads whose elements share words have nothing to do with each other
  __shared__ u16 held[64];
  u16* const y = reinterpret_cast<u16*>(Y);
  held[threadIdx.x] = u16(X[threadIdx.x]);
  y[threadIdx.x] = held[threadIdx.x];
  y[threadIdx.x] += 1;
}

// The last block that comes adds up what all have written.
inline void add_up(const Arguments& arguments, bool tells_late) {
  __shared__ bool comes_last;
  u32* const parts = Y + 8;
  parts[blockIdx.x * blockDim.x + threadIdx.x] = X[threadIdx.x];
  if (tells_late) __syncthreads();
  if (threadIdx.x == 0) {
    comes_last = ptx::atom_acq_rel_gpu_add(reinterpret_cast<i32*>(Y + 1), 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (comes_last) {
    u32 sum = 0;
    for (int block = 0; block < gridDim.x; ++block) sum += parts[block * blockDim.x + (threadIdx.x + 1) % blockDim.x];
    if (threadIdx.x == 0) Y[0] = sum;
  }
}

KERNEL(adds_up) { add_up(arguments, true); }

// --- Hopper's ---

inline void wait(u32 barrier, u32 parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// A barrier of one arrival behind the first 2048 bytes, of which all threads know.
inline u32 made_barrier() {
  const u32 barrier = dynamic() + 2048;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return barrier;
}

KERNEL(bulk) {  // X to shared memory and from there to Y, and once more added to it
  const u32 barrier = made_barrier();
  if (threadIdx.x != 0) return;
  ptx::mbarrier_arrive_expect_tx(barrier, 256);
  ptx::cp_async_bulk(dynamic(), X, 128, barrier);
  ptx::cp_async_bulk(dynamic() + 128, X + 32, 128, barrier);
  wait(barrier, 0);
  ptx::cp_async_bulk_store(Y, dynamic(), 256);
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group<0>();
  ptx::cp_reduce_async_bulk_add_f32(reinterpret_cast<float*>(Y), dynamic(), 256);
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group_read<0>();
}

KERNEL(ring) {  // one warp gives numbers to another, which adds them up
  const u32 full = made_barrier(), empty = full + 8, at = dynamic() + 4 * ptx::laneid();
  if (threadIdx.x == 0) ptx::mbarrier_init(empty, 32);
  __syncthreads();
  u32 sum = 0;
  for (u32 i = 0; i < 5; ++i) {
    if (threadIdx.x < 32) {
      wait(empty, i % 2 ^ 1);
      ptx::st_shared_u32(at, X[i] + ptx::laneid());
      __syncwarp();
      if (threadIdx.x == 0) ptx::mbarrier_arrive(full);
    } else {
      wait(full, i % 2);
      sum += ptx::ld_shared_u32(at);
      ptx::mbarrier_arrive(empty);
    }
  }
  if (threadIdx.x >= 32) Y[ptx::laneid()] = sum;
}

KERNEL(registers) {
  if (threadIdx.x < 128)
    ptx::setmaxnreg_dec<24>();
  else
    ptx::setmaxnreg_inc<240>();
  Y[threadIdx.x] = 1;
}

// --- faults ---

KERNEL(gives_back_by_taking) { ptx::setmaxnreg_inc<240>(); }

KERNEL(no_such_mbarrier) { ptx::mbarrier_arrive(dynamic()); }

KERNEL(unknown_mbarrier) {
  if (threadIdx.x == 0) ptx::mbarrier_init(dynamic(), 64);
  __syncwarp();
  ptx::mbarrier_arrive(dynamic());
}

KERNEL(too_many_arrive) {
  const u32 barrier = made_barrier();
  ptx::mbarrier_arrive_expect_tx(barrier, 16);
}

KERNEL(writes_an_mbarrier) { ptx::st_shared_u32(made_barrier(), 0); }

KERNEL(no_bytes_come) {
  const u32 barrier = made_barrier();
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(barrier, 16);
  wait(barrier, 0);
}

KERNEL(no_wait_for_bytes) {
  const u32 barrier = made_barrier();
  if (threadIdx.x != 0) return;
  ptx::mbarrier_arrive_expect_tx(barrier, 16);
  ptx::cp_async_bulk(dynamic(), X, 16, barrier);
  Y[0] = ptx::ld_shared_u32(dynamic());
}

KERNEL(stores_unfenced) {
  if (threadIdx.x != 0) return;
  for (u32 i = 0; i < 4; ++i) ptx::st_shared_u32(dynamic() + 4 * i, 1);
  ptx::cp_async_bulk_store(Y, dynamic(), 16);
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group<0>();
}

KERNEL(ends_too_early) {
  if (threadIdx.x != 0) return;
  ptx::cp_async_bulk_store(Y, dynamic(), 16);
  ptx::cp_async_bulk_commit_group();
}

KERNEL(overwrites_a_source) {
  if (threadIdx.x != 0) return;
  ptx::cp_async_bulk_store(Y, dynamic(), 16);
  ptx::cp_async_bulk_commit_group();
  ptx::st_shared_u32(dynamic(), 1);
}

KERNEL(tells_too_early) { add_up(arguments, false); }

KERNEL(tells_nothing) {
  if (blockIdx.x == 0)
    Y[threadIdx.x] = 1;
  else
    Y[threadIdx.x + 64] = Y[threadIdx.x];
}

KERNEL(no_barrier) {
  __shared__ u32 held[64];
  held[threadIdx.x] = X[threadIdx.x];
  __syncwarp();
  Y[threadIdx.x] = held[threadIdx.x ^ 32];
}

KERNEL(no_barrier_before_writing) {
  __shared__ u32 held[64];
  held[threadIdx.x] = X[threadIdx.x];
  __syncthreads();
  Y[threadIdx.x] = held[threadIdx.x ^ 32];
  held[threadIdx.x] = 0;
}

KERNEL(no_syncwarp) {
  __shared__ u32 held[32];
  held[threadIdx.x] = X[threadIdx.x];
  __shfl_sync(0xffffffffu, 0, 0);  // orders nothing in memory
  Y[threadIdx.x] = held[threadIdx.x ^ 1];
}

KERNEL(no_wait) {
  ptx::cp_async<16>(dynamic(), X, 16);
  ptx::cp_async_commit_group();
  Y[0] = ptx::ld_shared_u32(dynamic());
}

KERNEL(wait_for_another_group) {
  ptx::cp_async<16>(dynamic(), X, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async<16>(dynamic() + 16, X, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  Y[0] = ptx::ld_shared_u32(dynamic()) + ptx::ld_shared_u32(dynamic() + 16);
}

KERNEL(only_waits) {
  const u32 to = dynamic() + 16 * threadIdx.x;
  ptx::cp_async<16>(to, X, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  Y[threadIdx.x] = ptx::ld_shared_u32(dynamic());
}

KERNEL(reads_behind) { Y[threadIdx.x] = X[threadIdx.x + 1]; }
KERNEL(reads_wide) { Y[threadIdx.x] = reinterpret_cast<const uint4*>(X)[16].x; }
KERNEL(writes_input) { X[threadIdx.x] = 1; }
KERNEL(copies_behind) { ptx::cp_async<4>(dynamic() + 4 * threadIdx.x, X + 64 + threadIdx.x, 4); }
KERNEL(adds_behind) { ptx::red_add_f32(reinterpret_cast<float*>(Y) + 512 + threadIdx.x, 1.0f); }
KERNEL(stores_far) { ptx::st_shared_u32(dynamic() + 4096, 1); }
KERNEL(stores_aslant) { ptx::st_shared_v2(dynamic() + 4, 1, 2); }
KERNEL(copies_aslant) { ptx::cp_async<16>(dynamic(), X + 1, 16); }
KERNEL(divides) { Y[0] = X[0] / Y[1]; }

KERNEL(different) {
  if (ptx::laneid() < 16)
    __syncwarp();
  else
    __ballot_sync(0xffffffffu, 1);
}

KERNEL(some_lanes) {
  const u32 a[4] = {};
  float d[4];
  if (ptx::laneid() != 3) ptx::mma_m16n8k16<f16>(d, a, 0, 0);
}

KERNEL(two_barriers) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    ptx::bar_sync(1, 64);
}
"""
KERNELS = tuple(re.findall(r"^KERNEL\((\w+)\)", SOURCE, re.MULTILINE))
WORDS = 512


def run(name: str, x: Any, y: Any = None, *, blocks: int = 1, threads: int = 32, order: int | None = None) -> Any:
    """Launch a kernel with x, which it may read, and y, which it may write: y's words afterwards."""
    with Gpu(order=order) as gpu:
        arrays = {"x": np.ascontiguousarray(x), "y": np.zeros(WORDS, np.uint32) if y is None else y}
        placed = gpu.arrays({key: array.view(np.uint32) for key, array in arrays.items()})
        placed["y"].allow(emulated.memory.WRITABLE)
        argument = struct.pack("2Q", placed["x"].address, placed["y"].address)
        gpu.enqueue(Launched(Function(program(), name, 16), blocks, threads, 4096, argument))
        return placed["y"].numpy()


@pytest.fixture(autouse=True, scope="module")
def made() -> None:
    program()


_made: list[Program] = []


def program() -> Program:
    if not _made:
        _made.append(Program(SOURCE, _jit.headers(), "Arguments", KERNELS))
    return _made[0]


WORDS_IN = np.random.default_rng(0).integers(1, 2**32, 64, dtype=np.uint32)


def test_every_instruction_has_a_form_for_the_host() -> None:
    """What ``cuda_src/ptx`` declares, ``cuda/ptx`` does."""
    for name, text in _jit.headers().items():
        if not name.startswith("ptx/"):
            continue
        declared = set(re.findall(r"^inline [^(=]*?(\w+)\(", text.decode(), re.MULTILINE))
        there = set(re.findall(r"\b(\w+)\(", (build.CUDA / name).read_text()))
        assert declared and declared <= there, name


def test_conversions_round_as_the_hardware_does() -> None:
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32)
    near = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # and halfway between two
    patterns[::2] = (
        near[::2].view(np.uint32).astype(np.int64) + rng.choice([-1, 0, 1, 0xFFF, 0x1000], 1 << 15)
    ) % 2**32
    x = patterns.view(np.float32)
    found = run("convert", x, np.zeros(4 << 16, np.uint32), blocks=64, threads=1024).reshape(-1, 4)
    with np.errstate(all="ignore"):
        for words, dtype in ((found[:, 0], np.float16), (found[:, 1], ml_dtypes.bfloat16)):
            expected = np.stack([x, -x], -1).astype(dtype).view(np.uint16)
            expected[np.isnan(x)] = 0x7FFF
            assert np.array_equal(np.ascontiguousarray(words).view(np.uint16).reshape(-1, 2), expected)
    for words, dtype in ((found[:, 2], np.float16), (found[:, 3], ml_dtypes.bfloat16)):
        expected = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
        assert np.array_equal(words.view(np.float32), expected, equal_nan=True)


def test_conversions_of_e4m3_are_exact_one_way_and_round_the_other() -> None:
    e4m3, rng = ml_dtypes.float8_e4m3fn, np.random.default_rng(1)
    numbers = np.arange(256, dtype=np.uint8).view(e4m3).astype(np.float32)
    middles = (numbers[:127][1:] + numbers[:127][:-1]) / 2
    near = np.concatenate([np.nextafter(middles, np.float32(way * np.inf)) for way in (-1, 0, 1)])
    patterns = rng.integers(0, 2**32, 1 << 14, dtype=np.uint32)
    edges = np.concatenate([numbers, middles, -middles, near, -near, [448, 464, 465, 1e30, np.inf, -np.inf, np.nan]])
    patterns[: len(edges)] = edges.astype(np.float32).view(np.uint32)
    x = patterns.view(np.float32)
    found = run("convert_e4m3", x, np.zeros(4 << 14, np.uint32), blocks=16, threads=1024).reshape(-1, 4)
    with np.errstate(all="ignore"):
        rounded = np.clip(x, -448, 448).astype(e4m3).view(np.uint8)
    assert np.array_equal(found[:, 0], np.where(np.isnan(x), 0x7F, rounded))
    bits = np.arange(256, dtype=np.uint8)
    four = np.stack([bits, bits ^ 0x80, bits ^ 1, bits ^ 2], -1).view(e4m3).astype(np.float32)
    wide = np.ascontiguousarray(found[:256, 1:3]).view(np.float16).astype(np.float32)
    assert np.array_equal(wide, four, equal_nan=True)
    assert np.array_equal(np.signbit(wide) & (wide == 0), np.signbit(four) & (four == 0))
    assert np.array_equal(np.ascontiguousarray(found[:256, 3]).view(np.float32), numbers, equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
def test_products_of_16_bits(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    d = rng.standard_normal((16, 8)).astype(np.float32)
    d[3, 5] = np.nan
    found = run(
        f"multiply_{'f16' if dtype is np.float16 else 'bf16'}", np.concatenate([a.ravel(), b.ravel()]), d.copy()
    )
    exact = a.astype(np.float64) @ b.astype(np.float64) + d
    found = found.view(np.float32).reshape(16, 8)
    toward_zero = np.abs(found) <= np.abs(exact)
    assert (toward_zero & (np.abs(found - exact) <= np.spacing(np.abs(found))) | np.isnan(exact)).all()
    assert np.isnan(found).sum() == 1 and found.view(np.uint32)[3, 5] == 0x7FFFFFFF


def test_products_of_tf32() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((24, 8)).astype(np.float32)
    found = run("multiply_tf32", x).view(np.float32)[:128].reshape(16, 8)
    read = (x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    assert np.allclose(found, read[:16] @ read[16:], rtol=0, atol=1e-6)
    assert not np.allclose(found, x[:16].astype(np.float64) @ x[16:], rtol=0, atol=1e-6)


def test_matrices_are_loaded_and_stored() -> None:
    x = np.arange(128, dtype=np.uint32)
    assert np.array_equal(run("matrices", x)[:128], x)


def test_matrices_are_turned() -> None:
    x = np.arange(64, dtype=np.uint16).reshape(8, 8)
    found = run("turned", x.ravel().view(np.uint32))[:32]
    assert np.array_equal(found.view(np.uint16).reshape(8, 8), x.T)


def test_lanes_of_a_warp_exchange_words() -> None:
    x, lanes = WORDS_IN[:32], np.arange(32)
    found = run("warp", x)[: 11 * 32].reshape(11, 32)
    bits = int((x & 1).astype(np.uint64) @ (1 << lanes.astype(np.uint64)))
    expected = [x[7], x[lanes ^ 5], x[np.where(lanes < 3, lanes, lanes - 3)], x[np.where(lanes > 27, lanes, lanes + 4)]]
    expected += [x[lanes // 8 * 8 + 1], bits, 1, 1, x.max(), x.view(np.int32).max().view(np.uint32), 1]
    for row, want in zip(found, expected, strict=True):
        assert (row == want).all()


def test_copies_fill_up_with_zeros() -> None:
    expected = WORDS_IN.reshape(16, 4).copy()
    expected.view(np.uint8).reshape(16, 16)[:, 10:] = 0
    for order in range(4):  # in one of which a copy is late
        assert np.array_equal(run("copy", WORDS_IN, threads=16, order=order)[:64].reshape(16, 4), expected)


def test_barriers_order_what_threads_do() -> None:
    for order in (None, 0, 1):
        found = run("neighbours", WORDS_IN, threads=64, order=order)
        assert np.array_equal(found[1:64], WORDS_IN[::-1][1:])
        assert found[0] == np.uint32(int(WORDS_IN[0]) + int(WORDS_IN[63]) & 0xFFFFFFFF)
        found = run("side_by_side", WORDS_IN, threads=64, order=order).view(np.uint16)[:64]
        assert np.array_equal(found, WORDS_IN.astype(np.uint16) + np.uint16(1))
    assert run("unwritten", WORDS_IN)[:32].all()  # NaN


def test_blocks_run_in_many_orders() -> None:
    last = {int(run("last", WORDS_IN, blocks=5, threads=64, order=order)[0]) for order in range(12)}
    assert len(last) > 2
    assert run("last", WORDS_IN, blocks=5, threads=64)[0] == 4
    for order in range(4):
        assert run("in_turn", WORDS_IN, blocks=4, order=order)[0] == ((3 * 2 + 2) * 2 + 1) * 2
    for order in (None, *range(4)):
        assert run("adds_up", WORDS_IN, blocks=6, threads=64, order=order)[0] == np.uint32(6 * int(WORDS_IN[1]) % 2**32)


def test_the_copy_engine_copies_and_adds() -> None:
    x = WORDS_IN.astype(np.float32)
    for order in (None, *range(4)):
        assert np.array_equal(run("bulk", x, threads=64, order=order).view(np.float32)[:64], 2 * x)


def test_mbarriers_have_phases() -> None:
    for order in (None, *range(4)):
        found = run("ring", WORDS_IN, threads=64, order=order)[:32]
        assert np.array_equal(found, WORDS_IN[:5].sum(dtype=np.uint32) + 5 * np.arange(32, dtype=np.uint32))


def test_registers_move_between_warpgroups() -> None:
    for order in (None, 0, 1):
        assert run("registers", WORDS_IN, threads=384, order=order)[:384].all()


RACE = "a race: byte .* is (read, and was written|written, and was read) by .* without a barrier between"
UNTOLD = "a race: what is at address .* is read, and was written by another thread that has not told this one"
FAULTS = {
    "no_barrier": RACE,
    "no_barrier_before_writing": RACE,
    "no_syncwarp": RACE,
    "no_wait": "is read, but an asynchronous copy to it was not waited for",
    "wait_for_another_group": "is read, but an asynchronous copy to it was not waited for",
    "only_waits": RACE,
    "tells_too_early": UNTOLD,
    "tells_nothing": UNTOLD,
    "reads_behind": r"a load: of 4 bytes .*\(0 bytes behind the end of x\) may not be read",
    "reads_wide": r"a load: of \d+ bytes .*\(0 bytes behind the end of x\)",
    "writes_input": r"a store: .*\(byte \d+ of the 256 of x\) may not be written",
    "copies_behind": r"cp.async: .*behind the end of x\) may not be read",
    "adds_behind": r"red.add: .*behind the end of y\) may not be written",
    "stores_far": "4 bytes are written at byte 4096 of dynamic shared memory, of which there are 4096 bytes",
    "stores_aslant": "st.shared: address .* is no multiple of 8",
    "copies_aslant": "cp.async: source .* is no multiple of 16",
    "divides": "a division by zero",
    "different": "different instructions: __(syncwarp|ballot_sync) of ffffffff and __(syncwarp|ballot_sync)",
    "some_lanes": "thread 3 of block 0 ends, but others .* wait for it in mma.m16n8k16.f16|lanes 00000008 have ended",
    "two_barriers": "(?s)stuck: nobody can go on.*waiting for __syncthreads.*waiting for bar.sync",
    "gives_back_by_taking": "setmaxnreg: from 255 registers to 240",
    "no_such_mbarrier": "mbarrier.arrive: there is no mbarrier at address",
    "unknown_mbarrier": "a race: mbarrier.arrive of an mbarrier, which another thread has made without a barrier",
    "too_many_arrive": "mbarrier.arrive.expect_tx: more than 1 threads come to an mbarrier",
    "writes_an_mbarrier": "is written, which is part of an mbarrier",
    "no_bytes_come": "(?s)stuck: nobody can go on.*waiting for an mbarrier",
    "no_wait_for_bytes": "is read, but an asynchronous copy to it was not waited for",
    "stores_unfenced": "is read by cp.async.bulk, and was written by a thread without a fence.proxy.async between",
    "ends_too_early": "a thread ends, but its bulk copies may still read shared memory",
    "overwrites_a_source": "is written, and was read by wgmma or an asynchronous copy without a barrier between",
    "in_turn": "(?s)look at memory for news that nobody is left to bring.*waiting for what ld.acquire finds",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name: str) -> None:
    with pytest.raises(EmulationError, match=FAULTS[name]) as found:
        run(name, WORDS_IN, blocks=2, threads=64)
    lines = SOURCE.splitlines()
    begin = next(i for i, line in enumerate(lines, 1) if line.startswith(f"KERNEL({name})"))
    end = next((i for i, line in enumerate(lines, 1) if i > begin and line.startswith("KERNEL")), len(lines) + 1)
    if name != "divides":
        places = map(int, re.findall(r"at unit\.cpp:(\d+)", str(found.value)))
        assert any(begin <= place < end for place in places), str(found.value)


def test_what_cannot_be_read_of_cuda_is_refused() -> None:
    with pytest.raises(EmulationError, match="shared memory is not understood: __shared__ auto x = 3;"):
        build.translated("__shared__ auto x = 3;")
    with pytest.raises(EmulationError, match=r"(?s)does not compile for the CPU.*no_such_thing"):
        Program("no_such_thing", {}, "int", ()).path  # noqa: B018


def test_calls_by_names() -> None:
    case = Case(batch=2, seqlen_q=5, seqlen_k=9, dtype="float16", use_out=True)
    arrays = case.arrays()
    found = emulated.call(ATTENTION, {**arrays, "out": case.output(), "sinks": None}, causal=True, return_lse=True)
    assert list(found) == ["out", "lse"]
    assert_close(found["out"], lse=found["lse"], **arrays, causal=True)
    with pytest.raises(TypeError, match="attention: there are no options casual"):
        emulated.call(ATTENTION, arrays, casual=True)
    with pytest.raises(TypeError, match="attention: there are no arrays dout, w"):
        emulated.call(ATTENTION, {**arrays, "w": arrays["q"], "dout": None})
    large = np.ones((1, 100, 1, 64), np.float16)
    assert (emulated.call(ATTENTION, dict.fromkeys("qkv", large), arch=90)["out"] == 1).all()
    with pytest.raises(cufa.errors.ArgumentError, match="attention: k has head_dim 8 but q has 16"):
        emulated.call(ATTENTION, {**arrays, "k": arrays["k"][..., :8]})


def test_arrays_that_share_memory_still_do() -> None:
    fused = np.arange(48, dtype=np.float32).reshape(4, 3, 4)
    with Gpu() as gpu:
        placed = gpu.arrays({"a": fused[:, 0], "b": fused[:, 1, ::-1], "c": fused[2:, 2].copy(), "d": fused[:0, 0]})
        assert placed["b"].address - placed["a"].address == 4 * 7
        for name, array in zip("abcd", (fused[:, 0], fused[:, 1, ::-1], fused[2:, 2], fused[:0, 0]), strict=True):
            assert np.array_equal(placed[name].numpy(), array)


def test_examples_run() -> None:
    assert doctest.testmod(gpu).failed == 0 and doctest.testmod(gpu).attempted > 5
    page = Path(__file__).parents[2] / "docs" / "emulation.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(example, {})
