"""What a kernel is: which problems it serves, how it is specialised for one, and what its launches take.

Each kernel is one file beside this one. All of it is pure Python and runs without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from .._call.problem import Problem, Static
from .._driver.launch import Argument
from .._terms import Term
from ..errors import UnsupportedError
from .record import Record

OLDEST_ARCH = 80
MAX_GRID = (1 << 31) - 1

SIZEOF = {"f16": 2, "bf16": 2, "f32": 4, "e4m3": 1}

SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}
"""Bytes of shared memory that a block may use, by compute capability."""

WARPGROUP_ROWS = 64
"""Rows that a warpgroup computes with wgmma."""

PORTABLE_CLUSTER = 8
"""Thread blocks of a cluster that every GPU with clusters holds."""

FASTEST = "it is the fastest for this GPU"


class Step(NamedTuple):
    """One launch: a ``__global__`` function, threads and bytes of shared memory per block, and the largest cluster.

    An SM is to hold `resident` of its blocks at a time, if the kernel does not ask for more. It `waits` where it likes,
    or begins with the kernel's prologue.
    """

    entry: str
    threads: int
    smem_bytes: int = 0
    max_cluster: int = 1
    resident: int = 1
    waits: bool = False


class Map(NamedTuple):
    """A tensor map in a kernel's argument: the member that holds it, the array, what its address differs by, and it."""

    member: str
    name: str
    shift: int
    encoded: bytes


class Scratch(NamedTuple):
    """Device memory that a call takes while it runs, in float32 numbers: where each part begins, and all of it."""

    parts: dict[str, int]
    floats: int


class Mask(NamedTuple):
    """A mask: its name in Static, its header in ``cuda_src``, its C++ type, and whether its blocks come from lists."""

    name: str
    header: str
    type: str
    lists: bool = False


MASKS = (
    Mask("none", "attention/masks.cuh", "attention::FullMask"),
    Mask("causal", "attention/masks.cuh", "attention::CausalMask"),
    Mask("window", "attention/masks.cuh", "attention::WindowMask"),
)

