"""XLA's foreign functions, through ctypes: what XLA calls at a call's place in a program, without compiled code.

XLA hands over one pointer, to a frame of 8-byte words, and takes null or an error object. Only the words that are read
here are told of; they lie alike in every version of the interface whose major is 0 (``xla/ffi/api/c_api.h``).

Within the frame: 0 its size, 1 extensions, 2 the table of XLA's own functions, 3 the context that those want, 4 the
stage; from 5 on arguments, from 10 on results and from 15 on attributes, each as (size, extensions, count, types,
pointers), attributes with their names before the pointers. A buffer: size, extensions, dtype, address, rank, extents.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import operator
import struct
import uuid
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import numpy as np

from .._call import problem as _problem
from .._call.arrays import ALIGNMENT, CPU, Adapter, Arrays, Layout, Spec, borrow, contiguous, numpy_dtype
from .._call.options import Options
from .._call.problem import Problem
from .._driver import driver as _driver
from .._operations import operation as _operation
from .._operations.call import compute_on_cpu, prepare
from .._operations.operation import Operation
from ..errors import UnsupportedError

COMMAND_BUFFERS = 0
"""The trait by which XLA may record the launches into a CUDA graph, 1 or 0. A launch depends on layouts alone, so it
could be; but a recorded call whose kernel is not loaded by then fails."""

VERSION = 0, 3
"""Of the interface, the one that this was written by. Of the same major the minor may be any, for nothing is read that
minors changed."""

INSTANTIATE, EXECUTE = 0, 3
"""Stages: a program is made, and run."""

_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = dict(enumerate(_INTEGERS, 1)) | {10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}
"""XLA's numbers of dtypes."""

CREATE_ERROR, DESTROY_ERROR, GET_STREAM, ALLOCATE, FREE = 6, 8, 10, 15, 16
"""Places of XLA's functions in its table."""

INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 3, 12, 13

Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class XlaAdapter(Adapter):
    """Arrays in the hands of XLA, which are contiguous."""

    name = "jax"

    def spec(self, layout: Layout) -> Spec:
        _, shape, _, dtype, device, misalignment, writable = layout
        return Spec(self.name, shape, contiguous(shape), dtype.name, device, misalignment, writable)


ADAPTER = XlaAdapter()


def layout_of(shape: tuple[int, ...], dtype: np.dtype[Any], device: int, pointer: int = 0) -> Layout:
    """The layout of an array that XLA holds."""
    return ADAPTER, shape, None, dtype, device, pointer % ALIGNMENT, True


class Call(NamedTuple):
    """What of a call is settled when its program is made.

    Attributes
    ----------
    operation : Operation
    present : tuple of int
        The places of the arrays that are given.
    options : Options
    """

    operation: Operation
    present: tuple[int, ...]
    options: Options

    def given(self, values: tuple[Any, ...] | list[Any], other: Any = None) -> list[Any]:
        """What belongs to the arrays that are given, in the operation's order, and `other` elsewhere."""
        found = [other] * len(self.operation.arrays)
        for place, value in zip(self.present, values, strict=True):
            found[place] = value
        return found

    def problem(self, layouts: tuple[Layout, ...]) -> Problem:
        """The checked problem of arrays of these layouts, in the order of `present`."""
        return _problem.check(self.operation, Arrays((), [], tuple(self.given(layouts))), self.options)

    @property
    def late_members(self) -> list[Any]:
        """What kernels are given for late options."""
        return self.operation.owned.late_members(self.options.late)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that are given."""
        return tuple(self.operation.arrays[place] for place in self.present)


# --- What a program carries -------------------------------------------------------------------------

_OWN: dict[str, Call] = {}
"""Calls that no text can tell of; programs that have them cannot leave the process."""


def description_of(call: Call, layouts: tuple[Layout, ...]) -> str:
    """A call as text, by which any process that has the operation finds it again; layouts are what it may prepare."""
    arrays = [(shape, dtype.name) for _, shape, _, dtype, *_ in layouts]
    told = {"operation": key_of(call.operation), "present": call.present, "options": call.options, "arrays": arrays}
    try:
        text = json.dumps(told)
        if _call_in(json.loads(text)) == call:
            return text
    except (TypeError, ValueError):
        pass
    key = next((key for key, known in _OWN.items() if known == call), None) or uuid.uuid4().hex
    _OWN[key] = call
    return json.dumps({"own": key, "arrays": arrays})


@lru_cache(maxsize=4096)
def described(text: bytes) -> tuple[Call, tuple[tuple[tuple[int, ...], str], ...]]:
    """The call of a description, and shapes and dtypes of the arrays that it was made for."""
    told = json.loads(text)
    call = _OWN.get(told["own"]) if "own" in told else _call_in(told)
    if call is None:
        raise UnsupportedError("cufa: the program has a call with options that only the process that made it has.")
    return call, tuple((tuple(shape), dtype) for shape, dtype in told["arrays"])


def _call_in(told: dict[str, Any]) -> Call:
    return Call(_operation_of(told["operation"]), tuple(told["present"]), Options(*_plain(told["options"])))


def _plain(value: Any) -> Any:
    """Tuples where JSON has lists: options hold no lists."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


