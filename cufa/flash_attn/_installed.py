"""`install`: programs that import flash_attn find cufa's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import ArgumentError

VERSION = "2.8.3"
"""The version whose signatures and meanings these are, in the form that programs parse."""


class Package(NamedTuple):
    """A top-level module that programs import.

    Attributes
    ----------
    home : str
        The module of cufa that it is.
    distribution : str
        Which metadata names it.
    version : str
    """

    home: str
    distribution: str
    version: str


PACKAGES = {
    "flash_attn": Package("cufa.flash_attn", "flash-attn", VERSION),
    "flash_attn_interface": Package("cufa.flash_attn.flash_attn_3", "flash-attn-3", "3.0.0"),
}


class Alias(Loader):
    """Fills a module with what is in another."""

    def __init__(self, home: str) -> None:
        self.home = home

    def exec_module(self, module: ModuleType) -> None:
        found = importlib.import_module(self.home)
        own = {"__name__", "__spec__", "__loader__", "__package__", "__path__"}
        vars(module).update({name: value for name, value in vars(found).items() if name not in own})


class Metadata(importlib.metadata.Distribution):
    """What a distribution's files would say."""

    def __init__(self, module: str, package: Package) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {package.version}\n"
            "Summary: Computed by cufa\n",
            "top_level.txt": f"{module}\n",
            "INSTALLER": "cufa\n",
        }

    def read_text(self, filename: Any) -> str | None:
        return self._texts.get(str(filename))

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class Finder:
    """Finds packages and their submodules, and their metadata, before anything else does."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        if top not in self.modules or any(part.startswith("_") for part in rest.split(".")):
            return None
        home = ".".join(filter(None, (PACKAGES[top].home, rest)))
        try:
            found = importlib.util.find_spec(home)
        except ModuleNotFoundError:  # of a package that there is not either
            return None
        if found is None:
            return None
        spec = ModuleSpec(
            fullname, Alias(home), origin=found.origin, is_package=found.submodule_search_locations is not None
        )
        spec.has_location = found.has_location
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[Metadata]:
        context = importlib.metadata.DistributionFinder.Context() if context is None else context
        for module in self.modules:
            package = PACKAGES[module]
            if context.name is None or _normal(context.name) == _normal(package.distribution):
                yield Metadata(module, package)

    def invalidate_caches(self) -> None:
        """There are none."""


def _normal(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


class Installation:
    """What `install` has put in place; as a context manager, it is removed at its end."""

    def __init__(self, finder: Finder | None, hidden: dict[str, ModuleType]) -> None:
        self._finder = finder
        self._hidden = hidden

    def remove(self) -> None:
        """Forget cufa's modules, and bring back those that they hid. What was imported from them stays as it is."""
        finder, self._finder = self._finder, None
        if finder is not None:
            sys.meta_path.remove(finder)
            _take(finder.modules)
            sys.modules.update(self._hidden)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _take(packages: Sequence[str]) -> dict[str, ModuleType]:
    """Take packages and their submodules out of `sys.modules`."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def install(*, replace: bool = False, flash_attn_3: bool = False) -> Installation:
    """Let programs that import flash_attn find `cufa.flash_attn`, until what is returned is removed.

    Call it before what looks for flash_attn is imported: transformers, for one, remembers what it has found.

    Parameters
    ----------
    replace : bool
        Hide a flash_attn that is installed or imported; else it is left, and an error.
    flash_attn_3 : bool
        Provide the module ``flash_attn_interface`` of FlashAttention-3 as well: programs that find both mostly take it,
        and it has neither dropout nor ALiBi.

    Returns
    -------
    Installation
        Whose ``remove()`` undoes it; also a context manager.

    Raises
    ------
    ValueError
        If there is a flash_attn, or another flash_attn_interface, and `replace` is False.

    Notes
    -----
    ``importlib.util.find_spec``, ``importlib.metadata.version`` and ``packages_distributions`` know the packages too,
    as flash-attn and flash-attn-3. Submodules that cufa does not have raise ModuleNotFoundError.

    Examples
    --------
    >>> import cufa.flash_attn
    >>> with cufa.flash_attn.install():
    ...     from flash_attn import flash_attn_func
    >>> flash_attn_func is cufa.flash_attn.flash_attn_func
    True
    """
    wanted = ("flash_attn", "flash_attn_interface") if flash_attn_3 else ("flash_attn",)
    ours = {name for finder in sys.meta_path if isinstance(finder, Finder) for name in finder.modules}
    modules = [name for name in wanted if name not in ours]
    if not modules:
        return Installation(None, {})
    for name in modules:
        found = sys.modules.get(name) or importlib.util.find_spec(name)
        if found is not None and not replace:
            origin = getattr(found, "__file__", None) or getattr(found, "origin", None)
            raise ArgumentError(
                f"cufa.flash_attn.install: there is a {name} already, {origin}; pass replace=True to hide it."
            )
    hidden = _take(modules)
    finder = Finder(modules)
    sys.meta_path.insert(0, finder)
    return Installation(finder, hidden)
