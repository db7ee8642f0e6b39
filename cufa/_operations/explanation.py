"""What would run for a problem, in words: the report of `cufa.explain` and of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .._call import problem as _problem
from .._call.align import Copies
from .._call.problem import Problem
from .._compile import jit as _jit
from .._driver.driver import Device
from .._kernels.kernel import Config
from .call import planned, planned_for


@dataclass(frozen=True)
class Explanation:
    """What would run. ``str()`` gives it as a report.

    Attributes
    ----------
    function : str
    kernel : str
        Name of the kernel; ``cpu`` for arrays in host memory.
    device : str
    state : {'loaded', 'bundled', 'cached', 'to be compiled', 'not needed'}
        Of the kernel when it was asked.
    reason : str
        Why this kernel and not a faster one.
    block_m, block_n : int
        Rows of q and of k per tile; 0 where there are none, as on the CPU.
    num_threads, num_blocks : int
        Threads per block, blocks of all launches.
    smem_bytes : int
        Shared memory per block, in bytes.
    registers, spill_bytes : int
        Registers per thread; bytes spilled to local memory.
    compile_seconds : float
        What compiling it took, when that was done.
    config : dict
        Every member of the kernel's Config.
    refusals : dict of str to str
        The kernels that were asked before this one, and why each does not serve.
    bundle : str
        The file of the bundle that the kernel comes from.
    not_bundled : str
        Why none of the bundles at hand has the kernel, and what to do; empty if one has, or if there are none.
    launches : tuple of (str, int, int)
        The function of each launch, its blocks and the threads of each.
    mask : str
        How many blocks of a `cufa.BlockMask` are full, which are computed as they are, partial, which are masked, and
        empty, which are skipped.
    """

    function: str
    kernel: str
    device: str
    state: str
    reason: str
    block_m: int = 0
    block_n: int = 0
    num_threads: int = 0
    num_blocks: int = 0
    smem_bytes: int = 0
    registers: int = 0
    spill_bytes: int = 0
    compile_seconds: float = 0.0
    config: dict[str, Any] | None = None
    refusals: dict[str, str] = field(default_factory=dict)
    bundle: str = ""
    not_bundled: str = ""
    launches: tuple[tuple[str, int, int], ...] = ()
    mask: str = ""

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.kernel} on {self.device}"]
        if self.config is not None:
            blocks = f"{self.num_blocks} blocks of {self.num_threads} threads"
            tiles = f"  tiles      {self.block_m} × {self.block_n} (rows of q × rows of k), {blocks}"
            names = ", ".join(f"{entry} of {count} × {threads}" for entry, count, threads in self.launches)
            lines += [tiles if self.block_m else f"  runs       {blocks}"]
            lines += [f"  launches   {names} (blocks × threads)"] if len(self.launches) > 1 else []
            lines += [
                f"  takes      {self.smem_bytes / 1024:g} KB shared memory per block, {self.registers} registers per "
                f"thread, {self.spill_bytes} bytes spilled",
                f"  kernel is  {self.state} (compiling it took {self.compile_seconds:.2f} s)",
            ]
            lines += [f"  bundle     {self.bundle or self.not_bundled}"] if self.bundle or self.not_bundled else []
        lines += [f"  mask       {self.mask}"] if self.mask else []
        others = {kernel: why for kernel, why in self.refusals.items() if not self.reason.startswith(why)}
        refused = [f"  not by     {kernel}: {why}" for kernel, why in others.items()]
        return "\n".join([*lines, f"  because    {self.reason}", *refused])


def _said(copies: Copies) -> str:
    """What is copied, in words."""
    names = [each.name for each in copies.made]
    what = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    memory = -(-4 * copies.floats // (1 << 20))
    are = "is" if len(names) == 1 else "are"
    return f"{what} {are} copied first, into rows aligned to 16 bytes, for which it takes {memory} MiB while it runs"


def explained(problem: Problem, device: Device | None = None) -> Explanation:
    """What runs on the GPU of a problem, or would on one like `device`; a kernel that is not there yet is compiled."""
    _, copies, plan, grid, _, _ = planned(problem) if device is None else planned_for(problem, device)
    if copies is not None:
        from .._kernels import align

        _jit.entry_of(_jit.unit_of(align.plan_for(plan.arch)))
    unit = _jit.unit_of(plan)
    served = _jit.bundled(unit)
    if device is None and _jit.is_loaded(plan, problem.device):
        state = "loaded"
    elif served is not None:
        state = "bundled"
    else:
        state = "cached" if _jit.is_cached(unit) else "to be compiled"
    meta = _jit.entry_of(unit).meta
    config, steps = plan.config, plan.steps
    # Of the launch that computes; which of several that is, the config says.
    alone = steps[0] if len(steps) == 1 else None
    threads, smem_bytes = (alone.threads, alone.smem_bytes) if alone else (config.num_threads, config.smem_bytes)
    launches = ((step.entry, blocks, step.threads) for step, blocks in zip(steps, grid.blocks, strict=True) if blocks)
    has_tiles = isinstance(config, Config)
    return Explanation(
        function=problem.function,
        kernel=f"{plan.name} (sm_{meta['arch']})",
        device=_problem.device_name(problem.device) if device is None else f"a GPU of {device.num_sms} SMs",
        state=state,
        reason=plan.reason if copies is None else f"{plan.reason}; {_said(copies)}",
        refusals=dict(plan.refusals),
        block_m=config.block_m if has_tiles else 0,
        block_n=config.block_n if has_tiles else 0,
        num_threads=threads,
        num_blocks=sum(grid.blocks),
        smem_bytes=smem_bytes,
        registers=meta["registers"],
        spill_bytes=meta["spill_bytes"],
        compile_seconds=meta["seconds"],
        config=dict(vars(config)),
        bundle="" if served is None else str(served.path),
        not_bundled=_jit.why_not_bundled(unit) if served is None else "",
        launches=tuple(launches),
    )