_KEYS: dict[str, Operation] = {}


@lru_cache(maxsize=256)
def key_of(operation: Operation) -> str:
    """A name that another process gives to the same operation: of its arrays, and of its terms' types and sources."""
    terms = [
        (f"{type(term).__module__}.{type(term).__qualname__}", term.type, sorted(term.headers.items()))
        for term in operation.terms
    ]
    told = (operation.name, operation.arrays, operation.written, operation.tiles, terms)
    key = f"{operation.name}/{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"
    if _KEYS.setdefault(key, operation) is not operation:  # two that look alike
        key = f"{key}/{uuid.uuid4().hex}"
        _KEYS[key] = operation
    return key


def _operation_of(key: str) -> Operation:
    if key not in _KEYS:
        for operation in _operation.made():
            key_of(operation)
    if key not in _KEYS:
        name = key.partition("/")[0]
        raise UnsupportedError(
            f"{name}: the program was made with an operation that is not here, or of another version; import what "
            "makes it, and trace the program anew."
        )
    return _KEYS[key]


# --- The frame --------------------------------------------------------------------------------------

_BYTES = memoryview((ctypes.c_char * (1 << 56)).from_address(0)).cast("B")
"""All that a process on a 64-bit CPU can address: to read it takes a tenth of the time of making ctypes objects."""

_WORDS = _BYTES.cast("Q")


def word(address: int, place: int = 0) -> int:
    """The word that lies at an address, or some words behind it."""
    return _WORDS[(address >> 3) + place]


class Frame:
    """What XLA hands over.

    Attributes
    ----------
    stage : int
    table : int
        The address of the table of XLA's functions.
    """

    __slots__ = ("_at", "stage", "table")

    def __init__(self, address: int) -> None:
        self._at = at = address >> 3
        self.table = _WORDS[at + 2]
        self.stage = _WORDS[at + 4] & 0xFFFFFFFF

    def addresses(self) -> list[int]:
        """Of the arguments, and then of the results."""
        at, found = self._at, []
        for group in (at + 7, at + 12):
            first = _WORDS[group + 2] >> 3
            found += [_WORDS[(_WORDS[place] >> 3) + 3] for place in range(first, first + _WORDS[group])]
        return found

    def kinds(self) -> list[tuple[int, tuple[int, ...]]]:
        """The dtypes of arguments and results, by XLA's numbers, and their extents."""
        at, found = self._at, []
        for group in (at + 7, at + 12):
            first = _WORDS[group + 2] >> 3
            for place in range(first, first + _WORDS[group]):
                buffer = _WORDS[place] >> 3
                extents = _WORDS[buffer + 5] >> 3
                shape = tuple(_WORDS[extents : extents + _WORDS[buffer + 4]])
                found.append((_WORDS[buffer + 2] & 0xFFFFFFFF, shape))
        return found

    def description(self) -> bytes:
        """The only attribute, a text."""
        assert _WORDS[self._at + 17] == 1, "one attribute is expected"
        span = word(_WORDS[self._at + 20]) >> 3
        pointer = _WORDS[span]
        return _BYTES[pointer : pointer + _WORDS[span + 1]].tobytes()

    def ask(self, place: int, *arguments: int) -> int:
        """Call a function of XLA's that wants the context; the last argument, which it may have written."""
        count = 3 + len(arguments)
        memory = (ctypes.c_uint64 * count)(8 * count, 0, _WORDS[self._at + 3], *arguments)
        error = _function(word(self.table, place))(memory)
        if error:
            _function(word(self.table, DESTROY_ERROR))((ctypes.c_uint64 * 3)(24, 0, error))
            raise RuntimeError(f"XLA's function {place} failed")
        last: int = memory[count - 1]
        return last


