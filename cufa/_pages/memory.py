"""What pages need of a framework: an int32 array that follows one on the host, and copies of pages."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._call import arrays as _arrays
from .._call.arrays import Spec
from ..errors import ArgumentError, UnsupportedError

DTYPES = ("float16", "bfloat16", "float32", "float64")


class Memory:
    """NumPy's, and the base of the others."""

    def mirror(self, host: NDArray[np.int32]) -> Any:
        """A flat array beside the caches that holds what `host` does after each `upload`; here it is `host` itself."""
        return host

    def upload(self, mirror: Any, host: NDArray[np.int32], count: int) -> None:
        """Copy the first `count` numbers in the caller's current stream; `host` may be changed right afterwards."""

    def copy_pages(self, caches: tuple[Any, ...], pages: NDArray[np.int64]) -> None:
        """In each cache, make pages ``pages[0]`` what pages ``pages[1]`` are, all at once."""
        for cache in caches:
            bits = cache.view(f"u{cache.dtype.itemsize}")  # a copy needs no arithmetic, which bfloat16 may lack
            bits[pages[0]] = bits[pages[1]]


class CupyMemory(Memory):
    """CuPy's. What comes from the host goes through CuPy's pool of pinned memory, so nobody waits."""

    def __init__(self, device: int) -> None:
        self._cupy = sys.modules["cupy"]
        self._device = device

    def mirror(self, host: NDArray[np.int32]) -> Any:
        with self._cupy.cuda.Device(self._device):
            return self._cupy.empty(host.shape, host.dtype)

    def upload(self, mirror: Any, host: NDArray[np.int32], count: int) -> None:
        with self._cupy.cuda.Device(self._device):
            mirror[:count] = self._cupy.asarray(host[:count])

    def copy_pages(self, caches: tuple[Any, ...], pages: NDArray[np.int64]) -> None:
        with self._cupy.cuda.Device(self._device):
            super().copy_pages(caches, self._cupy.asarray(pages))


class TorchMemory(Memory):
    """torch's. Its cache of pinned memory keeps what is being copied until it is."""

    def __init__(self, like: Any) -> None:
        self._torch = sys.modules["torch"]
        self._device = like.device

    def mirror(self, host: NDArray[np.int32]) -> Any:
        with self._torch.inference_mode(False):  # else it could be written in that mode only
            if self._device.type == "cpu":
                return self._torch.from_numpy(host)
            return self._torch.empty(host.shape, dtype=self._torch.int32, device=self._device)

    def upload(self, mirror: Any, host: NDArray[np.int32], count: int) -> None:
        if self._device.type != "cpu":
            mirror[:count].copy_(self._torch.from_numpy(host[:count]).pin_memory(), non_blocking=True)

    def copy_pages(self, caches: tuple[Any, ...], pages: NDArray[np.int64]) -> None:
        index = self._torch.from_numpy(pages)
        if self._device.type != "cpu":
            index = index.pin_memory().to(self._device, non_blocking=True)
        with self._torch.no_grad():
            for cache in caches:
                cache.index_copy_(0, index[0], cache.index_select(0, index[1]))


def memory_of(function: str, k_caches: tuple[Any, ...], v_caches: tuple[Any, ...]) -> tuple[Memory, tuple[int, int]]:
    """The framework's memory, and (num_pages, page_size), of caches that fit together; ArgumentError if they do not."""
    if len(k_caches) != len(v_caches) or not k_caches:
        raise ArgumentError(
            f"{function}: there are {len(k_caches)} k_caches and {len(v_caches)} v_caches; pass one of each per layer."
        )
    names = [f"{kind}_caches[{layer}]" for layer in range(len(k_caches)) for kind in "kv"]
    given = [cache for pair in zip(k_caches, v_caches, strict=True) for cache in pair]
    specs = _specs(function, tuple(names), tuple(given))
    first = specs[0]
    for index, (name, spec) in enumerate(zip(names, specs, strict=True)):
        key = specs[index & ~1]
        if len(spec.shape) != 4 or 0 in spec.shape:
            raise ArgumentError(
                f"{function}: {name} has shape {spec.shape}; pass (num_pages, page_size, num_heads_k, head_dim)."
            )
        if spec.shape[:2] != first.shape[:2]:
            raise ArgumentError(
                f"{function}: {name} has {spec.shape[0]} pages of {spec.shape[1]} and {names[0]} has {first.shape[0]} "
                f"of {first.shape[1]}; all layers share their block tables, so pass as many and as large ones."
            )
        if spec.shape[2] != key.shape[2] or spec.dtype != key.dtype:
            raise ArgumentError(
                f"{function}: {name} has {spec.shape[2]} heads in {spec.dtype} and {names[index & ~1]} has "
                f"{key.shape[2]} in {key.dtype}; they must agree."
            )
        if spec.dtype not in DTYPES:
            raise ArgumentError(f"{function}: {name} is {spec.dtype}; pass one of {', '.join(DTYPES)}.")
        if (spec.framework, spec.device) != (first.framework, first.device):
            raise ArgumentError(f"{function}: {name} and {names[0]} must be of one framework and on one device.")
        if not spec.writable:
            raise ArgumentError(f"{function}: {name} is read-only, and new keys and values are written to it.")
    if first.shape[0] >= 2**31:
        raise ArgumentError(f"{function}: {first.shape[0]} pages are more than an int32 block table can name.")
    return _memory(function, first, given[0]), first.shape[:2]  # type: ignore[return-value]


def _specs(function: str, names: tuple[str, ...], given: tuple[Any, ...]) -> list[Spec]:
    """The arrays as `cufa._call.arrays` sees them; no two may begin at one address."""
    if any(_arrays.is_jax(array) for array in given):
        raise UnsupportedError(
            f"{function}: JAX arrays cannot be written, and pages are; keep the caches in NumPy, CuPy or torch."
        )
    try:
        viewed = _arrays.view(function, names, given, tuple(range(len(given))))
    except _arrays.Recorded:
        raise UnsupportedError(
            f"{function}: a cache requires grad or stands for another tensor; pass plain tensors, as detach() makes."
        ) from None
    for name, pointer, later in zip(names, viewed.pointers, range(1, len(names) + 1), strict=True):
        if pointer and pointer in viewed.pointers[later:]:
            other = names[viewed.pointers.index(pointer, later)]
            raise ArgumentError(f"{function}: {name} and {other} are the same memory; pass an array for each.")
    specs = []
    for name, layout in zip(names, viewed.layouts, strict=True):
        assert layout is not None
        try:
            specs.append(layout[0].spec(layout))
        except UnsupportedError as error:
            raise UnsupportedError(f"{function}: {name} cannot be used: {error}") from None
    return specs


def _memory(function: str, spec: Spec, like: Any) -> Memory:
    if spec.framework == "numpy":
        return Memory()
    if spec.framework == "cupy":
        return CupyMemory(spec.device)
    if spec.framework == "torch":
        return TorchMemory(like)
    raise UnsupportedError(
        f"{function}: pages of {spec.framework} arrays are not supported; pass NumPy, CuPy or torch arrays, which may "
        "share their memory (as cupy.asarray of a Numba array does)."
    )
