"""Translation unit → key → cache → NVRTC → loaded kernel."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._driver import counts as _counts
from .._driver import driver as _driver
from .._driver import forks as _forks
from .._kernels import Plan
from .._kernels import unit as units
from .._kernels.kernel import PORTABLE_CLUSTER
from .._kernels.unit import Unit
from ..errors import CompileError, CudaError, MissingKernelError
from . import cache as _cache
from . import env as _env
from . import files as _files
from . import lookup as _lookup
from . import nvrtc as _nvrtc
from .bundle import command_for, runs_on
from .cache import CubinCache, Entry
from .lookup import Served
from .nvrtc import Nvrtc
from .sources import headers as headers

COMPILED, CACHED, BUNDLED, LOADED = (
    _counts.tally("kernels", what) for what in ("compiled", "cached", "bundled", "loaded")
)
"""How often a kernel was compiled, taken from the cache or from a bundle, and loaded."""


class Compiled(NamedTuple):
    """What NVRTC made of a source; `ptx` is what came between, if it was asked for."""

    cubin: bytes
    log: str
    seconds: float
    ptx: str = ""


class Resources(NamedTuple):
    """What a compiled kernel takes, from the compiler's log: registers per thread and spilled bytes."""

    registers: int
    spill_bytes: int


def nvrtc() -> Nvrtc:
    """The compiler: that which is loaded, or would be.

    Raises
    ------
    CompileError
        If there is none; the message says what to install.
    """
    return _nvrtc.find(notes)


def notes() -> CubinCache | None:
    """Where it is noted what NVRTC there is. A variable with a wrong value is for whoever needs the cache itself."""
    try:
        return cache()
    except ValueError:
        return None


def options_of(target: str) -> list[str]:
    """Options for NVRTC; target is ``80`` or ``90a``."""
    options = [f"--gpu-architecture=sm_{target}", *_common_options()]
    if nvrtc().version >= (12, 9):
        options.append("--no-cache")  # NVRTC's own cache would leave the log without registers and spills
    return options


def _common_options() -> list[str]:
    """What decides the machine code but for the architecture."""
    options = ["--device-as-default-execution-space", "--std=c++17", "--ptxas-options=-v"]
    return [*options, "--generate-line-info"] if _env.lineinfo() else options


def unit_of(plan: Plan) -> Unit:
    """The translation unit of a plan."""
    return units.unit_of(plan, headers())


def target_of(unit: Unit) -> str:
    """The architecture to compile for: the GPU's own, or an older one of its family that NVRTC knows."""
    archs, wanted = nvrtc().archs, unit.arch
    family = [arch for arch in archs if runs_on(arch, wanted)]
    if not family:
        major, minor = nvrtc().version
        raise CompileError(
            f"cufa: NVRTC {major}.{minor} does not compile for compute capability {wanted // 10}.{wanted % 10}; "
            "install a newer one, for example with pip install -U 'cufa[cuda13]'."
        )
    return f"{max(family)}{unit.target_suffix}"


def key_of(unit: Unit) -> str:
    """Digest of everything that goes into compiling it."""
    found = nvrtc()
    fields: dict[str, bytes | str | list[str]] = {
        "source": unit.source,
        "options": [*options_of(target_of(unit)), *unit.options],
        "nvrtc": [*map(str, found.version), found.build],
    }
    for name, text in unit.headers.items():
        fields[f"header {name}"] = text
    return _cache.digest(fields)


def source_key(unit: Unit) -> str:
    """Digest of everything that makes the kernel, but for the architecture and the compiler: its name in bundles."""
    fields: dict[str, bytes | str | list[str]] = {"source": unit.source, "options": _common_options()}
    for name, text in unit.headers.items():
        fields[f"header {name}"] = text
    return _cache.digest(fields)


def compile_unit(unit: Unit) -> Compiled:
    """Compile with NVRTC; no GPU is needed.

    Raises
    ------
    CompileError
        With NVRTC's log.
    """
    _nvrtc.settle(notes)
    options = [*options_of(target_of(unit)), *unit.options]
    return compile_source(unit.source, options, unit.words, unit.headers)


