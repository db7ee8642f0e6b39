"""The public functions that are one operation each, and the arguments of their calls by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .attention import attention, attention_varlen
from .backward import attention_backward, attention_varlen_backward
from .decode_plan import decode_plan
from .kvcache import attention_with_kvcache
from .rotary import rotary
from .states import merge_states, merge_states_backward

FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(attention, attention_varlen, attention_backward, attention_varlen_backward),
        *(attention_with_kvcache, decode_plan, merge_states, merge_states_backward, rotary),
    )
}
"""By name, which is the operation's too."""


def arguments_of(
    asker: str, function: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a call by name, with defaults; or TypeError, as Python has it, in the name of who asks."""
    try:
        bound = inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise TypeError(f"{asker}: {function.__name__} is called otherwise: {error}.") from None
    bound.apply_defaults()
    return bound.arguments
