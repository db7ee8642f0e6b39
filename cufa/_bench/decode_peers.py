"""What is measured over caches of keys: calls of cufa, and of the libraries beside it that can be imported.

A peer is given the framework of the arrays, a case and its inputs, and returns a function without arguments, whose
result is (batch, seqlen_q, num_heads_q, head_dim). It raises ImportError if its library is not there, and
NotImplementedError for a case that it does not serve.
"""

from __future__ import annotations

import sys
from typing import Any

from .decode_measure import Inputs, Peer
from .decode_reports import Case
from .frameworks import Framework
from .peers import FORWARD, Call
from .reports import BASELINE, Row

# --- cufa ---------------------------------------------------------------------------------------------


def _over_caches(case: Case, given: Inputs) -> dict[str, Any]:
    return {"cache_seqlens": given.cache_seqlens, "block_table": given.block_table, "causal": case.causal}


def _cufa(framework: Framework, case: Case, given: Inputs) -> Call:
    from .._api.kvcache import attention_with_kvcache

    options = _over_caches(case, given)
    return lambda: attention_with_kvcache(given.q, given.k_cache, given.v_cache, **options)


def _cufa_planned(framework: Framework, case: Case, given: Inputs) -> Call:
    from .._api.kvcache import attention_with_kvcache

    plan, options = _cufa_plan(framework, case, given)(), _over_caches(case, given)
    return lambda: attention_with_kvcache(given.q, given.k_cache, given.v_cache, plan=plan, **options)


def _cufa_plan(framework: Framework, case: Case, given: Inputs) -> Call:
    from .._api.decode_plan import decode_plan

    options = _over_caches(case, given)
    return lambda: decode_plan(given.q, given.k_cache, given.v_cache, **options)


def _cufa_update(framework: Framework, case: Case, given: Inputs) -> Call:
    plan = _cufa_plan(framework, case, given)()
    return lambda: plan.update()


def _cufa_dense(framework: Framework, case: Case, given: Inputs) -> Call:
    from .._api.attention import attention

    _check_full(case)
    return lambda: attention(given.q, given.k_cache, given.v_cache, causal=case.causal)


def _cufa_prefix(framework: Framework, case: Case, given: Inputs) -> Call:
    if not case.prefix or not case.uniform:
        raise NotImplementedError("no prefix")
    from .._api.shared_prefix import attention_shared_prefix

    shared, tail = case.prefix // case.page_size, given.k_cache.shape[2:]
    prefixes = (cache[:shared].reshape(-1, *tail) for cache in (given.k_cache, given.v_cache))
    own = (cache[shared:].reshape(case.batch, -1, *tail) for cache in (given.k_cache, given.v_cache))
    arrays = (*prefixes, *own)
    return lambda: attention_shared_prefix(given.q, *arrays, causal=case.causal)


# --- torch's attention --------------------------------------------------------------------------------


def _check_full(case: Case) -> None:
    """Refuse what dense arrays do not hold: pages, and sequences that do not fill their caches."""
    if case.page_size or not case.uniform:
        raise NotImplementedError("no pages, and no lengths")


def _sdpa(name: str) -> Peer:
    """One query row by a backend of scaled_dot_product_attention, as in the benchmark of the forward."""

    def make(framework: Framework, case: Case, given: Inputs) -> Call:
        _check_full(case)
        if case.causal:
            raise NotImplementedError("no mask that is aligned at the last key")
        heads = case.num_heads_q, case.num_heads_k
        row = Row(case.head_dim, case.seqlen_q, case.batch, *heads, False, seqlen_k=case.lengths[0])
        return FORWARD[name](framework, row, given.q, given.k_cache, given.v_cache)

    return make