def compile_source(
    source: str, options: list[str], what: str, texts: Mapping[str, bytes] | None = None, *, ptx: bool = False
) -> Compiled:
    """`compile_unit` of a source that `what` names in messages; headers by path, those of ``cuda_src`` if None.

    What is compiled has its PTX as well if `ptx`.
    """
    bindings, texts = _nvrtc.load().bindings, headers() if texts is None else texts
    with _progress(what), _forks.section():
        status, compiled = _run_nvrtc(bindings, source, texts, options, ptx)
    saved = _save_source(source, texts, compiled.log)
    if status != 0:
        where = f" The source is in {saved}." if saved else " Set CUFA_SAVE_SOURCE to a directory to keep the source."
        name = getattr(status, "name", status)
        raise CompileError(f"cufa: compiling {what} failed ({name}).{where}\n{compiled.log}")
    return compiled


def _run_nvrtc(
    bindings: Any, source: str, texts: Mapping[str, bytes], options: list[str], ptx: bool
) -> tuple[Any, Compiled]:
    """The compiler's status and what it made, which has no cubin if that is not 0."""
    names = [name.encode() for name in texts]
    _, program = _nvrtc.call(
        "nvrtcCreateProgram",
        bindings.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(names), list(texts.values()), names),
    )
    try:
        began = time.perf_counter()
        (status,) = bindings.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
        seconds = time.perf_counter() - began
        _, size = _nvrtc.call("nvrtcGetProgramLogSize", bindings.nvrtcGetProgramLogSize(program))
        buffer = bytearray(size)
        bindings.nvrtcGetProgramLog(program, buffer)
        log = buffer.decode(errors="replace").strip("\0 \n")
        cubin, text = bytearray(), bytearray()
        if status == 0:
            _, size = _nvrtc.call("nvrtcGetCUBINSize", bindings.nvrtcGetCUBINSize(program))
            cubin = bytearray(size)
            _nvrtc.call("nvrtcGetCUBIN", bindings.nvrtcGetCUBIN(program, cubin))
        if status == 0 and ptx:
            _, size = _nvrtc.call("nvrtcGetPTXSize", bindings.nvrtcGetPTXSize(program))
            text = bytearray(size)
            _nvrtc.call("nvrtcGetPTX", bindings.nvrtcGetPTX(program, text))
        return status, Compiled(bytes(cubin), log, seconds, text.decode(errors="replace").rstrip("\0"))
    finally:
        bindings.nvrtcDestroyProgram(program)


