"""Which kernel serves a call, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import _arrays, _attention, _jit, _launch, _plan, _problem
from ._align import Copies
from ._arrays import CPU
from ._problem import Problem
from .errors import UnsupportedError


@dataclass(frozen=True)
class Explanation:
    """What would run. ``str()`` gives it as a report.

    Attributes
    ----------
    function : str
    kernel : str
        Name of the kernel; ``cpu`` for arrays in host memory.
    device : str
    state : {'loaded', 'cached', 'to be compiled', 'not needed'}
        Of the kernel when it was asked.
    reason : str
        Why this kernel and not a faster one.
    block_m, block_n : int
        Rows of q and of k a tile; on the CPU, 0.
    num_threads, num_blocks : int
        Threads a block, blocks of the launch.
    smem_bytes : int
        Shared memory a block, in bytes.
    registers, spill_bytes : int
        Registers a thread; bytes spilled to local memory.
    compile_seconds : float
        What compiling it took, when that was done.
    config : dict
        Every member of the kernel's Config.
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

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.kernel} on {self.device}"]
        if self.config is not None:
            lines += [
                f"  tiles      {self.block_m} × {self.block_n} (rows of q × rows of k), {self.num_blocks} blocks of "
                f"{self.num_threads} threads",
                f"  takes      {self.smem_bytes / 1024:g} KB shared memory a block, {self.registers} registers a "
                f"thread, {self.spill_bytes} bytes spilled",
                f"  kernel is  {self.state} (compiling it took {self.compile_seconds:.2f} s)",
            ]
        return "\n".join([*lines, f"  because    {self.reason}"])


def explain(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    *,
    seqused_k: Any = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Explanation:
    """Say which kernel would serve a call of `attention`, or `attention_varlen` if offsets are given, and why.

    Nothing is computed. A kernel that is not there yet is compiled, since what it takes is known only then.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, \\
return_lse, out
        As for `attention` and `attention_varlen`.

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As the call itself would.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q = np.zeros((1, 16, 2, 64), np.float32)
    >>> print(cufa.explain(q, q, q))
    attention: cpu on the CPU
      because    q is a numpy array in host memory; CuPy, torch or JAX arrays on a GPU are computed there
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    function = "attention_varlen" if packed else "attention"
    given: tuple[Any, ...] = (q, k, v, alibi_slopes, sinks, out)
    names = _problem.VARLEN_NAMES if packed else _problem.DENSE_NAMES
    if packed:
        given = (*given, cu_seqlens_q, cu_seqlens_k, seqused_k)
    options = _problem.options(function, causal, window_size, softmax_scale, softcap)
    _problem.flag(function, "return_lse", return_lse)
    if _arrays.is_jax(q):
        from .interop import jax

        if out is not None:
            raise UnsupportedError(f"{function}: out is not supported for JAX arrays, which cannot be written.")
        problem = _problem.check(function, arrays := jax.view(function, given), options)
    else:
        arrays = _arrays.view(function, names, given, _problem.WRITTEN[function])
        problem = (_problem.varlen_problem if packed else _problem.dense_problem)(arrays, *options)
    if problem.device == CPU:
        layout = arrays.layouts[0]
        assert layout is not None
        framework = layout[0].spec(layout).framework
        reason = f"q is a {framework} array in host memory; CuPy, torch or JAX arrays on a GPU are computed there"
        return Explanation(function, "cpu", "the CPU", "not needed", reason)
    return _explain_kernel(problem)


def _said(copies: Copies) -> str:
    """What is copied, in words."""
    names = [each.name for each in copies.made]
    what = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    memory = -(-4 * copies.floats // (1 << 20))
    are = "is" if len(names) == 1 else "are"
    return f"{what} {are} copied first, into rows aligned to 16 bytes, for which it takes {memory} MiB while it runs"


def _explain_kernel(problem: Problem) -> Explanation:
    assert problem.static is not None
    device = _launch.device(problem.device)
    copies = _attention.copies_of(problem)
    if copies is not None:
        _jit.entry_of(_plan.make_align_plan(device.arch))
        problem = copies.problem
    assert problem.static is not None
    plan = _plan.make_plan(problem.static, device.arch)
    grid = _plan.make_grid(plan, problem, device.num_sms)
    if _jit.is_loaded(plan, problem.device):
        state = "loaded"
    else:
        state = "to be compiled" if _jit.cache().get(_jit.key_of(plan)) is None else "cached"
    meta = _jit.entry_of(plan).meta
    config = plan.config
    return Explanation(
        function=problem.function,
        kernel=f"{plan.kernel} (sm_{meta['arch']})",
        device=_problem.device_name(problem.device),
        state=state,
        reason=plan.reason if copies is None else f"{plan.reason}; {_said(copies)}",
        block_m=config.block_m,
        block_n=config.block_n,
        num_threads=config.num_threads,
        num_blocks=grid.blocks,
        smem_bytes=config.smem_bytes,
        registers=meta["registers"],
        spill_bytes=meta["spill_bytes"],
        compile_seconds=meta["seconds"],
        config=dict(vars(config)),
    )