@lru_cache(maxsize=64)
def _function(address: int) -> Any:
    return Function(address)


def error_of(table: int, error: BaseException) -> int:
    """An error object of XLA's, which JAX raises as a JaxRuntimeError."""
    known = isinstance(error, (UnsupportedError, TypeError, ValueError))
    kind = UNIMPLEMENTED if isinstance(error, UnsupportedError) else INVALID_ARGUMENT if known else INTERNAL
    text = str(error) if known or str(error).startswith("cufa:") else f"cufa: {type(error).__name__}: {error}"
    message = ctypes.create_string_buffer(text.encode(errors="replace"))
    arguments = ctypes.create_string_buffer(struct.pack("@QQQi", 28, 0, ctypes.addressof(message), kind), 32)
    created: int = _function(word(table, CREATE_ERROR))(arguments)
    return created


def _answer_metadata(frame: int, table: int, version: tuple[int, int]) -> bool:
    """Whether XLA asks what the handler is, in place of calling it: then it is told.

    Of its version XLA is told what it says itself, if it does; else `version`.
    """
    extension = word(frame, 1)
    if not extension or word(extension, 1) & 0xFFFFFFFF != 1:
        return False
    record = word(extension, 3)
    major, minor = version
    told = word(table, 4) if table else 0
    if told and told & 0xFFFFFFFF == major:
        minor = told >> 32
    ctypes.c_uint64.from_address(record + 24).value = minor << 32 | major
    ctypes.c_uint32.from_address(record + 32).value = COMMAND_BUFFERS
    return True


def handler(run: Callable[[Frame], None], version: tuple[int, int] = VERSION) -> Any:
    """A function for XLA that calls `run`; no exception gets out of it, for ctypes would drop it.

    `version` is that of the interface, for an XLA that does not say its own when it asks.
    """

    def handle(address: int) -> int | None:
        table = 0
        try:
            table = word(address, 2)
            if not _answer_metadata(address, table, version):
                run(Frame(address))
        except BaseException as error:
            if not table:  # not a frame that can be answered
                raise
            return error_of(table, error)
        return None

    return Handler(handle)