def resources_of(log: str) -> Resources:
    """Registers, of the function that takes most, and spilled bytes, from what ``--ptxas-options=-v`` logs."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise CompileError(f"cufa: the compiler's log does not say what the kernel takes:\n{log}")
    return Resources(max(map(int, registers)), sum(int(stores) + int(loads) for stores, loads in spills))


_silent = threading.local()


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Say nothing on the terminal of what this thread compiles meanwhile: there is a progress bar."""
    before = getattr(_silent, "here", False)
    _silent.here = True
    try:
        yield
    finally:
        _silent.here = before


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say on an interactive terminal, and in the log, what is being compiled.

    At once and by no other thread: one cannot always be started, and may not run while the interpreter ends. Nor does a
    stream or a log that fails matter here.
    """
    wanted = _env.progress() if not getattr(_silent, "here", False) else False
    _cache.log(logging.INFO, "compiling %s", what)
    with contextlib.suppress(Exception):
        if sys.stderr is not None and (wanted or (wanted is None and sys.stderr.isatty())):
            print(f"cufa: compiling {what} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    yield
    _cache.log(logging.INFO, "compiled %s in %.2f s", what, time.perf_counter() - began)


def _save_source(source: str, texts: Mapping[str, bytes], log: str) -> Path | None:
    """Keep source, headers and log where ``CUFA_SAVE_SOURCE`` says; trouble in doing so is logged and no more."""
    directory = _env.save_source_dir()
    if directory is None:
        return None
    target = directory / hashlib.sha256(source.encode(), usedforsecurity=False).hexdigest()[:16]
    try:
        _files.save(target, {**texts, "kernel.cu": source.encode(), "log.txt": log.encode()})
    except _cache.TROUBLE as error:
        _cache.log(logging.WARNING, "the source of a kernel could not be saved: %s", error)
        return None
    return target


_caches: dict[str, CubinCache] = {}
_kernels: dict[tuple[Plan, int], tuple[Any, ...]] = {}
"""Loaded functions, by bare plan and GPU."""
_libraries: dict[str, Any] = {}
_lock = threading.Lock()
_key_locks: dict[str, threading.Lock] = {}


def _renew_locks() -> None:
    """In a forked child, where those that other threads held would never be released."""
    global _lock
    _lock = threading.Lock()
    _key_locks.clear()


_forks.after_in_child(_renew_locks)


def cache() -> CubinCache:
    """The store of cubins that the environment describes now."""
    described = repr([os.environ.get(variable.name) for variable in _env.VARIABLES]) + repr(_env.cache_dir())
    found = _caches.get(described)
    if found is None:
        found = _caches.setdefault(described, CubinCache.from_env())
    return found


def entry_of(unit: Unit) -> Entry:
    """The compiled kernel, from a bundle, the cache or the compiler."""
    served = bundled(unit)
    if served is None:
        return _entry_of(unit, _cache_key(unit))
    BUNDLED.add()
    return served.entry


def bundled(unit: Unit) -> Served | None:
    """The kernel from a bundle, if one serves; NVRTC is not asked."""
    bundles = _lookup.bundles()
    return bundles.find(source_key(unit), unit) if bundles else None


def why_not_bundled(unit: Unit) -> str:
    """Why no bundle serves, in one sentence that ends with what to do; empty if there are no bundles."""
    bundles = _lookup.bundles()
    return bundles.why(unit) if bundles else ""


def is_cached(unit: Unit) -> bool:
    """Whether the cache has the kernel.

    Raises
    ------
    CompileError, MissingKernelError
        If there is no NVRTC, whose kernel it would be.
    """
    return cache().get(_cache_key(unit)) is not None


def _cache_key(unit: Unit) -> str:
    try:
        return key_of(unit)
    except CompileError as error:  # without NVRTC nothing in the cache can be found
        if _env.jit_disabled():
            raise _missing(unit) from error
        raise


def _entry_of(unit: Unit, key: str) -> Entry:
    with _lock:
        lock = _key_locks.setdefault(key, threading.Lock())
    with lock:  # threads that want one kernel compile it once; different kernels compile side by side
        entry = cache().get(key)
        if entry is None:
            return _compile(unit, key)
        CACHED.add()
        return entry


def _compile(unit: Unit, key: str) -> Entry:
    if _env.jit_disabled():
        raise _missing(unit)
    with cache().claim(key, f"compiling {unit.words}") as made:
        if made is not None:
            CACHED.add()
            return made
        _nvrtc.settle(notes)
        if key_of(unit) == key:
            entry = compiled_entry(unit)
            cache().put(key, entry)
            return entry
    return _entry_of(unit, key_of(unit))  # another compiler than was expected has been loaded


def compiled_entry(unit: Unit) -> Entry:
    """The kernel from the compiler, which the cache is not told of."""
    compiled = compile_unit(unit)
    taken = resources_of(compiled.log)
    COMPILED.add()
    meta = {
        "kernel": unit.name,
        "what": unit.words,
        "arch": target_of(unit),
        "registers": taken.registers,
        "spill_bytes": taken.spill_bytes,
        "seconds": round(compiled.seconds, 3),
        "nvrtc": "{}.{} {:.12}".format(*nvrtc().version, nvrtc().build),
    }
    if unit.plan is None:  # who wrote it wants to know more of it
        meta["log"] = compiled.log
    return Entry(compiled.cubin, meta)


def _missing(unit: Unit) -> MissingKernelError:
    if unit.plan is None:
        return MissingKernelError(
            f"cufa: {unit.words} is not in the cache, and CUFA_DISABLE_JIT forbids compiling it; compile it once where "
            "that is allowed, into the same cache."
        )
    why = why_not_bundled(unit) or f"No bundle is there; {command_for(unit.plan)} makes one that serves."
    return MissingKernelError(
        f"cufa: {unit.words} is not in the cache, and CUFA_DISABLE_JIT forbids compiling it. {why} Run that where "
        "compiling is allowed, and let CUFA_BUNDLE_PATH name the file."
    )


def own_entry_of(unit: Unit) -> Entry:
    """The compiled kernel of the caller's, of which no bundle knows: from the cache or the compiler."""
    return _entry_of(unit, _cache_key(unit))