NO_SCRATCH = Scratch({}, 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The members of the C++ ``Config``, with the same names, that every kernel of attention has.

    Attributes
    ----------
    element : str
    variant : tuple of Term
        Score terms in their order.
    head_dim, head_dim_v : int
        Exact.
    tile_head_dim, tile_head_dim_v : int
        Widths of the shared-memory tiles, zero-filled past the exact ones.
    block_m, block_n : int
        Rows of q and of k per tile.
    num_threads : int
    smem_bytes : int
    store_bytes : int
    mask : str
        The name of one of `MASKS`.
    varlen, sinks : bool
    chains : bool
        Whether sums are taken over at intervals.
    pack : int
        Heads that share a key head and a tile of queries.
    """

    element: str
    variant: tuple[Term, ...]
    head_dim: int
    head_dim_v: int
    tile_head_dim: int
    tile_head_dim_v: int
    block_m: int
    block_n: int
    num_threads: int
    smem_bytes: int
    store_bytes: int
    mask: str
    varlen: bool
    sinks: bool
    chains: bool
    pack: int = 1

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def window(self) -> bool:
        return self.mask == "window"

    def types(self) -> dict[str, str]:
        """Its members that are types, in C++."""
        terms = ", ".join(term.struct(self.element) for term in self.variant)
        variant = f"attention::Variant<{terms}>"
        return {"element": self.element, "variant": variant, "mask": self.mask_type()}

    def mask_type(self) -> str:
        """The C++ type of the mask: its ranges and, where a term lists blocks, what says which of them tiles need."""
        ranges = mask_of(self.mask).type
        for term in self.variant:
            if term.blocks is not None:
                rows, columns = term.blocks
                parts = f"{columns // self.block_n}, {rows * self.pack // self.block_m}" + ", true" * self.lists_parts
                return f"attention::ListedMask<{ranges}, {term.struct(self.element)}, {parts}>"
        return ranges

    @property
    def lists_parts(self) -> bool:
        """Whether tiles of queries are parts of the blocks that are listed, and lists of those parts are gone over."""
        return False

    @property
    def listed(self) -> bool:
        """Whether blocks are listed."""
        return listed_blocks(self.variant) is not None

    def includes(self) -> list[str]:
        """The headers of its types."""
        return [mask_of(self.mask).header, *(term.header for term in self.variant)]

    def words(self) -> list[str]:
        """What it is for, in the words of a user."""
        parts = [self.element, f"head_dim {self.head_dim}"]
        if self.head_dim_v != self.head_dim:
            parts.append(f"head_dim_v {self.head_dim_v}")
        parts += [self.mask] if self.mask != "none" else []
        parts += [name for name in ("varlen", "sinks", "deterministic") if getattr(self, name, False)]
        return parts + [term.name for term in self.variant]


class Kernel:
    """One kernel: a header in ``cuda_src/attention/`` and its ``__global__`` functions. It has no state.

    Attributes
    ----------
    name : str
        ``attention_`` and the name of the header.
    record : str
        The C++ struct that is the argument of all its functions.
    target_suffix : str
        ``a`` for a kernel with instructions that one architecture alone has.
    special : bool
        Whether it is for special problems only: why it does not serve others is no reason for what serves these.
    prologue : str
        C++ that each function begins with.
    headers : dict of str to str
        Sources beside those of ``cuda_src``, by the path by which they are included.
    """

    name: str
    record: str
    target_suffix = ""
    special = False
    prologue = ""
    headers: Mapping[str, str] = MappingProxyType({})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def runs_on(self, arch: int) -> bool:
        """Whether GPUs of a compute capability can run it."""
        return arch >= OLDEST_ARCH

    def refusal(self, static: Static) -> str:
        """Why it does not serve a problem on a GPU that can run it, in a sentence; empty if it does."""
        return ""

    def reason(self, static: Static, arch: int) -> str:
        """Why it is chosen where no kernel before it has refused on such a GPU; and how the call could be faster."""
        return FASTEST

    def config(self, static: Static, arch: int) -> Any:
        """How it is specialised: whose int and bool members become those of the C++ ``Config``."""
        raise NotImplementedError

    def steps(self, config: Any) -> tuple[Step, ...]:
        """Its launches, in their order."""
        return (Step(self.name, config.num_threads, config.smem_bytes),)

    def grid(self, config: Any, problem: Problem, num_sms: int) -> Any:
        """How a problem is divided: whose `blocks` are those of each step."""
        raise NotImplementedError

    def clusters(self, config: Any, grid: Any) -> tuple[int, ...]:
        """How many thread blocks of each step are a cluster: they divide its `blocks`."""
        return (1,) * len(grid.blocks)

    def values(self, config: Any, problem: Problem, grid: Any) -> dict[str, Any]:
        """The members of `record` that are neither addresses nor tensor maps."""
        raise NotImplementedError

    def maps(self, config: Any, problem: Problem) -> tuple[Map, ...]:
        """The tensor maps of `record`."""
        return ()

    def scratch(self, config: Any, problem: Problem, grid: Any) -> Scratch:
        """The memory that it takes while it runs."""
        return NO_SCRATCH

    def asserts(self) -> str:
        """C++ that fails to compile where constants of the host are others there."""
        return ""

    def blocks_per_sm(self, config: Any) -> int:
        """Thread blocks of a function that an SM is to hold at a time at least."""
        return 1

    def argument(self, record: Record, config: Any, problem: Problem, grid: Any) -> Argument:
        """What its launches for a problem are given."""
        maps = self.maps(config, problem)
        values = self.values(config, problem, grid) | {each.member: each.encoded for each in maps}
        return Argument(
            record.pack(values),
            tuple((each.offset, each.name) for each in record.pointers()),
            tuple((record.offset_of(each.member), each.name, each.shift) for each in maps),
            tuple(record.slots(values)),
        )


class Plan(NamedTuple):
    """A kernel and how it is specialised.

    Attributes
    ----------
    kernel : Kernel
    arch : int
        Compute capability it is compiled for.
    config : object
        Of the kernel's own kind.
    reason : str
        Why this kernel and not a faster one.
    refusals : tuple of (str, str)
        The kernels that were asked before, and why each does not serve.
    """

    kernel: Kernel
    arch: int
    config: Any
    reason: str = ""
    refusals: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.kernel.steps(self.config)

    @property
    def entries(self) -> tuple[str, ...]:
        """The ``__global__`` functions of the translation unit, in the order of their launches."""
        return tuple(step.entry for step in self.steps)

    @property
    def bare(self) -> Plan:
        """The plan without reasons, which is the same for all problems that the same kernel serves."""
        return Plan(self.kernel, self.arch, self.config)

    def words(self) -> str:
        """The kernel in the words of a user, for messages."""
        words = ", ".join(self.config.words())
        return f"{self.name}{f' ({words})' if words else ''} for sm_{self.arch}"


@lru_cache(maxsize=1024)
def choose(kernels: tuple[Kernel, ...], static: Static, arch: int) -> Plan:
    """The first of the kernels that serves, fastest first, specialised.

    Raises
    ------
    UnsupportedError
        If the GPU is older than sm_80, or no kernel serves.
    """
    if arch < OLDEST_ARCH:
        raise UnsupportedError(
            f"cufa: a GPU of compute capability {arch // 10}.{arch % 10} is not supported; 8.0 (Ampere) or newer is. "
            "NumPy arrays are computed on the CPU."
        )
    if not kernels:
        raise UnsupportedError("cufa: no kernel serves this operation on a GPU; NumPy arrays are computed on the CPU.")
    refusals: list[tuple[str, str]] = []
    reason = ""
    for kernel in kernels:
        here = kernel.runs_on(arch)
        why = kernel.refusal(static) if here else f"it is not for GPUs of compute capability {arch // 10}.{arch % 10}"
        if not why:
            reason = reason or kernel.reason(static, arch)
            return Plan(kernel, arch, kernel.config(static, arch), reason, tuple(refusals))
        refusals.append((kernel.name, why))
        reason = reason or (why if here and not kernel.special else "")
    raise UnsupportedError(f"cufa: no kernel serves: {'; '.join(': '.join(each) for each in refusals)}.")


def known_arch(arch: int) -> int:
    """The newest compute capability of `SHARED_MEMORY` up to `arch`, whose tiles a GPU surely holds."""
    return max(each for each in SHARED_MEMORY if each <= arch)


def common(static: Static) -> dict[str, Any]:
    """The members of Config that follow from the problem alone."""
    return {
        "element": static.element,
        "variant": static.terms,
        "head_dim": static.head_dim,
        "head_dim_v": static.head_dim_v,
        "store_bytes": static.store_bytes,
        "mask": static.mask,
        "varlen": static.varlen,
        "sinks": static.sinks,
        "chains": static.chains,
    }


def mask_of(name: str) -> Mask:
    """The mask of a name."""
    return next(mask for mask in MASKS if mask.name == name)


def listed_blocks(terms: Sequence[Term]) -> tuple[int, int] | None:
    """Queries and keys of the blocks that a term lists, if one does."""
    return next((term.blocks for term in terms if term.blocks is not None), None)


def dividing(side: int, of: int) -> int:
    """Rows of a tile, at most `side`, whose tiles divide blocks of so many: a power of 2."""
    return math.gcd(1 << side.bit_length() - 1, of)


def refuses_blocks(static: Static, rows: int, columns: int) -> str:
    """Why a kernel whose tiles are such, or divide these, cannot go over the blocks that a term lists."""
    blocks = listed_blocks(static.terms)
    if blocks is None or (blocks[0] % rows == 0 and blocks[1] % columns == 0):
        return ""
    return f"blocks of {blocks[0]} × {blocks[1]} are not made of tiles of {rows} × {columns}"


def has_short_tile(static: Static) -> bool:
    """Whether the kernels for every GPU have a small tile, of either direction, that short sequences fill."""
    if static.short_rows == 0:
        return False
    # Of float32 larger ones take too many registers, or more shared memory than some GPUs have.
    return static.element != "f32" or (static.short_keys <= 32 and max(static.head_dim, static.head_dim_v) <= 128)


def slower(static: Static, arch: int) -> str:
    """Why the kernels for every GPU serve a problem, and how the call could be faster; empty if it could not."""
    if has_short_tile(static):
        average = "on average " if static.varlen else ""
        return f"sequences are {average}so short that small tiles, many of which share an SM, are the fastest"
    if static.element == "f32":
        return "float32 takes three tf32 products for one; float16 and bfloat16 are at least seven times as fast"
    if static.copy_bytes < 16:
        faster = "16-byte aligned rows would be faster"
        if arch // 10 == 9:
            faster = "16-byte aligned rows would let the tensor memory accelerator copy, for a faster kernel"
        return f"q, k and v are copied {static.copy_bytes} bytes at a time; {faster}"
    return ""


def needs_maps(static: Static) -> str:
    """Why a kernel that multiplies with wgmma and reads through tensor maps does not serve; empty if it may."""
    if why := slower(static, 90):
        return why
    if not static.tma:
        return "a stride of q, k or v is negative or reaches 2^40 bytes, beyond the tensor memory accelerator"
    return ""


def reason_for_every_gpu(static: Static, arch: int) -> str:
    """Why a kernel for every GPU serves where there is none for one architecture."""
    if why := slower(static, arch):
        return why
    if arch >= 90:
        return f"the kernel for sm_80 and newer serves sm_{arch}; there is none specific to it"
    return FASTEST


def reciprocal_of(number: int) -> tuple[int, int]:
    """The shift and the reciprocal of ``Divisor`` in cuda_src/core/math.cuh, for a number below 2^31."""
    shift = (number - 1).bit_length()
    return shift, -(-(1 << 31 + shift) // number)


def small_reciprocal(number: int) -> int:
    """What divides by a small number: ``SmallDivisor`` in cuda_src/core/math.cuh; of 0 there is none."""
    return -(-(1 << 20) // number) if number else 0


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def blocks_in(length: int, rows: int, problem: Problem) -> int:
    """Blocks of so many rows: of a sequence or, packed, enough for all of them without knowing one length.

    See attention/packed.cuh; sequences without rows take none.
    """
    if not problem.varlen:
        return -(-length // rows)
    return length // rows + min(problem.batch, length) if problem.batch else 0


def four(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of batch, rows, heads and columns; packed arrays have no batch."""
    return tuple(strides) if len(strides) == 4 else (0, *strides)
