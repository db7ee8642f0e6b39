"""What cufa finds on this machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

# None of these imports NumPy, which may be what is broken.
from .._compile import env as _env
from .._compile import nvrtc as _nvrtc
from .._compile.cache import CubinCache
from .._driver import driver as _driver

DEPENDENCIES = ("numpy", "scipy", "ml_dtypes", "click", "cuda-bindings", "cuda-pathfinder")

OTHERS = (
    *("cupy", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "jaxlib", "numba", "numba-cuda", "triton"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "cuda-toolkit", "cryptography"),
)
"""Distributions that are reported where they are installed."""

SURROUNDINGS = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUDA_HOME", "CUDA_MODULE_LOADING", "CUDA_LAUNCH_BLOCKING"),
    *("CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD"),
)
"""Variables of others that bear on what is found, reported where they are set."""


def is_available() -> bool:
    """Whether an NVIDIA GPU that cufa supports is there. Never raises.

    Attention of arrays in host memory works without one.

    Returns
    -------
    bool
        True if the CUDA driver loads and some GPU has compute capability 8.0 or newer.

    Examples
    --------
    >>> import cufa
    >>> cufa.is_available() in (True, False)
    True
    """
    try:
        from .._kernels import OLDEST_ARCH

        count = int(_driver.call("cuDeviceGetCount"))
        return any(_driver.device(ordinal).arch >= OLDEST_ARCH for ordinal in range(count))
    except Exception:  # whatever is wrong with driver or GPU, there is none to use
        return False


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...


@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, str]]: ...


def show_config(mode: str = "stdout") -> dict[str, dict[str, str]] | None:
    """Print versions, GPUs, NVRTC, the cache of kernels and the environment: what a bug report should hold.

    Frameworks are asked for by what is installed, and not imported.

    Parameters
    ----------
    mode : {'stdout', 'dicts'}
        Print the report, or return it as nested dictionaries, as `numpy.show_config` does.

    Returns
    -------
    dict or None
        A probe that fails has its error as its value.

    Examples
    --------
    >>> import cufa
    >>> sorted(cufa.show_config("dicts"))
    ['cache', 'environment', 'gpu', 'nvrtc', 'versions']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"show_config: mode is {mode!r}; pass 'stdout' or 'dicts'.")
    report = {
        "versions": _versions(),
        "gpu": _gpus(),
        "nvrtc": _compiler(),
        "cache": {
            "directory": _probe(lambda: str(_cache().path)),
            "state": _probe(lambda: _cache().state()),
            "bundles": _probe(_bundles),
        },
        "environment": {name: value for name, value, _ in _env.describe()}
        | {name: os.environ[name] for name in SURROUNDINGS if name in os.environ},
    }
    if mode == "dicts":
        return report
    width = max(len(name) for section in report.values() for name in section)
    for title, section in report.items():
        print(title)
        for name, value in section.items():
            print(_printable(f"  {name:<{width}}  {value}"))
    return None


def _printable(text: str) -> str:
    """`text` with escapes for what stdout cannot show: a path may hold bytes that are no text at all."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _probe(function: Callable[[], str]) -> str:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    import cufa

    versions = {
        "cufa": cufa.__version__,
        "python": platform.python_version() + ("" if _has_lock() else ", free-threaded"),
        "platform": _probe(platform.platform),
    }
    try:
        from importlib import metadata
    except Exception as error:
        return {**versions, "packages": f"{type(error).__name__}: {error}"}
    for distribution in DEPENDENCIES:
        versions[distribution] = _probe(partial(metadata.version, distribution))
    for distribution in OTHERS:
        try:
            versions[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:
            versions[distribution] = f"{type(error).__name__}: {error}"
    for module in ("cupy", "torch", "jax", "numba"):  # which may be here without being installed
        found: Any = sys.modules.get(module)
        if found is not None:
            versions[f"{module} (imported)"] = str(getattr(found, "__version__", "of no version"))
    return versions


def _has_lock() -> bool:
    """Whether one thread of Python runs at a time."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _cache() -> CubinCache:
    """The cache of this process, if kernels have been asked for, or else what it would be."""
    jit: Any = sys.modules.get("cufa._compile.jit")
    found: CubinCache = CubinCache.from_env() if jit is None else jit.cache()
    return found


def _bundles() -> str:
    from .._compile import lookup as _lookup

    return ", ".join(str(place.path) for place in _lookup.bundles().places) or "none"


def _gpus() -> dict[str, str]:
    def driver_version() -> str:
        version = int(_driver.call("cuDriverGetVersion"))
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    def gpu(ordinal: int) -> str:
        facts = _driver.device(ordinal)
        name = _driver.call("cuDeviceGetName", 256, _driver.call("cuDeviceGet", ordinal)).split(b"\0")[0].decode()
        supported = ", not supported" if _is_old(facts.arch) else ""
        return f"{name}, compute capability {facts.arch // 10}.{facts.arch % 10}, {facts.num_sms} SMs{supported}"

    found = {"driver": _probe(driver_version)}
    try:
        count = int(_driver.call("cuDeviceGetCount"))
    except Exception:  # the driver's line says why
        return {**found, "gpus": "none"}
    return {**found, **{f"cuda:{ordinal}": _probe(partial(gpu, ordinal)) for ordinal in range(count)}}


def _is_old(arch: int) -> bool:
    try:
        from .._kernels import OLDEST_ARCH
    except Exception:  # NumPy is broken, which other lines say
        return False
    return arch < OLDEST_ARCH


def _compiler() -> dict[str, str]:
    try:
        found = _nvrtc.find(_notes)
    except Exception as error:
        return {"version": f"none: {' '.join(str(error).split())}"}
    return {
        "version": "{}.{}".format(*found.version),
        "library": f"{found.path} (found via {found.found_via})",
        "build": found.build[:16],
        "compiles for": ", ".join(f"sm_{arch}" for arch in found.archs),
    }


def _notes() -> CubinCache | None:
    try:
        return _cache()
    except ValueError:  # of a variable, which other lines say
        return None
