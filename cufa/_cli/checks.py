"""The steps of a call, each tried by itself, for ``cufa doctor``.

They run in a process of their own, which `main` serves: a driver that hangs or crashes takes that one along and not the
report. So nothing is imported here before a step needs it, and what one step finds broken does not keep the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .._compile.cache import Entry

MARK = "cufa doctor: "
"""What a line begins with that holds a result, beside whatever libraries print."""


class Failed(Exception):
    """What is wrong, and what to do about it."""

    def __init__(self, says: str, do: str) -> None:
        super().__init__(says)
        self.do = do


class NotNeeded(Exception):
    """Why a step is left out."""


class Check(NamedTuple):
    """One step.

    Attributes
    ----------
    run : function
        Returns what was found, in a few words; raises `Failed`, `NotNeeded`, or whatever comes.
    do : str
        What to do where it fails otherwise than by `Failed`.
    needs : tuple of str
        Steps without which it makes no sense.
    seconds : int
        How long it may take.
    """

    run: Callable[[], str]
    do: str
    needs: tuple[str, ...] = ()
    seconds: int = 60


def cpu() -> str:
    import numpy as np

    import cufa

    q, k, v = _inputs()
    _compare(np.asarray(cufa.attention(q, k, v, causal=True)), "the CPU")
    return f"NumPy {np.__version__}: results are right"


def driver() -> str:
    from .._driver import driver as _driver

    version = int(_driver.call("cuDriverGetVersion"))
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def gpu() -> str:
    from .._driver import driver as _driver
    from .._kernels import OLDEST_ARCH

    count = int(_driver.call("cuDeviceGetCount"))
    if not count:
        raise Failed("the driver finds no GPU", "See what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides it.")
    archs = [_driver.device(ordinal).arch for ordinal in range(count)]
    words = ", ".join(f"cuda:{ordinal} has compute capability {a // 10}.{a % 10}" for ordinal, a in enumerate(archs))
    if max(archs) < OLDEST_ARCH:
        raise Failed(words, f"cufa needs {OLDEST_ARCH // 10}.{OLDEST_ARCH % 10} or newer: an A100, RTX 30 or later.")
    return words


def nvrtc() -> str:
    from .._compile import jit as _jit
    from .._compile import nvrtc as _nvrtc

    _compiling()
    found = _nvrtc.settle(_jit.notes)
    words = "{}.{}, {} (found via {})".format(*found.version, found.path, found.found_via)
    newest = _driver_major()
    if newest is not None and found.version[0] > newest:
        raise Failed(
            f"{words} compiles for CUDA {found.version[0]}, which a driver for CUDA {newest} cannot load",
            f"Install the one for it: pip install 'cufa[cuda{newest}]', or a newer driver.",
        )
    return words


def headers() -> str:
    from .._compile import jit as _jit

    return f"{len(_jit.headers())} CUDA headers"


def compiling() -> str:
    _compiling()
    meta = _kernel().meta
    return f"{meta['what']} in {meta['seconds']:.1f} s"


def cache() -> str:
    import os

    from .._compile import cache as _cache
    from .._compile import jit as _jit

    store = _jit.cache()
    if not store.enabled:
        raise NotNeeded("CUFA_CACHE is 0, so every process compiles anew")
    do = "Set CUFA_CACHE_DIR to a directory of your own that can be written; until then every process compiles anew."
    if (reason := store.unused()) is not None:
        raise Failed(f"kernels are not kept on disk: {reason}", do)
    key, note = _cache.digest({"note": "doctor"}), {"tried": os.urandom(8).hex()}
    if not store.keep_note(key, note) or _cache.CubinCache.from_env().note(key) != note:
        raise Failed(f"{store.path}: {store.state()}", do)
    return f"{store.path}: {store.state()}"


def bundles() -> str:
    from .._compile import lookup as _lookup

    places = _lookup.bundles().places
    if not places:
        raise NotNeeded("there are none")
    troubles = [place.trouble for place in places if place.bundle() is None]
    if troubles:
        raise Failed("; ".join(troubles), "Build it again, fetch it anew, or take it out of CUFA_BUNDLE_PATH.")
    return ", ".join(str(place.path) for place in places)


def loading() -> str:
    from .._compile import jit as _jit
    from .._driver import driver as _driver

    _compiling()
    ordinal = _first_gpu()
    with _driver.loading(ordinal):
        library = _jit.load_library(_kernel().cubin)
        _driver.call("cuLibraryUnload", library)
    return f"the compiled kernel, on cuda:{ordinal}"


def launch() -> str:
    import cufa

    from .device_array import DeviceArray

    ordinal = _first_gpu()
    arrays = [DeviceArray.of(array, ordinal) for array in _inputs()]
    try:
        out = cufa.attention(*arrays, causal=True)
        arrays.append(out)
        _compare(out.numpy(), f"cuda:{ordinal}")
    finally:
        for array in arrays:
            array.free()
    kernel = next((name for name in cufa.stats().launches if not name.startswith("cpu")), "nothing")
    return f"{kernel} on cuda:{ordinal}: results are right"


_INSTALL_AGAIN = "Install cufa and what it needs again: pip install --force-reinstall cufa."
_REPORT = "This should not happen: please report it with what `cufa info` prints."

CHECKS = {
    "cpu": Check(cpu, _INSTALL_AGAIN),
    "driver": Check(
        driver,
        "Install NVIDIA's driver, or let the container have the GPU (docker run --gpus all); nvidia-smi tells whether "
        "it works. Arrays in host memory need none.",
    ),
    "gpu": Check(gpu, "See what nvidia-smi says.", ("driver",)),
    "nvrtc": Check(nvrtc, "Install it with pip install 'cufa[cuda13]' or 'cufa[cuda12]', as the driver supports."),
    "headers": Check(headers, _INSTALL_AGAIN),
    "compile": Check(compiling, _REPORT, ("nvrtc", "headers"), 180),
    "cache": Check(cache, "Set CUFA_CACHE_DIR to a directory of your own that can be written."),
    "bundles": Check(bundles, "Correct the variable, or take the bundle away."),
    "load": Check(loading, _REPORT, ("gpu", "compile")),
    "launch": Check(launch, _REPORT, ("gpu",), 180),
}
"""The steps, in the order in which they are tried."""


def _compiling() -> None:
    """End a step that compiles where that is forbidden."""
    from .._compile import env as _env

    if _env.jit_disabled():
        raise NotNeeded("CUFA_DISABLE_JIT is 1, so nothing is compiled")


def _first_gpu() -> int:
    from .._driver import driver as _driver
    from .._kernels import OLDEST_ARCH

    count = int(_driver.call("cuDeviceGetCount"))
    return next(ordinal for ordinal in range(count) if _driver.device(ordinal).arch >= OLDEST_ARCH)


def _driver_major() -> int | None:
    """The CUDA version that the driver is for; None if there is none."""
    from .._driver import driver as _driver
    from ..errors import CudaError

    try:
        return int(_driver.call("cuDriverGetVersion")) // 1000
    except CudaError:
        return None


@lru_cache(maxsize=1)
def _kernel() -> Entry:
    """A kernel of cufa's for the first GPU, or for any if there is none, from the compiler itself."""
    from .._compile import jit as _jit
    from .._driver import driver as _driver
    from .._kernels import OLDEST_ARCH, align

    try:
        arch = _driver.device(_first_gpu()).arch
    except Exception:  # the steps before have said why
        arch = OLDEST_ARCH
    return _jit.compiled_entry(_jit.unit_of(align.plan_for(arch)))


