"""``python -m cufa``."""

from __future__ import annotations

from ._cli.main import main

main()
