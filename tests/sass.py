"""Reading a cubin's machine code, with cuobjdump and nvdisasm from PyPI."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple, TypeVar


class Instruction(NamedTuple):
    """One instruction: where it is, what it does and, as text, on what."""

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]


State = TypeVar("State", bound=Hashable)


class Group(NamedTuple):
    """The wgmmas up to a commit, and the registers that belong to them until they are done."""

    committed: bool
    accumulators: frozenset[int]
    inputs: frozenset[int]


def packages(name: str) -> list[Path]:
    """Where NVIDIA's wheels have put a package."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) / name for place in places or () if (Path(place) / name).is_dir()]


def older_nvrtcs() -> dict[str, list[Path]]:
    """Libraries of NVRTC, by version, that are not the one which cufa finds: what ``make test`` has installed.

    That of CUDA 12 is a package of its own; for another of CUDA 13 there is a directory beside the environment's.
    """
    places = {"12.9": [package / "lib" for package in packages("cuda_nvrtc")]}
    for path in sorted((Path(__file__).parents[1] / ".venv").glob("nvrtc-*")):
        places[path.name.removeprefix("nvrtc-")] = [path / "nvidia" / "cu13" / "lib"]
    found = {
        version: [file for lib in libs for file in sorted(lib.glob("libnvrtc*.so.*")) if "alt" not in file.name]
        for version, libs in places.items()
    }
    return {version: libraries for version, libraries in found.items() if libraries}


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each function of a cubin; nothing without the tools to tell."""
    tools = [found / "bin" for found in packages("cu13") if (found / "bin" / "cuobjdump").exists()]
    if not tools:
        return {}
    path = os.pathsep.join([str(tools[0]), os.environ.get("PATH", "")])  # where it looks for nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools[0] / "cuobjdump"), "-sass", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path})
    name, *parts = re.split(r"^\s*Function : (\w+)$", run.stdout, flags=re.MULTILINE)[1:]
    return {name: parse(text) for name, text in zip([name, *parts[1::2]], parts[::2], strict=True)}


def parse(text: str) -> list[Instruction]:
    """The instructions of a function's listing."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", text)
    return [
        Instruction(int(address, 16), predicate, opcode, tuple(each.strip() for each in operands.split(",")))
        for address, predicate, opcode, operands in found
    ]


def count(instructions: list[Instruction]) -> collections.Counter[str]:
    """How many there are of each kind."""
    return collections.Counter(each.opcode.split(".")[0] for each in instructions)


def wgmma_hazards(instructions: list[Instruction]) -> list[Instruction]:
    """Instructions that touch what a running wgmma still accumulates into, or overwrite what it still reads.

    ptxas is to keep registers apart until the wait for the wgmma's group. It has been seen to overwrite A, held in
    registers, where nothing but arithmetic came between the wgmma and the wait.
    """
    hazards = set()

    def step(each: Instruction, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        if each.opcode.startswith("HGMMA"):
            return _begin(each, groups)
        if each.opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(each.operands[1], 16)
            return groups[len(groups) - pending :] if pending else ()
        if groups and _clashes(each, groups):
            hazards.add(each)
        return groups

    _walk(instructions, (), step)
    return sorted(hazards)


def lost_operands(instructions: list[Instruction]) -> list[Instruction]:
    """wgmmas that find in A what ldmatrix has loaded on some ways to them, and something else on others.

    A may stay in registers while a loop goes on. NVRTC 12.9 and 13.0 have been seen to give these registers to A of
    another wgmma of the same shape, which is written before the loop comes around, so that only the first step was
    right.
    """
    found: dict[Instruction, set[bool]] = {}

    def step(each: Instruction, loaded: frozenset[int]) -> frozenset[int]:
        if each.opcode.startswith("HGMMA"):
            if operands := _inputs(each):
                found.setdefault(each, set()).add(operands <= loaded)
            return loaded
        return loaded | _written(each) if each.opcode.startswith("LDSM") else loaded - _written(each)

    _walk(instructions, frozenset[int](), step)
    return sorted(each for each, ways in found.items() if len(ways) > 1)


def _walk(instructions: list[Instruction], state: State, step: Callable[[Instruction, State], State]) -> None:
    """Go all ways through a function; `step` is given each instruction with the states in which it may be reached."""
    index = {each.address: i for i, each in enumerate(instructions)}
    seen = set()
    paths = [(0, state)]
    while paths:
        at, state = paths.pop()
        while at < len(instructions) and (at, state) not in seen:
            seen.add((at, state))
            each = instructions[at]
            state = step(each, state)
            always = not each.predicate
            if each.opcode.startswith("BRA"):
                target = index.get(int(each.operands[-1], 16)) if each.operands[-1].startswith("0x") else None
                if target is not None:
                    paths.append((target, state))
                always &= len(each.operands) == 1
            if always and each.opcode.split(".")[0] in ("BRA", "EXIT"):
                break
            at += 1


def _begin(wgmma: Instruction, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    columns = re.search(r"64x(\d+)x", wgmma.opcode)
    assert columns is not None
    accumulators, inputs = _span(wgmma.operands[0], int(columns[1]) // 2), _inputs(wgmma)
    if groups and not groups[-1].committed:
        accumulators, inputs, groups = accumulators | groups[-1].accumulators, inputs | groups[-1].inputs, groups[:-1]
    return (*groups, Group(any(each.startswith("gsb") for each in wgmma.operands), accumulators, inputs))


def _inputs(wgmma: Instruction) -> frozenset[int]:
    """The registers of A; none if that is in shared memory."""
    return _span(wgmma.operands[1], 4) if re.match(r"R\d", wgmma.operands[1]) else frozenset()


def _clashes(each: Instruction, groups: tuple[Group, ...]) -> bool:
    written = _written(each)
    touched = written | {int(register) for operand in each.operands for register in re.findall(r"\bR(\d+)", operand)}
    return any(touched & group.accumulators or written & group.inputs for group in groups)


def _written(each: Instruction) -> frozenset[int]:
    """The registers that an instruction writes."""
    if each.opcode.startswith(("ST", "RED", "BAR", "BRA", "SYNCS.ARRIVE", "R2UR")):
        return frozenset()
    target = each.operands[1] if each.opcode.startswith("SHFL") else each.operands[0]  # SHFL's first is a predicate
    if not re.match(r"R\d", target):
        return frozenset()
    width = re.search(r"\.(64|128|WIDE|M88\.[24])\b", each.opcode)
    return _span(target, {"64": 2, "WIDE": 2, "128": 4, "M88.2": 2, "M88.4": 4}[width[1]] if width else 1)


def _span(operand: str, registers: int) -> frozenset[int]:
    first = re.match(r"R(\d+)", operand)
    assert first is not None
    return frozenset(range(int(first[1]), int(first[1]) + registers))
