"""The public functions. Each body is the whole way of a call; nothing is hidden between the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _align, _arrays, _jit, _launch, _params, _plan, _problem, _tensor_map
from ._align import Copies
from ._arrays import CPU, Arrays
from ._configs import ConfigSm90
from ._launch import Copying, Launch
from ._problem import OUT, Problem

NO_OFFSETS = (0, 0, 0)
"""Addresses of cu_seqlens_q, cu_seqlens_k and seqused_k where sequences are not packed."""

WRITTEN = (OUT,)

Array = Any
"""An array of CuPy, torch, JAX, Numba or NumPy, or any with ``__dlpack__``."""


@_arrays.opaque
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Exact attention, ``softmax(softmax_scale · q kᵀ) v``, for each batch entry and head.

    Computed where the arrays are: GPU arrays on their GPU and the caller's current stream, without waiting for it;
    arrays in host memory on the CPU. Nothing of size seqlen_q × seqlen_k is stored.

    Parameters
    ----------
    q : array, (batch, seqlen_q, num_heads_q, head_dim)
        CuPy, torch, JAX, Numba or NumPy, or any array with ``__dlpack__``; float16, bfloat16 or float32, on the CPU
        also float64. Any strides. head_dim is 1 to 256.
    k : array, (batch, seqlen_k, num_heads_k, head_dim)
        num_heads_q must be a multiple of num_heads_k: query head h reads key head ``h // (num_heads_q // num_heads_k)``
        (grouped-query attention; multi-query if num_heads_k is 1).
    v : array, (batch, seqlen_k, num_heads_k, head_dim_v)
        head_dim_v is 1 to 256, independent of head_dim.
    causal : bool
        Query i sees key j if ``j <= i + seqlen_k - seqlen_q``: the last query sees the last key.
    window_size : (int or None, int or None), optional
        Keys that a query sees to the (left, right) of the key at its own position ``i + seqlen_k - seqlen_q``, both
        inclusive; None (or -1) is unbounded. The mask is drawn in `cufa.reference`.
    softmax_scale : float, optional
        Multiplies q·kᵀ; default ``head_dim ** -0.5``. From 2^-126 to 2^127. This and `softcap` may be arrays of no
        dimensions, whose value is read at the call, for which the host waits if it is on a GPU.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0.0 is off.
    alibi_slopes : float32 array, (num_heads_q,) or (batch, num_heads_q), optional
        ``slope * |i + seqlen_k - seqlen_q - j|`` is subtracted from each score.
    sinks : float32 array, (num_heads_q,), optional
        Score, per head, of one more key that takes probability and has no value.
    return_lse : bool
        Return `lse` too.
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v), optional
        Written and returned instead of a new array; must not share memory with the inputs.

    Returns
    -------
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v)
        Of q's framework, dtype and device. Rows that see no key are 0.
    lse : float32 array, (batch, num_heads_q, seqlen_q)
        Only if `return_lse`: natural logarithm of the sum of exponentials of a row's scores, the sink's included;
        -inf for a row that sees no key. float64 for float64 arrays.

    Raises
    ------
    TypeError
        If an argument is no array or of another framework than q.
    ValueError
        If shapes, dtypes, devices or values disagree.
    UnsupportedError
        If the GPU is older than compute capability 8.0, or for float64 on a GPU, a head_dim above 256, or a torch
        tensor that requires grad.
    CompileError, MissingKernelError
        If the kernel is needed for the first time and cannot be compiled, or not now.

    See Also
    --------
    attention_varlen : Sequences of any lengths, packed without padding.
    reference.attention : The specification, in NumPy float64.
    explain : Which kernel serves a call, and why.

    Notes
    -----
    Dao, *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning*, 2023. Results are bitwise
    repeatable, and a row does not depend on what else is in the batch. All arguments are checked before anything is
    written.

    On a GPU 16-bit arrays q, k and v that cannot be copied 16 bytes at a time, as if head_dim is odd, are first copied
    into rows that can, where there are queries enough for that to pay. For as long as the call takes, the copies need
    memory from the caller's framework: as much as the arrays, with rows rounded up to 16 bytes.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 128, 8, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 128, 2, 64), dtype=np.float32)
    >>> cufa.attention(q, k, v, causal=True).shape
    (2, 128, 8, 64)
    """
    given = (q, k, v, alibi_slopes, sinks, out)
    if _arrays.compiling():
        return _arrays.uncompiled(_again, attention, given, (causal, window_size, softmax_scale, softcap), return_lse)
    options = _problem.options("attention", causal, window_size, softmax_scale, softcap)
    return_lse = _problem.flag("attention", "return_lse", return_lse)
    if _arrays.is_jax(q):  # its runtime owns streams and results
        return interop_jax().attention(given, options, return_lse)
    arrays = _arrays.view("attention", _problem.DENSE_NAMES, given, WRITTEN)
    problem = _problem.dense_problem(arrays, *options)
    out, lse, pointers = _outputs(arrays, problem, return_lse)
    run(arrays, problem, out, lse, pointers)
    return (out, lse) if return_lse else out


