"""Wheels that bring a bundle along, for a package index of one's own."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import zipfile
from pathlib import Path

from .._compile import files as _files
from .._compile.bundle import SUFFIX, BundleError, archived
from .._compile.lookup import GROUP
from .files import signed

PREFIX = "cufa-kernels"
"""How names of such distributions begin, so that the package of none takes the place of another's."""

_FILE = f"kernels{SUFFIX}"
# Of PEP 440, what a release of kernels may have: 1.2, 1.2rc1, 1.2.post3, 1.2.dev4, 1.2+team.5.
_VERSION = re.compile(
    r"(?:[0-9]+!)?[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc)[0-9]+)?(?:\.post[0-9]+)?(?:\.dev[0-9]+)?"
    r"(?:\+[a-z0-9]+(?:\.[a-z0-9]+)*)?"
)


def wheel(path: str | os.PathLike[str], name: str, version: str, out: str | os.PathLike[str]) -> Path:
    """Write a wheel for any platform that holds a bundle, every kernel of which is checked; where it is.

    The same bundle, name and version make the same bytes.

    Parameters
    ----------
    path : path
        Of the bundle.
    name : str
        Of the distribution: `PREFIX`, or it and more words.
    version : str
    out : path
        A directory, which is made if it is missing.

    Raises
    ------
    BundleError
        If something is wrong with the bundle, the name or the version.
    OSError
        If it cannot be read or written.
    """
    normal = re.sub(r"[-_.]+", "-", name).lower()
    if not re.fullmatch(rf"{PREFIX}(?:-[a-z0-9]+)*", normal):
        raise BundleError(f"cufa: {name!r} is no name for a wheel of kernels; it begins with {PREFIX}.")
    if _VERSION.fullmatch(version) is None:
        raise BundleError(
            f"cufa: {version!r} is no version of a Python package; write one such as 1.0 or 2026.3.post1."
        )
    with signed(path) as bundle:
        for entry in bundle.manifest.entries:
            bundle.cubin(entry)
        manifest, content = bundle.manifest, bundle.content()
    package = normal.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    targets = ", ".join(f"sm_{target}" for target in manifest.targets)
    files = {
        f"{package}/__init__.py": _MODULE.encode(),
        f"{package}/{_FILE}": content,
        f"{info}/METADATA": _METADATA.format(
            name=normal, version=version, cufa=manifest.cufa, targets=targets
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: cufa\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{GROUP}]\n{normal} = {package}:path\n".encode(),
    }
    rows = [f"{file},sha256={_digest(data)},{len(data)}\n" for file, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"]).encode()
    target = Path(os.path.abspath(out)) / f"{package}-{version}-py3-none-any.whl"
    target.parent.mkdir(parents=True, exist_ok=True)
    _files.publish(target, _archive(files), 0o644)
    return target


_MODULE = f'''"""A bundle of compiled attention kernels, which cufa finds by the entry point of this package."""

from pathlib import Path

path = Path(__file__).with_name("{_FILE}")
"""The bundle."""
'''

_METADATA = """\
Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: Compiled attention kernels of cufa {cufa} for {targets}
Requires-Dist: cufa=={cufa}
"""


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            packed = zipfile.ZIP_STORED if name.endswith(SUFFIX) else zipfile.ZIP_DEFLATED
            archive.writestr(archived(name), content, packed)
    return buffer.getvalue()
