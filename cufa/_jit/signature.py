"""The parameters of a kernel, read from its declaration, and how arguments become their bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

NUMBERS = {
    "bool": "?",
    "char": "b",
    "signed char": "b",
    "unsigned char": "B",
    "u8": "B",
    "short": "h",
    "unsigned short": "H",
    "u16": "H",
    "int": "i",
    "i32": "i",
    "unsigned": "I",
    "unsigned int": "I",
    "u32": "I",
    "long long": "q",
    "i64": "q",
    "unsigned long long": "Q",
    "u64": "Q",
    "size_t": "Q",
    "float": "f",
    "f32": "f",
    "double": "d",
}
"""Types of numbers, those of core/types.cuh among them, and their formats of `struct`."""

ALIASES = {
    "u8": "unsigned char",
    "u16": "unsigned short",
    "u32": "unsigned int",
    "u64": "unsigned long long",
    "i32": "int",
    "i64": "long long",
    "f32": "float",
}
"""What the names of core/types.cuh stand for."""

DTYPES = {
    **{name: np.dtype(form).name for name, form in NUMBERS.items()},
    **dict.fromkeys(("f16", "half", "__half"), "float16"),
    **dict.fromkeys(("bf16", "nv_bfloat16", "__nv_bfloat16"), "bfloat16"),
    "e4m3": "float8_e4m3fn",
}
"""Dtypes of arrays by what a pointer points to. Whatever is not here takes any."""

MAPS = ("ptx::TensorMap", "TensorMap", "CUtensorMap")
MAP_BYTES, MAP_ALIGNMENT = 128, 64

_MEANINGLESS = re.compile(r"\b(?:__restrict__|__restrict|__grid_constant__|volatile)\b")
_COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])')""", re.DOTALL)
_WORDS = {"signed", "unsigned", "char", "short", "int", "long"}
_TYPES = {"bool", "float", "double", "void"}


class Parameter(NamedTuple):
    """A parameter of a kernel.

    Attributes
    ----------
    text, name : str
        The declaration, and what it declares.
    kind : {'array', 'number', 'map'}
    form : str
        Format of `struct` for what the kernel is given.
    dtype : str or None
        Of arrays, or None if it does not matter.
    written : bool
        Whether the kernel may write the array.
    spelled : str or None
        The type in words that mean the same wherever they are written in the source, if there are such.
    """

    text: str
    name: str
    kind: str
    form: str
    dtype: str | None = None
    written: bool = False
    spelled: str | None = None

    @property
    def alignment(self) -> int:
        return MAP_ALIGNMENT if self.kind == "map" else struct.calcsize(self.form)


def of_source(source: str, name: str) -> str:
    """The parameters of the kernel as its source declares them.

    Raises
    ------
    ValueError
        If it declares no ``extern "C" __global__`` function of that name, or several.
    """
    code = plain(source)
    declared = []
    for found in re.finditer(rf"\b{re.escape(name)}\s*\(", code):
        before = re.split(r"[;{}]", code[: found.start()])[-1]
        if not re.search(r"\b__global__\b", before):
            continue
        if 'extern "C"' not in before and not re.search(r'extern\s+"C"\s*\{', code[: found.start()]):
            raise ValueError(f'the kernel {name} has a mangled name; declare it extern "C" __global__ void {name}(...)')
        declared.append(" ".join(_until_closed(code[found.end() :]).split()))
    if len(set(declared)) != 1:
        seen = "several declarations" if declared else "no declaration"
        raise ValueError(f'the source has {seen} of extern "C" __global__ void {name}(...); say signature=')
    return declared[0]


def plain(code: str) -> str:
    """Without comments, and with lines joined that a backslash continues."""
    return _COMMENT.sub(lambda found: found[1] or " ", re.sub(r"\\\r?\n", "", code))


def _until_closed(code: str) -> str:
    """What comes before the parenthesis that closes one which is open."""
    depth = 1
    for index, character in enumerate(code):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return code[:index]
    return code


def parse(signature: str, defines: Mapping[str, str]) -> tuple[Parameter, ...]:
    """The parameters of a list of declarations, as ``float* y, const float* x, int n``.

    Raises
    ------
    TypeError
        Of a type that no argument can be converted to.
    """
    declared = [each.strip() for each in signature.split(",")] if signature.strip() not in ("", "void") else []
    found = tuple(_parameter(text, defines) for text in declared)
    names = [each.name for each in found]
    if len(set(names)) != len(names):
        raise TypeError(f"two parameters have the same name in {signature!r}")
    return found