@_arrays.opaque
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    seqused_k: Array | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """`attention` of sequences of any lengths, packed end to end without padding.

    Parameters
    ----------
    q : array, (total_q, num_heads_q, head_dim)
    k : array, (total_k, num_heads_k, head_dim)
    v : array, (total_k, num_heads_k, head_dim_v)
        As for `attention`.
    cu_seqlens_q, cu_seqlens_k : int32 array, (batch + 1,)
        Sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. They begin with 0 and do not decrease, but for
        zeros behind the last, with which programs of fixed shapes pad: checked on the CPU. On a GPU, where reading them
        would make the host wait, an offset counts as the largest up to it, clamped to the packed array. Rows of q that
        are no sequence's are 0 in a new `out`, left as they are in a given one, and their lse is -infinity.
    seqused_k : int32 array, (batch,), optional
        Live keys of each sequence; whatever its other rows of k and v hold, NaN included, does not count.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, return_lse, out
        As for `attention`, within each sequence. `alibi_slopes` may be (batch, num_heads_q).

    Returns
    -------
    out : array, (total_q, num_heads_q, head_dim_v)
    lse : float32 array, (num_heads_q, total_q)
        Only if `return_lse`; float64 for float64 arrays.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As for `attention`.

    See Also
    --------
    reference.attention_varlen : The specification.

    Notes
    -----
    No longest length is asked for: the kernel finds its sequence from the offsets on the GPU.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4, 32), dtype=np.float32)
    >>> offsets = np.array([0, 5, 12], np.int32)  # sequences of 5 and 7 tokens
    >>> cufa.attention_varlen(q, k, v, offsets, offsets, causal=True).shape
    (12, 4, 32)
    """
    given = (q, k, v, alibi_slopes, sinks, out, cu_seqlens_q, cu_seqlens_k, seqused_k)
    if _arrays.compiling():
        asked = causal, window_size, softmax_scale, softcap
        return _arrays.uncompiled(_again, attention_varlen, given, asked, return_lse)
    options = _problem.options("attention_varlen", causal, window_size, softmax_scale, softcap)
    return_lse = _problem.flag("attention_varlen", "return_lse", return_lse)
    if _arrays.is_jax(q):
        return interop_jax().attention_varlen(given, options, return_lse)
    arrays = _arrays.view("attention_varlen", _problem.VARLEN_NAMES, given, WRITTEN)
    problem = _problem.varlen_problem(arrays, *options)
    out, lse, pointers = _outputs(arrays, problem, return_lse)
    run(arrays, problem, out, lse, pointers)
    return (out, lse) if return_lse else out


