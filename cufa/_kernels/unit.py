"""The translation unit of a plan: the only code that is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .._terms.term import FLAGS
from . import record
from .kernel import Plan


class Unit(NamedTuple):
    """What is compiled for a plan, or for a kernel of the caller's own.

    Attributes
    ----------
    name : str
        Of the kernel.
    source : str
    headers : dict of str to bytes
        What the source may include, by path.
    entries : tuple of str
        Its ``__global__`` functions, in the order of their launches.
    arch : int
    target_suffix : str
        ``a`` if it has instructions that one architecture alone has.
    words : str
        The kernel in the words of a user.
    plan : Plan or None
        What it was made of; None if the source is the caller's.
    options : tuple of str
        What the compiler is told beside what it is told of every unit.
    """

    name: str
    source: str
    headers: Mapping[str, bytes]
    entries: tuple[str, ...]
    arch: int
    target_suffix: str
    words: str
    plan: Plan | None
    options: tuple[str, ...] = ()


def unit_of(plan: Plan, headers: Mapping[str, bytes]) -> Unit:
    """The unit of a plan, given the headers of ``cuda_src``."""
    kernel = plan.kernel
    headers = _with_own(plan, headers)
    source = _source(plan, headers)
    return Unit(kernel.name, source, headers, plan.entries, plan.arch, kernel.target_suffix, plan.words(), plan)


def _source(plan: Plan, headers: Mapping[str, bytes]) -> str:
    kernel, config = plan.kernel, plan.config
    included = [f"attention/{kernel.name.removeprefix('attention_')}.cuh", "ptx/grid.cuh", *config.includes()]
    types = "".join(f"  using {name} = {type_name};\n" for name, type_name in config.types().items())
    constants = [
        f"  static constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};\n"
        for name, value in vars(config).items()
        if isinstance(value, int)
    ]
    kernels = [
        f'extern "C" __global__ __launch_bounds__({step.threads}, {max(kernel.blocks_per_sm(config), step.resident)})\n'
        f"void {step.entry}(const __grid_constant__ attention::{kernel.record} params) {{\n"
        f"{'' if step.waits else kernel.prologue}"
        f"  attention::{step.entry.removeprefix('attention_')}<Config>(params);\n"
        "}\n"
        for step in plan.steps
    ]
    lines = [f'#include "{name}"\n' for name in included]
    return (
        f"{''.join(lines)}\n"
        "struct Config {\n"
        f"{types}{''.join(constants)}"
        "};\n\n"
        f"{record_of(plan, headers).asserts()}{_term_asserts(plan)}{kernel.asserts()}\n"
        f"{''.join(kernels)}"
    )


def _term_asserts(plan: Plan) -> str:
    """C++ that fails to compile where a score term's struct says otherwise of it than its class."""
    lines = []
    for term in getattr(plan.config, "variant", ()):
        struct = term.struct(plan.config.element)
        for flag in FLAGS:
            said = str(getattr(term, flag)).lower()
            words = f"{flag} of the score term {term.name} is {said} in its Python class, but not in its C++ struct"
            lines.append(f'static_assert({struct}::{flag} == {said}, "{words}");\n')
    return "".join(lines)


def record_of(plan: Plan, headers: Mapping[str, bytes]) -> record.Record:
    """The argument of the plan's kernels, in which its score terms have their data."""
    texts = tuple(text.decode() for name, text in _with_own(plan, headers).items() if name.startswith("attention/"))
    terms = {term.name: record.read(term.data, texts) for term in getattr(plan.config, "variant", ())}
    return record.read(plan.kernel.record, texts).holding("terms", terms)


def _with_own(plan: Plan, headers: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The headers with those of the kernel and of its score terms."""
    own = dict(plan.kernel.headers)
    for term in getattr(plan.config, "variant", ()):
        own |= term.headers
    return {**headers, **{name: text.encode() for name, text in own.items()}} if own else headers