# --- What is run ------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """What is remembered of calls whose buffers are alike.

    Attributes
    ----------
    call : Call
    problem : Problem
    layouts : tuple of Layout
        Of the arguments.
    chosen : callable
        Takes the addresses of the buffers and 0, and gives those of the operation's arrays and of the results.
    floats : int
        The float32 numbers of the last result, if that is the memory a call takes while it runs.
    late : list
        What kernels are given for late options.
    """

    call: Call
    problem: Problem
    layouts: tuple[Layout, ...]
    chosen: Callable[[list[int]], tuple[int, ...]]
    floats: int
    late: list[Any]


MAX_READY = 4096
_READY: dict[Any, _Ready] = {}


def _ready(frame: Frame, device: int) -> tuple[_Ready, list[int]]:
    """What is remembered of a call on a device, and the addresses of its buffers.

    Shapes and dtypes are part of the description, so that those of the buffers are looked at once.
    """
    text, addresses = frame.description(), frame.addresses()
    aligned = reduce(operator.or_, addresses, 0) % ALIGNMENT == 0
    misaligned = () if aligned else tuple(address % ALIGNMENT for address in addresses)
    key = text, device, misaligned
    known = _READY.get(key)
    if known is None:
        if len(_READY) >= MAX_READY:
            _READY.clear()
        known = _READY[key] = _make_ready(text, frame.kinds(), device, misaligned)
    return known, addresses


def _make_ready(
    text: bytes, kinds: list[tuple[int, tuple[int, ...]]], device: int, misaligned: tuple[int, ...]
) -> _Ready:
    call, _ = described(text)
    given = len(call.present)
    layouts = []
    for (dtype, shape), misalignment in zip(kinds[:given], misaligned or (0,) * given, strict=False):
        if dtype not in DTYPES:
            raise UnsupportedError(f"{call.operation.name}: XLA's dtype {dtype} is not supported.")
        layouts.append(layout_of(shape, numpy_dtype(DTYPES[dtype]), device, misalignment))
    problem = call.problem(tuple(layouts))
    expected = [(result.shape, result.dtype) for result in problem.results]
    end = given + len(expected)
    found = [(shape, DTYPES.get(dtype)) for dtype, shape in kinds[given:end]]
    if found != expected:
        raise ValueError(f"{call.operation.name}: the program wants results {found}, and the call gives {expected}.")
    places = operator.itemgetter(*call.given([*range(given)], len(kinds)), *range(given, end))
    floats = math.prod(kinds[end][1]) if len(kinds) > end else 0
    return _Ready(call, problem, tuple(layouts), places, floats, call.late_members)


def run_on_cpu(frame: Frame) -> None:
    """Compute a call of arrays in host memory."""
    if frame.stage != EXECUTE:
        return
    (call, problem, layouts, *_), addresses = _ready(frame, CPU)
    count = len(layouts)
    held = tuple(call.given([frame] * count))  # whatever is not None
    arrays = Arrays(held, call.given(addresses[:count], 0), tuple(call.given(layouts)))
    results = []
    for address, result in zip(addresses[count:], problem.results, strict=False):
        results.append(borrow(address, ADAPTER.spec(layout_of(result.shape, numpy_dtype(result.dtype), CPU)), frame))
    compute_on_cpu(arrays, problem, results, call.options.late)


def run_on_gpu(frame: Frame) -> None:
    """Enqueue a call on XLA's stream; when its program is made, its kernels are loaded."""
    if frame.stage == INSTANTIATE:
        load_early(frame.description())
    if frame.stage != EXECUTE:
        return
    stream = frame.ask(GET_STREAM, 0)
    (_, problem, _, chosen, floats, late), addresses = _ready(frame, device_of(stream))
    prepared = problem.memo.get("prepared") or prepare(problem, stream)
    named = [*chosen([*addresses, 0]), *late]
    current = _driver.current_ordinal() if _driver.count() > 1 else 0
    current = -1 if current is None else current
    if prepared.floats <= floats:
        prepared(named, addresses[-1], stream, current)
        return
    # Traced for another GPU, or in parts for several. XLA hands memory out in the order of its stream.
    size = 4 * prepared.floats
    memory = frame.ask(ALLOCATE, size, 256, 0)
    try:
        prepared(named, memory, stream, current)
    finally:
        frame.ask(FREE, size, memory)


def device_of(stream: int) -> int:
    """The CUDA ordinal of the GPU that a call runs on: its stream's, whichever is current in XLA's thread."""
    return 0 if _driver.count() == 1 else _driver.device_of_stream(stream)


def load_early(text: bytes) -> None:
    """Load what a call of the arrays that it was traced for will launch, lest its first run does; else that run will.

    Programs may be made where there is no GPU, or for several.
    """
    try:
        call, arrays = described(text)
        layouts = tuple(layout_of(shape, numpy_dtype(dtype), 0) for shape, dtype in arrays)
        prepare(call.problem(layouts), 0)
    except Exception:
        return
