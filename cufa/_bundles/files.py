"""What is done with bundles as files: verify, install, extract, merge and compare them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .._compile import bundle as _bundle
from .._compile import cache as _cache
from .._compile import env as _env
from .._compile import files as _files
from .._compile import jit as _jit
from .._compile import lookup as _lookup
from .._compile import sources as _sources
from .._compile.bundle import MANIFEST, SUFFIX, Bundle, BundleError, Item, Listed, architectures, open_bundle
from .._driver import driver as _driver
from ..errors import CudaError

_ARCH = re.compile(r"(?:sm_)?([0-9]{2,3})[af]?")


class Serving(NamedTuple):
    """Whether a bundle serves GPUs of a compute capability: how many of its kernels run there, and if none why."""

    arch: int
    kernels: int
    why_not: str


class Verified(NamedTuple):
    """What came of verifying a bundle.

    Attributes
    ----------
    bundle : Bundle
        Closed.
    size : int
        Of its file, in bytes.
    damaged : tuple of str
        What is wrong with each kernel that is not what the manifest says.
    unused : str
        Why it would not be used on this machine, whatever the GPU: who can write it, or who has signed it.
    serving : tuple of Serving
    """

    bundle: Bundle
    size: int
    damaged: tuple[str, ...]
    unused: str
    serving: tuple[Serving, ...]

    @property
    def good(self) -> bool:
        return not (self.damaged or self.unused or any(each.why_not for each in self.serving))


@contextlib.contextmanager
def signed(path: str | os.PathLike[str]) -> Iterator[Bundle]:
    """An open bundle that has the signature which ``CUFA_BUNDLE_KEYS`` asks for, if it does."""
    with open_bundle(path) as bundle:
        _lookup.check_signature(bundle, _lookup.where())
        yield bundle


def arch_of(text: str) -> int:
    """The compute capability that ``sm_90a``, ``sm_90`` or ``90`` names; anything else is a ValueError."""
    match = _ARCH.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no architecture; write sm_80 or sm_90a.")
    return int(match[1])


def gpus() -> list[int]:
    """Compute capabilities of the GPUs of this machine, each once."""
    try:
        count = int(_driver.call("cuDeviceGetCount"))
        return sorted({_driver.device(ordinal).arch for ordinal in range(count)})
    except CudaError:  # no driver, and so no GPU
        return []


def verify(path: str | os.PathLike[str], archs: Sequence[int]) -> Verified:
    """Check every kernel of a bundle, and say whether GPUs of some compute capabilities would use it.

    Raises
    ------
    BundleError
        If it is no bundle at all.
    OSError
        If it cannot be read.
    """
    with open_bundle(path) as bundle:
        damaged = []
        for entry in bundle.manifest.entries:
            try:
                bundle.cubin(entry)
            except BundleError as error:
                damaged.append(str(error))
        unused = ""
        try:
            _lookup.check_trust(bundle, _lookup.where())
        except ValueError as error:
            unused = str(error).removeprefix("cufa: ")
        serving = tuple(_serving(bundle, arch) for arch in archs)
        return Verified(bundle, bundle.status.st_size, tuple(damaged), unused, serving)


def number_of(kernels: int) -> str:
    """So many kernels, in words."""
    return f"{kernels} {'kernel' if kernels == 1 else 'kernels'}"


def _serving(bundle: Bundle, arch: int) -> Serving:
    manifest = bundle.manifest
    if manifest.sources != _sources.version():
        return Serving(arch, 0, f"it {_lookup.made_from(manifest)}; build it again")
    targets = _bundle.targets_for(manifest.targets, arch)
    if arch not in {arch_of(each) for each in (*manifest.archs, *manifest.targets)}:
        built = architectures(manifest.targets)
        command = (
            f"cufa bundle build --arch sm_{arch}{'a' if arch >= 90 else ''} --preset {manifest.preset or 'inference'}"
        )
        why = f"it was built for {built}"
        if targets:  # what fits the one's shared memory and is fast there is another kernel than on the other
            why += f", and sm_{arch}, which could run its kernels, mostly wants others"
        return Serving(arch, 0, f"{why}; {command} --out FILE makes one that serves")
    return Serving(arch, sum(entry.target in targets for entry in manifest.entries), "")


def install(path: str | os.PathLike[str]) -> Path:
    """Copy a bundle, every kernel of which is checked, to where this user's processes find it; where that is.

    Raises
    ------
    BundleError
        If something is wrong with it, or the directory could be written by others.
    OSError
        If it cannot be read or written.
    """
    directory = _directory()
    with signed(path) as bundle:
        for entry in bundle.manifest.entries:
            bundle.cubin(entry)
        data = bundle.content()
    name = bundle.path.name
    cache = _jit.cache()
    if (reason := cache._misplaced(directory.parent)) is not None:
        raise BundleError(f"cufa: bundles are not installed: {reason}.")
    _files.make_directory(directory.parent, 0o700, private_parents=not cache.named)
    # As for kernels: a shared directory passes its own mode on, and all else is private.
    mode = stat.S_IMODE(os.stat(directory.parent).st_mode) if cache.trust_shared else 0o700
    _files.make_directory(directory, mode)
    for each in (directory.parent, directory):
        if (reason := cache._refusal(each)) is not None:
            raise BundleError(f"cufa: bundles are not installed: {reason}.")
    _sweep(directory)
    target = directory / (name if name.endswith(SUFFIX) else f"{name}{SUFFIX}")
    _files.publish(target, data, 0o600 | (mode & 0o044))
    return target


def uninstall(name: str) -> Path:
    """Remove an installed bundle by the name of its file, with or without the suffix; where it was.

    Raises
    ------
    BundleError
        If there is none of that name.
    OSError
        If it cannot be removed.
    """
    directory = _directory()
    there = {path.name: path for path in directory.glob(f"*{SUFFIX}")}
    path = there.get(name) or there.get(f"{name}{SUFFIX}")
    if path is None:
        raise BundleError(f"cufa: no bundle {name} is installed; there are: {', '.join(sorted(there)) or 'none'}.")
    path.unlink()
    return path


def _directory() -> Path:
    directory = _env.bundle_dir()
    if directory is None:
        raise BundleError("cufa: there is no home directory to install bundles in; set CUFA_CACHE_DIR.")
    return directory


def _sweep(directory: Path) -> None:
    """Remove what killed installations have left."""
    for path in directory.glob(f"{_files.TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if abs(time.time() - path.lstat().st_mtime) > _cache.STALE_SECONDS:
                path.unlink()


def extract(path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> list[Path]:
    """Write the cubins and the manifest of a bundle into a new or empty directory: all of them or none.

    Raises
    ------
    BundleError
        If something is wrong with it, or the directory holds something.
    OSError
        If it cannot be read or written.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"cufa: {directory} is not an empty directory; name a new one.")
    with open_bundle(path) as bundle:
        files = {extracted_name(entry): bundle.cubin(entry) for entry in bundle.manifest.entries}
        files[MANIFEST] = bundle.text
    temporary = target.with_name(f"{_files.TEMPORARY}{os.urandom(8).hex()}")
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [target / name for name in files]


