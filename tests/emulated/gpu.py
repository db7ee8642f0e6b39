"""An emulated GPU: arrays in its memory, and launches that programs on the CPU run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from cufa._call import arrays as _arrays
from cufa._call import options as _options
from cufa._call import problem as _problem
from cufa._call.arrays import Adapter, Spec, contiguous, numpy_dtype
from cufa._call.options import Options
from cufa._compile import jit as _jit
from cufa._driver import driver as _driver
from cufa._jit.kernel import JitKernel
from cufa._jit.loading import Loaded
from cufa._kernels import Plan, tensor_map
from cufa._kernels.record import MAP_BYTES
from cufa._kernels.unit import record_of, unit_of
from cufa._operations import call as _call
from cufa._operations.operation import Operation

from . import build
from .build import EmulationError, Program
from .memory import BASE, CAPACITY, POISONS, READABLE, WRITABLE, Memory

SECONDS = 120
"""How long launches may take."""

MOST_RESIDENT = 16
"""Thread blocks that may run at a time: ``max_resident`` in cuda/state.h."""

CLUSTER = "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"

OWN = (*(path.name for path in build.CUDA.glob("*.*")), "ptx/", "??")
"""Files whose lines are left out where the place of an error is told."""

DEFAULTS = Options(False, None, None, 0.0, False, False)


class Function(NamedTuple):
    """A loaded kernel: one ``__global__`` function of a program, and the size of its argument."""

    program: Program
    entry: str
    argument_bytes: int


class Launched(NamedTuple):
    """A launch: the function, thread blocks, threads and shared memory per block, its argument, blocks per cluster.

    `width` is how many of the thread blocks lie along x, the rest being along y; all if 0.
    """

    function: Function
    blocks: int
    threads: int
    smem_bytes: int
    argument: bytes
    cluster: int = 1
    width: int = 0


class Array:
    """An array in the memory of an emulated GPU, as the arrays of a framework are in that of a real one."""

    def __init__(self, gpu: Gpu, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> None:
        self.gpu, self.address, self.shape, self.strides, self.dtype = gpu, address, shape, strides, dtype
        self.allow(READABLE)

    def allow(self, right: int) -> None:
        """Let kernels read or write it."""
        self.gpu.memory.allow(self.address, self.shape, self.strides, numpy_dtype(self.dtype).itemsize, right)

    def numpy(self) -> Any:
        """A copy for NumPy, when all launches are done."""
        self.gpu.synchronize()
        return self.gpu.memory.view(self.address, self.shape, self.strides, numpy_dtype(self.dtype)).copy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.numpy(), dtype)


class ArrayAdapter(Adapter):
    """How cufa reads arrays of a kind of GPU: problems, which remember their kernels, are told apart by it."""

    name = "emulated"

    def view(self, array: Array) -> tuple[int, Any]:
        adapter = adapter_of(array.gpu.arch, array.gpu.num_sms, array.gpu.changed)
        return array.address, (adapter, array.shape, array.strides, array.dtype, 0, array.address % 16, True)

    def view_written(self, array: Array) -> tuple[int, Any]:
        array.allow(WRITABLE)
        return self.view(array)

    def spec(self, layout: Any) -> Spec:
        return Spec(self.name, *layout[1:])

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> tuple[Array, int]:
        array = like.gpu.empty(shape, dtype, "what the call allocates")
        return array, array.address

    def stream(self, array: Array, device: int) -> int:
        return 0

    def current_device(self) -> int:
        return 0


Sources = tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def adapter_of(arch: int, num_sms: int, changed: Sources) -> ArrayAdapter:
    return ArrayAdapter()


_arrays.register(Array, ArrayAdapter())  # whose `view` names that of the array's GPU


class Gpu:
    """An emulated GPU, on which calls of cufa run that are given its arrays, within a ``with`` statement.

    Parameters
    ----------
    arch : int
        Compute capability.
    num_sms : int
        Few make grids small, and let blocks have several tiles.
    order : int, optional
        The seed of an order in which thread blocks run side by side, up to `MOST_RESIDENT` of them. By default they run
        one after the other. Memory that is not written yet holds NaN where it is even or not given, and else numbers.
    changed : mapping of str to str, optional
        Sources in place of those of ``cuda_src``, or beside them, by their paths there.

    Examples
    --------
    >>> import numpy, cufa, emulated
    >>> q = numpy.ones((1, 5, 2, 16), numpy.float16)
    >>> with emulated.Gpu(order=1) as gpu:
    ...     x = gpu.array(q)
    ...     out = cufa.attention(x, x, x).numpy()
    >>> bool((out == 1).all())
    True
    """

    def __init__(
        self, arch: int = 80, num_sms: int = 3, order: int | None = None, changed: Mapping[str, str] | None = None
    ) -> None:
        self.arch, self.num_sms, self.order = arch, num_sms, order
        self.changed = tuple(sorted((changed or {}).items()))
        self.memory = Memory(POISONS[(order or 0) % 2])
        self.launches: list[Launched] = []
        self._waiting: list[Launched] = []

    # --- arrays -------------------------------------------------------------------------------------------

    def array(self, array: Any, name: str = "an array") -> Array:
        """A NumPy array, laid out in memory as it is, with nothing that may be touched between its elements."""
        return self.arrays({name: array})[name]

    def arrays(self, arrays: Mapping[str, Any]) -> dict[str, Array]:
        """The same of several by name, of which those that share memory still do."""
        given = {name: np.asarray(array) for name, array in arrays.items()}
        spans = sorted((*_span(array), name) for name, array in given.items())
        found: dict[str, Array] = {}
        while spans:
            begin, end, name = spans.pop(0)
            together = [name]
            while spans and spans[0][0] < end:
                _, its_end, name = spans.pop(0)
                end = max(end, its_end)
                together.append(name)
            base = self.memory.allocate(" and ".join(together), end - begin, begin)
            for name in together:
                array = given[name]
                strides = tuple(stride // array.itemsize for stride in array.strides)
                address = base + array.__array_interface__["data"][0] - begin
                found[name] = Array(self, address, array.shape, strides, array.dtype.name)
                self.memory.view(address, array.shape, strides, array.dtype)[...] = array
        return {name: found[name] for name in given}

    def empty(self, shape: tuple[int, ...], dtype: str, name: str = "an array") -> Array:
        """An array that holds anything."""
        strides, itemsize = contiguous(shape), numpy_dtype(dtype).itemsize
        array = Array(self, self.memory.allocate(name, itemsize * math.prod(shape)), shape, strides, dtype)
        array.allow(WRITABLE)
        return array

    def __call__(self, flat: Any, view: Any) -> Array:
        """The array of a `cufa.testing.View` of flat memory: so that a GPU can be given as `xp` to a `Case`."""
        itemsize = flat.itemsize
        address = self.memory.allocate("an array", flat.nbytes)
        self.memory.view(address, flat.shape, (1,), flat.dtype)[...] = flat
        return Array(self, address + view.offset * itemsize, view.shape, view.strides, flat.dtype.name)

    # --- calls --------------------------------------------------------------------------------------------

    def __enter__(self) -> Gpu:
        self._entered = contextlib.ExitStack()
        device = _driver.Device(self.arch, self.num_sms)
        for module, name, value in (
            (_driver, "device", lambda _: device),
            (_driver, "driver", lambda: _Driver),
            (_driver, "overlaps", lambda _: False),
            (_driver, "current", lambda _: contextlib.nullcontext()),
            (_driver, "enter", lambda _: False),
            (_driver, "is_capturing", lambda _: False),
            (_driver, "download", self._download),
            (tensor_map, "_driver_encode", tensor_map._driver_encode.__wrapped__),  # which remembers what drivers gave
            (_jit, "headers", lambda: headers_of(self.changed)),
            (_jit, "load_kernel", lambda plan, *_: load(plan.bare, self.changed)),
            (JitKernel, "_on", lambda kernel, *_: load_own(kernel, self.arch, self.changed)),
            (_Driver, "gpu", self),
        ):
            self._entered.enter_context(mock.patch.object(module, name, value))
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                self.synchronize()
        finally:
            self._entered.close()
            self.memory.close()

    def _download(self, ordinal: int, host: int, address: int, size: int, stream: int) -> None:
        self.synchronize()
        ctypes.memmove(host, self.memory.view(address, (size,), (1,), np.uint8).tobytes(), size)

    def enqueue(self, launched: Launched) -> None:
        self.launches.append(launched)
        self._waiting.append(launched)

    def synchronize(self) -> None:
        """Run what was launched.

        Raises
        ------
        EmulationError
            If kernels do what they must not, or are stuck; with the lines of the sources where they do so.
        """
        waiting, self._waiting = self._waiting, []
        for program, together in itertools.groupby(waiting, lambda launched: launched.function.program):
            self._run(program.path, list(together))

    def _run(self, program: Path, launches: list[Launched]) -> None:
        seed, resident = (0, 1) if self.order is None else (self.order, MOST_RESIDENT)
        told = struct.pack("<QQ4I", BASE, CAPACITY, seed, resident, len(launches), self.memory.poison)
        for each in launches:
            numbers = each.blocks, each.threads, each.smem_bytes, each.cluster, len(each.argument)
            width = each.width or each.blocks
            told += struct.pack("<64s6I", each.function.entry.encode(), *numbers, width) + each.argument
        file = self.memory.file
        process = subprocess.Popen(
            [program, str(file)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(file,)
        )
        try:
            _, said = process.communicate(told, SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            _, said = process.communicate()
        if process.returncode != 0:
            said = said.decode() or f"emulated: the program ends with {process.returncode}"
            raise EmulationError(self._explained(program, said))

    def _explained(self, program: Path, said: str) -> str:
        """What a program said, with lines of sources for addresses in it, and with the names of arrays."""
        lines = []
        for line in said.splitlines():
            word, *numbers = line.split()
            if word == "at":
                lines += _places(program, [int(number, 16) for number in numbers])
                continue
            lines.append(
                re.sub(r"address ([0-9a-f]{9,})", lambda x: f"{x[0]} ({self.memory.named(int(x[1], 16))})", line)
            )
        return "\n".join(lines)


def _span(array: Any) -> tuple[int, int]:
    """The address of an array's first byte in memory, and that behind its last."""
    begin = end = array.__array_interface__["data"][0]
    if array.size == 0:
        return begin, begin
    for extent, stride in zip(array.shape, array.strides, strict=True):
        begin, end = begin + min(0, (extent - 1) * stride), end + max(0, (extent - 1) * stride)
    return begin, end + array.itemsize


