"""`cufa.jit` and the rungs of the ladder on a GPU."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import cufa
from cufa.learn import ladder

pytestmark = pytest.mark.gpu

SOURCE = """
#include "ptx/convert.cuh"
extern "C" __global__ void axpy(float* y, const ELEMENT* x, double a, bool negate, int n) {
  extern __shared__ float held[];
  const int i = blockIdx.y * gridDim.x * blockDim.x + blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = i < n ? ptx::cvt_f32(x[i]) : 0;
  __syncthreads();
  if (i < n) y[i] += (negate ? -1 : 1) * float(a) * held[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture(scope="module")
def axpy() -> cufa.JitKernel:
    return cufa.jit(SOURCE, "axpy", defines={"ELEMENT": "f16"})


def run(axpy: cufa.JitKernel, y: Any, x: Any) -> None:
    # More shared memory than a kernel may have that has not asked for it.
    axpy(y, x, 2.0, np.True_, np.int32(1000), grid=(2, 4), block=128, shared_bytes=64 << 10)


def test_a_launch_is_on_the_current_stream_and_in_a_graph(cupy: Any, axpy: cufa.JitKernel) -> None:
    x, y = cupy.arange(1024).astype(cupy.float16), cupy.zeros(1024, cupy.float32)
    run(axpy, y, x)
    expected = np.where(np.arange(1024) < 1000, -2.0 * np.arange(1024), 0).astype(np.float32)
    np.testing.assert_array_equal(y.get(), expected)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        y.fill(0)
        run(axpy, y, x)  # behind the fill
        stream.begin_capture()
        run(axpy, y, x)
        graph = stream.end_capture()
        graph.launch(stream)
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(y.get(), 3 * expected)
    fresh = cufa.jit(SOURCE, "axpy", defines={"ELEMENT": "f16", "fresh": 1})
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(cufa.MissingKernelError, match="is not loaded, and the stream is being captured"):
            run(fresh, y, x)
        stream.end_capture()


def test_torch_tensors_are_launched_on(axpy: cufa.JitKernel) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    x = torch.arange(1024, device="cuda").half()
    y = torch.zeros(1024, device="cuda")
    run(axpy, y, x)
    assert torch.equal(y[:1000], -2.0 * x[:1000].float()) and not y[1000:].any()
    with pytest.raises(cufa.UnsupportedError, match="torch records what becomes of an array"):
        run(axpy, y, x.clone().requires_grad_())


def test_views_copies_and_threads_launch(cupy: Any, axpy: cufa.JitKernel) -> None:
    x, y = cupy.arange(1025).astype(cupy.float16), cupy.zeros(1025, cupy.float32)
    run(axpy, y[1:], x[1:])
    run(pickle.loads(pickle.dumps(axpy)), y[1:], x[1:])  # what is loaded stays behind, and is loaded again
    axpy(y[:0], x, 2.0, True, 0, grid=1, block=128, shared_bytes=512)
    expected = np.where(np.arange(1024) < 1000, -4.0 * np.arange(1, 1025), 0).astype(np.float32)
    np.testing.assert_array_equal(y.get()[1:], expected)
    assert y[0] == 0
    fresh = cufa.jit(SOURCE, "axpy", defines={"ELEMENT": "f16", "threads": 1})
    results = [cupy.zeros(1024, cupy.float32) for _ in range(4)]
    cupy.cuda.Device().synchronize()
    with ThreadPoolExecutor(4) as pool:  # all of which find it neither compiled nor loaded
        list(pool.map(lambda each: run(fresh, each, x[1:]), results))
    cupy.cuda.Device().synchronize()
    for each in results:
        np.testing.assert_array_equal(each.get(), expected / 2)


def test_what_the_gpu_does_not_allow_is_refused(cupy: Any, axpy: cufa.JitKernel) -> None:
    x, y = cupy.ones(1024, cupy.float16), cupy.zeros(1024, cupy.float32)
    with pytest.raises(ValueError, match=r"shared_bytes is \d+; beside what the kernel declares"):
        axpy(y, x, 1.0, False, 1024, grid=1, block=128, shared_bytes=1 << 20)
    bounded = cufa.jit(
        SOURCE.replace("__global__", "__global__ __launch_bounds__(64)"), "axpy", defines={"ELEMENT": "f16"}
    )
    with pytest.raises(ValueError, match="allow 64 threads"):
        bounded(y, x, 1.0, False, 1024, grid=1, block=128, shared_bytes=512)
    with pytest.raises(ValueError, match="x is in host memory"):
        axpy(y, np.ones(1024, np.float16), 1.0, False, 1024, grid=1, block=128)
    cupy.cuda.Device().synchronize()
    assert not y.any()


RUNGS = [each for each in ladder.RUNGS if each.needs in ("cuda", "sm_90")]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_rungs_are_right(cupy: Any, rung: ladder.Rung) -> None:
    if reason := ladder.why_not(rung):
        pytest.skip(reason)
    ladder.check(rung, cupy, max_examples=40, max_seqlen=300)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_rung_is_faster_than_the_one_before(cupy: Any, head_dim: int) -> None:
    """On Hopper, at 4096 rows; and the last is not far behind what cufa has."""
    if reason := ladder.why_not(ladder.rung("r13")):
        pytest.skip(reason)
    size = ladder.Size(head_dim=head_dim)
    found = [ladder.measure(each, size, seconds=0.2) for each in RUNGS]
    own = ladder.measure_cufa(size, cupy, seconds=0.2)
    speeds = {each.name: each.tflops for each in (*found, own)}
    assert sorted(speeds, key=lambda name: speeds[name]) == [*speeds], speeds
    assert speeds["r13_hopper"] >= 0.55 * speeds["cufa.attention"], speeds