def extracted_name(entry: Listed) -> str:
    """The file of a cubin: the kernel first, for the eye, and the key whole, so that no two have the same."""
    return f"{entry.kernel}-sm_{entry.target}-{entry.key}.cubin"


def merge(
    out: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    *,
    keep_first: bool = False,
    signer: Callable[[bytes], bytes] | None = None,
) -> int:
    """Write a bundle that holds the kernels of several; how many those are.

    Raises
    ------
    BundleError
        If two bundles were made from different sources or, unless `keep_first`, hold different machine code of one
        kernel; or `out` exists, or something is wrong with a bundle.
    OSError
        If something cannot be read or written.
    """
    if os.path.lexists(out):
        raise BundleError(f"cufa: {out} exists; name a new file.")
    kept: dict[tuple[str, str], tuple[Item, Path]] = {}
    with contextlib.ExitStack() as stack:
        bundles = [stack.enter_context(signed(path)) for path in paths]
        first = bundles[0].manifest
        for bundle in bundles[1:]:
            if bundle.manifest.sources != first.sources:
                raise BundleError(
                    f"cufa: {bundles[0].path} was made from cufa {first.cufa} sources {first.sources[:8]}… and "
                    f"{bundle.path} from cufa {bundle.manifest.cufa} sources {bundle.manifest.sources[:8]}…, so no "
                    "process would use both; build one of them again."
                )
        for bundle in bundles:
            for item in bundle.items():
                before, where = kept.setdefault((item.key, item.target), (item, bundle.path))
                if before.cubin != item.cubin and not keep_first:
                    raise BundleError(
                        f"cufa: {where} and {bundle.path} hold different machine code of {item.meta['what']} "
                        f"({item.key[:8]}…, sm_{item.target}); --keep-first takes that of the first."
                    )
        archs = list(dict.fromkeys(arch for bundle in bundles for arch in bundle.manifest.archs))
        presets = {bundle.manifest.preset for bundle in bundles}
    _bundle.write(
        out,
        [item for item, _ in kept.values()],
        archs=archs,
        preset=presets.pop() if len(presets) == 1 else None,
        signer=signer,
        made_from=(first.cufa, first.sources),
    )
    return len(kept)


class Difference(NamedTuple):
    """Kernels that one of two bundles has, and those of which they have different machine code."""

    only_first: tuple[Listed, ...]
    only_second: tuple[Listed, ...]
    different: tuple[Listed, ...]

    def __bool__(self) -> bool:
        return any(self)


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Difference:
    """Compare the kernels of two bundles, by what their manifests say."""
    with open_bundle(first) as one, open_bundle(second) as two:
        mine, others = ({each.name: each for each in bundle.manifest.entries} for bundle in (one, two))
    return Difference(
        tuple(entry for name, entry in mine.items() if name not in others),
        tuple(entry for name, entry in others.items() if name not in mine),
        tuple(entry for name, entry in mine.items() if name in others and others[name].sha256 != entry.sha256),
    )
