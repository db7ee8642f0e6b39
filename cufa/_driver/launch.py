"""Launches of loaded kernels on the caller's stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from ..errors import CudaError
from . import counts as _counts
from . import driver as _driver

MAX_STREAMS = 64
"""Streams whose launch configurations a launch remembers."""

pack_address = struct.Struct("@Q").pack_into

ARGUMENT_BYTES = 4096
"""What the argument of a kernel may take on every GPU."""


CLUSTER_POLICY = "LOAD_BALANCING"
"""Where the blocks of a cluster go, as ``CUclusterSchedulingPolicy`` has it; docs/decode.md has what others take."""


class _Scratch(threading.local):
    """A thread's kernel argument: the driver has copied it when the launch returns."""

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(ARGUMENT_BYTES)
        self._array = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
        self.argument = memoryview(memory).cast("B")  # a fifth of the time of ctypes' own copies
        # Looking at a thread's own attribute takes several times as long as at another.
        self.both = self.argument, ctypes.addressof(self._array)


_scratch = _Scratch()


class Shape(NamedTuple):
    """Thread blocks of a launch, threads and bytes of shared memory per block, and thread blocks per cluster."""

    blocks: int
    threads: int
    smem_bytes: int
    cluster: int = 1


class Argument(NamedTuple):
    """What every launch of a problem shares of a kernel's argument, and where addresses and late options go.

    Attributes
    ----------
    content : bytes
        Addresses and late options are 0.
    pointers : tuple of (int, str)
        Offset of each, and the name of what lies there: an array, a result or a part of the scratch memory.
    maps : tuple of (int, str, int)
        Offset of each tensor map, whose first bytes are an address, the array's name, and what is added to it.
    late : tuple of (int, str, str)
        Offset of each late option, its format of `struct` and its name.
    """

    content: bytes
    pointers: tuple[tuple[int, str], ...]
    maps: tuple[tuple[int, str, int], ...] = ()
    late: tuple[tuple[int, str, str], ...] = ()


class Launch:
    """Loaded kernels that are launched one after the other with the same argument.

    Where the GPU can, each begins while the one before it ends: see ptx/grid.cuh.

    Parameters
    ----------
    words : str
        Names the kernels in messages.
    functions : sequence
        Loaded, in their order.
    device : int
    shapes : sequence of Shape
        Of each.
    argument : Argument
    names : sequence of str
        What lies at the addresses that a call is given, and late options, whose values are given among them; what the
        argument names and is not here has address 0. Of two of one name the last counts.
    """

    __slots__ = (
        "_chosen",
        "_configs",
        "_constants",
        "_counted",
        "_enqueue",
        "_pack_into",
        "_shapes",
        "_shifted",
        "device",
        "functions",
        "words",
    )

    def __init__(
        self,
        words: str,
        functions: Sequence[Any],
        device: int,
        shapes: Sequence[Shape],
        argument: Argument,
        names: Sequence[str],
    ) -> None:
        self.words = words
        self.device = device
        # Those without blocks are left out.
        running = [index for index, shape in enumerate(shapes) if shape.blocks > 0]
        self.functions = [functions[index] for index in running]
        self._shapes = [shapes[index] for index in running]
        assert len(argument.content) <= ARGUMENT_BYTES
        self._enqueue = _driver.driver().cuLaunchKernelEx
        places = {name: index for index, name in enumerate(names)}
        known = [(offset, "Q", places[name]) for offset, name in argument.pointers if name in places]
        known += [(offset, form, places[name]) for offset, form, name in argument.late]
        known += [(offset, "Q", places[name]) for offset, name, shift in argument.maps if not shift]
        self._pack_into, self._constants, self._chosen = _packing(argument.content, known, len(names))
        self._shifted = [(offset, places[name], shift) for offset, name, shift in argument.maps if shift]
        self._configs: dict[int, list[Any]] = {}
        self._counted = (_counts.tally("launches", words) if running else _counts.Tally()).add

    def __call__(self, addresses: Sequence[Any], stream: int, current_device: int) -> None:
        """Enqueue on `stream`; there is an address, or the value of a late option, for each of `names`.

        `current_device` is the framework's current GPU, or -1 if that is not known.
        """
        argument, arguments = _scratch.both
        enqueue = self._enqueue
        self._pack_into(argument, 0, *self._chosen([*addresses, *self._constants]))
        for offset, index, shift in self._shifted:
            pack_address(argument, offset, addresses[index] + shift)
        configs = self._configs.get(stream) or self._make_configs(stream)
        done = 0
        if current_device == self.device:
            for config, function in configs:
                (status,) = enqueue(config, function, arguments, 0)
                if status != 0:  # in a new thread no GPU is current, whatever the framework says
                    break
                done += 1
        if done < len(configs):
            self._insist(configs[done:], arguments)
        self._counted()

    def _insist(self, configs: Sequence[Any], arguments: int) -> None:
        """Enqueue where it is not known that this GPU is current, or known that it is not."""
        _driver.enter(self.device)
        with _driver.current(self.device):
            for config, function in configs:
                (status,) = self._enqueue(config, function, arguments, 0)
                if status != 0:
                    described = _driver.describe(_driver.driver(), status)
                    raise CudaError(f"cufa: launching {self.words} failed: {described}.")

    def _make_configs(self, stream: int) -> list[Any]:
        """What the driver is told of each kernel, and the kernel; kept, because making it costs microseconds."""
        overlap = _driver.overlaps(self.device)
        configs = [
            (_config(shape, stream, overlap and index > 0), function)
            for index, (shape, function) in enumerate(zip(self._shapes, self.functions, strict=True))
        ]
        if len(self._configs) >= MAX_STREAMS:
            self._configs.clear()
        self._configs[stream] = configs
        return configs


