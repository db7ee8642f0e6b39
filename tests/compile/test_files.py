"""The rules of Windows, as far as they can be tried elsewhere, and links that change under a reader's hands."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cufa._compile import cache as _cache
from cufa._compile import env as _env
from cufa._compile import files as _files
from cufa._compile.cache import CubinCache, Entry, digest

ROOT = Path(__file__).parents[2]
ENTRY, EVIL = Entry(b"cubin", {"kernel": "a"}), Entry(b"evil!", {"kernel": "a"})
KEY = digest({"kernel": "a"})
SOMEONE = 54321


# Windows


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rules, and its directories, whose modes say that anybody can write them."""
    monkeypatch.setattr(_files, "SYSTEM", _files.Windows())
    monkeypatch.setattr(_files, "BUSY_SECONDS", (0.01, 0.02))
    for name in ("geteuid", "getuid", "fchmod", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_DIRECTORY"):
        monkeypatch.delattr(os, name)
    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(os, name, as_windows_does(getattr(os, name)))


def as_windows_does(real: Callable[..., os.stat_result]) -> Callable[..., Any]:
    def fake(*arguments: Any, **named: Any) -> Any:
        status = real(*arguments, **named)
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        attributes = stat.FILE_ATTRIBUTE_REPARSE_POINT if str(arguments[0]).endswith("junction") else 0
        mode = stat.S_IFMT(status.st_mode) | 0o777
        return SimpleNamespace(**fields | {"st_uid": 0, "st_mode": mode, "st_file_attributes": attributes})

    return fake


@pytest.fixture
def cache(tmp_path: Path) -> CubinCache:
    return CubinCache(tmp_path / "store")


def file_of(cache: CubinCache) -> Path:
    file = cache.file(KEY)
    assert file is not None
    return file


def test_a_cache_works_by_the_rules_of_windows(windows: None, cache: CubinCache) -> None:
    assert cache.put(KEY, ENTRY) and cache.put(KEY, ENTRY)
    assert CubinCache(cache.path).get(KEY) == ENTRY
    assert cache.state().startswith("ok, 1 entry")
    with cache.claim(KEY, "compiling a kernel") as found:
        assert found == ENTRY
    with cache.claim(digest({}), "compiling a kernel") as found:
        assert found is None
        assert list(cache.path.rglob(".lease-*"))  # type: ignore[union-attr]
    assert not list(cache.path.rglob(".*"))  # type: ignore[union-attr]
    assert (cache.verify(), cache.stats().entries, cache.prune(0)) == ([], 1, 1)


def test_damage_is_found_by_the_rules_of_windows(windows: None, cache: CubinCache) -> None:
    cache.put(KEY, ENTRY)
    file = file_of(cache)
    whole = file.read_bytes()
    for data in (b"", whole[:-1], whole[:20] + b"\r\n" + whole[21:]):
        file.write_bytes(data)
        assert CubinCache(cache.path).get(KEY) is None
        assert not file.exists()


def test_a_cache_is_below_the_profile_on_windows(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUFA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert _env.cache_dir() is None
    monkeypatch.setenv("LOCALAPPDATA", "relative")
    assert _env.cache_dir() is None
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "AppData" / "Local"))
    assert _env.cache_dir() == tmp_path / "AppData" / "Local" / "cufa" / "cache"
    assert CubinCache.from_env().put(KEY, ENTRY)


