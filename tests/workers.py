"""What each worker of pytest-xdist has: a GPU, a thread, and its share of the tests that take long.

No module is imported here that reads the variables which follow.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

COUNT_GPUS = (
    "import ctypes; cuda, number = ctypes.CDLL('libcuda.so.1'), ctypes.c_int(); "
    "cuda.cuInit(0); cuda.cuDeviceGetCount(ctypes.byref(number)); print(number.value)"
)


def visible_gpus() -> int:
    """How many GPUs there are, asked in another process: in this one CUDA would settle their order."""
    asked = subprocess.run([sys.executable, "-I", "-S", "-c", COUNT_GPUS], capture_output=True, text=True)
    return int(asked.stdout) if asked.returncode == 0 else 0


def share_of_machine(worker: str, num_gpus: int) -> dict[str, str]:
    """Variables that give a worker of pytest-xdist its part of the machine: one thread of BLAS, and a GPU.

    It sees all GPUs, so that tests which need two have them, but its own first, which tests use that need one.
    """
    own = int(worker.removeprefix("gw")) if worker.startswith("gw") else 0
    # Threads of one worker's products would only wait for those of another's.
    found = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if num_gpus > 1:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(str((own + each) % num_gpus) for each in range(num_gpus))
    return found


def long_first(items: list[Any], is_long: list[bool], workers: int) -> list[Any]:
    """The items in an order in which none that takes long begins last, when the others are done.

    pytest-xdist gives each worker as many neighbours, which here begin with its share of the long ones; the others stay
    in their order, in which neighbours have kernels in common.
    """
    long = [item for item, chosen in zip(items, is_long, strict=True) if chosen]
    others = [item for item, chosen in zip(items, is_long, strict=True) if not chosen]
    found: list[Any] = []
    for left in range(workers, 0, -1):
        size = (len(long) + len(others)) // left
        own = min(size, -(-len(long) // left))
        found += [*long[:own], *others[: size - own]]
        del long[:own], others[: size - own]
    return found


def reasons(skipped: list[Any]) -> dict[str, int]:
    """Why tests were left out, and how many: what a run on fewer GPUs, or without a framework, has not verified."""
    told = (each.longrepr[2] if isinstance(each.longrepr, tuple | list) else each.longrepr for each in skipped)
    return dict(sorted(Counter(str(reason).removeprefix("Skipped: ") for reason in told).items()))
