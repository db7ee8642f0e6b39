"""The public gradients: the way of a call is that of `_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _arrays, _jit, _launch, _params, _plan, _problem, _tensor_map
from ._align import WORKSPACE_ALIGNMENT
from ._arrays import CPU, Arrays
from ._attention import NO_OFFSETS, Array, copies_of, interop_jax, load_copying
from ._configs_backward import ConfigBackward
from ._launch import BackwardLaunch, Copying
from ._plan import BackwardGrid, Plan
from ._problem import NAMES, Problem

SINKS = _problem.DENSE_NAMES.index("sinks")


@_arrays.opaque
def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    deterministic: bool = False,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
) -> Any:
    """Gradients of `attention` by q, k, v and the sinks.

    Nothing of size seqlen_q × seqlen_k is stored: scores are computed again, and `lse` makes probabilities of them.

    Parameters
    ----------
    dout : array, (batch, seqlen_q, num_heads_q, head_dim_v)
        Gradient by `out`, in q's dtype.
    q, k, v : array
        What `attention` was called with.
    out : array, (batch, seqlen_q, num_heads_q, head_dim_v)
        What it returned.
    lse : float32 array, (batch, num_heads_q, seqlen_q)
        What it returned with ``return_lse=True``; for float64 arrays in float64. (They accept a float32 one, too, and
        then err by its rounding: relatively by 2^-24 times lse.)
    dlse : float32 array, (batch, num_heads_q, seqlen_q), optional
        Gradient by `lse`, for float64 arrays float64 or float32; 0 if None.
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks
        What `attention` was called with.
    deterministic : bool
        dq is the same bits in every run. Without, blocks of keys add to it as they come, which is faster. dk, dv and
        dsinks always are, and so is dq on the CPU, and on Hopper above head_dim 128.
    dq, dk, dv : array, optional
        Shaped like q, k and v, and in their dtype. Written and returned instead of new arrays; must not share memory
        with each other or with the inputs.

    Returns
    -------
    dq, dk, dv : array
        Of q's framework, dtype and device. A row that sees no key has gradient 0, whatever its dout and dlse hold, and
        so has a key that no row sees.
    dsinks : float32 array, (num_heads_q,)
        Only if `sinks` are given; float64 for float64 arrays.

    Raises
    ------
    TypeError, ValueError
        As for `attention`; also if `out`, `lse`, `dout` or `dlse` are not shaped as that call's results.
    UnsupportedError, CompileError, MissingKernelError, CudaError
        As for `attention`; `UnsupportedError` also for dq, dk or dv with JAX arrays, which cannot be written.

    See Also
    --------
    reference.attention_backward : The specification, in NumPy float64.

    Notes
    -----
    On a GPU the sums of dq take memory while they add up, from the caller's framework: 4 bytes for each element of q,
    head_dim rounded up to 32, 64 or 128, and 8 for each row; on Hopper above head_dim 128 only the latter. Packed
    sequences take at most twice the former if they have 128 rows on average, and at most five times as much if they
    have fewer. Where sequences have up to 32 rows and 64 keys, packed ones take the former on every GPU, once, and
    dense ones none of it. To the latter packed ones add 32 bytes for each of them that has rows, and 16 for each that
    has not, in all. Copies of q, k, v and dout, as `attention` makes of arrays that are not aligned, come on top.

    Dao, *FlashAttention-2*, 2023, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 128, 2, 64), dtype=np.float32)
    >>> out, lse = cufa.attention(q, k, v, causal=True, return_lse=True)
    >>> dq, dk, dv = cufa.attention_backward(dout, q, k, v, out, lse, causal=True)
    >>> dk.shape
    (1, 128, 2, 64)
    """
    forward = (q, k, v, alibi_slopes, sinks, out)
    given = (*forward, dout, lse, dlse, dq, dk, dv)
    return _run("attention_backward", given, (causal, window_size, softmax_scale, softcap), deterministic)


@_arrays.opaque
def attention_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    seqused_k: Array | None = None,
    dlse: Array | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    deterministic: bool = False,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
) -> Any:
    """Gradients of `attention_varlen` by q, k, v and the sinks.

    Parameters
    ----------
    dout, out : array, (total_q, num_heads_q, head_dim_v)
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k
        What `attention_varlen` was called with.
    lse, dlse : float32 array, (num_heads_q, total_q)
    causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, deterministic, dq, dk, dv
        As for `attention_backward`.

    Returns
    -------
    dq, dk, dv : array
        Shaped like q, k and v; 0 for rows that are not live.
    dsinks : float32 array, (num_heads_q,)
        Only if `sinks` are given; float64 for float64 arrays.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As for `attention_backward`.

    See Also
    --------
    reference.attention_varlen_backward : The specification.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 12, 4, 32), dtype=np.float32)
    >>> offsets = np.array([0, 5, 12], np.int32)  # sequences of 5 and 7 tokens
    >>> out, lse = cufa.attention_varlen(q, k, v, offsets, offsets, return_lse=True)
    >>> cufa.attention_varlen_backward(dout, q, k, v, out, lse, offsets, offsets)[0].shape
    (12, 4, 32)
    """
    forward = (q, k, v, alibi_slopes, sinks, out, cu_seqlens_q, cu_seqlens_k, seqused_k)
    given = (*forward, dout, lse, dlse, dq, dk, dv)
    return _run("attention_varlen_backward", given, (causal, window_size, softmax_scale, softcap), deterministic)


def _run(function: str, given: tuple[Any, ...], options: tuple[Any, ...], deterministic: bool) -> Any:
    if _arrays.compiling():
        return _arrays.uncompiled(_run, function, given, options, deterministic)
    options = _problem.options(function, *options)
    deterministic = _problem.flag(function, "deterministic", deterministic)
    if _arrays.is_jax(given[0]):  # its runtime owns streams and results
        return interop_jax().gradients(function, given, options, deterministic)
    arrays = _arrays.view(function, NAMES[function], given, _problem.WRITTEN[function])
    problem = _problem.backward_problem(function, arrays, options)
    gradients, pointers = [], []
    for name, into, pointer in zip("qkv", given[-3:], arrays.pointers[-3:], strict=True):
        array, pointer = arrays.empty(problem.shape(name), problem.dtype) if into is None else (into, pointer)
        gradients.append(array)
        pointers.append(pointer)
    dsinks, pointer = (None, 0) if given[SINKS] is None else arrays.empty((problem.num_heads_q,), problem.lse_dtype)
    if problem.device == CPU:
        run_on_cpu(arrays, problem, gradients, dsinks)
    else:
        _run_on_gpu(arrays, problem, [*pointers, pointer], deterministic)
    return (*gradients,) if dsinks is None else (*gradients, dsinks)


def _run_on_gpu(arrays: Arrays, problem: Problem, gradients: list[int], deterministic: bool) -> None:
    """Launch the kernels on the caller's stream; `gradients` are the addresses of dq, dk, dv and dsinks."""
    stream = arrays.stream(problem.device)
    kernels, workspace = prepare(problem, deterministic, stream)
    # Freed when this returns: the framework hands it out again only to what comes later on the stream.
    _memory, address = arrays.empty((workspace.floats,), "float32")
    enqueue(kernels, arrays, gradients, workspace, address, stream)


