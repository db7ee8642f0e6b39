"""``cufa bundle``: the commands by name, each imported when it is run."""

from __future__ import annotations

import click

from .main import Commands

BUNDLE_COMMANDS = {
    "build": "compile kernels into a bundle; no GPU is needed",
    "verify": "check every kernel, and say which GPUs a bundle serves and why not others",
    "list": "the kernels of a bundle, or the bundles that this machine finds",
    "install": "copy a bundle to where this user's programs find it",
    "uninstall": "remove an installed bundle",
    "extract": "write the cubins of a bundle into a directory",
    "merge": "make one bundle of several, or sign one",
    "diff": "what two bundles do not have in common",
    "wheel": "put a bundle into a wheel for pip",
}
"""The commands and what each does, in the order of the help. Each is the function of that name in a module of that
name behind ``bundle_`` here."""


class BundleCommands(Commands):
    """Those of ``cufa bundle``."""

    described = BUNDLE_COMMANDS
    prefix = "bundle_"


@click.command(cls=BundleCommands)
def bundle() -> None:
    """Files of compiled kernels, which travel to machines where none should be compiled.

    A bundle is used when CUFA_BUNDLE_PATH names it or its directory, or when it is installed, by this command or as a
    wheel. A kernel that is in none of them, or was made from other sources, is compiled as usual.
    """