def _again(function: Any, given: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    """Call a function of this module once more, with its arguments in the order of `_problem.NAMES`."""
    arrays = dict(zip(_problem.NAMES[function.__name__], given, strict=True))
    names = "causal", "window_size", "softmax_scale", "softcap"
    return function(**arrays, **dict(zip(names, options, strict=True)), return_lse=return_lse)


def _outputs(arrays: Arrays, problem: Problem, return_lse: bool) -> tuple[Array, Array | None, list[int]]:
    """out and lse in the caller's framework, and the addresses that lead Params."""
    if arrays.layouts[OUT] is None:
        out, out_pointer = arrays.empty(problem.out_shape, problem.dtype)
    else:
        out, out_pointer = arrays.given[OUT], arrays.pointers[OUT]
    lse, lse_pointer = arrays.empty(problem.lse_shape, problem.lse_dtype) if return_lse else (None, 0)
    return out, lse, pointers_of(arrays, out_pointer, lse_pointer)


def pointers_of(arrays: Arrays, out: int, lse: int) -> list[int]:
    """The addresses that lead Params, in their order there."""
    q, k, v, alibi_slopes, sinks, _, *offsets = arrays.pointers
    return [q, k, v, out, lse, alibi_slopes, sinks, *(offsets or NO_OFFSETS)]


def run(
    arrays: Arrays,
    problem: Problem,
    out: Array,
    lse: Array | None,
    pointers: list[int],
    stream: int | None = None,
    workspace: tuple[int, int] | None = None,
) -> None:
    """Compute out and lse: on the CPU, or by a launch on `stream`, by default the caller's.

    `workspace` is the address of memory for copies, and how many float32 numbers it holds. By default there is as much
    as is needed.
    """
    if problem.device == CPU:
        _run_on_cpu(arrays, problem, out, lse)
        return
    if stream is None:
        stream = arrays.stream(problem.device)
    launch = problem.memo.get("launch")
    current_device = arrays.adapter.current_device()
    if launch is None:  # the first call, or one of arrays that are copied first
        launch, copying = prepare(problem, stream, None if workspace is None else workspace[1])
        if copying is not None:
            # Freed when this returns: the framework hands it out again only to what comes later on the stream.
            _memory, address = (None, workspace[0]) if workspace else arrays.empty((copying.floats,), "float32")
            pointers = copying(pointers, address, stream, current_device)
    launch(pointers, stream, current_device)


def prepare(problem: Problem, stream: int, most_floats: int | None = None) -> tuple[Launch, Copying | None]:
    """Choose, compile and load the kernel of `problem`, and the one that copies arrays for it, if they should be.

    Once, after which they are remembered with the problem: where nothing is copied, as its launch. Where copies would
    take more than `most_floats` numbers, there are none.
    """
    copies = copies_of(problem)
    if copies is None:
        problem.memo["launch"] = launch = _load(problem, stream)
        return launch, None
    copied = most_floats is None or copies.floats <= most_floats
    key = f"launch, copied={copied}"
    known: tuple[Launch, Copying | None] | None = problem.memo.get(key)
    if known is None:
        copying = load_copying(copies, stream) if copied else None
        known = problem.memo[key] = _load(copies.problem if copied else problem, stream), copying
    return known


def copies_of(problem: Problem) -> Copies | None:
    """What is copied for a problem, on its GPU."""
    if "copies" not in problem.memo:
        problem.memo["copies"] = _align.copies_of(problem, _launch.device(problem.device).arch)
    copies: Copies | None = problem.memo["copies"]
    return copies


def load_copying(copies: Copies, stream: int) -> Copying:
    """Compile and load the kernel that copies."""
    problem = copies.problem
    device = _launch.device(problem.device)
    plan = _plan.make_align_plan(device.arch)
    (kernel,) = _jit.load_kernel(plan, problem.device, stream)
    blocks = _plan.make_align_blocks(plan, copies, device.num_sms)
    params, layout = _params.pack_align(copies), _params.ALIGN_POINTER_LAYOUT
    threads = plan.config.num_threads
    launch = Launch(_jit.describe(plan), kernel, problem.device, blocks, threads, 0, params, layout=layout)
    return Copying(launch, copies, _problem.read_by_tiles(problem.function))


def _load(problem: Problem, stream: int) -> Launch:
    """Choose, compile and load the kernel of a problem as it is."""
    assert problem.static is not None
    device = _launch.device(problem.device)
    plan = _plan.make_plan(problem.static, device.arch)
    grid = _plan.make_grid(plan, problem, device.num_sms)
    (kernel,) = _jit.load_kernel(plan, problem.device, stream)
    config, params = plan.config, _params.pack(problem, grid)
    shifts: tuple[int, ...] = ()
    if isinstance(config, ConfigSm90):
        maps = _tensor_map.make_maps(problem, config)
        params = (maps.encoded + params + _params.pack_deal(grid)).ljust(_params.TMA_SIZE, b"\0")
        shifts = maps.shifts
    what = _jit.describe(plan)
    return Launch(what, kernel, problem.device, grid.blocks, config.num_threads, config.smem_bytes, params, shifts)


def _run_on_cpu(arrays: Arrays, problem: Problem, out: Array, lse: Array | None) -> None:
    from . import _cpu

    q, k, v, alibi_slopes, sinks = (arrays.numpy(index) for index in range(OUT))
    assert q is not None and k is not None and v is not None
    out = _arrays.as_numpy(out)
    lse = None if lse is None else _arrays.as_numpy(lse)
    options: dict[str, Any] = {
        "softmax_scale": problem.softmax_scale,
        "window_left": problem.window_left,
        "window_right": problem.window_right,
        "softcap": problem.softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    if problem.varlen:
        cu_seqlens_q, cu_seqlens_k, seqused_k = (arrays.numpy(index) for index in range(OUT + 1, OUT + 4))
        assert cu_seqlens_q is not None and cu_seqlens_k is not None
        fresh = arrays.layouts[OUT] is None
        _cpu.varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, out, lse, fresh=fresh, **options)
    else:
        _cpu.forward(q, k, v, out, lse, **options)


def interop_jax() -> Any:
    from .interop import jax

    return jax
