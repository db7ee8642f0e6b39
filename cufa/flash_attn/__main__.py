"""``python -m cufa.flash_attn PROGRAM ...``: run a program, which finds cufa where it imports flash_attn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

from ._installed import install
from ._spawned import Program, spec_of


def main() -> None:
    """Run the program that the command line names, with the arguments behind it."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m cufa.flash_attn PROGRAM [ARGUMENT ...]")
    del sys.argv[0]
    path = Path(sys.argv[0]).absolute()
    sys.path[0] = str(path.resolve().parent)  # as python itself has it
    if not path.is_file():  # a directory with a program, or an error
        with install():
            runpy.run_path(sys.argv[0], run_name="__main__")
        return
    spec = spec_of(str(path))
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__, module.__spec__ = str(path), spec
    exec(Program(spec.name, str(path)).get_code(spec.name), vars(module))


if __name__ == "__main__":
    main()
