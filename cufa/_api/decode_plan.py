"""`cufa.decode_plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._call.arrays import unscriptable
from .._call.kvcache import DecodePlan, KVCacheProblem, PlanFacts
from .._operations.asked import problem_of
from .._operations.call import call
from .._operations.kvcache import DECODE_PLAN
from .attention import Array


@unscriptable
def decode_plan(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    k: Array | None = None,
    v: Array | None = None,
    cache_seqlens: Array | None = None,
    block_table: Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    cu_seqlens_q: Array | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    num_splits: int = 0,
    cache_dtype: str | None = None,
) -> DecodePlan:
    """Divide the work of calls of `attention_with_kvcache` over the GPU, once for all layers of a model.

    Without a plan every call divides the work for itself, in a launch of its own or at the beginning of the main one.
    The plan is made on the device, by one launch, from lengths that the host never reads, but with ``CUFA_DEBUG=1``:
    all arrays are then checked as those of the call.

    Parameters
    ----------
    q, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q
        Arrays like those of the calls, which the plan keeps. Only `cache_seqlens`, `cache_leftpad` and `cu_seqlens_q`
        are read, now and by `DecodePlan.update`; the lengths are those before the calls append.
    causal, window_size, num_splits, cache_dtype
        As in the calls.

    Returns
    -------
    DecodePlan
        For calls with such arrays, whatever their other options are, as long as the lengths are what they were when the
        plan was made. `DecodePlan.update` makes it anew in the same memory, which CUDA graphs may do too. NumPy arrays
        have one that does nothing.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError, MissingKernelError
        As `attention_with_kvcache`.

    See Also
    --------
    attention_with_kvcache : Takes a plan, and refuses one that was made for other calls.

    Notes
    -----
    A plan holds lengths. Where `cache_seqlens` has changed since, new rows are appended by that, but results are as of
    the plan. Some plans hold nothing, and results are then as of the lengths at the call: those of NumPy arrays, and
    those of few short sequences on sm_90 and newer, which clusters of thread blocks serve with a plan and without.
    Making such a plan launches nothing.

    Calls whose queries fill large tiles on Hopper, such as chunks of prompts, need no plan and find out by themselves
    how long sequences are; one may be given all the same.

    Thread blocks count in the plan's memory which of them is the last to finish a tile. So calls that share a plan must
    not overlap: enqueue them, and updates, on one stream, or in its order.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> k_cache, v_cache = np.ones((2, 3, 16, 2, 64), np.float32)
    >>> q, k, v = (np.ones((3, 1, heads, 64), np.float32) for heads in (8, 2, 2))
    >>> lengths = np.array([4, 0, 9], np.int32)
    >>> plan = cufa.decode_plan(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths)
    >>> for layer in range(2):  # each with caches of its own
    ...     out = cufa.attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, plan=plan)
    >>> lengths += 1
    >>> plan.update()
    """
    arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": cache_seqlens}
    arrays |= {"block_table": block_table, "cache_batch_idx": cache_batch_idx}
    arrays |= {"cache_leftpad": cache_leftpad, "cu_seqlens_q": cu_seqlens_q}

    def make(changed: Mapping[str, Any], plan: DecodePlan | None) -> tuple[Any, PlanFacts]:
        memory, facts = (None, None) if plan is None else (plan.memory, plan.facts)
        own = {**arrays, "plan": memory, **changed}
        given = tuple(own.get(name) for name in DECODE_PLAN.arrays)
        asked = (causal, window_size, None, 0.0, False, False, True, num_splits, facts, cache_dtype)
        made = call(DECODE_PLAN, given, asked)
        problem = problem_of(DECODE_PLAN, given, asked)
        assert isinstance(problem, KVCacheProblem)
        return made, PlanFacts.of(problem)

    return DecodePlan(*make({}, None), make)
