"""``cufa cache``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from .._compile.cache import CubinCache

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def _size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """A number of bytes, as ``CUFA_CACHE_MAX_SIZE`` has it."""
    from .._compile.env import size_of

    size = None if value is None else size_of(value)
    if value is not None and size is None:
        raise click.BadParameter(f"{value!r} is not a number of bytes such as 1048576, 512M or 2G.")
    return size


@click.group()
def cache() -> None:
    """The compiled kernels on disk: where they are, what they take, and whether they are whole."""


@cache.command()
@_json_option
def path(as_json: bool) -> None:
    """Print the directory of compiled kernels, which need not exist yet."""
    store = _store()
    if as_json:
        click.echo(json.dumps({"path": str(store.path), "read_only": _text(store.read_only_path)}))
    else:
        click.echo(store.path)


@cache.command()
@_json_option
def stats(as_json: bool) -> None:
    """Say how many kernels there are, what they take, and whether more can be kept."""
    from .._compile.cache import human

    store = _anything()
    counts = store.stats()
    if as_json:
        on_disk = {name: getattr(counts, name) for name in ("entries", "size", "max_size")}
        click.echo(json.dumps({"path": _text(store.path), "state": store.state(), **on_disk}, indent=2))
        return
    click.echo(f"directory  {store.path or 'none'}")
    click.echo(f"state      {store.state()}")
    click.echo(f"entries    {counts.entries}")
    click.echo(f"size       {human(counts.size)} of {human(counts.max_size)}")


@cache.command("list")
@_json_option
def list_(as_json: bool) -> None:
    """List the kernels: key, size, architecture and what each is for."""
    from .._compile.cache import human

    store = _store()
    found = [
        {"key": key, "size": len(entry.cubin), **entry.meta}
        for key in sorted(store.listed())
        if (entry := store.peek(key)) is not None
    ]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found:
        what = each.get("what", "a kernel of another version")
        click.echo(f"{each['key'][:16]}  {human(each['size']):>9}  {what}")
    click.echo(f"{len(found)} {_kernels(len(found))}")


@cache.command()
@_json_option
@click.pass_context
def verify(context: click.Context, as_json: bool) -> None:
    """Read every kernel, and remove those that are damaged.

    Exits with 1 if there were any. They would have been compiled again in any case.
    """
    store = _store()
    entries = store.stats().entries
    damaged = [str(path) for path in store.verify()]
    if as_json:
        click.echo(json.dumps({"checked": entries, "damaged": damaged}, indent=2))
    else:
        for each in damaged:
            click.echo(f"removed {each}: damaged")
        click.echo(f"{entries} {_kernels(entries)} checked, {len(damaged)} damaged")
    context.exit(1 if damaged else 0)


@cache.command()
@click.option("--max-size", callback=_size, help="Most bytes to keep, such as 2G; CUFA_CACHE_MAX_SIZE if not given.")
@_json_option
def prune(max_size: int | None, as_json: bool) -> None:
    """Remove what killed processes have left, and the least recently used kernels beyond a size."""
    store = _store()
    _say_removed(store, store.prune(max_size), as_json)


@cache.command()
@_json_option
def clear(as_json: bool) -> None:
    """Remove all kernels. They are compiled again when they are needed."""
    store = _store()
    _say_removed(store, store.clear(), as_json)


@cache.command()
@click.argument("key")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def extract(key: str, out: Path) -> None:
    """Write the cubin of a kernel to a file, for cuobjdump and nvdisasm.

    KEY is what `cufa cache list` prints, or as much of it as is unique. An OUT that is there is replaced.
    """
    from .._compile import files as _files

    store = _store()
    if not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.absolute().parent} is no directory; make it first.")
    wanted = key.lower()
    keys = [each for each in store.listed() if each.startswith(wanted)]
    if len(keys) != 1:
        what = f"{len(keys)} kernels have keys that begin" if keys else "no kernel has a key that begins"
        raise click.ClickException(f"{what} with {key!r}; cufa cache list prints them all.")
    entry = store.peek(keys[0])
    if entry is None:
        raise click.ClickException(f"the kernel of {keys[0]} is damaged, or of another version of cufa.")
    _files.publish(out.absolute(), entry.cubin, 0o644)
    click.echo(f"{out}: {entry.meta.get('what', keys[0])}")


def _anything() -> CubinCache:
    from .._compile.cache import CubinCache

    return CubinCache.from_env()


def _store() -> CubinCache:
    """The cache, if it has a directory that is used."""
    store = _anything()
    if (reason := store.unused()) is not None:
        raise click.ClickException(f"there is no cache on disk: {reason}")
    return store


def _say_removed(store: CubinCache, removed: int, as_json: bool) -> None:
    from .._compile.cache import human

    left = store.stats()
    if as_json:
        click.echo(json.dumps({"removed": removed, "entries": left.entries, "size": left.size}, indent=2))
    else:
        left_are = f"{left.entries} {_kernels(left.entries)}, {human(left.size)}"
        click.echo(f"removed {removed} {_kernels(removed)}; left: {left_are}")


def _kernels(count: int) -> str:
    return "kernel" if count == 1 else "kernels"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
