"""What is measured of biases, score functions, dropout and masks: calls of cufa, and of torch's attention.

A peer is given the framework of the arrays, a case and its inputs, and returns its ways. It raises ImportError if its
library is not there, and NotImplementedError for a case that it does not serve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from .frameworks import Framework
from .peers import BACKWARD, Call, flash, refusing
from .reports import BASELINE, Row
from .variants_cases import DROPOUT_P, LEARNED, SOFTCAP, Case, lengths_of, pattern_of
from .variants_measure import Inputs, Peer, Ways
from .variants_reports import PLAIN

SEED = 1

# --- cufa ---------------------------------------------------------------------------------------------


def _attending(given: Inputs, learns: bool = False, **options: Any) -> Ways:
    """cufa's functions with these options; gradients by biases that nothing learns are computed, and dropped."""
    from .._api.attention import attention
    from .._api.backward import attention_backward

    q, k, v, dout = given[:4]

    def backward() -> Call:
        out, lse = attention(q, k, v, return_lse=True, **options)
        kept = 4 if learns else 3
        return lambda: attention_backward(dout, q, k, v, out, lse, **options)[:kept]

    return Ways(lambda: attention(q, k, v, **options), backward)


def _cufa(framework: Framework, case: Case, given: Inputs) -> Ways:
    """By the option that is there for it."""
    options: dict[str, Any] = {"causal": case.causal}
    if case.feature in ("bias per head", "bias per sequence"):
        options["bias"] = given.array
    elif case.feature == "relative table":
        options["rel_bias"] = given.array
    elif case.feature == "dropout":
        options |= {"dropout_p": DROPOUT_P, "seed": SEED}
    elif case.feature == "ALiBi":
        options["alibi_slopes"] = given.array
    elif case.feature == "softcap":
        options["softcap"] = SOFTCAP
    elif case.feature == "window":
        options |= {"causal": True, "window_size": (case.size, None)}
    else:
        raise NotImplementedError("no option but a mask")
    return _attending(given, case.feature in LEARNED, **options)


def _cufa_function(framework: Framework, case: Case, given: Inputs) -> Ways:
    """By a score function that the user writes."""
    score: Any
    if case.feature == "ALiBi":
        score = (_alibi, given.array)
    elif case.feature == "softcap":
        score = _softcapped
    elif case.feature == "relative table":
        reach = case.seqlen - 1
        score = (lambda score, batch, head, query, key, table: score + table[head, query - key + reach], given.array)
    else:
        raise NotImplementedError("no score function")
    return _attending(given, case.feature in LEARNED, score=score)


def _alibi(score: Any, batch: Any, head: Any, query: Any, key: Any, slopes: Any) -> Any:
    from .. import functions

    return score - functions.stop_gradient(slopes[head]) * abs(query - key)


def _softcapped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    from .. import functions

    return SOFTCAP * functions.tanh(score / SOFTCAP)