class Kernels(NamedTuple):
    """What a call launches: what copies arrays first, if they should be, and the gradients' kernels."""

    copying: Copying | None
    launch: BackwardLaunch


def enqueue(
    kernels: Kernels, arrays: Arrays, gradients: list[int], workspace: Workspace, address: int, stream: int
) -> None:
    """Enqueue the kernels; the workspace is at `address`."""
    q, k, v, alibi_slopes, sinks, out, *others = arrays.pointers
    dout, lse, dlse = others[-6:-3]
    offsets = others[:-6] or NO_OFFSETS
    copying, launch = kernels
    if copying is not None:
        memory = address + 4 * workspace.copies
        q, k, v, dout = copying([q, k, v, dout], memory, stream, arrays.adapter.current_device())
    launch(
        [q, k, v, out, lse, alibi_slopes, sinks, *offsets],
        [dout, dlse, *gradients, *(address + 4 * offset for offset in workspace.offsets)],
        stream,
    )


class Workspace(NamedTuple):
    """Memory that the kernels of the gradients share, in float32 numbers.

    Attributes
    ----------
    offsets : tuple of int
        Of row_lse, row_delta, dq_sum, turns, next_unit, heads_done, offsets_q, offsets_k, not_finite and chains.
    copies : int
        Of copies of arrays.
    floats : int
        All of it.
    """

    offsets: tuple[int, ...]
    copies: int
    floats: int


def prepare(problem: Problem, deterministic: bool, stream: int) -> tuple[Kernels, Workspace]:
    """Choose, compile and load the kernels: once, after which they are remembered with the problem."""
    key = f"launch, deterministic={deterministic}"
    known: tuple[Kernels, Workspace] | None = problem.memo.get(key)
    if known is not None:
        return known
    workspace = workspace_of(problem, deterministic)
    copies = copies_of(problem)
    copying = None if copies is None else load_copying(copies, stream)
    kernels = Kernels(copying, _load(problem if copies is None else copies.problem, deterministic, stream))
    problem.memo[key] = kernels, workspace
    return kernels, workspace


