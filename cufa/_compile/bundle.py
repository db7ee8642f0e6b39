"""Bundles: files of compiled kernels that travel to machines where none should be compiled.

A bundle is a ZIP archive of ``manifest.json``, of ``kernels/<key>-<target>.cubin`` for every entry that the manifest
lists and, if it is signed, of ``manifest.sig``: the Ed25519 signature of the manifest's bytes. The manifest holds the
SHA-256 of every cubin, so that the signature covers them too. The same kernels make the same bytes.

Nothing is believed of a bundle but what is checked: names, sizes and the manifest when it is opened, each cubin when it
is read. A key is `source_key` of a unit and says nothing of the compiler: whichever NVRTC made a kernel, it serves.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .._call.arrays import ALIGNMENT
from .._kernels import Plan
from .._kernels.kernel import SIZEOF, Config
from .._kernels.unit import Unit
from .._terms import TERMS
from . import files as _files
from . import sources as _sources
from .cache import MAX_ENTRY_SIZE, Entry

if TYPE_CHECKING:
    from zipfile import ZipFile, ZipInfo

SCHEMA = 1
"""Version of the manifest; a bundle of another is refused."""

SUFFIX = ".cufa-bundle"

MAX_MANIFEST_SIZE = 64 << 20
MAX_SIZE = 4 << 30
"""Most bytes of all kernels of a bundle, uncompressed."""

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
_FORMAT = "cufa bundle"
_SIGNATURE_SIZE = 64
_KERNEL = re.compile(r"kernels/[0-9a-f]{64}-[0-9]{2,3}a?\.cubin")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TARGET = re.compile(r"[0-9]{2,3}a?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TEGRA = 87
"""A compute capability whose kernels no other GPU of its family runs, nor it theirs."""


class BundleError(ValueError):
    """A bundle cannot be used; the message says why, and what to do."""


class Item(NamedTuple):
    """A kernel on its way into a bundle or out of one.

    Attributes
    ----------
    key : str
        `source_key` of its unit.
    target : str
        The architecture it is compiled for: ``80``, ``90a``.
    cubin : bytes
    meta : dict
        What a cache entry says of it, and ``config``: its Config as plain JSON values.
    """

    key: str
    target: str
    cubin: bytes
    meta: dict[str, Any]


class Listed(NamedTuple):
    """A kernel as the manifest lists it: everything but the cubin."""

    key: str
    target: str
    kernel: str
    what: str
    config: dict[str, Any]
    size: int
    sha256: str
    registers: int
    spill_bytes: int
    seconds: float
    nvrtc: str

    @property
    def name(self) -> str:
        """Of its cubin in the archive."""
        return f"kernels/{self.key}-{self.target}.cubin"

    @property
    def meta(self) -> dict[str, Any]:
        """What a cache entry says of a kernel."""
        names = ("kernel", "what", "registers", "spill_bytes", "seconds", "nvrtc")
        return {"arch": self.target, **{name: getattr(self, name) for name in names}}


class Manifest(NamedTuple):
    """What a bundle says of itself.

    Attributes
    ----------
    cufa, sources : str
        The version of cufa, and the digest of the CUDA sources, that it was made from.
    nvrtc : tuple of str
        Version and build of each NVRTC that compiled some of it.
    archs : tuple of str
        What it was asked to serve, as ``80`` or ``90a``.
    preset : str or None
    entries : tuple of Listed
        In the order of targets and keys.
    """

    cufa: str
    sources: str
    nvrtc: tuple[str, ...]
    archs: tuple[str, ...]
    preset: str | None
    entries: tuple[Listed, ...]

    @property
    def targets(self) -> list[str]:
        """The architectures that its kernels are compiled for."""
        return sorted({entry.target for entry in self.entries}, key=_order)


def write(
    path: str | os.PathLike[str],
    items: Iterable[Item],
    *,
    archs: Sequence[str],
    preset: str | None = None,
    signer: Callable[[bytes], bytes] | None = None,
    made_from: tuple[str, str] | None = None,
) -> None:
    """Write a bundle, which appears whole or not at all.

    Parameters
    ----------
    path : path
        A file there is replaced.
    items : iterable of Item
    archs : sequence of str
        What it is to serve, as ``sm_80`` or ``80``.
    preset : str, optional
    signer : callable, optional
        From the manifest's bytes to their signature: see `signer_of` in cufa/_compile/signing.py.
    made_from : (str, str), optional
        Version of cufa and digest of its sources, if they are not those of this process.

    Raises
    ------
    BundleError
        If two items have one key and target, or a value is not what the manifest may hold.
    OSError
        If it cannot be written.
    """
    from .. import __version__

    cufa, sources = made_from or (__version__, _sources.version())
    ordered = sorted(items, key=lambda item: (_order(item.target), item.key))
    entries = [_listed(item) for item in ordered]
    manifest = {
        "format": _FORMAT,
        "schema": SCHEMA,
        "cufa": cufa,
        "sources": sources,
        "nvrtc": sorted({entry.nvrtc for entry in entries}),
        "archs": [arch.removeprefix("sm_") for arch in archs],
        "preset": preset,
        "entries": [entry._asdict() for entry in entries],
    }
    text = json.dumps(manifest, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()
    try:
        _parse(text)  # what no reader takes is not written
    except _Refused as error:
        raise BundleError(f"cufa: no bundle is written to {path}: {error}.") from None
    files = {MANIFEST: text} | ({} if signer is None else {SIGNATURE: signer(text)})
    files |= {entry.name: item.cubin for entry, item in zip(entries, ordered, strict=True)}
    _files.publish(Path(os.path.abspath(path)), _archive(files), 0o644)


def _listed(item: Item) -> Listed:
    meta = {"nvrtc": "unknown", **item.meta}
    facts = {name: meta[name] for name in ("kernel", "what", "config", "registers", "spill_bytes", "seconds", "nvrtc")}
    digest = hashlib.sha256(item.cubin, usedforsecurity=False).hexdigest()
    return Listed(key=item.key, target=item.target, size=len(item.cubin), sha256=digest, **facts)


def _archive(files: Mapping[str, bytes]) -> bytes:
    """A ZIP archive that depends on the files alone, and on no clock or umask."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files.items():
            archive.writestr(archived(name), content, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def archived(name: str) -> ZipInfo:
    """How a file is described in archives: a regular one of no particular time."""
    import zipfile

    info = zipfile.ZipInfo(name)  # of 1980
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle and check everything but its kernels, which are checked when they are read, and its signature.

    Raises
    ------
    BundleError
        If it is not a whole bundle, or one of another schema.
    OSError
        If it cannot be read.
    """
    path = Path(os.path.abspath(path))
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(_open(path))
        with _refusing(path):
            import zipfile

            archive = zipfile.ZipFile(file)
            infos = _checked(archive.infolist())
            text = _read(archive, infos[MANIFEST], MAX_MANIFEST_SIZE)
            signature = _read(archive, infos[SIGNATURE], _SIGNATURE_SIZE) if SIGNATURE in infos else None
            manifest = _parse(text)
            _compare(manifest, infos)
        opened.pop_all()
    return Bundle(path, file, archive, infos, manifest, text, signature)


class Bundle:
    """An open bundle; close it, or use it as a context manager.

    Attributes
    ----------
    path : Path
    status : os.stat_result
        Of the open file.
    manifest : Manifest
    text : bytes
        The manifest's bytes, which are signed.
    signature : bytes or None
    """

    def __init__(
        self,
        path: Path,
        file: io.BufferedReader,
        archive: ZipFile,
        infos: dict[str, ZipInfo],
        manifest: Manifest,
        text: bytes,
        signature: bytes | None,
    ) -> None:
        self.path = path
        self.status = os.fstat(file.fileno())
        self.manifest = manifest
        self.text = text
        self.signature = signature
        self._file = file
        self._archive = archive
        self._infos = infos
        self._by_key: dict[str, list[Listed]] = {}
        for entry in manifest.entries:
            self._by_key.setdefault(entry.key, []).append(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read of the manifest stays."""
        self._archive.close()
        self._file.close()

    def find(self, key: str, unit: Unit) -> Listed | None:
        """The entry of a key that serves the GPUs of a unit, the newest if there are several."""
        entries = [entry for entry in self._by_key.get(key, ()) if serves(entry.target, unit)]
        return max(entries, key=lambda entry: _order(entry.target), default=None)

    def cubin(self, entry: Listed) -> bytes:
        """The machine code of an entry, which is what the manifest says, or BundleError."""
        with _refusing(self.path):
            cubin = _read(self._archive, self._infos[entry.name], MAX_ENTRY_SIZE)
            if hashlib.sha256(cubin, usedforsecurity=False).hexdigest() != entry.sha256:
                raise _Refused(f"{entry.name} is not what the manifest says: its SHA-256 is another")
        return cubin

    def entry(self, listed: Listed) -> Entry:
        """A kernel as the cache would give it."""
        return Entry(self.cubin(listed), listed.meta)

    def content(self) -> bytes:
        """The whole file, as it is."""
        with _refusing(self.path):
            self._file.seek(0)
            data = self._file.read(self.status.st_size)
            if len(data) < self.status.st_size:
                raise _Refused("it was cut off while it was read")
        return data

    def items(self) -> Iterator[Item]:
        """All kernels, each checked as it is read."""
        for entry in self.manifest.entries:
            yield Item(entry.key, entry.target, self.cubin(entry), entry.meta | {"config": entry.config})


def runs_on(built: int, arch: int) -> bool:
    """Whether a GPU runs what is compiled for a compute capability of its family that is not newer than its own."""
    return built == arch or (built // 10 == arch // 10 and built < arch and _TEGRA not in (built, arch))


def serves(target: str, unit: Unit) -> bool:
    """Whether kernels compiled for a target run on the GPUs of a unit, and may have the instructions it needs."""
    if target.endswith("a"):
        return int(target[:-1]) == unit.arch
    return not unit.target_suffix and runs_on(int(target), unit.arch)


def targets_for(targets: Iterable[str], arch: int) -> list[str]:
    """Of some targets, those whose kernels a GPU runs."""
    return [each for each in targets if int(each.rstrip("a")) == arch or (each.isdigit() and runs_on(int(each), arch))]


def architectures(targets: Iterable[str]) -> str:
    """Targets as a sentence names them: ``sm_80, sm_86 and sm_90a``."""
    *others, last = [f"sm_{target}" for target in targets] or ["nothing"]
    return f"{', '.join(others)} and {last}" if others else last


def command_for(plan: Plan) -> str:
    """The command that makes a bundle which holds the kernel of a plan; empty if no command can.

    That is so for kernels with score terms that are not cufa's, and for caches of float8: a command does not know them.
    """
    arch = f"sm_{plan.arch}{'a' if plan.arch >= 90 else ''}"
    config = plan.config
    out = f"--out cufa-{arch}{SUFFIX}"
    if not isinstance(config, Config):
        return f"cufa bundle build --arch {arch} {_plain_call(plan)} {out}"
    if not {type(term) for term in config.variant} <= {type(term) for term in TERMS}:
        return ""
    if getattr(config, "kv_element", config.element) != config.element:
        return ""
    dtype = DTYPES[config.element]
    head_dim = f"{config.head_dim}" + (f":{config.head_dim_v}" if config.head_dim_v != config.head_dim else "")
    cached = _with_caches(plan)
    operation = cached or f"attention{'_varlen' if config.varlen else ''}{'_backward' if _is_backward(plan) else ''}"
    features = [config.mask] if config.mask != "none" else []
    features += [term.name for term in config.variant]
    features += [name for name in ("sinks", "deterministic") if getattr(config, name, False)]
    features += ["unaligned"] if _is_unaligned(plan) else []
    features += ["paged"] if getattr(config, "page_rows", 0) or getattr(config, "paged", False) else []
    features += ["packed"] if cached and config.varlen else []
    asked = "".join(f" --feature {name}" for name in features)
    return f"cufa bundle build --arch {arch} --operation {operation} --dtype {dtype} --head-dim {head_dim}{asked} {out}"


DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def _plain_call(plan: Plan) -> str:
    """A call that needs a kernel which goes through whole arrays, whose chunks tell of some head_dim."""
    from .._kernels.chunks import ConfigChunks
    from .._kernels.merge_states import MergeStates, MergeStatesBackward
    from .._kernels.rotary import ConfigRotary

    config = plan.config
    if not isinstance(config, ConfigChunks):  # it copies arrays, and is the same for all that need it
        return "--operation attention --dtype bfloat16 --head-dim 64 --feature unaligned"
    names: dict[type, str] = {MergeStates: "merge_states", MergeStatesBackward: "merge_states_backward"}
    head_dim, name = config.chunk * getattr(config, "row_lanes", 1), names.get(type(plan.kernel), "rotary")
    if isinstance(config, ConfigRotary):  # of which pairs of columns are turned, or of chunks
        head_dim = 3 if config.chunk == 1 else config.chunk if config.interleaved else 2 * config.chunk
    return f"--operation {name} --dtype {DTYPES[config.element]} --head-dim {head_dim} --feature unaligned"


def _with_caches(plan: Plan) -> str:
    """The operation of a kernel that reads caches; empty if it reads none."""
    from .._kernels.forward_cache_sm80 import CachePlan, ForwardCacheSm80
    from .._kernels.forward_cache_sm90 import ForwardCacheSm90

    if isinstance(plan.kernel, CachePlan):
        return "decode_plan"
    return "attention_with_kvcache" if isinstance(plan.kernel, (ForwardCacheSm80, ForwardCacheSm90)) else ""


def _is_backward(plan: Plan) -> bool:
    from .._kernels.backward import BackwardKernel  # here, as inference never needs it

    return isinstance(plan.kernel, BackwardKernel)


def _is_unaligned(plan: Plan) -> bool:
    """Whether only arrays need the kernel whose rows begin elsewhere than in new or padded ones, or lie backwards."""
    config = plan.config
    size = SIZEOF[config.element]
    of_k, of_v = (max(size, math.gcd(ALIGNMENT, columns * size)) for columns in (config.head_dim, config.head_dim_v))
    stores = min(of_k, of_v) if _is_backward(plan) else of_v
    new = {"copy_bytes": min(of_k, of_v), "out_copy_bytes": of_v, "store_bytes": stores}
    is_short = getattr(config, "early_v", False) or getattr(config, "writes_dq", False)
    if _with_caches(plan):
        new["q_copy_bytes"] = of_k
    without_maps = (
        not _with_caches(plan) and plan.arch // 10 == 9 and size == 2 and not plan.kernel.target_suffix and not is_short
    )
    misaligned = any(getattr(config, name, ALIGNMENT) not in (width, ALIGNMENT) for name, width in new.items())
    return misaligned or without_maps


class _Refused(Exception):
    """Why a bundle is refused, without its path."""


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with the content of `path` into a sentence."""
    try:
        yield
    except _Refused as error:
        raise BundleError(f"cufa: {path} is not used as a bundle: {error}; build it again or fetch it anew.") from None
    except Exception as error:  # zipfile and zlib raise a dozen classes for archives that are damaged
        # The disk's trouble and the end of the interpreter are no fault of the archive's; an impossible offset is.
        disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if disk or isinstance(error, (ImportError, NameError)):
            raise
        raise BundleError(
            f"cufa: {path} is cut off, altered or no bundle at all ({' '.join(str(error).split())}); build it again or "
            "fetch it anew."
        ) from error


def _open(path: Path) -> io.BufferedReader:
    """A regular file for reading; what else lies there, as a FIFO, is not waited for."""
    flags = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # where a system has them
    descriptor = os.open(path, sum((getattr(os, name, 0) for name in flags), os.O_RDONLY))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(f"cufa: {path} is not a regular file, and so no bundle; name the file itself.")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _checked(infos: list[ZipInfo]) -> dict[str, ZipInfo]:
    """The files of an archive by name, of which none is harmful or huge."""
    by_name: dict[str, ZipInfo] = {}
    for info in infos:
        name = info.orig_filename
        if name in by_name:
            raise _Refused(f"it holds {name!r} twice")
        if name not in (MANIFEST, SIGNATURE) and _KERNEL.fullmatch(name) is None:
            escapes = name.startswith(("/", "\\")) or ":" in name or ".." in re.split(r"[/\\]", name)
            raise _Refused(f"it holds {name!r}, {'which escapes its directory' if escapes else 'which is no kernel'}")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _Refused(f"{name} in it is a link or another special file")
        limit = {MANIFEST: MAX_MANIFEST_SIZE, SIGNATURE: _SIGNATURE_SIZE}.get(name, MAX_ENTRY_SIZE)
        if info.file_size > limit:
            raise _Refused(f"{name} in it has {info.file_size} bytes, and {limit} is the limit")
        by_name[name] = info
    if (size := sum(info.file_size for info in infos)) > MAX_SIZE:
        raise _Refused(f"it holds {size} bytes, and {MAX_SIZE} is the limit")
    if MANIFEST not in by_name:
        raise _Refused(f"it has no {MANIFEST}")
    return by_name


def _compare(manifest: Manifest, infos: Mapping[str, ZipInfo]) -> None:
    """Refuse an archive that does not hold just what its manifest lists."""
    sizes = {entry.name: entry.size for entry in manifest.entries}
    for name, size in sizes.items():
        if name not in infos:
            raise _Refused(f"it lacks {name}, which its manifest lists")
        if infos[name].file_size != size:
            raise _Refused(f"{name} in it has {infos[name].file_size} bytes, and the manifest says {size}")
    for name in infos.keys() - sizes.keys() - {MANIFEST, SIGNATURE}:
        raise _Refused(f"it holds {name}, which its manifest does not list")


def _read(archive: ZipFile, info: ZipInfo, limit: int) -> bytes:
    """One file, of which no more than `limit` bytes are ever made, whatever the archive says of it."""
    with archive.open(info) as file:
        data = file.read(limit + 1)
    if len(data) != info.file_size or len(data) > limit:
        raise _Refused(f"{info.filename} has another size than the archive says")
    return data


def _parse(text: bytes) -> Manifest:
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _Refused(f"its {MANIFEST} is not JSON") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise _Refused(f"its {MANIFEST} is not that of a bundle")
    if found.get("schema") != SCHEMA:
        from .. import __version__

        raise _Refused(f"its schema is {found.get('schema')!r}, and cufa {__version__} reads {SCHEMA}")
    lists = [_field(found, name, list) for name in ("nvrtc", "archs")]
    if not all(_is_text(each) for names in lists for each in names):
        raise _Refused(f"a name in its {MANIFEST} is not a text")
    nvrtc, archs = lists
    preset = found.get("preset")
    if preset is not None and not _is_text(preset):
        raise _Refused(f"preset in its {MANIFEST} is not a text")
    entries = tuple(map(_entry, _field(found, "entries", list)))
    if len({(entry.key, entry.target) for entry in entries}) < len(entries):
        raise _Refused(f"its {MANIFEST} lists a kernel twice")
    cufa, sources = _field(found, "cufa", str), _field(found, "sources", str)
    if _DIGEST.fullmatch(sources) is None:
        raise _Refused(f"sources in its {MANIFEST} is not a digest")
    return Manifest(cufa, sources, tuple(nvrtc), tuple(archs), preset, entries)


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("key", "target", "kernel", "what", "sha256", "nvrtc"), str),
    **dict.fromkeys(("size", "registers", "spill_bytes"), int),
    "seconds": (int, float),
    "config": dict,
}


def _entry(found: Any) -> Listed:
    if not isinstance(found, dict):
        raise _Refused(f"an entry of its {MANIFEST} is not an object")
    entry = Listed(**{name: _field(found, name, _TYPES[name]) for name in Listed._fields})
    for name, pattern in (("key", _DIGEST), ("sha256", _DIGEST), ("target", _TARGET), ("kernel", _NAME)):
        if pattern.fullmatch(getattr(entry, name)) is None:
            raise _Refused(f"{name} of an entry of its {MANIFEST} is {getattr(entry, name)!r:.80}")
    if not 0 <= entry.size <= MAX_ENTRY_SIZE:
        raise _Refused(f"{entry.name} in its {MANIFEST} has {entry.size} bytes, and {MAX_ENTRY_SIZE} is the limit")
    return entry


def _field(found: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = found.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not _is_text(value)):
        raise _Refused(f"{name} in its {MANIFEST} is {value!r:.80}")
    return value


def _is_text(value: object) -> bool:
    """Whether it may be shown in a terminal, whose control characters it has none of."""
    return isinstance(value, str) and value.isprintable()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _order(target: str) -> tuple[int, str]:
    """By which targets are sorted: sm_80, sm_90, sm_90a, sm_100a."""
    digits = target.rstrip("a")
    return (int(digits) if digits.isdigit() else 0, target)
