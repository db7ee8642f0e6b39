"""The way of a call, the same for every operation: view, check, allocate, compute, return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from .._call import align as _align
from .._call import arrays as _arrays
from .._call import options as _options
from .._call import problem as _problem
from .._call.align import Copies
from .._call.arrays import CPU, Arrays
from .._call.options import Options, Pairs
from .._call.problem import Problem
from .._driver import counts as _counts
from .._driver import driver as _driver
from .._driver.driver import Device
from .._driver.launch import Launch, Shape
from .._kernels import Plan, choose
from .._kernels import unit as units
from .._kernels.kernel import Scratch
from ..errors import UnsupportedError
from . import repeated as _repeated
from .operation import Operation
from .repeated import Ready, Repeated


def call(operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...]) -> Any:
    """Call an operation with its arrays, in its order, and with options in that of `Options` and then of its terms."""
    if _arrays.compiling(given[0]):
        from ..interop import torch  # which is traced; a cache would not be

        return torch.compiled(operation, given, asked)
    return call_plain(operation, given, _options.of(operation.name, asked, operation.owned))


def call_plain(operation: Operation, given: tuple[Any, ...], options: Options) -> Any:
    """`call` with plain options, where torch.compile does not trace it."""
    known = operation.repeated.get(type(given[0]))
    again = None if known is None or options.late else _repeated.find(known, given, options)
    if again is not None:
        repeated, addresses = again
        if repeated.recorded:
            return interop_torch().differentiated_again(operation, given, options, repeated, addresses)
        results = repeated(addresses)
        return results[0] if len(results) == 1 else tuple(results)
    if _arrays.is_jax(given[0]):  # its runtime owns streams and results
        return interop_jax().call(operation, given, options)
    try:
        arrays = _arrays.view_recorded(operation.name, operation.arrays, given, operation.uncopied_indices)
        arrays.adapter.check_call()
    except _arrays.Recorded:
        return interop_torch().call(operation, given, options)
    if arrays.recorded:
        return interop_torch().differentiated(operation, arrays, options)
    problem = _problem.checked(operation, arrays, options)
    ready = None if options.late else problem.memo.get("ready")
    if ready is not None and ready.current_device() == ready.device:
        results = ready(arrays.pointers)
    else:
        results = computed(arrays, problem, options.late)
        if not options.late:
            expect(operation, arrays, options, problem)
    return results[0] if len(results) == 1 else tuple(results)


def computed(arrays: Arrays, problem: Problem, late: Pairs) -> list[Any]:
    """The results of a problem. `late` are the late options."""
    results, addresses = allocate(arrays, problem)
    compute(arrays, problem, results, addresses, late)
    return results


def allocate(arrays: Arrays, problem: Problem) -> tuple[list[Any], list[int]]:
    """The results, given or new in the caller's framework; and all addresses, in the order of `names_of`."""
    results, addresses = [], [*arrays.pointers]
    given, adapter = arrays.given, arrays.adapter
    plain = arrays.key[0] is adapter  # else layouts may be those of other views than the arrays themselves
    for shape, dtype, place, alike in problem.made:
        if place is not None:
            array, address = given[place], arrays.pointers[place]
        elif plain and alike is not None:
            array, address = adapter.empty_like(given[alike], shape, dtype)
        else:
            array, address = adapter.empty(shape, dtype, given[0])
        results.append(array)
        addresses.append(address)
    return results, addresses


def names_of(problem: Problem, scratch: Scratch) -> tuple[str, ...]:
    """What a launch is given: addresses of arrays and results, late options, addresses of parts of scratch memory."""
    operation, results = problem.operation, (result.name for result in problem.results)
    return *operation.arrays, *results, *operation.owned.late_names, *scratch.parts


def compute(arrays: Arrays, problem: Problem, results: Sequence[Any], addresses: list[Any], late: Pairs) -> None:
    """Compute the results: on the CPU, or by launches on the caller's stream. `late` are the late options."""
    if problem.device == CPU:
        compute_on_cpu(arrays, problem, results, late)
        return
    if late:
        addresses = [*addresses, *problem.operation.owned.late_members(late)]
    adapter = arrays.adapter
    stream = adapter.stream(arrays.given[0], problem.device)
    if problem.operation.check_values is not None and debugging():
        check_on_gpu(arrays, problem, stream)
    prepared = problem.memo.get("prepared") or prepare(problem, stream)
    if prepared.floats == 0:
        prepared.launch(addresses, stream, adapter.current_device())
        return
    # Freed when this returns: the framework hands it out again only to what comes later on the stream.
    _memory, address = adapter.scratch(prepared.floats, arrays.given[0])
    prepared(addresses, address, stream, adapter.current_device())


