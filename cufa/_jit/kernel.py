"""`cufa.jit`: a kernel of the caller's own, compiled for the GPU of the arrays that it is launched on."""

from __future__ import annotations

import ctypes
import math
import operator
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .._bundles.selection import arch_of
from .._call.arrays import CPU, Spec
from .._compile import jit as _compiler
from .._compile import listing as _listing
from .._driver import counts as _counts
from .._driver import driver as _driver
from .._driver import launch as _launch
from .._kernels.unit import Unit
from ..errors import ArgumentError, CudaError
from . import loading as _loading
from . import signature as _signature
from . import viewing as _viewing
from .signature import Parameter
from .tensor_map import TensorMap

MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
"""What no launch may exceed, along x, y and z."""

_REFUSED = re.compile(
    r"-[IDU].*|--?(gpu-architecture|arch|include-path|pre-include|include|define-macro|undefine-macro|"
    r"relocatable-device-code|rdc|device-c|dc|dlink-time-opt|dlto|optix-ir|pch|pch-dir|create-pch|use-pch)([= ].*)?"
)
"""Options that are `jit`'s own, that make no machine code, or that let in files which the cache would not know."""

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_INCLUDE = re.compile(r"^\s*(?:#|%:)\s*include\s*(\S[^\n]*)", re.MULTILINE)
_FILE = re.compile(r"""[<"]((?:[/\\]|[A-Za-z]:)[^>"]*)""")


@dataclass(frozen=True)
class CompiledKernel:
    """What became of a kernel, and what it takes.

    Attributes
    ----------
    arch : str
        What it was compiled for, as ``sm_90a``.
    registers : int
        Per thread.
    shared_bytes : int
        Of the shared memory that the source declares; what a launch asks for comes on top.
    spill_bytes : int
        That registers are stored to, and loaded from, in local memory.
    log : str
        What NVRTC said, warnings included.
    cubin : bytes
        The machine code in its ELF file.
    """

    name: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    log: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @cached_property
    def sass(self) -> str | None:
        """The machine code as text, of this kernel alone; None where no ``cuobjdump`` and ``nvdisasm`` are found."""
        if not _listing.can_disassemble():
            return None
        text = _listing.sass(self.cubin)
        parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)
        functions: dict[str, str] = dict(zip(parts[1::2], parts[2::2], strict=True))
        return functions[self.name]

    @cached_property
    def instructions(self) -> int | None:
        """How many instructions the machine code has, without the NOPs that fill it up; None where `sass` is None."""
        if self.sass is None:
            return None
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", self.sass, re.MULTILINE)
        return len([opcode for opcode in found if opcode != "NOP"])


