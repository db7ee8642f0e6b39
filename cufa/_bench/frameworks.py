"""Where the arrays of a benchmark come from: torch, beside whose attention cufa is measured, or CuPy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import ArrayLike

from ..errors import UnsupportedError
from ..testing import _timing
from .reports import Row


class Framework:
    """What the measurements ask of a framework on a GPU."""

    matmul_dtype = "bfloat16"
    """What large matrix products are measured with."""

    xp: Any
    """The framework's module, for functions that it calls as NumPy does."""

    def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """Normal numbers."""
        raise NotImplementedError

    def integers(self, values: ArrayLike) -> Any:
        """An array of int32."""
        raise NotImplementedError

    def view(self, result: Any) -> Any:
        """Another framework's array, by DLPack, as one of this one."""
        raise NotImplementedError

    def float32(self, array: Any) -> Any:
        raise NotImplementedError

    def softmax(self, scores: Any) -> Any:
        """Over the last axis."""
        raise NotImplementedError

    def release(self) -> None:
        """Wait for all streams, and give the GPU the memory back that nothing uses."""
        raise NotImplementedError

    def device_name(self) -> str:
        raise NotImplementedError

    def version(self) -> str:
        """The framework's name and version."""
        raise NotImplementedError

    def clock(self) -> _timing.Gpu:
        """The clock of the GPU on which arrays are made, with a stream of its own."""
        found = _timing.gpu_of(self.integers([0]))
        assert found is not None
        return found

    def inputs(self, row: Row, seed: int) -> tuple[Any, Any, Any, Any]:
        """Random q, k, v and dout."""

        def tokens(seqlen: int) -> tuple[int, ...]:
            return (row.batch, seqlen) if row.lengths is None else (sum(row.lengths),)

        queries = (*tokens(row.seqlen), row.num_heads_q, row.head_dim)
        keys = (*tokens(row.seqlen_k or row.seqlen), row.num_heads_k, row.head_dim)
        q, k, v, dout = (
            self.random(shape, row.dtype, 4 * seed + place)
            for place, shape in enumerate((queries, keys, keys, queries))
        )
        return q, k, v, dout

    def offsets(self, lengths: Sequence[int]) -> Any:
        """Where packed sequences begin and end."""
        return self.integers([0, *itertools.accumulate(lengths)])


class Torch(Framework):
    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch finds no GPU")
        self.torch = self.xp = torch

    def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        generator = self.torch.Generator("cuda").manual_seed(seed)
        return self.torch.randn(shape, generator=generator, device="cuda", dtype=getattr(self.torch, dtype))

    def integers(self, values: ArrayLike) -> Any:
        return self.torch.tensor(values, dtype=self.torch.int32, device="cuda")

    def view(self, result: Any) -> Any:
        return self.torch.from_dlpack(result)

    def float32(self, array: Any) -> Any:
        return array.float()

    def softmax(self, scores: Any) -> Any:
        return self.torch.softmax(scores, -1)

    def release(self) -> None:
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()

    def device_name(self) -> str:
        return str(self.torch.cuda.get_device_name())

    def version(self) -> str:
        return f"torch {self.torch.__version__}"


class CuPy(Framework):
    matmul_dtype = "float16"  # of bfloat16 it knows little, and the tensor cores are as fast with either

    def __init__(self) -> None:
        import cupy
        import ml_dtypes

        if not cupy.cuda.is_available():
            raise ImportError("CuPy finds no GPU")
        self.cupy = self.xp = cupy
        self.dtypes = {"bfloat16": ml_dtypes.bfloat16}

    def random(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        numbers = self.cupy.random.default_rng(seed).standard_normal(shape, dtype=self.cupy.float32)
        return numbers.astype(self.dtypes.get(dtype, dtype))

    def integers(self, values: ArrayLike) -> Any:
        return self.cupy.asarray(values, dtype=self.cupy.int32)

    def view(self, result: Any) -> Any:
        return self.cupy.from_dlpack(result)

    def float32(self, array: Any) -> Any:
        return array.astype(self.cupy.float32)

    def softmax(self, scores: Any) -> Any:
        weights = self.cupy.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def release(self) -> None:
        self.cupy.cuda.runtime.deviceSynchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def device_name(self) -> str:
        properties = self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.Device().id)
        return str(properties["name"].decode())

    def version(self) -> str:
        return f"CuPy {self.cupy.__version__}"


def find() -> Framework:
    """torch if it is there and finds a GPU, else CuPy.

    Raises
    ------
    UnsupportedError
        If neither does; the message says why.
    """
    reasons = []
    for kind in (Torch, CuPy):
        try:
            return kind()
        except ImportError as reason:
            reasons.append(str(reason))
    raise UnsupportedError(
        f"bench: arrays on the GPU are made by torch or CuPy, and there is neither ({'; '.join(reasons)}); pip install "
        "torch, whose attention is then measured too, or 'cufa[cuda13]', which brings CuPy."
    )


def results_of(returned: Any) -> tuple[Any, ...]:
    """What a call returned, as a tuple."""
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def norms(framework: Framework, arrays: Sequence[Any]) -> Iterator[float]:
    """The Frobenius norm of each array; NaN or Inf if an element is."""
    for array in map(framework.float32, arrays):
        yield float((array * array).sum()) ** 0.5


def difference(framework: Framework, results: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest relative error, in the Frobenius norm, of any result."""
    apart = [
        framework.float32(result) - framework.float32(other) for result, other in zip(results, expected, strict=True)
    ]
    return max(error / size for error, size in zip(norms(framework, apart), norms(framework, expected), strict=True))
