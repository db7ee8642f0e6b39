"""The kernels, one file each: which problems a kernel serves, its table of tiles, its launches and its argument.

An operation lists those that may serve it; `choose` asks them in their order, fastest first. Nothing is imported here
that not every operation needs.
"""

from .kernel import OLDEST_ARCH, Kernel, Plan, choose

__all__ = ["OLDEST_ARCH", "Kernel", "Plan", "choose"]