class JitKernel:
    """A kernel that `jit` has made. It is launched by calling it::

        kernel(x, y, n, grid=(n + 255) // 256, block=256, shared_bytes=0)

    Arguments are arrays on one GPU, all of the same framework, for pointers; None for a null pointer; what `tensor_map`
    returns for tensor maps; and Python's or NumPy's numbers, of the kind that the parameter has: a bool for a ``bool``,
    an integer for an ``int``, an integer or a float for a ``float``. Nothing else is converted. An array gives its
    address alone: its shape and strides are arguments like others.

    It runs on the current stream of the arrays' framework. Once the kernel is loaded, a launch can be captured into a
    CUDA graph.

    Attributes
    ----------
    name, source : str
    signature : str
        The parameters as they are declared.

    Raises
    ------
    TypeError
        If a launch has too many or too few arguments, or one of another kind, dtype or framework; or if it has no
        array, which would say on which GPU.
    ValueError
        If arrays are in host memory or on several GPUs, a number does not fit its type, or `grid`, `block` or
        `shared_bytes` are not what the GPU and the kernel allow.
    CompileError
        If the source does not compile; NVRTC's log follows, with the lines of the source.
    MissingKernelError
        If the kernel is not loaded, and must not be compiled, or the stream is being captured.
    CudaError
        If the driver refuses the launch.
    """

    def __init__(
        self,
        source: str,
        name: str,
        signature: str,
        parameters: tuple[Parameter, ...],
        behind: str,
        headers: Mapping[str, bytes],
        options: tuple[str, ...],
    ) -> None:
        self.source = source
        self.name = name
        self.signature = signature
        self._parameters = parameters
        self._offsets, self._size = _signature.offsets(parameters)
        self._arrays = tuple(index for index, each in enumerate(parameters) if each.kind == "array")
        self._behind = behind
        self._headers = headers
        self._options = options
        self._loaded: dict[int, _loading.Loaded] = {}
        self._counted = _counts.tally("launches", name).add

    def __reduce__(self) -> tuple[Any, ...]:
        # What is loaded is the process's own: a copy loads it again.
        given = self.source, self.name, self.signature, self._parameters, self._behind, self._headers, self._options
        return JitKernel, given

    def __repr__(self) -> str:
        return f"<cufa.JitKernel {self.name}({self.signature})>"

    def compile(self, arch: str | int | None = None) -> CompiledKernel:
        """Compile the kernel, and say what it takes. No GPU is needed.

        Parameters
        ----------
        arch : str or int, optional
            As ``"sm_90"`` or 90. From 9.0 on the instructions that an architecture alone has are there, too, such as
            wgmma. By default that of the current GPU.

        Returns
        -------
        CompiledKernel

        Raises
        ------
        ValueError
            If `arch` is none.
        CompileError
            If the source does not compile, NVRTC does not know the architecture, or it is missing.
        MissingKernelError
            If the kernel is not in the cache, and ``CUFA_DISABLE_JIT`` is set.
        CudaError
            Without `arch`, if there is no GPU.
        """
        if arch is None:
            try:
                found: int | None = _driver.device(_driver.current_ordinal() or 0).arch
            except CudaError as error:
                raise CudaError(f"{error} Without a GPU say what to compile for, as compile('sm_90').") from None
        else:
            found = arch_of(str(arch))
        if found is None:
            raise ArgumentError(f"{self.name}: arch is {arch!r}; write sm_90, or 90.")
        unit = self._unit(found)
        entry = _compiler.own_entry_of(unit)
        log = entry.meta["log"]
        own = _loading.log_of(unit, log)
        taken = _compiler.resources_of(own)
        return CompiledKernel(
            self.name,
            f"sm_{_compiler.target_of(unit)}",
            taken.registers,
            _loading.static_shared_bytes(own),
            taken.spill_bytes,
            log,
            entry.cubin,
        )

    def __call__(
        self,
        *arguments: Any,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int = 0,
    ) -> None:
        """Launch the kernel; see `JitKernel`.

        Parameters
        ----------
        *arguments
            One for each parameter.
        grid, block : int or sequence of int
            Thread blocks of the grid, and threads of a block, along x, y and z.
        shared_bytes : int
            Dynamic shared memory of a block.
        """
        if len(arguments) != len(self._parameters):
            raise TypeError(
                f"{self.name}: {len(arguments)} arguments are given, and the kernel has {len(self._parameters)} "
                f"parameters: {self.signature}."
            )
        extents = self._extents("grid", grid, MAX_GRID), self._extents("block", block, MAX_BLOCK)
        threads = extents[1][0] * extents[1][1] * extents[1][2]
        if threads > MAX_THREADS:
            raise ArgumentError(f"{self.name}: block is {block}, {threads} threads; it has at most {MAX_THREADS}.")
        (shared,) = self._integers("shared_bytes", (shared_bytes,))
        values, device, stream, kept = self._values(arguments)
        _driver.enter(device)
        loaded = self._on(device, stream)
        if threads > loaded.max_threads:
            raise ArgumentError(
                f"{self.name}: block is {block}, and the kernel's registers, or its __launch_bounds__, allow "
                f"{loaded.max_threads} threads."
            )
        if not 0 <= shared <= loaded.max_shared_bytes:
            raise ArgumentError(
                f"{self.name}: shared_bytes is {shared}; beside what the kernel declares, this GPU has "
                f"{loaded.max_shared_bytes} for a block."
            )
        memory = ctypes.create_string_buffer(max(1, self._size))
        for parameter, offset, value in zip(self._parameters, self._offsets, values, strict=True):
            struct.pack_into(f"={parameter.form}", memory, offset, value)
        base = ctypes.addressof(memory)
        places = (ctypes.c_void_p * max(1, len(values)))(*(base + offset for offset in self._offsets))
        shape = _launch.config(*extents, shared, stream)
        with _driver.current(device):
            (status,) = _driver.driver().cuLaunchKernelEx(shape, loaded.function, ctypes.addressof(places), 0)
        if status != 0:
            raise CudaError(f"cufa: launching {self.name} failed: {_driver.describe(_driver.driver(), status)}.")
        del kept  # what was borrowed may go now that the work is enqueued
        self._counted()

    def _unit(self, arch: int) -> Unit:
        """What is compiled for an architecture."""
        # What one architecture alone has may be there where it is compiled for, and not for an older one of its family.
        suffix = "a" if arch >= 90 and arch in _compiler.nvrtc().archs else ""
        words = f"the kernel {self.name} for sm_{arch}{suffix}"
        source = self.source + self._behind
        return Unit(self.name, source, self._headers, (self.name,), arch, suffix, words, None, self._options)

    def _on(self, device: int, stream: int) -> _loading.Loaded:
        """The kernel, loaded for a GPU."""
        found = self._loaded.get(device)
        if found is None:
            found = _loading.load(self._unit(_driver.device(device).arch), device, stream)
            found = self._loaded.setdefault(device, found)
        return found

    def _extents(self, name: str, given: int | Sequence[int], most: tuple[int, int, int]) -> tuple[int, int, int]:
        extents = self._integers(name, given if isinstance(given, Sequence) else (given,))
        x, y, z = (*extents, 1, 1, 1)[:3]
        if not 1 <= len(extents) <= 3 or not all(1 <= a <= b for a, b in zip((x, y, z), most, strict=True)):
            raise ArgumentError(f"{self.name}: {name} is {given}; it has 1 to {most} along x, y and z.")
        return x, y, z

    def _integers(self, name: str, values: Sequence[Any]) -> tuple[int, ...]:
        try:
            return tuple(map(operator.index, values))
        except TypeError:
            raise TypeError(f"{self.name}: {name} has to be made of integers, as 4 or (4, 2).") from None

    def _values(self, arguments: tuple[Any, ...]) -> tuple[list[Any], int, int, Any]:
        """What the kernel is given, the GPU, the stream, and what has to be kept until the launch is enqueued."""
        values: list[Any] = [0] * len(arguments)
        for index, (parameter, given) in enumerate(zip(self._parameters, arguments, strict=True)):
            if parameter.kind == "number":
                values[index] = self._number(parameter, given)
            elif parameter.kind == "map":
                if not isinstance(given, TensorMap):
                    text = f"is a {type(given).__name__}, not a tensor map; make one by cufa.tensor_map"
                    raise TypeError(f"{self.name}: {parameter.name} {text}.")
                values[index] = given.content
        # A pointer's own array, or that of a map; the first of them says where.
        places = [index for index in self._arrays if arguments[index] is not None]
        mapped = [index for index, each in enumerate(self._parameters) if each.kind == "map"]
        if not places and not mapped:
            raise TypeError(f"{self.name}: no argument is an array, which would say on which GPU to run.")
        given = (*(arguments[index] for index in places), *(arguments[index].array for index in mapped))
        parameters = [self._parameters[index] for index in (*places, *mapped)]
        written = tuple(index for index, each in enumerate(parameters) if each.written)
        view, specs = _viewing.view(self.name, tuple(each.name for each in parameters), given, written)
        for parameter, spec in zip(parameters, specs, strict=True):
            self._check_array(parameter, spec, parameters[0], specs[0])
        for index, pointer in zip(places, view.pointers, strict=False):
            values[index] = int(pointer)
        device = specs[0].device
        return values, device, view.stream(device), view

    def _number(self, parameter: Parameter, given: Any) -> Any:
        try:
            return _signature.number(parameter, given)
        except TypeError as error:
            raise TypeError(f"{self.name}: {parameter.name} {error}.") from None
        except ValueError as error:
            raise ArgumentError(f"{self.name}: {parameter.name} {error}.") from None

    def _check_array(self, parameter: Parameter, spec: Spec, first: Parameter, found: Spec) -> None:
        wrong = f"{self.name}: {parameter.name} is"
        if spec.device == CPU:
            raise ArgumentError(f"{wrong} in host memory; pass an array on a GPU.")
        if spec.device != found.device:
            raise ArgumentError(f"{wrong} on cuda:{spec.device}, and {first.name} on cuda:{found.device}.")
        if spec.framework != found.framework:
            raise TypeError(f"{wrong} a {spec.framework} array, and {first.name} a {found.framework} one.")
        if parameter.dtype is not None and spec.dtype != parameter.dtype:
            raise TypeError(f"{wrong} {spec.dtype}, but is declared {parameter.text!r}, which is {parameter.dtype}.")
        if parameter.written and (not spec.writable or spec.copied):
            raise ArgumentError(f"{wrong} read-only, but is declared {parameter.text!r}; the kernel may write it.")