def _flash(framework: Framework, case: Case, given: Inputs) -> Call:
    """torch's flash backend, below scaled_dot_product_attention where that has no way to say what is meant."""
    import torch

    if case.page_size:
        raise NotImplementedError("no pages")
    if case.uniform and not case.causal:
        return _sdpa(BASELINE)(framework, case, given)
    if case.uniform:
        transposed = [each.transpose(1, 2) for each in given[:3]]

        def run() -> Any:
            out = torch.ops.aten._scaled_dot_product_flash_attention(*transposed, 0.0, True)[0]
            return out.transpose(1, 2)

        return run
    k, v = (torch.cat([cache[index, :length] for index, length in enumerate(case.lengths)]) for cache in given[1:3])
    offsets_q = framework.offsets([case.seqlen_q] * case.batch)
    offsets_k = framework.offsets(case.lengths)
    q, longest = given.q.flatten(0, 1), max(case.lengths)

    def run_packed() -> Any:
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets_q, offsets_k, case.seqlen_q, longest, 0.0, case.causal, False
        )[0]
        return out.view(given.q.shape)

    return run_packed


# --- FlashAttention -----------------------------------------------------------------------------------


def _flash_attn(framework: Framework, case: Case, given: Inputs) -> Call:
    from flash_attn import flash_attn_with_kvcache

    if case.page_size % 256:
        raise NotImplementedError("pages of a multiple of 256")
    options = _over_caches(case, given)
    return lambda: flash_attn_with_kvcache(given.q, given.k_cache, given.v_cache, **options)


def _fa3_module(case: Case) -> Any:
    """FlashAttention-3 of either wheel: `fa3-fwd`, which is built without pages, or one that has the usual name."""
    try:
        import flash_attn_interface

        return flash_attn_interface
    except ImportError:
        import fa3_fwd_config

        sys.modules.setdefault("flash_attn_config", fa3_fwd_config)  # the name under which the package looks for it
        import fa3_fwd_interface

        if case.page_size:
            raise NotImplementedError("the wheel is built without pages") from None
        return fa3_fwd_interface


def _fa3_options(case: Case, given: Inputs) -> dict[str, Any]:
    table = {} if given.block_table is None else {"page_table": given.block_table}
    return {"cache_seqlens": given.cache_seqlens, "causal": case.causal, **table}


def _fa3(framework: Framework, case: Case, given: Inputs) -> Call:
    attend, options = _fa3_module(case).flash_attn_with_kvcache, _fa3_options(case, given)
    return lambda: attend(given.q, given.k_cache, given.v_cache, **options)


def _fa3_planned(framework: Framework, case: Case, given: Inputs) -> Call:
    attend, options = _fa3_module(case).flash_attn_with_kvcache, _fa3_options(case, given)
    plan = _fa3_plan(framework, case, given)()
    return lambda: attend(given.q, given.k_cache, given.v_cache, scheduler_metadata=plan, **options)


def _fa3_plan(framework: Framework, case: Case, given: Inputs) -> Call:
    plan = _fa3_module(case).get_scheduler_metadata
    paged = given.block_table is not None
    capacity = given.block_table.shape[1] * case.page_size if paged else given.k_cache.shape[1]
    sizes = case.batch, case.seqlen_q, capacity, case.num_heads_q, case.num_heads_k, case.head_dim
    options = {
        "qkv_dtype": given.q.dtype,
        "headdim_v": case.head_dim,
        "page_size": case.page_size or None,
        "causal": case.causal,
    }
    return lambda: plan(*sizes, given.cache_seqlens, **options)


# --- all of them --------------------------------------------------------------------------------------

PEERS: dict[str, Peer] = {
    "cufa": _cufa,
    "cufa, plan": _cufa_planned,
    "cufa, dense": _cufa_dense,
    "cufa, prefix": _cufa_prefix,
    BASELINE: _flash,
    "cuDNN (torch)": _sdpa("cuDNN (torch)"),
    "memory-efficient (torch)": _sdpa("memory-efficient (torch)"),
    "flash-attn": _flash_attn,
    "FA3": _fa3,
    "FA3, plan": _fa3_planned,
}

PLANS: dict[str, Peer] = {
    "cufa.decode_plan": _cufa_plan,
    "cufa, update": _cufa_update,
    "FA3's get_scheduler_metadata": _fa3_plan,
}
"""What divides the work of calls to come."""
