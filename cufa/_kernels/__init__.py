"""The kernels, one file each: which problems a kernel serves, its table of tiles, its launches and its argument.

`choose` asks those of an operation in their order, fastest first.
"""

from .align import ALIGN
from .backward_sm80 import BackwardSm80
from .backward_sm90 import BackwardSm90
from .backward_split_sm90 import BackwardSplitSm90
from .forward_sm80 import ForwardSm80
from .forward_sm90 import ForwardSm90
from .kernel import OLDEST_ARCH, Kernel, Plan, choose

FORWARD: tuple[Kernel, ...] = (ForwardSm90(), ForwardSm80())
BACKWARD: tuple[Kernel, ...] = (BackwardSm90(), BackwardSplitSm90(), BackwardSm80())

__all__ = ["ALIGN", "BACKWARD", "FORWARD", "OLDEST_ARCH", "Kernel", "Plan", "choose"]