def own_library_of(unit: Unit) -> Any:
    """The loaded library of a kernel of the caller's."""
    return _cached_library(unit)


def is_loaded(plan: Plan, device: int) -> bool:
    """Whether the next call finds the kernel ready."""
    return (plan.bare, device) in _kernels


def load_kernel(plan: Plan, device: int, stream: int) -> tuple[Any, ...]:
    """The functions of the kernel, in the order of `Plan.steps`, loaded and ready to launch on `device`.

    Raises
    ------
    CompileError
        If it cannot be compiled.
    MissingKernelError
        If it is not loaded and `stream` is being captured, or compiling is forbidden.
    """
    functions = _kernels.get((plan.bare, device))
    if functions is not None:
        return functions
    with _driver.current(device):
        if _driver.is_capturing(stream):
            raise MissingKernelError(
                f"cufa: {plan.words()} is not loaded, and the stream is being captured into a CUDA graph, where it "
                "cannot be; make the same call once before the capture, or cufa.warmup() what it needs."
            )
    return load(plan, device)


def load(plan: Plan, device: int) -> tuple[Any, ...]:
    """`load_kernel` before any call, and so for no stream."""
    with _driver.loading(device):
        kernels = _load(unit_of(plan))
        attribute, handle = _driver.driver().CUfunction_attribute, _driver.call("cuDeviceGet", device)
        for kernel, step in zip(kernels, plan.steps, strict=True):
            allowed = {
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: step.smem_bytes,
                attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: int(step.max_cluster > PORTABLE_CLUSTER),
            }
            for which, value in allowed.items():
                if value:
                    _driver.call("cuKernelSetAttribute", which, value, kernel, handle)
            _driver.call("cuKernelGetFunction", kernel)  # loads it into the context now, not within a later capture
    functions = tuple(_driver.driver().CUfunction(int(kernel)) for kernel in kernels)
    LOADED.add()
    return _kernels.setdefault((plan.bare, device), functions)


def _load(unit: Unit) -> list[Any]:
    library = _bundled_library(unit)
    if library is None:
        library = _cached_library(unit)
    return [_driver.call("cuLibraryGetKernel", library, name.encode()) for name in unit.entries]


def _bundled_library(unit: Unit) -> Any:
    """The library of a bundled kernel; None if no bundle serves, or the driver refuses what it has."""
    served = bundled(unit)
    if served is None:
        return None
    library = _libraries.get(served.name)
    if library is None:
        try:
            library = load_library(served.entry.cubin)
        except CudaError as error:
            _cache.log(logging.WARNING, "the driver refused %s of %s: %s", unit.words, served.path, error)
            return None
        BUNDLED.add()
        library = _libraries.setdefault(served.name, library)
    return library


def _cached_library(unit: Unit) -> Any:
    key = _cache_key(unit)
    library = _libraries.get(key)
    if library is None:
        entry = _entry_of(unit, key)
        try:
            library = load_library(entry.cubin)
        except CudaError as error:
            # Its checksum is right, yet the driver refuses it: compile it anew, once.
            path = cache().discard(key)
            _cache.log(logging.WARNING, "the driver refused the cached %s: %s %s", unit.words, error, path or "")
            library = load_library(_compile(unit, key).cubin)
        library = _libraries.setdefault(key, library)
    return library


def load_library(cubin: bytes) -> Any:
    return _driver.call("cuLibraryLoadData", cubin, None, None, 0, None, None, 0)