@pytest.mark.parametrize("place", ["root", "shard"])
def test_a_junction_is_refused(
    place: str, windows: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CubinCache(tmp_path / ("junction" if place == "root" else "store"))
    if place == "shard":
        monkeypatch.setattr(_cache, "_relative", lambda key, suffix=".cufa": f"junction/{key}{suffix}")
    assert not cache.put(KEY, ENTRY)
    assert [record.message for record in caplog.records] == [
        f"cache of compiled kernels not used: {cache.path if place == 'root' else cache.path / 'junction'} "  # type: ignore[operator]
        "is a symbolic link; name the directory itself"
    ]
    assert cache.get(KEY) == ENTRY
    assert CubinCache(cache.path).get(KEY) is None


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_file_that_is_being_read_cannot_be_replaced(
    failures: int, windows: None, cache: CubinCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which ends soon, or else the kernel stays in memory."""
    left = [PermissionError(13, "used by another process")] * failures
    replace = os.replace

    def busy(source: str, target: Path) -> None:
        if left:
            raise left.pop()
        replace(source, target)

    cache.put(KEY, EVIL)
    monkeypatch.setattr(os, "replace", busy)
    began = time.monotonic()
    assert cache.put(KEY, ENTRY) == (failures < 3)
    assert time.monotonic() - began < 1
    assert cache.get(KEY) == ENTRY
    assert CubinCache(cache.path).get(KEY) == (ENTRY if failures < 3 else EVIL)
    assert len(caplog.records) == (failures == 3)
    assert not list(cache.path.rglob(".tmp-*"))  # type: ignore[union-attr]


def test_a_file_that_is_being_read_cannot_be_removed(
    windows: None, cache: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise PermissionError(13, "used by another process")

    cache.put(KEY, ENTRY)
    with monkeypatch.context() as inner:
        inner.setattr(os, "unlink", busy)
        assert cache.clear() == 0
        with cache.claim(digest({}), "compiling a kernel") as found:
            assert found is None
    assert cache.clear() == 1


def test_a_file_exchanged_while_it_is_opened_is_not_read(
    windows: None, cache: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, ENTRY)
    file = file_of(cache)
    other = file.with_name("other")
    shutil.copy(file, other)
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened(other if path == file else path, *rest))
    assert CubinCache(cache.path).get(KEY) is None
    monkeypatch.setattr(os, "open", opened)
    file.unlink()
    file.symlink_to(other)
    monkeypatch.setattr(stat, "S_ISLNK", lambda mode: True)  # which the modes above do not say
    assert CubinCache(cache.path).get(KEY) is None


def test_sources_are_kept_by_the_rules_of_windows(windows: None, tmp_path: Path) -> None:
    for text in (b"first", b"second"):
        _files.save(tmp_path / "kept" / "unit", {"kernel.cu": text, "core/math.cuh": text})
        assert (tmp_path / "kept" / "unit" / "kernel.cu").read_bytes() == text
        assert (tmp_path / "kept" / "unit" / "core" / "math.cuh").read_bytes() == text
    with pytest.raises(OSError, match="is a link"):
        _files.save(tmp_path / "kept" / "unit", {"junction/math.cuh": b""})


def test_everything_imports_where_there_is_no_posix() -> None:
    """What Windows lacks in `os` is taken away before cufa is imported; what is not cufa's is imported before."""
    script = """
        import os, sys, tempfile
        import click, concurrent.futures.process, ctypes, json, logging, multiprocessing, numpy, pathlib, shutil
        import importlib.metadata, scipy.special, subprocess, zipfile
        import cuda.bindings.driver, cuda.pathfinder
        for name in ("geteuid", "getuid", "fchmod", "register_at_fork", "fork", "uname", "mkfifo",
                     "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY"):
            delattr(os, name)
        os.name = "nt"
        from cufa._compile import files
        os.name = "posix"  # pathlib asks for it at every path
        assert type(files.SYSTEM) is files.Windows
        sys.platform = "win32"
        import cufa
        from cufa._compile import cache, jit, lease, nvrtc
        assert nvrtc._search() is None
        os.environ["LOCALAPPDATA"] = tempfile.mkdtemp()
        q = numpy.ones((1, 4, 1, 8), numpy.float32)
        assert (cufa.attention(q, q, q) == 1).all()
        store = jit.cache()
        key = cache.digest({})
        with store.claim(key, "compiling a kernel") as found:
            assert found is None and store.put(key, cache.Entry(b"cubin", {}))
        assert cache.CubinCache(store.path).get(key).cubin == b"cubin"
        cufa.show_config("dicts")
        import importlib, pkgutil
        for module in pkgutil.walk_packages(cufa.__path__, "cufa."):
            if not any(part in module.name for part in ("torch", "jax", "interop", "testing", "__main__")):
                try:
                    importlib.import_module(module.name)
                except ModuleNotFoundError as error:
                    assert error.name in ("torch", "transformers", "numba", "triton"), error
        print(store.path == pathlib.Path(os.environ["LOCALAPPDATA"], "cufa", "cache"))
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUFA_")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout == "True\n", run.stderr


# What changes between a look and the next


def pretend_owner(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """Let all that is below `top` belong to somebody else."""
    inodes = {os.lstat(path).st_ino for path in (top, *top.rglob("*"))}

    def wrap(real: Callable[..., os.stat_result]) -> Callable[..., Any]:
        def fake(*arguments: Any, **named: Any) -> Any:
            status = real(*arguments, **named)
            if status.st_ino not in inodes:
                return status
            fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
            return SimpleNamespace(**fields | {"st_uid": SOMEONE})

        return fake

    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("swapped", ["entry", "shard", "root"])
@pytest.mark.parametrize("by", ["link", "directory of another user"])
def test_what_is_exchanged_in_a_loop_is_never_used(
    swapped: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody puts another user's entry in the place of this user's, again and again, while it is read and written."""
    CubinCache(tmp_path / "good").put(KEY, ENTRY)
    CubinCache(tmp_path / "evil").put(KEY, EVIL)
    shard, name = KEY[:2], f"{KEY[2:]}.cufa"
    below = {"entry": f"{shard}/{name}", "shard": shard, "root": ""}[swapped]
    good, evil, place = (tmp_path / each / below for each in ("good", "evil", "store"))
    place.parent.mkdir(parents=True, exist_ok=True)
    pretend_owner(monkeypatch, tmp_path / "evil")
    link = tmp_path / "link"
    link.symlink_to(evil)
    bad = link if by == "link" else evil
    os.rename(good, place)
    stop, pauses = threading.Event(), random.Random(0)

    def swap() -> None:
        while not stop.is_set():
            os.rename(place, good)
            os.rename(bad, place)
            os.rename(place, bad)
            os.rename(good, place)
            time.sleep(pauses.random() * 1e-3)

    thread = threading.Thread(target=swap)
    thread.start()
    found = {ENTRY.cubin: 0, None: 0}
    try:
        start = time.monotonic()
        while (waited := time.monotonic() - start) < 0.6 or (not found[ENTRY.cubin] and waited < 60):
            entry = CubinCache(tmp_path / "store").get(KEY)
            found[None if entry is None else entry.cubin] += 1  # a KeyError is the evil one
    finally:
        stop.set()
        thread.join()
    assert found[ENTRY.cubin] > 0
    assert CubinCache(tmp_path / "store").get(KEY) == ENTRY


def test_a_cache_that_is_removed_or_replaced_in_use(cache: CubinCache) -> None:
    root = cache.path
    assert root is not None
    other = digest({"kernel": "b"})
    assert cache.put(KEY, ENTRY)
    shutil.rmtree(root)
    assert cache.get(KEY) == ENTRY  # in memory
    assert CubinCache(root).get(KEY) is None
    assert cache.put(other, ENTRY)
    assert CubinCache(root).get(other) == ENTRY
    shutil.rmtree(root)
    root.write_bytes(b"not a directory")
    assert not cache.put(other, ENTRY)
    assert cache.get(other) == ENTRY
    root.unlink()
    CubinCache(root).put(KEY, EVIL)
    assert cache.put(other, ENTRY) and CubinCache(root).get(KEY) == EVIL
    assert cache.stats().entries == 2


def test_a_cache_that_is_removed_in_a_loop_is_written_all_the_same(cache: CubinCache) -> None:
    root = cache.path
    assert root is not None
    stop = threading.Event()

    def remove() -> None:
        while not stop.wait(0.001):
            shutil.rmtree(root, ignore_errors=True)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        deadline = time.monotonic() + 0.5
        kept = 0
        while time.monotonic() < deadline:
            with cache.claim(digest({"time": str(time.monotonic())}), "compiling a kernel") as found:
                assert found is None
            kept += cache.put(KEY, ENTRY)
            entry = CubinCache(root).get(KEY)
            assert entry is None or entry == ENTRY
            assert cache.get(KEY) == ENTRY
    finally:
        stop.set()
        thread.join()
    assert kept > 0
    assert cache.put(KEY, ENTRY) and CubinCache(root).get(KEY) == ENTRY


def test_writers_killed_at_any_moment_leave_whole_entries(tmp_path: Path) -> None:
    script = """
        import sys
        from cufa._compile.cache import CubinCache, Entry, digest
        cache, number = CubinCache(sys.argv[1], max_size=1 << 20), 0
        print("ready", flush=True)
        while True:
            number += 1
            key = digest({"number": number % 7})
            with cache.claim(key, "compiling a kernel"):
                cache.put(key, Entry(b"%d" % (number % 7) * 100_000, {}))
    """
    root = tmp_path / "store"
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(root)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.005 + 0.0031 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        cache = CubinCache(root)
        for number in range(7):
            entry = cache.get(digest({"number": number}))
            assert entry is None or entry.cubin == b"%d" % number * 100_000
            with cache.claim(digest({"number": number}), "compiling a kernel") as found:  # without waiting
                assert found == entry
        assert cache.verify() == [] and cache.stats().damaged == 0
    hour = time.time() - _cache.STALE_SECONDS - 60
    for path in root.rglob(".*"):
        os.utime(path, (hour, hour))
    CubinCache(root).prune()
    assert not list(root.rglob(".*"))