def jit(
    source: str,
    name: str,
    *,
    signature: str | None = None,
    defines: Mapping[str, str | int | float] | None = None,
    headers: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> JitKernel:
    """Make a kernel of CUDA C++ that is launched on arrays.

    It is compiled with NVRTC when it is first launched, for the GPU that the arrays are on, and kept in cufa's cache on
    disk (`cufa.cache`). What comes back may be kept, and used from any thread.

    Parameters
    ----------
    source : str
        It declares ``extern "C" __global__ void name(...)``. Every function without a ``__host__`` is one for the GPU.
        It may include cufa's own headers, as ``"ptx/mma.cuh"``: see the directory ``cuda_src`` of the sources.
    name : str
        Of the kernel.
    signature : str, optional
        The types and names of its parameters, as ``"float* y, const float* x, int n"``. By default it is read from the
        source. Types are those of CUDA and of ``core/types.cuh``: a pointer to a known type takes arrays of its dtype,
        and any other pointer arrays of any dtype; an array behind a pointer that is not to ``const`` is written.
    defines : mapping of str to (str, int or float), optional
        Macros without parameters, in the signature, too; so a type may be one.
    headers : mapping of str to str, optional
        Texts that the source may include, by path. They come before cufa's own. No file is included from the disk:
        neither the CUDA toolkit's headers nor those of the working directory.
    options : sequence of str, optional
        Of NVRTC's, as ``"--use_fast_math"``. Those that name files or an architecture are refused.

    Returns
    -------
    JitKernel

    Raises
    ------
    TypeError
        If a parameter is of a type that no argument can be converted to, or the arguments of `jit` are of wrong types.
    ValueError
        If the source does not declare the kernel or names a file to include, or an option is refused.

    See Also
    --------
    tensor_map : Describes an array to the tensor memory accelerator.

    Examples
    --------
    >>> import cufa
    >>> source = '''
    ... extern "C" __global__ void axpy(float* y, const float* x, float a, int n) {
    ...   const int i = blockIdx.x * blockDim.x + threadIdx.x;
    ...   if (i < n) y[i] += a * x[i];
    ... }'''
    >>> axpy = cufa.jit(source, "axpy")
    >>> axpy
    <cufa.JitKernel axpy(float* y, const float* x, float a, int n)>
    >>> axpy.compile("sm_90").spill_bytes
    0

    On CuPy arrays, or those of torch:

    >>> axpy(y, x, 2.0, n, grid=(n + 255) // 256, block=256)  # doctest: +SKIP
    """
    for what, text in (("source", source), ("name", name), ("signature", signature)):
        if not isinstance(text, str) and not (what == "signature" and text is None):
            raise TypeError(f"jit: {what} is a {type(text).__name__}; it is text.")
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"jit: name is {name!r}, and not the name of a function.")
    macros = _macros({} if defines is None else defines)
    texts = _texts({} if headers is None else headers)
    _check_text("source", source)
    for text in (source, *texts.values()):
        _check_includes(text, macros, texts)
    if not isinstance(options, (list, tuple)) or not all(isinstance(each, str) for each in options):
        raise TypeError(f"jit: options is {options!r}; pass a list of texts.")
    if refused := [each for each in options if _REFUSED.fullmatch(each)]:
        raise ArgumentError(
            f"jit: the option {refused[0]} is refused: architectures and macros have arguments of their own, and the "
            "cache would not know the content of files; pass headers= or defines=."
        )
    try:
        declared = _signature.of_source(source, name) if signature is None else _signature.plain(signature).strip()
        parameters = _signature.parse(declared, macros)
    except TypeError as error:
        raise TypeError(f"jit: {error}.") from None
    except ValueError as error:
        raise ArgumentError(f"jit: {error}.") from None
    # Of a source that includes nothing the key in the cache need not change with cufa's headers.
    included = {**_compiler.headers(), **{path: text.encode() for path, text in texts.items()}}
    if "include" not in source:
        included = {}
    # The compiler compares what was read, or told, with what the source declares, behind macros and typedefs.
    if signature is None:
        behind = _signature.redeclared(name, parameters)
    else:
        behind = "\n" + _signature.declaration(name, " ".join(declared.split()), "what signature= says")
    # Else files of the working directory could be included, and the cache would not notice when they change.
    own = ("--no-source-include", *(f"--define-macro={macro}={value}" for macro, value in macros.items()))
    return JitKernel(source, name, declared, parameters, behind, included, (*own, *options))


