"""``cufa`` and ``python -m cufa``: the commands by name, each imported when it is run."""

from __future__ import annotations

import importlib
from typing import Any

import click

from .. import __version__

COMMANDS = {
    "info": "what cufa finds on this machine, as a bug report should hold",
    "doctor": "try each step of a call on this machine, and say what to mend",
    "cache": "the compiled kernels on disk: where they are, what they take, whether they are whole",
    "explain": "which kernel would serve a call, why, and what it takes, from shapes and dtypes",
    "tiles": "the tables of tiles: what a thread block takes at a time",
    "warmup": "compile, or load, what calls will need",
    "dump": "source, PTX, machine code and resources of the kernel for a call",
    "bundle": "files of compiled kernels: build, check, install and ship them",
    "bench": "how fast attention is on this GPU, beside what else is installed",
    "learn": "flash attention, from ten lines of NumPy to a kernel for Hopper, each step checked and timed",
}
"""The commands and what each does, in the order of the help. Each is the function of that name in a module of that
name here."""


class Commands(click.Group):
    """A group whose commands are not imported for the help, nor one for the sake of another."""

    described = COMMANDS
    prefix = ""
    """What the names of the commands' modules begin with."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.described)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.described:
            return None
        found: click.Command = getattr(importlib.import_module(f"cufa._cli.{self.prefix}{name}"), name)
        return found

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.described.items()))

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        """As the base class, but the message about an unknown command says which there are."""
        if args[0] not in self.described and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self.described, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.described)}."
            context.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(context, args)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cufa")
def cufa() -> None:
    """Exact attention kernels: what is here, what would run, and kernels compiled ahead."""


def main() -> None:
    """Run the command line; errors that are cufa's own end it with one sentence and status 1."""
    from ..errors import CompileError, CudaError, MissingKernelError, UnsupportedError

    try:
        cufa(prog_name="cufa")
    except (CompileError, CudaError, MissingKernelError, UnsupportedError, ValueError, TypeError, OSError) as error:
        click.echo(f"cufa: {str(error).removeprefix('cufa: ')}", err=True)
        raise SystemExit(1) from None
