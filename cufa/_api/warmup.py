"""Having kernels ready before the first call."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._bundles import selection
from .._bundles.build import cores
from .._bundles.progress import watched
from .._bundles.warm import Warmed as Warmed
from .._bundles.warm import warm
from .._call import options as _options
from .._call.arrays import CPU
from .._call.problem import Problem
from .._compile import cache as _cache
from .._compile import jit as _jit
from .._compile import used as _used
from .._driver import driver as _driver
from .._kernels import Plan, align
from .._operations import sketch as _sketch
from .._operations.asked import asked_by, problem_of
from .._operations.call import chosen
from ..errors import CudaError
from .functions import FUNCTIONS, arguments_of


def warmup(
    preset: str | None = None,
    *,
    calls: Iterable[Mapping[str, Any]] = (),
    log: str | os.PathLike[str] | None = None,
    operation: str | Sequence[str] = (),
    dtype: str | Sequence[str] = (),
    head_dim: int | Sequence[int | tuple[int, int]] = (),
    features: str | Sequence[str] = (),
    device: int | Sequence[int] | None = None,
    arch: str | Sequence[str] | None = None,
    jobs: int | None = None,
    progress: bool | None = None,
) -> Warmed:
    """Compile what is not compiled yet, and load it, so that no call waits for a kernel.

    Afterwards calls of the kinds that are named here compile and load nothing, and can be captured into a CUDA graph at
    once; `stats` counts what was compiled and loaded, before and after. Say what the kernels are for in one or several
    of these ways: by `calls`, by `log`, or by the kinds of calls, which `cufa bundle build` takes as well.

    Parameters
    ----------
    preset : {'inference', 'training', 'full'}, optional
        A choice of usual calls. `operation`, `dtype`, `head_dim` and `features` leave some of them.
    calls : iterable of mapping
        Arguments of single calls by their names: arrays, which are not read, or shapes in their place, as tuples, with
        ``dtype``. ``operation`` names the function; by default it is `attention_varlen` if there are offsets, else
        `attention`. ``backward=True`` adds the gradients of a call of these, and ``deterministic=True`` asks for theirs
        to be. With shapes ``plan=True`` stands for a plan.
    log : path, optional
        A file that a program has written which ran with ``CUFA_RECORD``.
    operation, dtype : str or sequence of str, optional
        Without a preset by default all operations, in bfloat16.
    head_dim : int or sequence, optional
        Of q, k and v; a pair if v has another.
    features : str or sequence of str, optional
        What the calls have, together: causal, window, softcap, alibi, sinks, deterministic, unaligned or, with caches,
        paged or packed.
    device : int or sequence of int, optional
        GPUs to load onto: by default the current one, or the first. Arrays among `calls` say it themselves.
    arch : str or sequence of str, optional
        Architectures such as ``'sm_90a'``, in place of GPUs: kernels are put into the cache, and no GPU is needed.
    jobs : int, optional
        Threads that work; by default one per core.
    progress : bool, optional
        Whether to show on stderr how far it is; by default on a terminal.

    Returns
    -------
    Warmed
        What was done. ``str()`` gives it as a sentence.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        If something is not known, or a call would raise it.
    CompileError, MissingKernelError
        If a kernel cannot be compiled, or must not be.
    CudaError
        If there is no GPU, and no `arch`.

    See Also
    --------
    explain : Which kernel serves a call, and why.
    stats : How many kernels were compiled and loaded.

    Examples
    --------
    What a program needs that decodes with heads of 128, on this machine's GPU::

        cufa.warmup(dtype="bfloat16", head_dim=128, features=["causal"], operation="attention")

    One call, for the cache alone:

    >>> import cufa
    >>> shape = (2, 1024, 8, 64)
    >>> ready = cufa.warmup(calls=[dict(q=shape, k=shape, v=shape, dtype="float16", causal=True)], arch="sm_80")
    >>> ready.kernels
    1

    A step of decoding with pages:

    >>> step = dict(q=(8, 1, 32, 64), k_cache=(500, 16, 8, 64), v_cache=(500, 16, 8, 64), dtype="float16")
    >>> step |= dict(operation="attention_with_kvcache", cache_seqlens=(8,), block_table=(8, 64))
    >>> cufa.warmup(calls=[step], arch="sm_80").kernels
    1
    """
    operations, dtypes, archs = _several("operation", operation), _several("dtype", dtype), _several("arch", arch)
    features = _several("features", features)
    dims = [(each, each) if isinstance(each, int) else (each[0], each[1]) for each in _dims(head_dim)]
    chosen_kinds: tuple[selection.Chosen, ...] = ()
    if preset is not None or operations or dtypes or dims or features:
        chosen_kinds = selection.asked_for(
            preset=preset, operations=operations, dtypes=dtypes, head_dims=dims, features=features
        )
    uses = [] if log is None else _read(Path(log))
    calls = list(calls)
    problems = [problem for call in calls for problem in _problems(call)]
    if not (chosen_kinds or calls or log):
        raise ValueError("warmup: nothing says what for; name a preset, a head_dim, calls, or a log.")
    places: list[tuple[int, int | None]]
    if archs:
        _check_cache()
        places = [(each, None) for each in map(_arch, archs)]
    else:
        places = [(_driver.device(each).arch, each) for each in _devices(device)]
    plans: dict[tuple[Plan, int | None], None] = {}
    for capability, ordinal in places:
        found = selection.plans_for(chosen_kinds, capability) if chosen_kinds else []
        used, unknown = selection.plans_used(uses, capability)
        for notice in unknown:
            _cache.log(logging.WARNING, "%s: %s", log, notice)
        plans |= dict.fromkeys((plan, ordinal) for plan in [*found, *used])
    for problem, is_here in problems:
        for capability, ordinal in [_place_of(problem)] if is_here and not archs else places:
            plans |= dict.fromkeys((plan, ordinal) for plan in _plans(problem, capability))
    if progress is False:
        return warm(list(plans), jobs or cores())
    return warm(
        list(plans),
        jobs or cores(),
        lambda done: watched(done, len(plans), "Warming up", lines=progress is True),
    )


def _several(name: str, given: str | Sequence[str] | None) -> Sequence[str]:
    several: Any = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(several, Sequence) or not all(isinstance(each, str) for each in several):
        raise TypeError(f"warmup: {name} is {given!r}; pass a string, or a sequence of strings.")
    return several


def _dims(given: int | Sequence[int | tuple[int, int]]) -> Sequence[int | tuple[int, int]]:
    return (given,) if isinstance(given, int) else given


def _arch(text: str) -> int:
    arch = selection.arch_of(text)
    if arch is None:
        raise ValueError(f"warmup: {text!r} is no architecture; write 'sm_80' or 'sm_90a'.")
    return arch


def _check_cache() -> None:
    if _jit.cache().path is None:
        raise ValueError(
            f"warmup: arch is for filling the cache, but kernels are not kept on disk ({_jit.cache().state()})."
        )


def _read(path: Path) -> list[_used.Use]:
    uses, notices = _used.read(path)
    for notice in notices:
        _cache.log(logging.WARNING, "%s: %s", path, notice)
    return uses


def _devices(given: int | Sequence[int] | None) -> Sequence[int]:
    """The GPUs that are meant, each of which is there."""
    try:
        count = _driver.count()
    except CudaError as error:
        raise CudaError(f"{error} To fill the cache for another GPU, name its architecture: arch='sm_90a'.") from error
    if given is None:
        given = _driver.current_ordinal() or 0
    ordinals = [given] if isinstance(given, int) else list(given)
    for ordinal in ordinals:
        if not 0 <= ordinal < count:
            raise ValueError(f"warmup: there is no GPU {ordinal}; this process sees {count}.")
    return ordinals


def _place_of(problem: Problem) -> tuple[int, int | None]:
    return _driver.device(problem.device).arch, problem.device


def _problems(call: Mapping[str, Any]) -> list[tuple[Problem, bool]]:
    """The problems of a call and of its gradients, and whether its arrays say on which GPU."""
    given = {name: value for name, value in call.items() if value is not None}
    packed = "cu_seqlens_q" in given or "cu_seqlens_k" in given
    name = given.pop("operation", "attention_varlen" if packed else "attention")
    if name not in FUNCTIONS:
        raise ValueError(f"warmup: there is no operation {name!r}; there are {', '.join(FUNCTIONS)}.")
    operation, parameters = _sketch.OPERATIONS[name], inspect.signature(FUNCTIONS[name]).parameters
    backward, dtype = given.pop("backward", False), given.pop("dtype", None)
    deterministic = False if "deterministic" in parameters else given.pop("deterministic", False)
    unknown = [each for each in given if each not in parameters]
    if unknown:
        raise TypeError(f"warmup: a call has no argument {unknown[0]!r}.")
    shapes = {each: value for each, value in given.items() if each in operation.arrays and _is_shape(value)}
    others = [each for each in given if each in operation.arrays and each not in shapes and given[each] is not True]
    if shapes and others:
        raise TypeError(f"warmup: {next(iter(shapes))} of a call is a shape, and others are arrays; pass either.")
    if shapes:
        if dtype is None:
            raise TypeError("warmup: a call with shapes in place of arrays needs dtype, such as 'bfloat16'.")
        if given.pop("plan", None):
            shapes["plan"] = (0,)  # whose size only the GPU's tells
        defaults = {each: parameter.default for each, parameter in parameters.items()}
        _, asked = asked_by(operation, defaults | {each: given[each] for each in given if each not in shapes})
        problem = _sketch.sketch(operation, shapes, dtype, _options.of(name, asked, operation.owned))
    else:
        if dtype is not None:
            raise TypeError("warmup: the arrays of a call have a dtype; leave dtype out.")
        problem = problem_of(operation, *asked_by(operation, arguments_of("warmup", FUNCTIONS[name], (), given)))
    found = [problem]
    if backward:
        found.append(_sketch.gradients_of(problem, _options.flag(name, "deterministic", deterministic)))
    elif deterministic:
        raise TypeError("warmup: deterministic is for gradients; pass backward=True as well.")
    return [(each, not shapes) for each in found if each.device != CPU]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(extent) is int for extent in value)


def _plans(problem: Problem, arch: int) -> list[Plan]:
    _, copies, plan = chosen(problem, arch)
    return [plan.bare] if copies is None else [align.plan_for(arch), plan.bare]
