"""Programs that ``python -m cufa.flash_attn`` runs, as modules of this one.

A process that multiprocessing spawns is told the name of its parent's main module, and runs that before its function.
By such a name it finds the program here, which then finds flash_attn there too.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from types import CodeType
from typing import Any

from ._installed import install

__path__: list[str] = []


class Program(SourceFileLoader):
    """Reads a program as Python does, without leaving bytecode beside it; before it runs, flash_attn is there."""

    def get_code(self, fullname: str) -> CodeType:
        install()
        found: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return found


def spec_of(path: str) -> ModuleSpec:
    """The module that a program is, by its absolute path."""
    name = f"{__name__}.{os.fsencode(path).hex()}"
    found = spec_from_file_location(name, path, loader=Program(name, path))
    assert found is not None
    return found


class Programs:
    """Finds them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        home, _, name = fullname.rpartition(".")
        return spec_of(os.fsdecode(bytes.fromhex(name))) if home == __name__ else None


sys.meta_path.append(Programs())
