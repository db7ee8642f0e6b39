"""Programs of kernels: a unit, compiled by the host's compiler together with the machine that runs it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).with_name("cuda")
COMPILERS = ("c++", "g++", "clang++")
KEPT_DAYS = 7
"""How long a program is kept that nobody runs."""

COMMON = ("-std=c++20", "-g1", "-march=native", "-fno-omit-frame-pointer", "-fno-exceptions", "-fno-rtti", "-no-pie")
COMMON = (*COMMON, "-fno-pie", "-fno-threadsafe-statics", "-fno-strict-aliasing")
KERNEL = ("-O1", "-ffp-contract=off", "-fsanitize=thread", "-Wno-unknown-pragmas", "-Wno-tsan", "-include", "prelude.h")
MACHINE = ("-O2", "-Wall", "-Wextra")

OFFSET = (
    ("static constexpr int value = __INTADDR__(&(static_cast<Struct*>(nullptr)->*member));", ""),
    ("constexpr int offset = OffsetOf<member>::value;", "constexpr ::emulated::Offset<member> offset{};"),
)
"""``tile::offset`` in cuda_src/tile/shared.cuh, and what stands for it."""


class EmulationError(Exception):
    """A kernel that cannot be emulated, or that does what it must not."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that compiles for this machine; None if there is none, or it is another kind of machine."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        return None
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def why_not() -> str:
    """Why nothing can be emulated here, for tests that are skipped; empty if it can."""
    if compiler() is not None:
        return ""
    return f"emulating kernels needs Linux on x86-64 and a C++ compiler ({', '.join(COMPILERS)})"


@dataclass(frozen=True, eq=False)
class Program:
    """A program that runs kernels: it is compiled when it is first asked for.

    Attributes
    ----------
    source : str
        The translation unit.
    headers : mapping of str to bytes
        What it may include, by path. Those of ``ptx/`` are not used.
    argument : str
        The C++ type that is the argument of all kernels.
    entries : tuple of str
        The ``__global__`` functions.
    arch : int
    """

    source: str
    headers: Mapping[str, bytes]
    argument: str
    entries: tuple[str, ...]
    arch: int = 80

    @functools.cached_property
    def path(self) -> Path:
        """The program.

        Raises
        ------
        EmulationError
            If it does not compile, with what the compiler says.
        """
        files = dict(_sources(self.headers))
        files["unit.cpp"] = source_of(self.source, self.argument, self.entries)
        compiled = [*COMMON, *KERNEL, f"-D__CUDA_ARCH__={self.arch}0", "-c", "unit.cpp", "-o", "unit.o"]
        linked = [
            *COMMON,
            "unit.o",
            str(_machine()),
            "-o",
        ]  # without the library for what the kernels are compiled with
        return _built("kernel", files, (compiled, linked))


@functools.cache
def _machine() -> Path:
    """What is linked with every kernel, and runs it."""
    files = {path.name: path.read_text() for path in CUDA.glob("*.*")}
    sources = sorted(name for name in files if name.endswith(".cpp"))
    files["machine.cpp"] = "".join(f'#include "{name}"\n' for name in sources)  # compiles in half the time
    return _built("machine", files, ([*COMMON, *MACHINE, "-c", "machine.cpp", "-o"],))


def _built(name: str, files: Mapping[str, str], commands: tuple[list[str], ...]) -> Path:
    """What the compiler makes of some files, made once for all processes; its name ends the last command."""
    state = hashlib.sha256(repr([_compiler_version(), commands, sorted(files.items())]).encode())
    target = directory() / f"{name}-{state.hexdigest()[:32]}"
    if not target.is_file():
        with open(f"{target}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, and the others wait for it
            if not target.is_file():
                _compile(target, files, commands)
    os.utime(target)
    return target


def _compile(target: Path, files: Mapping[str, str], commands: tuple[list[str], ...]) -> None:
    with tempfile.TemporaryDirectory(dir=directory()) as folder:
        for path, text in files.items():
            place = Path(folder, path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        *before, last = commands
        for options in (*before, [*last, "made"]):
            command = [str(compiler()), "-I.", f"-fdebug-prefix-map={folder}=.", *options]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if result.returncode != 0:
                raise EmulationError(f"a kernel does not compile for the CPU:\n{' '.join(command)}\n{result.stderr}")
        os.replace(Path(folder, "made"), target)


def _sources(headers: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """The headers that a unit may include, with those that stand for instructions and builtins."""
    for path, text in headers.items():
        if not path.startswith("ptx/"):
            yield path, translated(text.decode())
    for own in CUDA.rglob("*.*h"):
        yield own.relative_to(CUDA).as_posix(), own.read_text()


def source_of(source: str, argument: str, entries: tuple[str, ...]) -> str:
    """A unit's source, and a function that gives its kernels by their names."""
    kernels = "".join(
        f'  if (__builtin_strcmp(name, "{entry}") == 0)\n'
        f"    return [](const void* argument) {{ {entry}(*static_cast<const {argument}*>(argument)); }};\n"
        for entry in entries
    )
    found = f"emulated::Entry emulated::entry_of(const char* name) {{\n{kernels}  return nullptr;\n}}\n"
    return f'{translated(source)}\n#include "unit.h"\n\n{found}'


def translated(code: str) -> str:
    """What a host's compiler does not understand of CUDA, in other words; lines stay where they are."""
    code = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?char (\w+)\[\];",
        r"char* const \1 = ::emulated::dynamic_shared();",
        code,
    )
    code = re.sub(r"(?<!\w)__shared__ ([^;]+);", _shared, code)
    # Constants that NVRTC's front end folds, as C++ does not.
    code = re.sub(
        r"__INTADDR__\(&static_cast<([\w:]+)\*>\(nullptr\)->(\w+)\)",
        r"__builtin_offsetof(\1, \2)",
        code,
    )
    for old, new in OFFSET:
        code = code.replace(old, new)
    return re.sub(r"constexpr int (\w+ = tile::offset<)", r"const int \1", code)


def _shared(match: re.Match[str]) -> str:
    """A declaration of __shared__ variables: references to the block's own."""
    name = r"\w+(?:\[[^\]]+\])*"
    found = re.fullmatch(rf"((?:typename )?[\w:]+(?:<.*>)?(?:::\w+)*) ({name}(?:, {name})*)", match[1])
    if found is None:
        raise EmulationError(f"a declaration of shared memory is not understood: {match[0]}")
    declared = []
    for name, extents in re.findall(r"(\w+)((?:\[[^\]]+\])*)(?:, |$)", found[2]):
        kind = f"{found[1]}{extents}"
        declared.append(f"static const unsigned place_of_{name} = ::emulated::reserve<{kind}>();")
        declared.append(f"auto& {name} = ::emulated::shared_object_of<{kind}>(place_of_{name});")
    return " ".join(declared)


@functools.cache
def _compiler_version() -> str:
    """What the machine code depends on beside sources and options."""
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True).stdout
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return version + flags


@functools.cache
def directory() -> Path:
    """Where programs are kept, for this user alone; what was not run for some days is removed."""
    path = Path(tempfile.gettempdir()) / f"cufa-emulated-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EmulationError(f"{path} is not a directory of this user alone; remove it.")
    for kept in path.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - kept.stat().st_mtime > KEPT_DAYS * 86400:
                kept.unlink() if kept.is_file() else shutil.rmtree(kept, ignore_errors=True)
    return path
