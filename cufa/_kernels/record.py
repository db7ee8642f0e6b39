"""The arguments of kernels: C++ structs, read from the headers that declare them, and packed by name.

The header is the only home of a layout. What is read here is asserted in every translation unit, so a declaration that
this reader takes for something else does not compile.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from .._terms.term import Late

SCALARS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "u16": "H", "float": "f"}
"""Formats of `struct` by C++ type; pointers are unsigned integers of 8 bytes."""

WORD = 8
"""Bytes of the words that hold structs of whatever kinds."""

MAP_BYTES = 128
"""Of a tensor map."""

OPAQUE = {"ptx::TensorMap": (MAP_BYTES, 64)}
"""Size and alignment of what is filled in as bytes."""


class Member(NamedTuple):
    """A member of a struct.

    Attributes
    ----------
    name : str
    offset : int
        In bytes.
    elements : int
        Of an array's elements; 1 if it is none.
    format : str
        Of a number or, ``P``, of an address; empty for a record and for what is opaque.
    record : Record or None
        Of what type it is, if that is a struct.
    size : int
        Of all its elements, in bytes.
    """

    name: str
    offset: int
    elements: int
    format: str
    record: Record | None
    size: int


class Pointer(NamedTuple):
    """Where an address goes: its offset, and what lies there."""

    offset: int
    name: str


class Slot(NamedTuple):
    """Where a late option goes: its offset, its format of `struct`, where ``80s`` is 80 bytes, and its name."""

    offset: int
    format: str
    name: str


class Record:
    """A struct of the namespace ``attention``, as C++ lays it out.

    Attributes
    ----------
    name : str
    members : tuple of Member
    size, alignment : int
    """

    def __init__(self, name: str, members: tuple[Member, ...], alignment: int) -> None:
        self.name = name
        self.members = members
        self.alignment = alignment
        end = members[-1].offset + members[-1].size if members else 0
        self.size = -(-end // alignment) * alignment

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """The struct's bytes; addresses are 0.

        Parameters
        ----------
        values : mapping
            By member: a number, a sequence of them for an array or for a struct of as many, a mapping for a struct,
            bytes for what is opaque. Every member has one, but for addresses, which have none. Of `Late` ones the bytes
            are 0.

        Raises
        ------
        ValueError
            If a value is missing, or has no member.
        """
        packed = bytearray(self.size)
        self._pack_into(packed, 0, values)
        return bytes(packed)

    def _pack_into(self, packed: bytearray, offset: int, values: Mapping[str, Any]) -> None:
        wanted = {member.name for member in self.members if member.format != "P"}
        if wanted != values.keys():
            missing, unknown = sorted(wanted - values.keys()), sorted(values.keys() - wanted)
            raise ValueError(f"{self.name}: values are missing for {missing}, and there are no members {unknown}.")
        for member in self.members:
            if member.format == "P":
                continue
            value, at = values[member.name], offset + member.offset
            if isinstance(value, Late):
                continue
            if member.record is not None:
                if not isinstance(value, Mapping):
                    names = [each.name for each in member.record.members]
                    value = dict(zip(names, value, strict=True))
                member.record._pack_into(packed, at, value)
            elif member.format:
                numbers = value if isinstance(value, Sequence) else (value,)
                struct.pack_into(f"<{member.elements}{member.format}", packed, at, *numbers)
            else:
                assert len(value) == member.size
                packed[at : at + member.size] = value

    def pointers(self) -> Iterator[Pointer]:
        """Every address in it. That of an array's element has its number: ``sources 0``."""
        for member in self.members:
            if member.record is not None:
                yield from (Pointer(member.offset + each.offset, each.name) for each in member.record.pointers())
            elif member.format == "P":
                names = (
                    [member.name] if member.elements == 1 else [f"{member.name} {i}" for i in range(member.elements)]
                )
                yield from (Pointer(member.offset + 8 * index, name) for index, name in enumerate(names))

    def slots(self, values: Mapping[str, Any]) -> Iterator[Slot]:
        """Those of all members whose values, as `pack` takes them, are `Late`: numbers, or arrays of them."""
        for member in self.members:
            value = values.get(member.name)
            if isinstance(value, Late):
                assert member.format not in ("", "P")
                yield Slot(member.offset, member.format if member.elements == 1 else f"{member.size}s", value.name)
            elif member.record is not None and isinstance(value, Mapping):
                yield from (each._replace(offset=member.offset + each.offset) for each in member.record.slots(value))

    def offset_of(self, name: str) -> int:
        """Of a member, in bytes."""
        return next(member.offset for member in self.members if member.name == name)

    def holding(self, name: str, parts: Mapping[str, Record]) -> Record:
        """The same struct, where an array of words, which may be in a struct in it, holds structs by name.

        Each begins with a word, behind the last.

        Raises
        ------
        ValueError
            If the array has not so many words.
        """
        members = []
        for member in self.members:
            if member.name == name:
                held, offset = [], 0
                for part, record in parts.items():
                    held.append(Member(part, offset, 1, "", record, record.size))
                    offset += -(-record.size // WORD) * WORD
                if offset > member.size:
                    raise ValueError(f"{self.name}: {', '.join(parts)} take {offset} bytes of {member.size}.")
                record = Record("", tuple(held), WORD)
                member = member._replace(format="", elements=1, record=record)
            elif member.record is not None:
                member = member._replace(record=member.record.holding(name, parts))
            members.append(member)
        return Record(self.name, tuple(members), self.alignment)

    def asserts(self) -> str:
        """C++ that fails to compile where the struct, or one in it, is another than was read."""
        return "".join(record._own_asserts() for name, record in self._records().items() if name)

    def _records(self) -> dict[str, Record]:
        """This one and those in it, by name."""
        found: dict[str, Record] = {}
        for member in self.members:
            if member.record is not None:
                found |= member.record._records()
        return found | {self.name: self}

    def _own_asserts(self) -> str:
        lines = [f"static_assert(sizeof(attention::{self.name}) == {self.size});\n"]
        for member in self.members:
            # What offsetof expands to in NVRTC's front end; NVRTC before 13.3 has no __builtin_offsetof.
            address = f"&static_cast<attention::{self.name}*>(nullptr)->{member.name}"
            lines.append(f"static_assert(__INTADDR__({address}) == {member.offset});\n")
        return "".join(lines)


@lru_cache(maxsize=64)
def read(name: str, headers: tuple[str, ...]) -> Record:
    """The record of a struct that one of the `headers`, given by their texts, declares.

    Raises
    ------
    ValueError
        If none does, or it has members of a kind that is not known here.
    """
    for text in headers:
        if f"struct {name} {{\n" not in text:
            continue
        found = re.search(rf"^struct {name} \{{\n(.*?)^\}};", re.sub(r"//.*", "", text), re.MULTILINE | re.DOTALL)
        if found:
            return _parse(name, found[1], headers)
    raise ValueError(f"no header declares a struct {name}.")


def _parse(name: str, body: str, headers: tuple[str, ...]) -> Record:
    members: list[Member] = []
    constants: dict[str, int] = {}
    offset, largest = 0, 1
    for statement in filter(None, map(str.strip, body.split(";"))):
        if statement.startswith("static constexpr int "):
            for declared in statement.removeprefix("static constexpr int ").split(","):
                constant, value = declared.split("=")
                constants[constant.strip()] = _number(value, constants)
            continue
        kind, declared = re.fullmatch(r"((?:const )?[\w:]+)\s*(.*)", statement, re.DOTALL).groups()  # type: ignore
        for each in declared.split(","):
            found = re.fullmatch(r"\s*(\*?)\s*(\w+)((?:\[[^\]]+\])*)\s*", each)
            if found is None:
                raise ValueError(f"{name}: what is declared by {statement!r} is not known here.")
            record, form = None, "P" if found[1] else SCALARS.get(kind, "")
            if form:
                size = alignment = struct.calcsize(f"={form}") if form != "P" else 8
            elif kind in OPAQUE:
                size, alignment = OPAQUE[kind]
            else:
                record = read(kind, headers)
                size, alignment = record.size, record.alignment
            count = math.prod(_number(extent, constants) for extent in re.findall(r"\[([^\]]+)\]", found[3]))
            offset = -(-offset // alignment) * alignment
            members.append(Member(found[2], offset, count, form, record, count * size))
            offset, largest = offset + count * size, max(largest, alignment)
    return Record(name, tuple(members), largest)


def _number(text: str, constants: dict[str, int]) -> int:
    """The value of a sum of products of numbers and constants."""
    named = re.sub(r"[A-Za-z_]\w*", lambda match: str(constants[match[0]]), text)
    return sum(math.prod(map(int, term.split("*"))) for term in named.split("+"))