def _macros(defines: Any) -> dict[str, str]:
    """Macros and what they stand for, as text."""
    if not isinstance(defines, Mapping):
        raise TypeError(f"jit: defines is a {type(defines).__name__}; it is a mapping of names to texts and numbers.")
    for macro, value in defines.items():
        if not isinstance(macro, str) or not _NAME.fullmatch(macro):
            raise ArgumentError(f"jit: defines has {macro!r}, which is not the name of a macro without parameters.")
        if not isinstance(value, (str, int, float, np.integer, np.floating)):
            raise TypeError(f"jit: {macro} is defined as a {type(value).__name__}; pass a text or a number.")
        if isinstance(value, (float, np.floating)) and not math.isfinite(value):
            raise ArgumentError(f"jit: {macro} is defined as {value}, which C++ has no number for; pass an expression.")
        _check_text(f"the macro {macro}", str(value))
    return {macro: str(int(value) if isinstance(value, bool) else value) for macro, value in defines.items()}


def _texts(headers: Any) -> Mapping[str, str]:
    """Headers by path, if they are text."""
    if not isinstance(headers, Mapping):
        raise TypeError(f"jit: headers is a {type(headers).__name__}; it is a mapping of paths to texts.")
    for path, text in headers.items():
        if not isinstance(path, str) or not isinstance(text, str):
            raise TypeError(f"jit: headers has {path!r}, a {type(text).__name__}; both paths and headers are text.")
        _check_text(f"the header {path}", text)
    return headers


def _check_text(what: str, text: str) -> None:
    try:
        if b"\0" not in text.encode():
            return
    except UnicodeEncodeError:
        pass
    raise ArgumentError(f"jit: {what} has characters that a compiler does not read, such as a 0 or half a surrogate.")


def _check_includes(text: str, macros: Mapping[str, str], headers: Mapping[str, str]) -> None:
    """See that it names no file of the disk, since the cache would not notice when that changes."""
    for found in _INCLUDE.finditer(text):
        file = _FILE.match(macros.get(found[1].strip(), found[1]))
        if file and file[1] not in headers:
            raise ArgumentError(f"jit: the source includes the file {file[1]}; pass its text by headers= instead.")