def _places(program: Path, addresses: list[int]) -> list[str]:
    """Functions and lines of return addresses, and of what was inlined there; those of the machine are left out."""
    command = ["addr2line", "-e", str(program), "-i", *(hex(address - 1) for address in addresses)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return [f"  at {address:x} of {program}" for address in addresses]
    lines = [line for line, _ in itertools.groupby(re.sub(r"^(\./)+| \(.*", "", line) for line in found)]
    return [f"  at {line}" for line in lines if not line.startswith(OWN)]


_headers = _jit.headers


@functools.lru_cache(maxsize=256)
def headers_of(changed: Sources) -> dict[str, bytes]:
    """The headers of ``cuda_src``, some of them changed."""
    return {**_headers(), **{path: text.encode() for path, text in changed}}


@functools.lru_cache(maxsize=256)
def load(plan: Plan, changed: Sources) -> tuple[Function, ...]:
    """The functions of a kernel, in place of `cufa._compile.jit.load_kernel`."""
    unit = unit_of(plan, headers_of(changed))
    program = Program(unit.source, unit.headers, f"attention::{plan.kernel.record}", unit.entries, unit.arch)
    size = record_of(plan, unit.headers).size
    return tuple(Function(program, entry, size) for entry in unit.entries)


@functools.lru_cache(maxsize=256)
def load_own(kernel: JitKernel, arch: int, changed: Sources) -> Loaded:
    """A kernel of `cufa.jit`, in place of `JitKernel._on`: one that has all of its parameters in a struct."""
    unit = kernel._unit(arch)
    macros = re.findall(r"--define-macro=(\w+)=(.*)", "\n".join(unit.options))
    defines = "".join(f"#define {name} {value}\n" for name, value in macros)
    members = "".join(f"  {each.text};\n" for each in kernel._parameters)
    given = ", ".join(f"arguments.{each.name}" for each in kernel._parameters)
    source = (
        f"{defines}#line 1\n{unit.source}\n"
        f"struct Arguments {{\n{members}}};\n"
        f"void with_all(const Arguments& arguments) {{ {kernel.name}({given}); }}\n"
    )
    program = Program(source, {**headers_of(changed), **unit.headers}, "Arguments", ("with_all",), arch)
    return Loaded(Function(program, "with_all", kernel._size), 1024, 227 << 10)


class _Names:
    """An enumeration of the driver's, whose members are their own names."""

    def __getattr__(self, name: str) -> str:
        return name


class _Driver:
    """What launches ask of the driver's bindings."""

    gpu: Gpu | None = None
    CUlaunchConfig = SimpleNamespace
    cuuint32_t = cuuint64_t = int
    CUtensorMapDataType = CUtensorMapInterleave = CUtensorMapSwizzle = _Names()
    CUtensorMapL2promotion = CUtensorMapFloatOOBfill = _Names()
    CUlaunchAttributeID = CUclusterSchedulingPolicy = _Names()

    class CUlaunchAttribute:
        def __init__(self) -> None:
            self.id = ""
            self.value = SimpleNamespace(clusterDim=SimpleNamespace())

    @staticmethod
    def cuTensorMapEncodeTiled(
        element: str,
        rank: int,
        address: int,
        extents: list[int],
        strides: list[int],
        box: list[int],
        steps: list[int],
        interleave: str,
        swizzle: str,
        *rest: str,
    ) -> tuple[int, Any]:
        """A map as ``Tensor`` in cuda/engines.cpp has it, if the driver would make it, and a status."""
        row_bytes = int(swizzle.removeprefix("CU_TENSOR_MAP_SWIZZLE_").removesuffix("B"))
        right = (
            element in ("CU_TENSOR_MAP_DATA_TYPE_FLOAT16", "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16")
            and interleave == "CU_TENSOR_MAP_INTERLEAVE_NONE"
            and rest[-1] == "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE"
            and (len(extents), len(strides), len(box), steps) == (rank, rank - 1, rank, [1] * rank)
            and 3 <= rank <= 5
            and address % 16 == 0
            and all(1 <= extent <= 1 << 32 for extent in extents)
            and all(stride % 16 == 0 and 0 <= stride < 1 << 40 for stride in strides)
            and all(1 <= extent <= 256 for extent in box)
            and row_bytes in (32, 64, 128)
            and box[0] * 2 == row_bytes  # else rows of a box would lie farther apart
        )
        if not right:
            return 1, None
        filled = [*box, *[1] * (5 - rank)], [*extents, *[1] * (5 - rank)], [*strides, *[0] * (5 - rank)]
        packed = struct.pack("<Q3I5I5Ixxxx4Q", address, rank, 2, row_bytes, *filled[0], *filled[1], *filled[2])
        made = ctypes.create_string_buffer(packed, MAP_BYTES)
        return 0, SimpleNamespace(getPtr=lambda: ctypes.addressof(made), made=made)

    @staticmethod
    def cuGetErrorString(status: int) -> tuple[int, bytes]:
        return 0, b"invalid argument"

    @classmethod
    def cuLaunchKernelEx(cls, config: Any, function: Function, arguments: int, extra: int) -> tuple[int]:
        assert cls.gpu is not None
        argument = ctypes.string_at(ctypes.c_void_p.from_address(arguments).value or 0, function.argument_bytes)
        cluster = next((each.value.clusterDim.x for each in getattr(config, "attrs", ()) if each.id == CLUSTER), 1)
        assert config.gridDimZ == config.blockDimY == config.blockDimZ == 1, "the emulator knows no other dimensions"
        blocks, shape = config.gridDimX * config.gridDimY, (config.blockDimX, config.sharedMemBytes)
        cls.gpu.enqueue(Launched(function, blocks, *shape, argument, cluster, config.gridDimX))
        return (0,)


def call(
    operation: Operation,
    arrays: Mapping[str, Any],
    *,
    arch: int = 80,
    num_sms: int = 3,
    order: int | None = None,
    changed: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run an operation on an emulated GPU, as a call of its function does on a real one.

    Parameters
    ----------
    operation : Operation
        For example ``cufa._operations.forward.ATTENTION``.
    arrays : mapping of str to NumPy array
        By the operation's names; those that are None or missing are not given. Results that are given are not
        written, but their values are among what is returned.
    arch, num_sms, order, changed
        As for `Gpu`.
    **options
        Those of the operation: ``causal``, ``return_lse``, …, its own, and those of its score terms.

    Returns
    -------
    dict of str to NumPy array
        Results by name.

    Raises
    ------
    EmulationError
        As `Gpu.synchronize`.

    Examples
    --------
    >>> import numpy, emulated
    >>> from cufa._operations.forward import ATTENTION
    >>> x = numpy.ones((1, 5, 2, 16), numpy.float16)
    >>> sorted(emulated.call(ATTENTION, {"q": x, "k": x, "v": x}, return_lse=True))
    ['lse', 'out']
    """
    known = {name: default for name, default in DEFAULTS._asdict().items() if name not in ("more", "late")}
    own = operation.owned.names
    for kind, names, all_names in (("options", options, [*known, *own]), ("arrays", arrays, operation.arrays)):
        if strange := sorted({*names} - {*all_names}):
            raise TypeError(f"{operation.name}: there are no {kind} {', '.join(strange)}.")
    asked = tuple(options.get(name, known.get(name)) for name in (*known, *own))
    with Gpu(arch, num_sms, order, changed) as gpu:
        placed = gpu.arrays({name: array for name, array in arrays.items() if array is not None})
        given = tuple(placed.get(name) for name in operation.arrays)
        found = _call.call(operation, given, asked)
        view = _arrays.view(operation.name, operation.arrays, given)
        problem = _problem.check(operation, view, _options.of(operation.name, asked, operation.owned))
        results = found if isinstance(found, tuple) else (found,)
        return {each.name: array.numpy() for each, array in zip(problem.results, results, strict=True)}