def expect(operation: Operation, arrays: Arrays, options: Options, problem: Problem) -> None:
    """Be ready for calls like one that was made, from its second time on. `problem` is what was computed."""
    adapter, prepared = arrays.adapter, problem.memo.get("prepared")
    if prepared is None or prepared.copies or problem.written_indices:
        return
    if operation.check_values is not None and debugging():
        return
    plain = arrays.key[0] is adapter  # as a view of all at once leaves it
    if plain and adapter.maker is not None and "ready" not in problem.memo:
        problem.memo["ready"] = Ready(problem, adapter.maker, prepared, prepared.launch)
    known: tuple[Repeated, ...] = problem.memo.get("repeated", ())
    if not adapter.likens or not (known or problem.memo.get("tries", 0) < _repeated.MAX_TRIES):
        return
    kind = _repeated.kind_of(arrays.given, options)
    if kind is None:
        return
    found = next((each for each in known if each.addresses(arrays.given) is not None), None)
    if found is None:
        # The same problem has other tensors where they require grad, say, or where one is given twice.
        tries = problem.memo["tries"] = problem.memo.get("tries", -1) + 1
        alike = adapter.likeness(arrays) if 0 < tries <= _repeated.MAX_TRIES else None
        if alike is None:
            return
        found = Repeated(problem, alike, prepared, prepared.launch_of(len(arrays.given), alike.places))
        problem.memo["repeated"] = (*known, found)
    _repeated.add(operation, arrays.given[0], kind, found)


@cache  # reading the environment takes a microsecond each time
def debugging() -> bool:
    """Whether values of arrays on a GPU are checked as those in host memory are."""
    from .._compile import env as _env

    return _env.debug()


def check_on_gpu(arrays: Arrays, problem: Problem, stream: int) -> None:
    """Check values of a problem's arrays on a GPU, for which the host waits."""
    with _driver.current(problem.device):
        if _driver.is_capturing(stream):
            raise UnsupportedError(
                f"{problem.function}: with CUFA_DEBUG=1 the host reads lengths and the like, and cannot while the "
                "stream is captured into a CUDA graph; make the same call outside of a capture, or start the program "
                "without CUFA_DEBUG."
            )
    assert problem.operation.check_values is not None
    problem.operation.check_values(problem, arrays)


def compute_on_cpu(arrays: Arrays, problem: Problem, results: Sequence[Any], late: Pairs) -> None:
    """Compute the results of arrays in host memory."""
    operation = problem.operation
    inputs = {name: arrays.numpy(index) for index, name in enumerate(operation.arrays)} | dict(late)
    named = zip((result.name for result in problem.results), map(_arrays.as_numpy, results), strict=True)
    operation.on_cpu(problem, inputs, dict(named))
    _counts.tally("launches", f"cpu ({operation.name})").add()


class Planned(NamedTuple):
    """What will run for a problem.

    Attributes
    ----------
    problem : Problem
        That of the copies, if arrays are copied first.
    copies : Copies or None
    plan : Plan
    grid : object
        Of the kernel's own kind.
    scratch : Scratch
        Of the kernel. Copies lie behind it.
    floats : int
        All memory that a call takes while it runs, in float32 numbers.
    """

    problem: Problem
    copies: Copies | None
    plan: Plan
    grid: Any
    scratch: Scratch
    floats: int


def planned(problem: Problem, copied: bool = True) -> Planned:
    """Choose the kernel of a problem, and whether arrays are copied for it; without copies if `copied` is False."""
    key = f"planned, copied={copied}"
    known: Planned | None = problem.memo.get(key)
    if known is None:
        known = problem.memo[key] = planned_for(problem, _driver.device(problem.device), copied)
    return known


def planned_for(problem: Problem, device: Device, copied: bool = True) -> Planned:
    """`planned` for a GPU like `device`, which need not be there."""
    own, copies, plan = chosen(problem, device.arch, copied)
    grid = plan.kernel.grid(plan.config, own, device.num_sms)
    scratch = plan.kernel.scratch(plan.config, own, grid)
    floats = scratch.floats + (0 if copies is None else copies.floats)
    return Planned(own, copies, plan, grid, scratch, floats)


def chosen(problem: Problem, arch: int, copied: bool = True) -> tuple[Problem, Copies | None, Plan]:
    """The kernel of a problem, or of the copies that are made for it first."""
    copies = _align.copies_of(problem, arch) if copied else None
    own = problem if copies is None else copies.problem
    assert own.static is not None
    return own, copies, choose(own.operation.kernels, own.static, arch)