def _parameter(text: str, defines: Mapping[str, str]) -> Parameter:
    if "=" in text:
        raise TypeError(f"the parameter {text!r} has a default, which no launch would use; leave it out")
    match = re.fullmatch(r"(.*?[\s*&])(\w+)", " ".join(_MEANINGLESS.sub(" ", text).split()))
    if match is None:
        raise TypeError(f"the parameter {text!r} is not a type and a name; write it as float* x, or int n")
    declared = re.sub(r"\b[A-Za-z_]\w*\b", lambda word: defines.get(word[0], word[0]), match[1])
    base, star, rest = declared.partition("*")
    constant = bool(re.search(r"\bconst\b", base))
    base = _ordered(re.sub(r"\bconst\b", " ", base).split())
    rest = re.sub(r"\bconst\b", " ", rest).strip()
    spelled = ALIASES.get(base, base)
    if star and not rest:
        volatile = bool(re.search(r"\bvolatile\b[^*]*\*", text))
        known = f"{'const ' * constant}{'volatile ' * volatile}{spelled}*" if base in DTYPES or base == "void" else None
        return Parameter(text, match[2], "array", "Q", DTYPES.get(base), not constant, known)
    if not star and base in MAPS:
        if "__grid_constant__" not in text:
            raise TypeError(
                f"the tensor map {text!r} would be copied to where the copy engine does not read it; declare it const "
                f"__grid_constant__ {base} {match[2]}"
            )
        known = None if base == "TensorMap" else f"const __grid_constant__ {base}"
        return Parameter(text, match[2], "map", f"{MAP_BYTES}s", spelled=known)
    if not star and base in NUMBERS:
        return Parameter(text, match[2], "number", NUMBERS[base], spelled=spelled)
    raise TypeError(
        f"the parameter {text!r} is no pointer to elements, no tensor map ({MAPS[0]}) and no number of a type that is "
        f"known ({', '.join(NUMBERS)}); say signature= if it is the name of one of these"
    )


def _ordered(words: list[str]) -> str:
    """A type in the words that `NUMBERS` has: C++ has them in any order, and some may be left out."""
    if not words or not set(words) <= _WORDS:
        return " ".join(words)
    kinds = [word for word in words if word not in ("signed", "unsigned", "int")]
    signs = ["unsigned"] * ("unsigned" in words) or ["signed"] * ("signed" in words and kinds == ["char"])
    return " ".join([*signs, *(kinds or ["int"])])


def redeclared(name: str, parameters: tuple[Parameter, ...]) -> str:
    """A declaration of the kernel that compiles if its types are what they were taken for; empty if it cannot be told.

    A type that is not known may be one of a namespace, and so without a meaning behind the source.
    """
    types = [each.spelled for each in parameters]
    if None in types:
        return ""
    # Macros may hide what types mean, too, and are not needed any more.
    hidden = sorted({word for each in types for word in re.findall(r"[a-z]\w+", each or "")} & (_WORDS | _TYPES))
    undefined = "".join(f"#undef {word}\n" for word in hidden)
    return f"\n{undefined}" + declaration(name, ", ".join(map(str, types)), "what cufa.jit reads; else say signature=")


def declaration(name: str, parameters: str, comment: str) -> str:
    """Lines that declare the kernel, with a comment that the compiler shows if that is not what the source has."""
    return f'#line 1 "signature"\nextern "C" __global__ void {name}({parameters});  // {comment}\n'


def offsets(parameters: tuple[Parameter, ...]) -> tuple[tuple[int, ...], int]:
    """Where each parameter lies in a struct of them all, and the size of what they take."""
    found, end = [], 0
    for each in parameters:
        begin = -(-end // each.alignment) * each.alignment
        found.append(begin)
        end = begin + struct.calcsize(each.form)
    return tuple(found), end


def number(parameter: Parameter, value: Any) -> Any:
    """A number as `struct` takes it.

    Raises
    ------
    TypeError
        If it is not of the kind that the parameter has: a bool for a bool, an integer for an integer.
    ValueError
        If the parameter's type does not hold it.
    """
    form = parameter.form
    if form == "?":
        right = isinstance(value, (bool, np.bool_))
    elif form in "fd":
        right = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    else:
        right = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not right:
        raise TypeError(f"is a {type(value).__name__}, but is declared {parameter.text!r}")
    plain = value.item() if isinstance(value, np.generic) else value
    try:
        struct.pack(f"={form}", plain)  # as it is packed in the end: the native form takes a float that overflows
    except (struct.error, OverflowError):
        raise ValueError(f"is {value}, which {parameter.text!r} does not hold") from None
    return plain
