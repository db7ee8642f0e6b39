"""The exceptions that are cufa's own. Wrong types raise TypeError, and values that disagree a kind of ValueError."""

from __future__ import annotations

__all__ = ["CompileError", "CudaError", "MissingKernelError", "OutOfPagesError", "UnsupportedError"]


class ArgumentError(ValueError):
    """Arguments disagree, or have values that no call may have; unlike other ValueErrors, it is no fault of cufa's."""


class UnsupportedError(NotImplementedError):
    """What is asked for makes sense, but cufa does not do it here; the message says what it does."""


class CompileError(RuntimeError):
    """A kernel could not be compiled: NVRTC is missing, or its log follows."""


class MissingKernelError(RuntimeError):
    """A kernel is not loaded and must not be compiled now; the message says how to have it loaded."""


class OutOfPagesError(RuntimeError):
    """A `cufa.PagedKVCache` has fewer pages left than an operation needs; the operation has changed nothing."""


class CudaError(RuntimeError):
    """The CUDA driver refused a call."""