@cache  # it is kept by whoever trains, for all layers and steps
def _block_mask(framework: Framework, case: Case) -> Any:
    from .. import BlockMask, masks

    pattern, size = pattern_of(case), case.size
    mask: Any
    if case.feature == "documents":
        mask = masks.causal() & masks.document(pattern)
    elif case.feature == "window":
        mask = masks.sliding_window(size, 0)
    elif case.feature == "prefix":
        mask = masks.prefix_lm(size)
    else:
        assert pattern is not None
        mask = lambda batch, head, query, key: pattern[query // size, key // size] > 0  # noqa: E731
    return BlockMask.of(mask, 1, 1, case.seqlen, case.seqlen, block_size=128, like=framework.integers([0]))


def _cufa_block_mask(framework: Framework, case: Case, given: Inputs) -> Ways:
    if not case.masked:
        raise NotImplementedError("no mask")
    return _attending(given, mask=_block_mask(framework, case))


def _cufa_packed(framework: Framework, case: Case, given: Inputs) -> Ways:
    """Documents as the sequences of a packed call."""
    if case.feature != "documents":
        raise NotImplementedError("no documents")
    from .._api.attention import attention_varlen
    from .._api.backward import attention_varlen_backward

    offsets = framework.offsets(lengths_of(case))
    q, k, v, dout = (each[0] for each in given[:4])

    def backward() -> Call:
        out, lse = attention_varlen(q, k, v, offsets, offsets, causal=True, return_lse=True)

        def run() -> Any:
            found = attention_varlen_backward(dout, q, k, v, out, lse, offsets, offsets, causal=True)
            return [each[None] for each in found]

        return run

    return Ways(lambda: attention_varlen(q, k, v, offsets, offsets, causal=True)[None], backward)


def _cufa_plain(framework: Framework, case: Case, given: Inputs) -> Ways:
    return _attending(given, causal=case.plain_causal)


# --- torch's attention --------------------------------------------------------------------------------


def _by_autograd(
    attend: Callable[..., Any], leaves: list[Any], dout: Any, shape: Callable[[Any], Any] = lambda gradient: gradient
) -> Ways:
    """A forward of q, k, v, (batch, heads, seqlen, head_dim), and an array, and what autograd makes of it.

    `shape` makes the array's gradient what it would be by the array of the case.
    """
    import torch

    def backward() -> Call:
        out = attend(*leaves)

        def run() -> Any:
            dq, dk, dv, *learned = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            return [*(each.transpose(1, 2) for each in (dq, dk, dv)), *map(shape, learned)]

        return run

    return Ways(lambda: attend(*leaves).transpose(1, 2).detach(), backward)


def _leaves(given: Inputs, *learned: Any) -> list[Any]:
    """q, k and v as torch's attention takes them, and what else has a gradient."""
    return [each.detach().requires_grad_() for each in (*(each.transpose(1, 2) for each in given[:3]), *learned)]


def _sdpa(backend: str) -> Peer:
    """A backend of scaled_dot_product_attention: biases as masks, and dropout."""

    def make(framework: Framework, case: Case, given: Inputs) -> Ways:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        if case.kind not in ("Biases", "Dropout") or case.feature == "relative table":
            raise NotImplementedError("no score functions and no masks that are not stored")
        learned = [given.array] if case.feature in LEARNED else []
        wide = case.batch, case.num_heads, case.seqlen, case.seqlen
        options: dict[str, Any] = {"is_causal": case.causal}
        if case.feature == "dropout":
            options["dropout_p"] = DROPOUT_P

        def attend(q: Any, k: Any, v: Any, bias: Any = given.array) -> Any:
            mask = None if bias is None else bias.expand(wide)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

        ways = _by_autograd(attend, _leaves(given, *learned), given.dout.transpose(1, 2))
        refusing(ways.forward)
        # What a graph holds reads the seed on the GPU, where it is only if the forward was captured too.
        return ways._replace(capturable=case.feature != "dropout")

    return make


def _fa2(framework: Framework, case: Case, given: Inputs) -> Ways:
    """torch's flash backend; windows and packed documents below scaled_dot_product_attention, which has neither."""
    if case.feature == "dropout":
        return _sdpa("FLASH_ATTENTION")(framework, case, given)
    if case.feature not in ("documents", "window"):
        raise NotImplementedError("neither biases nor other masks")
    packed = case.feature == "documents"
    row = Row(case.head_dim, case.seqlen, case.batch, case.num_heads, case.num_heads, True)
    row = row._replace(lengths=lengths_of(case)) if packed else row._replace(window=case.size)
    q, k, v, dout = (each[0] if packed else each for each in given[:4])
    forward = flash(framework, row, q, k, v)

    def backward() -> Call:
        gradients = BACKWARD[BASELINE](framework, row, q, k, v, dout)
        return lambda: [each[None] if packed else each for each in gradients()]

    return Ways(lambda: forward()[None] if packed else forward(), backward)


def _flex(framework: Framework, case: Case, given: Inputs) -> Ways:
    """FlexAttention, compiled for a case: its first call in each direction takes seconds."""
    if case.feature == "dropout":
        raise NotImplementedError("no dropout")
    import torch
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # the graph is kept for more than one gradient
    torch._dynamo.reset()  # it stops compiling after a few shapes
    mask = None
    if case.masked:
        seen = _flex_mask(case, given.array)
        mask = create_block_mask(seen, None, None, case.seqlen, case.seqlen, device=given.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    score = _flex_score(case)
    # An array is a leaf without axes of one element: such an axis would be a view, whose gradient is copied.
    read = {"bias per head": lambda array: array[0], "bias per sequence": lambda array: array[:, 0]}
    array = read.get(case.feature, lambda array: array)(given.array)
    learned = [array] if case.feature in LEARNED else []

    def attend(q: Any, k: Any, v: Any, array: Any = array) -> Any:
        changed = None if score is None else score(array)
        return compiled(q, k, v, score_mod=changed, block_mask=mask)

    leaves, dout = _leaves(given, *learned), given.dout.transpose(1, 2)
    return _by_autograd(attend, leaves, dout, lambda each: each[None] if case.feature == "bias per head" else each)


def _flex_score(case: Case) -> Callable[[Any], Callable[..., Any]] | None:
    """The score function over an array."""
    import torch

    reach = case.seqlen - 1
    found: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "bias per head": lambda bias: lambda score, b, h, query, key: score + bias[h, query, key],
        "bias per sequence": lambda bias: lambda score, b, h, query, key: score + bias[b, query, key],
        "relative table": lambda table: lambda score, b, h, query, key: score + table[h, query - key + reach],
        "ALiBi": lambda slopes: lambda score, b, h, query, key: score - slopes[h] * (query - key).abs(),
        "softcap": lambda _: lambda score, b, h, query, key: SOFTCAP * torch.tanh(score / SOFTCAP),
    }
    return found.get(case.feature)


def _flex_mask(case: Case, pattern: Any) -> Callable[..., Any]:
    """The mask function, of nothing but tensors and numbers, which is compiled too."""
    size = case.size
    found: dict[str, Callable[..., Any]] = {
        "documents": lambda b, h, query, key: (pattern[query] == pattern[key]) & (query >= key),
        "window": lambda b, h, query, key: (query >= key) & (query - key <= size),
        "prefix": lambda b, h, query, key: (query >= key) | (key < size),
        "random blocks": lambda b, h, query, key: pattern[query // size, key // size] > 0,
    }
    return found[case.feature]


# --- all of them --------------------------------------------------------------------------------------

FLEX = "FlexAttention"

PEERS: dict[str, Peer] = {
    "cufa": _cufa,
    "cufa, function": _cufa_function,
    "cufa, BlockMask": _cufa_block_mask,
    "cufa, packed": _cufa_packed,
    PLAIN: _cufa_plain,
    BASELINE: _fa2,
    "cuDNN (torch)": _sdpa("CUDNN_ATTENTION"),
    "memory-efficient (torch)": _sdpa("EFFICIENT_ATTENTION"),
    FLEX: _flex,
}
