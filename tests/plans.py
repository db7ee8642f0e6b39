"""Plans and grids by what tests vary."""

from __future__ import annotations

from typing import Any

from cufa._call.problem import LONG_ROWS, Problem, Static
from cufa._kernels import BACKWARD, FORWARD, Plan, align, choose


def forward(static: Static, arch: int) -> Plan:
    """The kernel of the forward for a GPU of compute capability `arch`."""
    return choose(FORWARD, static, arch)


def backward(static: Static, arch: int, deterministic: bool = False, average_rows: int = LONG_ROWS) -> Plan:
    """The kernel of the gradients."""
    return choose(BACKWARD, static._replace(deterministic=deterministic, average_rows=average_rows), arch)


def aligned(arch: int) -> Plan:
    """The kernel that copies."""
    return align.plan_for(arch)


def grid(plan: Plan, problem: Problem, num_sms: int) -> Any:
    """How a problem is divided."""
    return plan.kernel.grid(plan.config, problem, num_sms)
