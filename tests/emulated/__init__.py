"""Kernels, run on the CPU: see docs/emulation.md."""

from .build import EmulationError, Program, why_not
from .gpu import Array, Function, Gpu, Launched, call

__all__ = ["Array", "EmulationError", "Function", "Gpu", "Launched", "Program", "call", "why_not"]
