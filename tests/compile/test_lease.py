"""Many processes that want one kernel: one compiles it, and nobody waits for ever."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cufa._compile import cache as _cache
from cufa._compile import files as _files
from cufa._compile import lease as _lease
from cufa._compile.cache import CubinCache, Entry, digest

KEY = digest({"kernel": "a"})
ENTRY = Entry(b"cubin", {"kernel": "a"})
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> CubinCache:
    return CubinCache(tmp_path / "store")


@pytest.fixture
def lease(cache: CubinCache) -> Path:
    """Where the lease on the entry is, in a directory that is there."""
    file = cache.file(KEY)
    assert file is not None
    _files.make_directory(file.parent, 0o700)
    return file.with_name(f".lease-{KEY[2:]}")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lease, "SECONDS", 0.3)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def output_of(process: subprocess.Popen[str], timeout: float = 60) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
        process.wait()


def holder(**changed: object) -> bytes:
    """The lease of this process, which lives, or of another."""
    return json.dumps({**_lease._this_process(), "token": "t", **changed}).encode()


def elsewhere() -> bytes:
    return holder(place="another machine")


def took(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def claimed(cache: CubinCache, key: str = KEY) -> Entry | None:
    with cache.claim(key, "compiling a kernel") as found:
        return found


# Many at once

RANK = """
    import os, sys, time
    from cufa._compile.cache import CubinCache, Entry, digest
    store, log, go = sys.argv[1:]
    cache = CubinCache(store)
    print("ready", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
    for number in range(3):
        key = digest({"number": number})
        entry = cache.get(key)
        if entry is None:
            with cache.claim(key, "compiling a kernel") as entry:
                if entry is None:
                    with open(log, "a") as file:  # what it does for a compiler
                        file.write(f"{number}\\n")
                    time.sleep(0.3)
                    entry = Entry(b"%d" % number * 100_000, {})
                    cache.put(key, entry)
        assert entry == Entry(b"%d" % number * 100_000, {})
    assert not cache.stats().damaged
    print("fine")
"""


def test_64_processes_compile_a_kernel_about_once(tmp_path: Path) -> None:
    store, log, go = (tmp_path / name for name in ("store", "log", "go"))
    processes = [start(RANK, store, log, go) for _ in range(64)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    go.touch()
    outputs = [output_of(process) for process in processes]
    assert outputs == ["fine\n"] * 64
    compiled = log.read_text().split()
    assert {*compiled} == {"0", "1", "2"}
    assert len(compiled) <= 6, "more than twice the work of one process"
    names = [path.suffix or path.name for path in store.rglob("*") if path.is_file()]
    assert sorted(names) == [".cufa"] * 3


def test_processes_with_nvrtc_compile_a_kernel_once(tmp_path: Path) -> None:
    script = """
        import logging, sys
        from cufa._compile import jit as _jit
        from cufa._kernels import choose
        from cufa._operations.forward import FORWARD
        from cufa._call.problem import Static
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        facts = Static("f16", 64, 64, "none", (), False, False, 16, 16, True, False)
        entry = _jit.entry_of(_jit.unit_of(choose(FORWARD, facts, 80)))
        print("cubin", len(entry.cubin), _jit.cache().stats().waited)
    """
    environment = {"CUFA_CACHE_DIR": str(tmp_path / "store"), "CUFA_PROGRESS": "0"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        outputs = [output_of(process) for process in [start(script) for _ in range(3)]]
    said = "".join(outputs)
    assert len({*re.findall(r"^cubin (\d{4,}) ", said, re.MULTILINE)}) == 1, said
    assert len(re.findall("^cubin ", said, re.MULTILINE)) == 3, said
    # Those that come when the entry is there have waited for nothing.
    assert len(re.findall("^compiling ", said, re.MULTILINE)) == 1, said


def test_a_lease_costs_a_lone_process_nothing(cache: CubinCache) -> None:
    claimed(cache)
    assert min(took(lambda: claimed(cache)) for _ in range(20)) < 0.005


def test_who_waited_gets_the_entry(cache: CubinCache, lease: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cufa")
    lease.write_bytes(holder())

    def compile_elsewhere() -> None:
        time.sleep(0.1)
        CubinCache(cache.path).put(KEY, ENTRY)  # and the lease stays: the entry is enough

    thread = threading.Thread(target=compile_elsewhere)
    thread.start()
    assert claimed(cache) == ENTRY
    thread.join()
    assert cache.stats().waited == 1
    assert cache.get(KEY) == ENTRY
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for another process, which is compiling a kernel"
    ]
    assert lease.exists()


def test_what_was_made_before_the_lease_is_found(cache: CubinCache, lease: Path) -> None:
    assert cache.get(KEY) is None
    CubinCache(cache.path).put(KEY, ENTRY)
    assert claimed(cache) == ENTRY
    assert not lease.exists()


def test_the_lease_is_held_while_compiling_and_gone_afterwards(cache: CubinCache, lease: Path) -> None:
    for error in (None, KeyboardInterrupt, RuntimeError, SystemExit):
        try:
            with cache.claim(KEY, "compiling a kernel") as found:
                assert found is None
                assert {"pid": os.getpid(), **json.loads(lease.read_bytes())} == json.loads(lease.read_bytes())
                assert lease.stat().st_mode & 0o777 == 0o600
                if error is not None:
                    raise error
        except BaseException as raised:
            assert error is not None and type(raised) is error
        assert not lease.exists()


def test_a_lease_of_a_shared_directory_can_be_read_by_the_others(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o2775)
    with CubinCache(store, trust_shared=True).claim(KEY, "compiling a kernel"):
        (lease,) = store.rglob(".lease-*")
        assert lease.stat().st_mode & 0o777 == 0o644


# Holders that do not end as they should


def test_a_killed_holder_is_not_waited_for(cache: CubinCache, lease: Path) -> None:
    script = """
        import os, signal, sys
        from cufa._compile.cache import CubinCache
        with CubinCache(sys.argv[1]).claim(sys.argv[2], "compiling a kernel"):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    process = start(script, cache.path, KEY)
    output_of(process)
    assert process.returncode == -signal.SIGKILL and lease.exists()
    assert took(lambda: claimed(cache)) < 10
    assert not lease.exists()


def test_a_killed_holder_that_nobody_has_buried_is_dead(cache: CubinCache, lease: Path) -> None:
    process = start("import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline()
    lease.write_bytes(holder(pid=process.pid, started=_lease._started(process.pid)))
    assert not _lease._is_dead(lease.read_bytes())
    process.kill()
    deadline = time.monotonic() + 10
    while not _lease._is_dead(lease.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert took(lambda: claimed(cache)) < 10
    process.wait()
    process.stdout.close()


def test_a_holder_killed_before_it_wrote_is_not_waited_for(cache: CubinCache, lease: Path) -> None:
    lease.touch()
    assert took(lambda: claimed(cache)) < 10


def test_a_process_of_the_same_number_is_not_the_holder(cache: CubinCache, lease: Path) -> None:
    lease.write_bytes(holder(started=1))
    assert took(lambda: claimed(cache)) < 10


@pytest.mark.parametrize("of", [holder, elsewhere])
def test_a_lease_expires(of: Callable[[], bytes], cache: CubinCache, lease: Path, brief: None) -> None:
    lease.write_bytes(of())
    with cache.claim(KEY, "compiling a kernel") as found:
        assert found is None
        assert lease.read_bytes() != of()  # this one's
    assert not lease.exists()
    assert 0.2 < took(lambda: (lease.write_bytes(of()), claimed(cache))) < 10


@pytest.mark.parametrize("wrong", [-600, 0, 600])
def test_age_is_told_by_the_clock_that_stamps_leases(
    wrong: float, cache: CubinCache, lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of this machine may be minutes off that of the file server, which here is the real one."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + wrong)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + wrong) * 1e9))
    lease.write_bytes(elsewhere())
    os.utime(lease, (now - 60, now - 60))
    assert took(lambda: claimed(cache)) < 10  # left a minute ago
    lease.write_bytes(elsewhere())
    assert _lease._age(lease) < 10


def test_a_lease_from_the_future_expires(cache: CubinCache, lease: Path, brief: None) -> None:
    lease.write_bytes(elsewhere())
    os.utime(lease, (time.time() + 10**6,) * 2)
    assert took(lambda: claimed(cache)) < 10


def test_nobody_waits_for_ever_for_ever_new_leases(
    cache: CubinCache, lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lease, "WAIT_SECONDS", 0.8)
    stop = threading.Event()

    def renew() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            _files.publish(lease, holder(token=str(number)), 0o600)

    thread = threading.Thread(target=renew)
    lease.write_bytes(holder())
    thread.start()
    try:
        assert took(lambda: claimed(cache)) < 10
    finally:
        stop.set()
        thread.join()


def test_nobody_queues_up_behind_those_who_cannot_keep_what_they_make(cache: CubinCache, lease: Path) -> None:
    """As where the disk is full: 8 that want a kernel that takes 0.6 s are done in less than 8 · 0.6 s."""
    log: list[float] = []

    def compile_unkept() -> None:
        with CubinCache(cache.path).claim(KEY, "compiling a kernel") as found:
            assert found is None
            time.sleep(0.6)
            log.append(time.monotonic())

    threads = [threading.Thread(target=compile_unkept) for _ in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log) == 8 and max(log) - began < 4.0
    assert not lease.exists()


def test_a_forked_child_leaves_the_lease_of_its_parent(cache: CubinCache, lease: Path) -> None:
    content = _lease.own_content()
    held = _lease.take(lease, 0o600, content)
    assert held is not None and _lease.take(lease, 0o600, content) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the fork of a process with threads, which other tests have left
        child = os.fork()
    if not child:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert lease.exists()
    held.release()
    assert not lease.exists()


def test_a_holder_leaves_the_lease_of_who_took_its_own_for_expired(cache: CubinCache, lease: Path) -> None:
    with cache.claim(KEY, "compiling a kernel"):
        lease.write_bytes(elsewhere())
    assert lease.read_bytes() == elsewhere()


# Where there can be no lease


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [make_directory, make_fifo, make_link])
def test_what_is_no_lease_is_not_waited_for(make: Callable[[Path], None], cache: CubinCache, lease: Path) -> None:
    make(lease)
    assert took(lambda: claimed(cache)) < 10
    assert os.path.lexists(lease)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOTSUP], ids=errno.errorcode.get)
def test_where_leases_cannot_be_made_each_compiles(
    code: int, cache: CubinCache, lease: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_files.SYSTEM, "open_new", fail)
    assert claimed(cache) is None
    assert not caplog.records


def test_a_lease_that_cannot_be_written_goes(cache: CubinCache, lease: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", fail)
    assert claimed(cache) is None
    assert not lease.exists()


def test_without_a_directory_there_is_nothing_to_wait_for() -> None:
    assert claimed(CubinCache(None)) is None


def test_no_lease_in_a_directory_that_is_not_trusted(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o777)
    assert claimed(CubinCache(store)) is None
    assert not list(store.rglob("*"))


@given(content=st.binary(max_size=60) | st.builds(lambda value: json.dumps(value).encode(), st.none() | st.integers()))
def test_a_lease_that_makes_no_sense_is_that_of_a_stranger(content: bytes) -> None:
    assert not _lease._is_dead(content)


@pytest.mark.parametrize("changed", [{"pid": "1"}, {"pid": -1}, {"pid": 0}, {"pid": None}, {"place": ""}, {"place": 1}])
def test_a_holder_that_cannot_be_is_a_stranger(changed: dict[str, object]) -> None:
    assert not _lease._is_dead(holder(**changed))


def test_where_processes_cannot_be_told_apart_nobody_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lease, "_place", lambda: "")
    assert not _lease._is_dead(holder(pid=2**22 + 1))


# In the cache


@pytest.fixture
def old(lease: Path) -> Iterator[Path]:
    lease.write_bytes(elsewhere())
    os.utime(lease, (time.time() - _cache.STALE_SECONDS - 60,) * 2)
    yield lease


def test_leases_are_no_entries_and_are_swept(cache: CubinCache, old: Path) -> None:
    assert cache.stats().entries == 0 and cache.stats().size == len(elsewhere())
    assert cache.verify() == [] and list(cache.listed()) == []
    assert cache.prune() == 0
    assert not old.exists()
    old.write_bytes(elsewhere())
    assert cache.clear() == 0 and old.exists()  # its holder may be compiling
