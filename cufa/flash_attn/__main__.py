"""``python -m cufa.flash_attn PROGRAM ...``: run a program, which finds cufa where it imports flash_attn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ._installed import install


def main() -> None:
    """Run the program that the command line names, with the arguments behind it."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m cufa.flash_attn PROGRAM [ARGUMENT ...]")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as python itself has it
    with install():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