def _inputs() -> list[Any]:
    """q, k and v of a small call."""
    import numpy as np

    random = np.random.default_rng(0)
    return [random.standard_normal((1, 24, heads, 32), np.float32) for heads in (4, 2, 2)]


def _compare(out: Any, where: str) -> None:
    import numpy as np

    from .. import reference

    worst = float(np.max(np.abs(out - reference.attention(*_inputs(), causal=True))))
    if not worst < 1e-4:
        raise Failed(f"attention on {where} is wrong by {worst:.3g}", _REPORT)


def _own_errors() -> tuple[type[Exception], ...]:
    """Those whose messages are whole sentences."""
    from .. import errors

    return tuple(getattr(errors, name) for name in errors.__all__)


def result_of(name: str) -> dict[str, Any]:
    """Try one step: its name, status, what it says, what to do if it failed, and the seconds it took."""
    began = time.perf_counter()
    check = CHECKS[name]
    status, do = "ok", ""
    try:
        says = check.run()
    except NotNeeded as why:
        status, says = "skipped", str(why)
    except Exception as error:
        status, do = "failed", getattr(error, "do", check.do)
        text = " ".join(str(error).removeprefix("cufa: ").split())
        says = text if isinstance(error, (Failed, *_own_errors())) else f"{type(error).__name__}: {text}"
    return {"name": name, "status": status, "says": says, "do": do, "seconds": round(time.perf_counter() - began, 3)}


def main() -> None:
    """Serve requests: each line of stdin is the name of a step, and each is answered by a line on stdout."""
    for line in sys.stdin:
        print(f"{MARK}{json.dumps(result_of(line.strip()))}", flush=True)


if __name__ == "__main__":
    main()