def _load(problem: Problem, deterministic: bool, stream: int) -> BackwardLaunch:
    """Choose, compile and load the gradients' kernels for a problem as it is."""
    plan, grid = _plan_and_grid(problem, deterministic)
    functions = _jit.load_kernel(plan, problem.device, stream)
    config = plan.config
    maps = _tensor_map.Maps(bytes(_params.BACKWARD_MAPS_BYTES), ())
    if plan.kernel.endswith("_sm90"):
        maps = _tensor_map.make_backward_maps(problem, config)
    argument = maps.encoded + _params.pack_backward(problem, grid)
    shapes = list(zip(grid.blocks, plan.threads, plan.smem_bytes, strict=True))
    return BackwardLaunch(_jit.describe(plan), functions, problem.device, shapes, argument, maps.shifts)


def _plan_and_grid(problem: Problem, deterministic: bool) -> tuple[Plan, BackwardGrid]:
    assert problem.static is not None
    device = _launch.device(problem.device)
    plan = _plan.make_backward_plan(problem.static, device.arch, deterministic, _plan.average_rows(problem))
    return plan, _plan.make_backward_grid(plan, problem, device.num_sms)


def workspace_of(problem: Problem, deterministic: bool) -> Workspace:
    """The memory that a call will need."""
    copies = copies_of(problem)
    if copies is not None:
        problem = copies.problem
    copied = 0 if copies is None else copies.floats
    return _workspace(*_plan_and_grid(problem, deterministic), problem, copied)


def _workspace(plan: Plan, grid: BackwardGrid, problem: Problem, copied: int) -> Workspace:
    config = plan.config
    assert isinstance(config, ConfigBackward)
    heads = problem.num_heads_q * (1 if problem.varlen else problem.batch)
    numbers, tiles = grid.workspace_rows * heads, grid.m_blocks * heads
    sums = 0, 0, 0, 0
    if plan.kernel != "attention_backward_split_sm90":  # where dq is not added up in memory
        rows = problem.seqlen_q * heads if config.sums_by_rows else tiles * config.block_m
        if config.writes_dq and not problem.varlen:  # nothing is added up
            rows = 0
        sums = rows * config.tile_head_dim, tiles, 1, (1 if problem.varlen else problem.batch) * problem.num_heads_k
    packed = 2 * (problem.batch + 1) if problem.varlen else 0
    # (before, size): what an address has before it and from there on.
    padding = PADDING_ROWS if problem.varlen else 0
    chains = _chain_floats(plan, grid, problem)
    sizes = [(padding, numbers), (padding, numbers), *((0, size) for size in (*sums, packed, packed, 1, chains))]
    offsets, end = [], 0
    for before, size in sizes:
        offsets.append(end + before)
        end = -(-(end + before + size) // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    return Workspace(tuple(offsets), end, end + copied)


def _chain_floats(plan: Plan, grid: BackwardGrid, problem: Problem) -> int:
    """What the blocks of the one-pass kernel take over of dk and dv, if their sums may be so long as to drift."""
    config = plan.config
    steps = -(-problem.seqlen_q // config.block_m) * (problem.num_heads_q // max(1, problem.num_heads_k))
    if plan.kernel != "attention_backward_sm90" or steps * config.block_m <= LONGEST_SUM:
        return 0
    columns = sum(-(-dim // 16) * 16 for dim in (config.head_dim, config.head_dim_v))
    main = grid.blocks[plan.entries.index(plan.kernel)]
    return int(main * config.block_n * columns)


LONGEST_SUM = 2 * _problem.CHAIN_ROWS
"""Rows over which the tensor cores add up in the one-pass kernel: ``take_chain`` in attention/backward_work.cuh."""

PADDING_ROWS = 128
"""``padding_rows`` in attention/backward_work.cuh."""


def run_on_cpu(arrays: Arrays, problem: Problem, gradients: list[Any], dsinks: Any) -> None:
    from . import _cpu_backward

    q, k, v, alibi_slopes, sinks, out, *others = (arrays.numpy(index) for index in range(len(arrays.given)))
    dout, lse, dlse = others[-6:-3]
    assert q is not None and k is not None and v is not None and out is not None
    assert dout is not None and lse is not None
    dq, dk, dv = (_arrays.as_numpy(each) for each in gradients)
    results = dq, dk, dv, None if dsinks is None else _arrays.as_numpy(dsinks)
    options: dict[str, Any] = {
        "softmax_scale": problem.softmax_scale,
        "window_left": problem.window_left,
        "window_right": problem.window_right,
        "softcap": problem.softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    if problem.varlen:
        cu_seqlens_q, cu_seqlens_k, seqused_k = others[:3]
        assert cu_seqlens_q is not None and cu_seqlens_k is not None
        _cpu_backward.varlen_backward(
            dout, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, out, lse, dlse, *results, **options
        )
    else:
        _cpu_backward.backward(dout, q, k, v, out, lse, dlse, *results, **options)