class Prepared:
    """The loaded kernels of a problem: those that copy arrays, if any should be copied, and those that compute.

    Attributes
    ----------
    launch : Launch
        Those that compute.
    floats : int
        The memory that a call of all takes, in float32 numbers.
    parts : list of int
        Where its parts begin, in bytes.
    """

    __slots__ = ("_copying", "_make", "_names", "floats", "launch", "parts")

    def __init__(
        self,
        make: Callable[[Sequence[str]], Launch],
        names: tuple[str, ...],
        copying: Copying | None,
        scratch: Scratch,
        floats: int,
    ) -> None:
        self.floats = floats
        self.launch = make(names)
        self.parts = [4 * offset for offset in scratch.parts.values()]
        self._make = make
        self._names = names
        self._copying = copying

    @property
    def copies(self) -> bool:
        """Whether arrays are copied."""
        return self._copying is not None

    def launch_of(self, arrays: int, places: Sequence[int]) -> Launch:
        """`launch` for calls that are given, of so many arrays, but those at some places."""
        return self._make([*map(self._names.__getitem__, places), *self._names[arrays:]])

    def __call__(self, addresses: list[Any], memory: int, stream: int, current_device: int) -> None:
        """Enqueue on `stream`.

        `addresses` are those of `allocate`, and then what late options give; `memory` is the scratch memory's.
        """
        if self._copying is not None:
            addresses = self._copying(addresses, memory, stream, current_device)
        if self.parts:
            addresses = [*addresses, *map(memory.__add__, self.parts)]
        self.launch(addresses, stream, current_device)


def prepare(problem: Problem, stream: int, copied: bool = True) -> Prepared:
    """Choose, compile and load the kernels of a problem: once, after which they are remembered with it."""
    key = "prepared" if copied else "prepared without copies"
    known: Prepared | None = problem.memo.get(key)
    if known is not None:
        return known
    from .._compile import jit as _jit  # half of what a first call on the CPU would import
    from .._compile import used as _used

    own, copies, plan, grid, scratch, floats = planned(problem, copied)
    copying = None if copies is None else _load_copying(copies, scratch.floats, stream)
    functions: tuple[Any, ...] = ()
    if any(grid.blocks):
        functions = _jit.load_kernel(plan, problem.device, stream)
        _used.note(plan, own.static, problem.function)
    record = units.record_of(plan, _jit.headers())
    argument = plan.kernel.argument(record, plan.config, own, grid)
    shapes = [
        Shape(blocks, step.threads, step.smem_bytes, cluster)
        for blocks, step, cluster in zip(grid.blocks, plan.steps, plan.kernel.clusters(plan.config, grid), strict=True)
    ]
    make = partial(Launch, plan.words(), functions, problem.device, shapes, argument)
    prepared = problem.memo[key] = Prepared(make, names_of(own, scratch), copying, scratch, floats)
    return prepared


class Copying:
    """The loaded kernel that copies arrays before others read them."""

    __slots__ = ("_launch", "_places")

    def __init__(self, launch: Launch, copies: Copies, names: tuple[str, ...], floats: int) -> None:
        self._launch = launch
        self._places = [(names.index(each.name), 4 * (floats + each.offset)) for each in copies.made]

    def __call__(self, addresses: list[Any], memory: int, stream: int, current_device: int) -> list[Any]:
        """Enqueue on `stream`; the addresses with those of the copies in place of the arrays'."""
        replaced = [*addresses]
        for index, offset in self._places:
            replaced[index] = memory + offset
        arrays, copies = ([each[index] for index, _ in self._places] for each in (addresses, replaced))
        self._launch([*arrays, *copies], stream, current_device)
        return replaced


def _load_copying(copies: Copies, floats: int, stream: int) -> Copying:
    """Compile and load the kernel that copies; the copies begin `floats` numbers into the scratch memory."""
    from .._compile import jit as _jit
    from .._compile import used as _used
    from .._kernels import align  # most problems need no copies

    problem = copies.problem
    device = _driver.device(problem.device)
    plan = align.plan_for(device.arch)
    functions = _jit.load_kernel(plan, problem.device, stream)
    _used.note(plan, None, problem.function)
    argument = align.argument_of(units.record_of(plan, _jit.headers()), copies)
    (step,) = plan.steps
    (blocks,) = align.grid_of(plan.config, copies, device.num_sms).blocks
    count = range(len(copies.made))
    names = [f"{kind} {index}" for kind in ("sources", "copies") for index in count]
    launch = Launch(plan.words(), functions, problem.device, [Shape(blocks, step.threads, 0)], argument, names)
    return Copying(launch, copies, problem.operation.arrays, floats)


@cache  # a statement that imports takes a microsecond each time
def interop_jax() -> Any:
    from ..interop import jax

    return jax


@cache
def interop_torch() -> Any:
    from ..interop import torch

    return torch
