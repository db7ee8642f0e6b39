"""A Hopper that is not there: launches are noted instead of made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cufa._compile import jit as _jit
from cufa._compile import used as _used
from cufa._driver import driver as _driver
from cufa._driver import launch as _launch
from cufa._kernels import tensor_map


class Gpu:
    """What launches ask of the driver's bindings, and what a caller's framework says.

    Attributes
    ----------
    launched : list
        Stream, kernel and argument of each launch.
    short_cuts : int
        Calls that were known, and went straight to their launches.
    stream, current : int
        The caller's.
    """

    CUclusterSchedulingPolicy = SimpleNamespace(CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING=2)
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6,
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4,
        CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE=5,
    )
    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.short_cuts = 0
        self.stream, self.current = 7, 0

    @staticmethod
    def CUlaunchAttribute() -> Any:
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: int, extra: int) -> tuple[int]:
        argument = _launch._scratch.argument
        self.launched.append((config.hStream, function, bytes(argument)))
        argument[:] = bytes(len(argument))
        return (0,)

    def same_memory(self) -> contextlib.AbstractContextManager[None]:
        """Within it the results of a call have the addresses that those of the call before had."""
        raise NotImplementedError

    def launches(self, call: Callable[[], Any]) -> list[Any]:
        """Those of a call."""
        self.launched = []
        with self.same_memory():
            call()
        return self.launched

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, known: type) -> None:
        """Be the GPU of the process. Calls of `known`, a class of `cufa._operations.repeated`, are counted."""
        run = known.__call__

        def counted(call: Any, addresses: list[int]) -> list[Any]:
            self.short_cuts += 1
            return run(call, addresses)  # type: ignore[no-any-return]

        for owner, name, value in (
            (_driver, "driver", lambda: self),
            (_driver, "device", lambda _: _driver.Device(90, 132)),
            (_driver, "overlaps", lambda _: True),
            (_driver, "enter", lambda _: None),
            (_driver, "current", lambda _: contextlib.nullcontext()),
            (_jit, "load_kernel", lambda plan, *_: plan.entries),
            (_used, "note", lambda *_: None),
            (tensor_map, "_driver_encode", lambda shape, address: address.to_bytes(8, "little") + bytes(120)),
            (known, "__call__", counted),
        ):
            monkeypatch.setattr(owner, name, value)