def _packing(content: bytes, places: Sequence[tuple[int, str, int]], count: int) -> tuple[Any, list[bytes], Any]:
    """How an argument is packed at once: the function, the bytes between what varies, and what takes its items.

    `places` are the offset of each address or other value, its format, and its index among `count` of them, behind
    which those bytes come.
    """
    form, end = "@", 0
    indices: list[int] = []
    constants: list[bytes] = []
    for offset, kind, index in [*sorted(places), (len(content), "", None)]:
        if offset > end:
            form += f"{offset - end}s"
            indices.append(count + len(constants))
            constants.append(content[end:offset])
        if index is not None:
            form += kind
            indices.append(index)
        end = offset + struct.calcsize(kind)
    packed = struct.Struct(form)
    assert packed.size == len(content)
    return packed.pack_into, constants, _getter(indices)


def _getter(indices: list[int]) -> Any:
    """Takes the items at some indices, as a tuple."""
    return itemgetter(*indices) if len(indices) > 1 else lambda items: (items[indices[0]],)


def _config(shape: Shape, stream: int, overlap: bool = False) -> Any:
    """What the driver is told of the shape of a launch, and whether it may `overlap` with the one before it."""
    told = config((shape.blocks, 1, 1), (shape.threads, 1, 1), shape.smem_bytes, stream)
    attributes = []
    if overlap:
        attributes.append(_attribute("PROGRAMMATIC_STREAM_SERIALIZATION"))
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if shape.cluster > 1:  # a block that is alone needs no cluster, and many a GPU knows none
        attributes.append(_attribute("CLUSTER_DIMENSION"))
        extents = attributes[-1].value.clusterDim
        extents.x, extents.y, extents.z = shape.cluster, 1, 1
        if CLUSTER_POLICY != "DEFAULT":
            attributes.append(_attribute("CLUSTER_SCHEDULING_POLICY_PREFERENCE"))
            policy = getattr(
                _driver.driver().CUclusterSchedulingPolicy, f"CU_CLUSTER_SCHEDULING_POLICY_{CLUSTER_POLICY}"
            )
            attributes[-1].value.clusterSchedulingPolicyPreference = policy
    if attributes:
        told.attrs = attributes
        told.numAttrs = len(attributes)
    return told


def config(grid: tuple[int, int, int], block: tuple[int, int, int], smem_bytes: int, stream: int) -> Any:
    """What the driver is told of a launch: thread blocks, threads of each, dynamic shared memory and the stream."""
    told = _driver.driver().CUlaunchConfig()
    told.gridDimX, told.gridDimY, told.gridDimZ = grid
    told.blockDimX, told.blockDimY, told.blockDimZ = block
    told.sharedMemBytes = smem_bytes
    told.hStream = stream
    return told


def _attribute(name: str) -> Any:
    bindings = _driver.driver()
    attribute = bindings.CUlaunchAttribute()
    attribute.id = getattr(bindings.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    return attribute
