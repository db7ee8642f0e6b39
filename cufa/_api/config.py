"""What cufa finds on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

from .._compile import env as _env
from .._compile import jit as _jit
from .._driver import driver as _driver
from .._kernels import OLDEST_ARCH


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
        "nvrtc": _nvrtc(),
        "cache": {
            "directory": _probe(lambda: str(_jit.cache().path)),
            "state": _probe(lambda: _jit.cache().state()),
        },
        "environment": {name: value for name, value, _ in _env.describe()},
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
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for distribution in ("numpy", "scipy", "ml_dtypes", "cuda-bindings", "cuda-pathfinder"):
        versions[distribution] = _probe(partial(importlib.metadata.version, distribution))
    for module in ("cupy", "torch", "jax", "numba"):
        found: Any = sys.modules.get(module)
        if found is not None:
            versions[module] = str(getattr(found, "__version__", "imported"))
    return versions


def _gpus() -> dict[str, str]:
    def driver_version() -> str:
        version = int(_driver.call("cuDriverGetVersion"))
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    def gpu(ordinal: int) -> str:
        facts = _driver.device(ordinal)
        name = _driver.call("cuDeviceGetName", 256, _driver.call("cuDeviceGet", ordinal)).split(b"\0")[0].decode()
        supported = "" if facts.arch >= OLDEST_ARCH else ", not supported"
        return f"{name}, compute capability {facts.arch // 10}.{facts.arch % 10}, {facts.num_sms} SMs{supported}"

    found = {"driver": _probe(driver_version)}
    try:
        count = int(_driver.call("cuDeviceGetCount"))
    except Exception:  # the driver's line says why
        return {**found, "gpus": "none"}
    return {**found, **{f"cuda:{ordinal}": _probe(partial(gpu, ordinal)) for ordinal in range(count)}}


def _nvrtc() -> dict[str, str]:
    try:
        found = _jit.nvrtc()
    except Exception as error:
        return {"version": f"none: {' '.join(str(error).split())}"}
    return {
        "version": "{}.{}".format(*found.version),
        "library": f"{found.path} (found via {found.found_via})",
        "compiles for": ", ".join(f"sm_{arch}" for arch in found.archs),
    }
