"""The store of compiled kernels: integrity, permissions, concurrency, size, and a disk that fails.

Nothing here relies on the operating system refusing something to the user who runs the tests, who may be
root: owners and failures are put in front of the functions of `os` instead.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cufa._compile import cache as _cache
from cufa._compile import env as _env
from cufa._compile import files as _files
from cufa._compile.cache import CubinCache, Entry, digest

ENTRY = Entry(b"\x7fELF" + bytes(range(40)), {"kernel": "attention_forward_sm90", "smem_bytes": 1024})
OTHER = Entry(b"\x7fELF other", {"kernel": "other"})
KEY = digest({"kernel": "a"})
SOMEONE = 54321


def key(number: int) -> str:
    return digest({"number": number})


def file_size(entry: Entry = ENTRY) -> int:
    """Bytes of an entry, from the layout and not from the code that writes it."""
    record = json.dumps({"key": KEY, "meta": entry.meta})
    return 8 + 4 + 8 + len(record) + len(entry.cubin) + 32


def forge(record: bytes, cubin: bytes = b"", *, meta_size: int | None = None, schema: int = 1) -> bytes:
    """A file whose checksum is right, whatever else is wrong with it."""
    size = len(record) if meta_size is None else meta_size
    body = b"CUFA\r\n\x1a\n" + struct.pack("<IQ", schema, size) + record + cubin
    return body + hashlib.sha256(body).digest()


def listing(root: Path) -> dict[str, object]:
    """Everything below `root`: the content of files, the target of links, the mode of directories."""
    found: dict[str, object] = {}
    for path in sorted([root, *root.rglob("*")] if os.path.lexists(root) else []):
        status = os.lstat(path)
        name = str(path.relative_to(root))
        if stat.S_ISLNK(status.st_mode):
            found[name] = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            found[name] = (path.read_bytes(), stat.S_IMODE(status.st_mode))
        else:
            found[name] = status.st_mode
    return found


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(".tmp-*"))


def pretend_owner(monkeypatch: pytest.MonkeyPatch, path: Path, user: int) -> None:
    """Let `path`, which must exist, belong to `user`, as far as the functions of `os` tell."""
    inode = os.lstat(path).st_ino

    def wrap(real: Callable[..., os.stat_result]) -> Callable[..., Any]:
        def fake(*args: Any, **named: Any) -> Any:
            status = real(*args, **named)
            if status.st_ino != inode:
                return status
            fields = {field: getattr(status, field) for field in dir(status) if field.startswith("st_")}
            return SimpleNamespace(**fields | {"st_uid": user})

        return fake

    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: object, **named: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def set_used(path: Path, seconds_ago: float) -> None:
    """Let an entry have been written or read that long ago."""
    os.utime(path, (time.time() - seconds_ago,) * 2)


def run_script(script: str, *arguments: object, timeout: float = 30) -> tuple[subprocess.Popen[str], Callable[[], str]]:
    """Start a script in a new interpreter; the second value waits for it and returns what it wrote."""
    root = str(Path(_cache.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )

    def finish() -> str:
        try:
            return process.communicate(timeout=timeout)[0]
        finally:
            process.kill()
            process.wait()

    return process, finish


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def cache(root: Path) -> CubinCache:
    return CubinCache(root)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged as a warning or worse."""
    return lambda: [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def umask() -> Iterator[Callable[[int], int]]:
    """Sets the umask, which is 022 in every test: directories made under 002 would be refused."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# The key of a kernel

VALUES = st.binary(max_size=3) | st.text("ab1", max_size=3) | st.integers(-2, 2) | st.booleans()
FIELDS = st.dictionaries(
    st.text("ab", max_size=2), VALUES | st.lists(st.text("ab1", max_size=2), max_size=3), max_size=3
)


def canonical(fields: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return sorted((label, type(value).__name__, value) for label, value in fields.items())


@given(first=FIELDS, second=FIELDS)
def test_digests_are_equal_if_and_only_if_the_fields_are(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert (digest(first) == digest(second)) == (canonical(first) == canonical(second))


@given(fields=FIELDS, data=st.data())
def test_the_order_of_labels_does_not_count(fields: dict[str, Any], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(fields.items()))))
    assert digest(shuffled) == digest(fields)
    assert re.fullmatch("[0-9a-f]{64}", digest(fields))


def test_digest_tells_apart_what_looks_alike() -> None:
    alike: list[dict[str, Any]] = [
        {},
        {"": ""},
        *({"a": value} for value in (1, -1, 11, "1", b"1", True, ["1"], ["1", "1"], "11", b"11", ["11"])),
        *({"a": value} for value in (0, False, "0", "", b"", [], [""], ["", ""])),
        *({"a": value} for value in ("str", b"str", "int", "sequence 0", ["ab", "c"], ["a", "bc"], ["bc", "a"])),
        {"b": 1},
        {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        {"ab": "c"},
        {"a": "bc"},
        {"a": "b", "c": "d"},
        {"a": ["b", "c", "d"]},
        {"a": "é"},
        {"a": "e\u0301"},
    ]
    assert len({digest(fields) for fields in alike}) == len(alike)


def test_digest_is_the_same_on_every_machine() -> None:
    def part(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    fields = {"source": b"\0\xff", "arch": "sm_90a", "build": 86, "options": ["-O3", "é"], "lineinfo": False}
    parts = [b"cufa 1", b"arch", b"str", b"sm_90a", b"build", b"int", b"86", b"lineinfo", b"bool", b"0"]
    parts += [b"options", b"sequence 2", b"-O3", "é".encode(), b"source", b"bytes", b"\0\xff"]
    assert digest(fields) == hashlib.sha256(b"".join(map(part, parts))).hexdigest()
    assert digest(fields) == "76a6de8c88c373f81b4cddf996b5f54ec5f4051567e854d0ad072cb28ee6d7ed"


def test_a_list_equals_a_tuple() -> None:
    assert digest({"a": ["x", "y"]}) == digest({"a": ("x", "y")})


@pytest.mark.parametrize(("value", "name"), [({"x"}, "set"), (None, "NoneType"), (1.0, "float"), ({"x": 1}, "dict")])
def test_digest_refuses_other_types(value: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^cache: cannot digest a, a {name}$"):
        digest({"a": value})


def test_another_schema_changes_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "SCHEMA", 2)
    assert digest({"kernel": "a"}) != KEY


# Round trip and layout

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(cubin=st.binary(max_size=300), meta=st.dictionaries(st.text(), JSON, max_size=3))
def test_round_trip(cubin: bytes, meta: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        cache = CubinCache(root)
        assert cache.put(KEY, Entry(cubin, meta))
        assert cache.get(KEY) == CubinCache(root).get(KEY) == Entry(cubin, meta)


def test_memory_holds_what_the_file_holds(cache: CubinCache, root: Path) -> None:
    meta: dict[Any, Any] = {"shape": (1, 2), 3: None}
    assert cache.put(KEY, Entry(bytearray(b"cubin"), meta))  # type: ignore[arg-type]
    meta["shape"] = "changed later"
    expected = Entry(b"cubin", {"shape": [1, 2], "3": None})
    assert cache.get(KEY) == CubinCache(root).get(KEY) == expected
    assert type(cache.get(KEY).cubin) is bytes  # type: ignore[union-attr]


def test_layout_of_the_file(cache: CubinCache, root: Path) -> None:
    assert cache.file(KEY) == root / KEY[:2] / f"{KEY[2:]}.cufa"
    cache.put(KEY, ENTRY)
    record = json.dumps({"key": KEY, "meta": ENTRY.meta}).encode()
    assert listing(root)[f"{KEY[:2]}/{KEY[2:]}.cufa"] == (forge(record, ENTRY.cubin), 0o600)
    assert len(forge(record, ENTRY.cubin)) == file_size()


def test_an_entry_is_replaced(cache: CubinCache, root: Path) -> None:
    assert cache.put(KEY, ENTRY)
    assert cache.put(KEY, OTHER)
    assert cache.get(KEY) == CubinCache(root).get(KEY) == OTHER
    assert cache.stats().entries == 1


def test_the_directory_may_be_moved(cache: CubinCache, root: Path, tmp_path: Path) -> None:
    cache.put(KEY, ENTRY)
    shutil.move(root, tmp_path / "elsewhere")
    assert CubinCache(root).get(KEY) is None
    assert CubinCache(tmp_path / "elsewhere").get(KEY) == ENTRY


@pytest.mark.parametrize("bad", ["", "ab", KEY[:-1], KEY + "0", KEY.upper(), "../" + KEY[3:], KEY[:-1] + "\n"])
def test_only_a_digest_is_a_key(bad: str, cache: CubinCache, root: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: cache.get(bad),
        lambda: cache.put(bad, ENTRY),
        lambda: cache.file(bad),
        lambda: cache.discard(bad),
        lambda: CubinCache(None).get(bad),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=f"^cache: expected a key of 64 hexadecimal digits, got {re.escape(repr(bad))}$"
        ):
            call()
    assert not root.exists()


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        ({"a": float("nan")}, ValueError, "Out of range float"),
        ({"a": {1, 2}}, TypeError, "not JSON serializable"),
        ({"a": b"bytes"}, TypeError, "not JSON serializable"),
        ([1], TypeError, "^cache: expected a dict as meta, got list$"),
        (None, TypeError, "^cache: expected a dict as meta, got NoneType$"),
    ],
)
def test_meta_must_be_a_json_object(
    meta: Any, error: type[Exception], message: str, cache: CubinCache, root: Path
) -> None:
    with pytest.raises(error, match=message):
        cache.put(KEY, Entry(b"", meta))
    assert cache.get(KEY) is None
    assert not root.exists()


def test_reading_creates_nothing(cache: CubinCache, tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    assert cache.get(KEY) is None
    assert cache.discard(KEY) is None
    assert (cache.clear(), cache.prune(), cache.verify()) == (0, 0, [])
    assert cache.state() == "ok, 0 entries, 0 B"
    assert cache.stats() == _cache.Stats(0, 0, 512 << 20, 0, 0, 1, 0, 0, 0)
    assert cache.path == tmp_path / "store"
    assert not list(tmp_path.iterdir())
    assert not warnings()


# Permissions of what is created


@pytest.mark.parametrize(
    ("mask", "named", "parent"),
    [
        *((mask, False, 0o700) for mask in (0o000, 0o022, 0o077, 0o277)),
        (0o000, True, 0o777),
        (0o022, True, 0o755),
        (0o277, True, 0o700),
    ],
)
def test_only_the_mode_of_a_named_parent_depends_on_the_umask(
    mask: int, named: bool, parent: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    cache = CubinCache(tmp_path / "new" / "store", named=named)
    assert cache.put(KEY, ENTRY)
    umask(0o022)
    file = cache.file(KEY)
    assert file is not None
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, *list(file.parents)[:3])]
    assert modes == [0o600, 0o700, 0o700, parent]


@pytest.mark.parametrize("below", ["", ".cache"])
def test_root_makes_nothing_in_the_home_of_another_user(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    for name in ("CUFA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / below).mkdir(parents=True)
    before = listing(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    pretend_owner(monkeypatch, home / below, SOMEONE)
    cache = CubinCache.from_env()
    reason = f"{home / below} belongs to user {SOMEONE}, who could not use what root makes there; set CUFA_CACHE_DIR"
    assert not cache.put(KEY, ENTRY) and not cache.put(key(1), ENTRY)
    assert cache.get(KEY) == ENTRY  # in memory
    assert warnings() == [f"compiled kernels stay in memory: {reason}"]
    assert cache.state() == f"memory only: {reason}"
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    cache = CubinCache.from_env()
    assert not cache.put(KEY, ENTRY)
    assert cache.state() == f"memory only: {tmp_path / 'missing'} does not exist; set CUFA_CACHE_DIR"
    assert listing(tmp_path) == before
    monkeypatch.setenv("CUFA_CACHE_DIR", str(home / below / "asked"))
    monkeypatch.setattr(os, "geteuid", os.getuid)
    assert CubinCache.from_env().put(KEY, ENTRY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_root_leaves_the_home_of_another_user_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUFA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    os.chown(tmp_path, SOMEONE, SOMEONE)
    assert not CubinCache.from_env().put(KEY, ENTRY)
    assert not list(tmp_path.iterdir())
    os.chown(tmp_path, 0, 0)
    assert CubinCache.from_env().put(KEY, ENTRY)


def test_a_directory_is_private_from_its_first_moment(
    cache: CubinCache, root: Path, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    umask(0)
    monkeypatch.setattr(os, "chmod", lambda path, mode: None)
    assert cache.put(KEY, ENTRY)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (root, root / KEY[:2])] == [0o700, 0o700]


def test_an_existing_directory_keeps_its_mode(cache: CubinCache, root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    assert cache.put(KEY, ENTRY)
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert stat.S_IMODE((root / KEY[:2]).stat().st_mode) == 0o700
    assert stat.S_IMODE((root / KEY[:2] / f"{KEY[2:]}.cufa").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("mode", "file_mode"), [(0o700, 0o600), (0o750, 0o640), (0o2770, 0o640), (0o755, 0o644), (0o1777, 0o644)]
)
def test_a_trusted_shared_directory_passes_its_mode_on(mode: int, file_mode: int, root: Path) -> None:
    root.mkdir()
    root.chmod(mode)
    assert CubinCache(root, trust_shared=True).put(KEY, ENTRY)
    assert stat.S_IMODE((root / KEY[:2]).stat().st_mode) == mode
    assert stat.S_IMODE((root / KEY[:2] / f"{KEY[2:]}.cufa").stat().st_mode) == file_mode
    assert CubinCache(root, trust_shared=True).get(KEY) == ENTRY


def test_a_new_directory_is_private_even_if_shared_ones_are_trusted(root: Path) -> None:
    assert CubinCache(root, trust_shared=True).put(KEY, ENTRY)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


# Damage


def test_every_flipped_bit_and_every_truncation_is_a_miss(cache: CubinCache, root: Path) -> None:
    cache.put(KEY, ENTRY)
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    whole = file.read_bytes()
    damaged = [whole[:size] for size in range(len(whole))]
    damaged += [
        whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :]
        for index in range(len(whole))
        for bit in range(8)
    ]
    for data in damaged:
        file.write_bytes(data)
        file.chmod(0o600)
        fresh = CubinCache(root)
        assert fresh.get(KEY) is None, data
        # A file of another schema belongs to another version and is left alone; all else is damage and goes.
        other_schema = len(data) == len(whole) and data[8:12] != whole[8:12]
        assert file.exists() == other_schema, data
        assert fresh.stats().damaged == (not other_schema), data
    file.write_bytes(whole)
    assert CubinCache(root).get(KEY) == ENTRY


SPLICES = st.tuples(st.integers(0, 300), st.integers(0, 300), st.binary(max_size=50))


@given(splices=st.lists(SPLICES, min_size=1, max_size=3))
def test_anything_written_over_an_entry_is_a_miss_and_is_replaced(
    splices: list[tuple[int, int, bytes]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        CubinCache(name).put(KEY, ENTRY)
        file = Path(name, KEY[:2], f"{KEY[2:]}.cufa")
        whole = data = file.read_bytes()
        for start, end, new in splices:
            data = data[:start] + new + data[max(start, end) :]
        file.write_bytes(data)
        fresh = CubinCache(name)
        assert fresh.get(KEY) == (ENTRY if data == whole else None)
        assert fresh.put(KEY, OTHER)
        assert file.read_bytes() != data
        assert CubinCache(name).get(KEY) == OTHER


RECORD = json.dumps({"key": KEY, "meta": {}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 4096,
        b"CUFA\r\n\x1a\n",
        forge(RECORD)[:-1],
        forge(RECORD) + b"\0",
        forge(json.dumps({"key": key(1), "meta": {}}).encode()),
        forge(json.dumps({"key": KEY.upper(), "meta": {}}).encode()),
        forge(json.dumps({"key": KEY, "meta": []}).encode()),
        forge(json.dumps({"key": KEY}).encode()),
        forge(json.dumps({"meta": {}}).encode()),
        forge(b"[]"),
        forge(b"null"),
        forge(b'"text"'),
        forge(b"{"),
        forge(b""),
        forge(b"\xff\xfe"),
        forge(b"[" * 100_000),
        forge(RECORD, meta_size=len(RECORD) - 1),
        forge(RECORD, b"cubin", meta_size=len(RECORD) + 1),
        forge(RECORD, meta_size=len(RECORD) + 1),
        forge(RECORD, meta_size=len(RECORD) + 32),
        forge(RECORD, meta_size=2**64 - 1),
    ],
)
def test_a_file_that_makes_no_sense_is_removed(data: bytes, root: Path) -> None:
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    file.parent.mkdir(parents=True, mode=0o700)
    file.write_bytes(data)
    file.chmod(0o600)
    root.chmod(0o700)
    cache = CubinCache(root)
    assert cache.get(KEY) is None
    assert not file.exists()
    assert (cache.stats().damaged, cache.stats().misses) == (1, 1)


def test_the_forgery_is_accepted_when_nothing_is_wrong_with_it(cache: CubinCache, root: Path) -> None:
    cache.put(KEY, ENTRY)
    (root / KEY[:2] / f"{KEY[2:]}.cufa").write_bytes(forge(RECORD, b"cubin"))
    assert CubinCache(root).get(KEY) == Entry(b"cubin", {})


def test_the_entry_of_another_key_is_not_returned(cache: CubinCache, root: Path) -> None:
    cache.put(key(1), OTHER)
    cache.put(KEY, ENTRY)
    shutil.copy(root / key(1)[:2] / f"{key(1)[2:]}.cufa", root / KEY[:2] / f"{KEY[2:]}.cufa")
    assert CubinCache(root).get(KEY) is None
    assert CubinCache(root).get(key(1)) == OTHER


def test_damage_of_a_file_that_has_just_been_replaced_leaves_the_new_one(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, ENTRY)
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    file.write_bytes(b"damaged")
    decode = _cache._decode

    def decode_while_another_writes(data: bytes, name: str) -> Entry | None:
        monkeypatch.setattr(_cache, "_decode", decode)
        CubinCache(root).put(KEY, OTHER)
        return decode(data, name)

    monkeypatch.setattr(_cache, "_decode", decode_while_another_writes)
    fresh = CubinCache(root)
    assert fresh.get(KEY) is None
    assert fresh.get(KEY) == OTHER


@pytest.mark.parametrize("number", [0, 2, 2**32 - 1])
def test_an_entry_of_another_version_is_left_alone_until_written(number: int, root: Path) -> None:
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    CubinCache(root).put(KEY, ENTRY)
    file.write_bytes(b"CUFA\r\n\x1a\n" + struct.pack("<I", number) + b"in a layout not known yet")
    cache = CubinCache(root)
    assert cache.get(KEY) is None
    assert cache.verify() == []
    assert file.exists()
    assert cache.stats().damaged == 0
    assert cache.put(KEY, ENTRY)
    assert CubinCache(root).get(KEY) == ENTRY


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(_cache.MAX_ENTRY_SIZE + 1)  # sparse: takes no room on the disk


def make_link_to_entry(path: Path) -> None:
    """A link to an entry which is good, and elsewhere."""
    elsewhere = CubinCache(path.parent.parent.parent / "elsewhere")
    elsewhere.put(KEY, ENTRY)
    path.symlink_to(elsewhere.file(KEY) or "")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # reading /dev/zero never ends
    except PermissionError:
        pytest.skip("only root can make a device")


MAKERS = (make_empty, make_fifo, make_huge, make_link_to_entry, make_dangling_link, make_loop, make_device)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_not_a_file_of_ours_is_a_miss_and_is_replaced(
    make: Callable[[Path], None], cache: CubinCache, root: Path, warnings: Callable[[], list[str]]
) -> None:
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    file.parent.mkdir(parents=True)
    make(file)
    is_file = stat.S_ISREG(os.lstat(file).st_mode)
    before = listing(root.parent / "elsewhere")
    assert cache.get(KEY) is None
    assert cache.stats().damaged == is_file  # anything else is not ours to remove
    assert os.path.lexists(file) != is_file
    assert cache.put(KEY, OTHER)
    assert stat.S_ISREG(os.lstat(file).st_mode)
    assert CubinCache(root).get(KEY) == OTHER
    assert listing(root.parent / "elsewhere") == before
    assert not warnings()


def test_a_huge_file_is_not_read(cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "MAX_ENTRY_SIZE", file_size())
    assert cache.put(KEY, ENTRY)
    assert CubinCache(root).get(KEY) == ENTRY
    monkeypatch.setattr(_cache, "MAX_ENTRY_SIZE", file_size() - 1)
    assert CubinCache(root).get(KEY) is None
    assert not cache.put(key(1), ENTRY)


def test_a_directory_in_place_of_an_entry(cache: CubinCache, root: Path, warnings: Callable[[], list[str]]) -> None:
    (root / KEY[:2] / f"{KEY[2:]}.cufa" / "kept").mkdir(parents=True)
    before = listing(root)
    assert cache.get(KEY) is None
    assert not cache.put(KEY, ENTRY)
    assert cache.get(KEY) == ENTRY  # from memory
    assert warnings() == [
        f"writing to {root} failed: Is a directory; compiled kernels stay in memory",
    ]
    assert (cache.clear(), cache.verify(), cache.stats().entries) == (0, [], 0)
    assert listing(root) == before


# Who else could have written it


def all_refuse(cache: CubinCache) -> None:
    """Nothing is read, written or removed."""
    root = cache.path
    assert root is not None
    before = listing(root)
    assert cache.get(KEY) is None
    assert not cache.put(KEY, OTHER)
    assert cache.get(KEY) == OTHER  # from memory
    assert cache.discard(KEY) is None
    assert (cache.clear(), cache.prune(0), cache.verify()) == (0, 0, [])
    assert cache.stats().entries == 0
    assert listing(root) == before


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_can_write_is_refused(
    mode: int, cache: CubinCache, root: Path, warnings: Callable[[], list[str]]
) -> None:
    cache.put(KEY, ENTRY)
    root.chmod(mode)
    reason = f"{root} can be written by other users (mode {mode:04o}); chmod go-w it or set CUFA_CACHE_TRUST_SHARED=1"
    fresh = CubinCache(root)
    assert fresh.state() == f"memory only: {reason}"
    assert not warnings()
    all_refuse(fresh)
    assert warnings() == [f"cache of compiled kernels not used: {reason}"]
    assert CubinCache(root, trust_shared=True).get(KEY) == ENTRY
    root.chmod(0o755)
    assert fresh.get(KEY) == ENTRY  # asked again each time


def test_a_directory_of_someone_else_is_refused(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    cache.put(KEY, ENTRY)
    pretend_owner(monkeypatch, root, SOMEONE)
    reason = (
        f"{root} belongs to user {SOMEONE} and not to this one; use another directory or set CUFA_CACHE_TRUST_SHARED=1"
    )
    fresh = CubinCache(root)
    assert fresh.state() == f"memory only: {reason}"
    all_refuse(fresh)
    assert warnings() == [f"cache of compiled kernels not used: {reason}"]
    shared = CubinCache(root, trust_shared=True)
    assert shared.get(KEY) == ENTRY
    assert shared.put(KEY, OTHER)
    assert shared.state() == f"ok, 1 entry, {file_size(OTHER)} B"


def test_what_belongs_to_root_is_trusted_and_what_belongs_to_this_user(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, ENTRY)
    monkeypatch.setattr(os, "geteuid", lambda: SOMEONE)
    paths = [root, root / KEY[:2], root / KEY[:2] / f"{KEY[2:]}.cufa"]
    for owner in (0, SOMEONE):
        with pytest.MonkeyPatch.context() as inner:
            for path in paths:
                pretend_owner(inner, path, owner)
            assert CubinCache(root).get(KEY) == ENTRY
    for other in paths:
        with pytest.MonkeyPatch.context() as inner:
            for path in paths:
                pretend_owner(inner, path, SOMEONE + 1 if path == other else 0)
            assert CubinCache(root).get(KEY) is None


@pytest.mark.parametrize("how", ["owner", "mode", "link", "file"])
def test_a_subdirectory_is_refused_as_the_directory_is(
    how: str,
    cache: CubinCache,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    cache.put(KEY, ENTRY)
    shard = root / KEY[:2]
    if how == "owner":
        pretend_owner(monkeypatch, shard, SOMEONE)
    elif how == "mode":
        shard.chmod(0o770)
    else:
        shard.rename(root / "away")
        if how == "link":
            shard.symlink_to("away")
        else:
            shard.write_bytes(b"")
    before = listing(root)
    fresh = CubinCache(root)
    assert fresh.get(KEY) is None
    assert not fresh.put(KEY, OTHER)
    assert fresh.discard(KEY) is None
    assert listing(root) == before
    if how in ("link", "file"):
        assert (fresh.clear(), fresh.verify()) == (0, [])
        assert listing(root) == before
    assert len(warnings()) == 1
    assert warnings()[0].startswith(f"cache of compiled kernels not used: {shard} ")


@pytest.mark.parametrize("mode", [0o660, 0o602, 0o622])
def test_an_entry_that_others_can_write_is_not_used(
    mode: int, cache: CubinCache, root: Path, warnings: Callable[[], list[str]]
) -> None:
    for number in (1, 2):
        cache.put(key(number), ENTRY)
        (root / key(number)[:2] / f"{key(number)[2:]}.cufa").chmod(mode)
    file = root / key(1)[:2] / f"{key(1)[2:]}.cufa"
    fresh = CubinCache(root)
    assert fresh.get(key(1)) is None
    assert fresh.get(key(2)) is None
    assert warnings() == [
        f"cached kernel not used: {file} can be written by other users (mode {mode:04o}); "
        "chmod go-w it or set CUFA_CACHE_TRUST_SHARED=1"
    ]
    assert CubinCache(root, trust_shared=True).get(key(1)) == ENTRY
    assert fresh.put(key(1), OTHER)
    assert CubinCache(root).get(key(1)) == OTHER


def test_an_entry_of_someone_else_is_not_used(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    cache.put(KEY, ENTRY)
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    pretend_owner(monkeypatch, file, SOMEONE)
    assert CubinCache(root).get(KEY) is None
    assert warnings() == [
        f"cached kernel not used: {file} belongs to user {SOMEONE} and not to this one; "
        "use another directory or set CUFA_CACHE_TRUST_SHARED=1"
    ]
    assert CubinCache(root, trust_shared=True).get(KEY) == ENTRY


def test_a_link_in_place_of_the_directory_is_refused(
    cache: CubinCache, root: Path, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    cache.put(KEY, ENTRY)
    link = tmp_path / "link"
    link.symlink_to(root)
    through = CubinCache(link)
    reason = f"{link} is a symbolic link; name the directory itself"
    assert through.state() == f"memory only: {reason}"
    before = listing(root)
    all_refuse(through)
    assert listing(root) == before
    assert warnings() == [f"cache of compiled kernels not used: {reason}"]
    assert CubinCache(link, trust_shared=True).get(KEY) == ENTRY


def test_a_dangling_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    all_refuse(CubinCache(tmp_path / "link"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("trust_shared", [False, True])
def test_a_file_in_place_of_the_directory(trust_shared: bool, root: Path) -> None:
    root.write_bytes(b"not ours")
    cache = CubinCache(root, trust_shared=trust_shared)
    assert cache.state() == f"memory only: {root} is not a directory"
    assert cache.get(KEY) is None
    assert not cache.put(KEY, ENTRY)
    assert cache.get(KEY) == ENTRY
    assert root.read_bytes() == b"not ours"


# A disk that fails

WRITING = ["os.mkdir", "os.chmod", "cufa._compile.files.temporary_file", "open", "os.fsync", "os.fchmod", "os.replace"]
CODES = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO]


def break_writing(monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    """Let `function` fail; ``open`` opens, and what it returns fails half way through the first write."""
    if function != "open":
        monkeypatch.setattr(function, failing(code))
        return

    @contextlib.contextmanager
    def opened(*args: Any, **named: Any) -> Iterator[Any]:
        with builtins.open(*args, **named) as file:

            def write(data: bytes) -> int:
                file.write(data[: len(data) // 2])
                file.flush()
                raise OSError(code, os.strerror(code))

            yield SimpleNamespace(write=write, flush=file.flush, read=file.read)

    monkeypatch.setattr(_files, "open", opened, raising=False)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("function", WRITING)
def test_a_failing_write_warns_once_and_keeps_the_kernel_in_memory(
    function: str, code: int, cache: CubinCache, root: Path, warnings: Callable[[], list[str]]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_writing(monkeypatch, function, code)
        assert not cache.put(key(1), ENTRY)
        assert not cache.put(key(2), ENTRY)
        assert cache.get(key(1)) == cache.get(key(2)) == ENTRY
    reason = f"writing to {root} failed: {os.strerror(code)}"
    assert warnings() == [f"{reason}; compiled kernels stay in memory"]
    assert not temporaries(root)
    assert not [path for path in root.rglob("*") if path.is_file()]
    assert CubinCache(root).get(key(1)) is None
    assert cache.stats().writes == 0
    if root.exists():
        assert cache.state() == f"memory only: {reason}"
    assert cache.put(key(1), ENTRY)  # the disk works again
    assert CubinCache(root).get(key(1)) == ENTRY
    assert cache.state() == f"ok, 1 entry, {file_size()} B"


@pytest.mark.parametrize("function", WRITING[2:])
def test_a_failing_write_leaves_the_entry_that_was_there(
    function: str, cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, ENTRY)
    before = listing(root)
    with pytest.MonkeyPatch.context() as inner:
        break_writing(inner, function, errno.ENOSPC)
        assert not cache.put(KEY, OTHER)
    assert listing(root) == before
    assert CubinCache(root).get(KEY) == ENTRY
    reason = f"writing to {root} failed: No space left on device"
    assert cache.state() == f"read only: {reason}; 1 entry, {file_size()} B"


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_nothing(
    function: str, cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, ENTRY)
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_a_read_only_file_system_still_serves(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    cache.put(KEY, ENTRY)
    damaged = root / key(1)[:2] / f"{key(1)[2:]}.cufa"
    cache.put(key(1), ENTRY)
    damaged.write_bytes(b"damaged")
    for function in ("mkdir", "chmod", "fchmod", "replace", "rename", "unlink", "utime"):
        monkeypatch.setattr(os, function, failing(errno.EROFS))
    monkeypatch.setattr("cufa._compile.files.temporary_file", failing(errno.EROFS))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    before = listing(root)
    fresh = CubinCache(root)
    size = file_size() + len(b"damaged")
    assert fresh.state() == f"read only: {root} is not writable; 2 entries, {size} B"
    assert fresh.get(KEY) == ENTRY
    assert fresh.get(key(1)) is None
    assert not warnings()
    assert not fresh.put(key(2), ENTRY)
    assert fresh.get(key(2)) == ENTRY
    assert fresh.discard(KEY) is None
    assert (fresh.clear(), fresh.prune(0)) == (0, 0)
    assert fresh.verify() == [damaged]
    assert listing(root) == before
    assert warnings() == [f"writing to {root} failed: Read-only file system; compiled kernels stay in memory"]


def test_state_of_a_directory_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert CubinCache(tmp_path / "a" / "b").state() == f"memory only: {tmp_path} is not writable"


@pytest.mark.parametrize("function", ["lstat", "open", "fstat", "scandir"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE], ids=errno.errorcode.get)
def test_a_failing_read_is_a_miss_and_removes_nothing(function: str, code: int, cache: CubinCache, root: Path) -> None:
    cache.put(KEY, ENTRY)
    fresh = CubinCache(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, function, failing(code))
        assert fresh.get(KEY) == (ENTRY if function == "scandir" else None)
        if function in ("lstat", "scandir"):
            assert (fresh.stats().entries, fresh.verify(), fresh.prune(0)) == (0, [], 0)
    assert fresh.get(KEY) == ENTRY
    assert fresh.stats().damaged == 0


def test_state_of_a_directory_that_cannot_be_looked_at(cache: CubinCache, root: Path) -> None:
    cache.put(KEY, ENTRY)
    with pytest.MonkeyPatch.context() as monkeypatch:
        lstat = os.lstat
        calls = iter([lstat])  # the first call finds the directory, and the second one fails
        monkeypatch.setattr(os, "lstat", lambda path: next(calls, failing(errno.EACCES))(path))
        state = cache.state()
    assert state == f"memory only: {root}: Permission denied"


@pytest.mark.parametrize("base", ["/proc/self/cufa", "FILE/cufa"])
def test_a_place_where_nobody_can_make_a_directory(
    base: str, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = CubinCache(base.replace("FILE", str(tmp_path / "file")))
    assert cache.get(KEY) is None
    assert not cache.put(KEY, ENTRY)
    assert cache.get(KEY) == ENTRY
    assert len(warnings()) == 1
    assert warnings()[0].startswith(f"writing to {cache.path} failed: ")
    assert cache.state().startswith("memory only: ")
    assert cache.verify() == []


def test_a_file_size_limit_of_the_system(root: Path) -> None:
    _, finish = run_script(
        """
        import resource, sys
        from cufa._compile.cache import CubinCache, Entry, digest
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cache = CubinCache(sys.argv[1])
        print(cache.put(digest({}), Entry(bytes(100_000), {})), cache.put(digest({"a": 1}), Entry(b"", {})))
        """,
        root,
    )
    assert "False True" in finish()
    assert not temporaries(root)
    assert CubinCache(root).stats().entries == 1


# Publishing


def test_an_entry_appears_whole_synced_and_private(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch, umask: Callable[[int], int]
) -> None:
    umask(0)
    cache.put(KEY, ENTRY)
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        record = json.dumps({"key": KEY, "meta": OTHER.meta}).encode()
        assert os.fstat(descriptor).st_size == len(forge(record, OTHER.cubin))
        events.append("fsync")
        fsync(descriptor)

    def watch_replace(source: str, target: Path) -> None:
        status = os.lstat(source)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert Path(source).parent == Path(target).parent == root / KEY[:2]
        assert Path(source).name.startswith(".tmp-")
        assert CubinCache(root).get(KEY) == ENTRY  # the old one, to the last moment
        events.append("replace")
        replace(source, target)
        assert CubinCache(root).get(KEY) == OTHER

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    assert cache.put(KEY, OTHER)
    assert events == ["fsync", "replace"]


def test_threads_never_see_part_of_an_entry(root: Path) -> None:
    entries = [Entry(bytes([number]) * 200_000, {"number": number}) for number in range(3)]
    CubinCache(root).put(KEY, entries[0])
    stop = time.monotonic() + 0.5
    wrong: list[object] = []
    reads = []

    def write(number: int) -> None:
        cache = CubinCache(root)
        while time.monotonic() < stop:
            if not cache.put(KEY, entries[number]):
                wrong.append("not written")

    def read() -> None:
        while time.monotonic() < stop:
            cache = CubinCache(root)
            entry = cache.get(KEY)
            if entry is None or entry != entries[entry.meta["number"]] or cache.stats().damaged:
                wrong.append(entry)
            reads.append(1)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    threads += [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(reads) > 3
    assert not temporaries(root)


def test_threads_may_share_one_cache(root: Path) -> None:
    cache = CubinCache(root, max_size=5 * file_size())
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for step in range(40):
                number = (first + step) % 10
                entry = cache.get(key(number))
                if entry is None:
                    cache.put(key(number), Entry(ENTRY.cubin, ENTRY.meta | {"number": number}))
                elif entry.meta["number"] != number:
                    wrong.append(entry)
                if step % 10 == first:
                    cache.clear()
                    cache.verify()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.stats().damaged == 0
    assert not temporaries(root)


WORKER = """
    import pathlib, sys, time
    from cufa._compile.cache import CubinCache, Entry, digest
    base, role, roles = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3].split()
    (base / role).touch()
    while not all((base / other).exists() for other in roles):
        time.sleep(0.001)
    stop, count = time.monotonic() + 1, 0
    while time.monotonic() < stop:
        cache = CubinCache(base / "store")
        for number in range(3):
            key = digest({"number": number})
            if role == "read":
                entry = cache.get(key)
                assert entry is None or entry.cubin == entry.meta["fill"].encode() * 300_000, "torn"
                count += entry is not None
            elif role == "evict":
                count += cache.prune(0)
            else:
                count += cache.put(key, Entry(role.encode() * 300_000, {"fill": role}))
                assert cache.stats().writes == number + 1, "not written"
        assert cache.stats().damaged == 0, "damaged"
        time.sleep(0.02 if role == "evict" else 0)
    print("fine", role, count)
"""


def test_processes_never_see_part_of_an_entry(tmp_path: Path) -> None:
    roles = ["a", "b", "c", "read", "evict"]
    finishers = [run_script(WORKER, tmp_path, role, " ".join(roles))[1] for role in roles]
    for role, output in zip(roles, [finish() for finish in finishers], strict=True):
        assert re.search(f"^fine {role} [1-9]", output, flags=re.MULTILINE), output
    assert not temporaries(tmp_path)


def test_a_killed_writer_leaves_a_temporary_file_which_goes_in_time(cache: CubinCache, root: Path) -> None:
    process, finish = run_script(
        """
        import os, signal, sys
        from cufa._compile.cache import CubinCache, Entry
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        CubinCache(sys.argv[1]).put(sys.argv[2], Entry(bytes(1000), {}))
        """,
        root,
        KEY,
    )
    finish()
    assert process.returncode == -9
    (left,) = temporaries(root)
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert cache.get(KEY) is None
    assert cache.stats().entries == 0
    assert (cache.prune(), cache.clear(), cache.verify()) == (0, 0, [])
    assert left.exists()  # its writer may be alive
    set_times = [time.time() - _cache.STALE_SECONDS + 60, time.time() + _cache.STALE_SECONDS - 60]
    for moment in set_times:
        os.utime(left, (moment, moment))
        assert cache.put(KEY, ENTRY)
        assert left.exists()
    os.utime(left, (time.time() - _cache.STALE_SECONDS - 60,) * 2)
    assert cache.prune() == 0
    assert not left.exists()
    assert cache.stats().entries == 1


def test_temporary_files_count_and_go_before_entries(root: Path) -> None:
    cache = CubinCache(root, max_size=10 * file_size())
    for number in range(4):
        assert cache.put(key(number), ENTRY)
        set_used(root / key(number)[:2] / f"{key(number)[2:]}.cufa", 1000 - number)
    shard = root / key(0)[:2]
    for name, age in (("old", 200), ("older", 300), ("new", 1)):
        (shard / f".tmp-{name}").write_bytes(bytes(4 * file_size()))
        os.utime(shard / f".tmp-{name}", (time.time() - age,) * 2)
    assert cache.stats().size == 16 * file_size()
    assert cache.prune() == 0
    assert sorted(path.name for path in temporaries(root)) == [".tmp-new"]  # 8 are left, which fits
    assert (cache.stats().entries, cache.stats().size) == (4, 8 * file_size())
    assert cache.prune(6 * file_size()) == 2
    assert temporaries(root) and cache.stats().size == 6 * file_size()
    assert [CubinCache(root).get(key(number)) for number in range(4)] == [None, None, ENTRY, ENTRY]


def test_a_temporary_file_from_the_future_goes_with_the_next_write(cache: CubinCache, root: Path) -> None:
    shard = root / "ab"
    shard.mkdir(parents=True)
    left = shard / ".tmp-left"
    left.write_bytes(b"")
    os.utime(left, (time.time() + 10 * _cache.STALE_SECONDS,) * 2)
    assert cache.put(KEY, ENTRY)
    assert not left.exists()


def test_a_fork_while_threads_work_leaves_a_working_cache(root: Path) -> None:
    _, finish = run_script(
        """
        import os, sys, threading, time, warnings
        from cufa._compile.cache import CubinCache, Entry, digest
        warnings.simplefilter("ignore")  # about the fork of a process with threads, which is the point
        cache = CubinCache(sys.argv[1], max_size=20_000)
        keys = [digest({"number": number}) for number in range(8)]
        stop = False
        def work():
            number = 0
            while not stop:
                number += 1
                cache.put(keys[number % 4], Entry(bytes(1000), {}))
                cache.get(keys[number % 8])
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads: thread.start()
        children = []
        for child in range(10):
            time.sleep(0.01)
            pid = os.fork()
            if pid == 0:
                fine = cache.put(keys[4], Entry(b"child", {})) and cache.get(keys[4]) == Entry(b"child", {})
                fresh = CubinCache(sys.argv[1])
                fresh.get(keys[0]), cache.stats(), cache.state(), cache.verify(), cache.prune()
                os._exit(0 if fine and not fresh.stats().damaged else 1)
            children.append(pid)
        print("codes", [os.waitpid(pid, 0)[1] for pid in children])
        stop = True
        for thread in threads: thread.join()
        """,
        root,
        timeout=20,
    )
    assert f"codes {[0] * 10}" in finish()


# Size


def test_the_least_recently_used_entries_go_first(root: Path) -> None:
    cache = CubinCache(root, max_size=3 * file_size())
    for number in range(3):
        assert cache.put(key(number), ENTRY)
        set_used(root / key(number)[:2] / f"{key(number)[2:]}.cufa", 1000 - number)
    assert cache.stats().entries == 3
    assert CubinCache(root).get(key(0)) == ENTRY  # now the most recent one
    assert cache.put(key(3), ENTRY)
    assert {number for number in range(4) if CubinCache(root).get(key(number))} == {0, 2, 3}
    assert cache.stats() == _cache.Stats(3, 3 * file_size(), 3 * file_size(), 4, 0, 0, 4, 0, 1)


@pytest.mark.parametrize("wrong", [-300, 300])
def test_reading_sets_the_time_by_the_clock_of_the_file_system(
    wrong: float, cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, ENTRY)
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    set_used(file, 10**6)
    before = time.time()
    monkeypatch.setattr(time, "time_ns", lambda real=time.time_ns: real() + int(wrong * 1e9))
    assert CubinCache(root).peek(KEY) == ENTRY
    assert file.stat().st_mtime < before - 10**5
    assert CubinCache(root).get(KEY) == ENTRY
    assert before - 1 < file.stat().st_mtime < before + 10


@pytest.mark.parametrize("wrong", [-300, 0, 300])
@pytest.mark.parametrize("by_writing", [True, False])
def test_eviction_is_right_whatever_the_clock_of_this_machine_says(
    by_writing: bool, wrong: float, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes ahead of or behind that of the file server, which here is the real one."""
    monkeypatch.setattr(time, "time_ns", lambda real=time.time_ns: real() + int(wrong * 1e9))
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + wrong)
    cache = CubinCache(root, max_size=4 * file_size())
    for number in range(4):
        assert cache.put(key(number), ENTRY)
        os.utime(root / key(number)[:2] / f"{key(number)[2:]}.cufa", (real_time() - 200 + number,) * 2)
    assert CubinCache(root).get(key(0)) == ENTRY  # the last one to be used
    left = root / "ab" / ".tmp-left"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"")
    os.utime(left, (real_time() - _cache.STALE_SECONDS + 100,) * 2)
    if by_writing:
        assert cache.put(key(4), ENTRY)
        assert {number for number in range(5) if CubinCache(root).peek(key(number))} == {0, 2, 3, 4}
    else:
        assert cache.prune(3 * file_size()) == 1
        assert {number for number in range(5) if CubinCache(root).peek(key(number))} == {0, 2, 3}
    assert not left.exists()  # of no size, but abandoned for minutes, and space was needed


def real_time() -> float:
    """The time by the clock that stamps files."""
    with tempfile.TemporaryFile() as file:
        return os.fstat(file.fileno()).st_mtime


def test_a_time_in_the_future_does_not_keep_an_entry_for_ever(root: Path) -> None:
    cache = CubinCache(root, max_size=2 * file_size())
    for number, seconds_ago in ((0, -(10**8)), (1, 60)):
        cache.put(key(number), ENTRY)
        set_used(root / key(number)[:2] / f"{key(number)[2:]}.cufa", seconds_ago)
    cache.put(key(2), ENTRY)
    assert {number for number in range(3) if CubinCache(root).get(key(number))} == {1, 2}


def test_the_entry_just_written_stays_whatever_its_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CubinCache(root, max_size=file_size())
    cache.put(key(0), ENTRY)
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # the clock of the machine and that of the disk disagree
    set_used(root / key(0)[:2] / f"{key(0)[2:]}.cufa", 0)
    assert cache.put(key(1), ENTRY)
    assert [CubinCache(root).get(key(number)) for number in range(2)] == [None, ENTRY]


@pytest.mark.parametrize("spare", [-1, 0])
def test_an_entry_larger_than_the_cache_stays_in_memory(
    spare: int, root: Path, warnings: Callable[[], list[str]]
) -> None:
    cache = CubinCache(root, max_size=file_size() + spare)
    assert cache.put(KEY, ENTRY) == (spare == 0)
    assert cache.get(KEY) == ENTRY
    assert CubinCache(root).get(KEY) == (ENTRY if spare == 0 else None)
    assert not warnings()


def test_eviction_touches_nothing_else(root: Path) -> None:
    cache = CubinCache(root, max_size=file_size())
    cache.put(KEY, ENTRY)
    shard = root / KEY[:2]
    others = [
        root / "README",
        root / ".tmp-x",
        root / f"{KEY[2:]}.cufa",
        shard / "notes.cufa",
        shard / f"{KEY[2:]}.cufa.bak",
        shard / f"{KEY[2:].upper()}.cufa",
        shard / f"{KEY[2:]}.cufa\n",
        root / "AB" / f"{KEY[2:]}.cufa",
        root / "abc" / f"{KEY[2:]}.cufa",
        root / "ab" / "cd" / f"{KEY[2:]}.cufa",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (1000, 1000))
    outside = root.parent / "outside"
    CubinCache(outside).put(KEY, ENTRY)
    (root / "0f").symlink_to(outside / KEY[:2])
    assert cache.put(key(1), ENTRY)
    assert (cache.prune(0), cache.verify(), cache.clear()) == (1, [], 0)
    assert all(path.exists() for path in others)
    assert CubinCache(outside).get(KEY) == ENTRY


def test_prune(root: Path) -> None:
    cache = CubinCache(root)
    for number in range(4):
        cache.put(key(number), ENTRY)
        set_used(root / key(number)[:2] / f"{key(number)[2:]}.cufa", 100 * (number + 1))
    assert cache.prune() == 0
    assert cache.prune(4 * file_size()) == 0
    assert cache.prune(4 * file_size() - 1) == 1
    assert {number for number in range(4) if CubinCache(root).get(key(number))} == {0, 1, 2}
    assert CubinCache(root, max_size=file_size()).prune() == 2
    assert cache.prune(0) == 1
    assert cache.stats().entries == 0
    assert cache.get(key(3)) == ENTRY  # memory is not pruned


def test_clear(cache: CubinCache, root: Path) -> None:
    other = CubinCache(root)
    for number in range(3):
        cache.put(key(number), ENTRY)
    assert other.get(key(0)) == ENTRY
    assert cache.clear() == 3
    assert cache.get(key(0)) is None
    assert other.get(key(0)) == ENTRY  # has it in memory
    assert other.put(key(0), ENTRY)
    assert cache.get(key(0)) == ENTRY


def test_clear_removes_empty_files_too(cache: CubinCache, root: Path) -> None:
    cache.put(KEY, ENTRY)
    (root / KEY[:2] / f"{KEY[2:]}.cufa").write_bytes(b"")
    assert cache.clear() == 1
    assert cache.stats().entries == 0


def test_eviction_spares_a_file_that_has_just_been_replaced(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, ENTRY)
    scan = _cache._scan

    def scan_before_another_writes(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
        found = list(scan(directory))
        monkeypatch.setattr(_cache, "_scan", scan)
        CubinCache(root).put(KEY, OTHER)
        return iter(found)

    monkeypatch.setattr(_cache, "_scan", scan_before_another_writes)
    assert cache.prune(0) == 0
    assert CubinCache(root).get(KEY) == OTHER


def test_eviction_goes_on_when_another_process_was_faster(
    cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        cache.put(key(number), ENTRY)
        set_used(root / key(number)[:2] / f"{key(number)[2:]}.cufa", 100 - number)
    scan = _cache._scan

    def scan_before_another_evicts(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
        found = list(scan(directory))
        (root / key(0)[:2] / f"{key(0)[2:]}.cufa").unlink()
        return iter(found)

    monkeypatch.setattr(_cache, "_scan", scan_before_another_evicts)
    cache.prune(2 * file_size())
    assert [CubinCache(root).get(key(number)) for number in range(3)] == [None, ENTRY, ENTRY]


def test_a_file_may_vanish_during_a_scan(cache: CubinCache, root: Path) -> None:
    for digit in "012":
        cache.put("ab" + 62 * digit, ENTRY)
    scan = _cache._scan(root)
    first, _ = next(scan)
    second, third = sorted({path for path, _ in _cache._scan(root)} - {first})
    second.unlink()
    assert [path for path, _ in scan] == [third]


# The second directory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A directory of kernels as an image or a cluster provides it: `KEY` is good, `key(1)` is damaged."""
    cache = CubinCache(tmp_path / "image")
    cache.put(KEY, ENTRY)
    cache.put(key(1), ENTRY)
    (tmp_path / "image" / key(1)[:2] / f"{key(1)[2:]}.cufa").write_bytes(b"damaged")
    return tmp_path / "image"


@pytest.mark.parametrize("with_first", [True, False])
def test_the_second_directory_is_read_and_never_written(
    with_first: bool, root: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(image)
    touched: list[object] = []
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path, **named: (touched.append(path), utime(path, **named)))
    cache = CubinCache(root if with_first else None, read_only_dir=image, max_size=1)
    assert cache.get(KEY) == ENTRY
    assert cache.get(key(1)) is None
    cache.put(key(2), ENTRY)
    cache.discard(KEY)
    cache.discard(key(1))
    cache.clear()
    cache.prune(0)
    cache.verify()
    assert cache.get(KEY) == ENTRY
    assert listing(image) == before
    assert not touched
    assert not root.exists()
    assert cache.stats().entries == 0


def test_the_first_directory_comes_first(root: Path, image: Path) -> None:
    CubinCache(root).put(KEY, OTHER)
    assert CubinCache(root, read_only_dir=image).get(KEY) == OTHER
    (root / KEY[:2] / f"{KEY[2:]}.cufa").write_bytes(b"damaged")
    assert CubinCache(root, read_only_dir=image).get(KEY) == ENTRY


def test_a_damaged_entry_of_the_second_directory_is_replaced_in_the_first(root: Path, image: Path) -> None:
    cache = CubinCache(root, read_only_dir=image)
    assert cache.get(key(1)) is None
    assert cache.put(key(1), OTHER)
    assert CubinCache(root, read_only_dir=image).get(key(1)) == OTHER


def test_the_second_directory_must_be_trusted_too(root: Path, image: Path, warnings: Callable[[], list[str]]) -> None:
    image.chmod(0o777)
    cache = CubinCache(root, read_only_dir=image)
    assert cache.get(KEY) is None
    assert cache.get(KEY) is None
    reason = f"{image} can be written by other users (mode 0777); chmod go-w it or set CUFA_CACHE_TRUST_SHARED=1"
    assert warnings() == [f"cache of compiled kernels not used: {reason}"]
    assert cache.state() == f"ok, 0 entries, 0 B; cannot read a second one: {reason}"
    assert cache.put(KEY, OTHER)  # the first one is still used
    assert CubinCache(root, read_only_dir=image, trust_shared=True).get(KEY) == OTHER


def test_a_second_directory_that_is_missing(root: Path, tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    missing = tmp_path / "missing"
    cache = CubinCache(root, read_only_dir=missing)
    assert cache.get(KEY) is None
    assert not warnings()
    assert not missing.exists()
    assert cache.state() == f"ok, 0 entries, 0 B; cannot read a second one: {missing}: No such file or directory"


# Memory only, discard, verify, state


@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        ({"enabled": False}, "memory only: CUFA_CACHE is 0"),
        ({"directory": None}, "memory only: no home directory, and CUFA_CACHE_DIR is not set"),
    ],
)
def test_memory_only(
    arguments: dict[str, Any],
    state: str,
    root: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    cache = CubinCache(**{"directory": root} | arguments)
    assert cache.path is None
    assert cache.file(KEY) is None
    assert cache.get(KEY) is None
    assert not cache.put(KEY, ENTRY)
    assert cache.get(KEY) == ENTRY
    assert cache.state() == state
    assert cache.stats() == _cache.Stats(0, 0, 512 << 20, 1, 1, 1, 0, 0, 0)
    assert (cache.prune(0), cache.verify()) == (0, [])
    assert cache.get(KEY) == ENTRY
    assert cache.discard(KEY) is None
    assert cache.get(KEY) is None
    cache.put(KEY, ENTRY)
    assert cache.clear() == 0
    assert cache.get(KEY) is None
    assert listing(tmp_path) == before
    assert not warnings()


def test_a_cache_that_is_off_does_not_read_the_second_directory_either(image: Path) -> None:
    cache = CubinCache(None, read_only_dir=image, enabled=False)
    assert cache.get(KEY) is None
    assert cache.state() == "memory only: CUFA_CACHE is 0"


def test_discard(cache: CubinCache, root: Path) -> None:
    cache.put(KEY, ENTRY)
    cache.put(key(1), OTHER)
    file = root / KEY[:2] / f"{KEY[2:]}.cufa"
    assert cache.discard(KEY) == file
    assert not file.exists()
    assert cache.get(KEY) is None
    assert cache.discard(KEY) is None
    assert cache.get(key(1)) == OTHER


def test_verify(root: Path) -> None:
    cache = CubinCache(root)
    files = []
    for number in range(6):
        cache.put(key(number), ENTRY)
        files.append(root / key(number)[:2] / f"{key(number)[2:]}.cufa")
    good, flipped, short, moved, link, temporary = files
    data = bytearray(flipped.read_bytes())
    data[-40] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(data[:-1])
    shutil.copy(good, moved)
    link.unlink()
    link.symlink_to(good)
    temporary.rename(temporary.with_name(".tmp-x"))
    fresh = CubinCache(root)
    assert sorted(fresh.verify()) == sorted([flipped, short, moved])
    assert fresh.stats().damaged == 3
    assert fresh.stats().in_memory == 0
    assert [path.exists() for path in files] == [True, False, False, False, True, False]
    assert temporary.with_name(".tmp-x").exists()
    assert fresh.verify() == []
    assert fresh.get(key(0)) == ENTRY


def test_stats_count_what_happened(cache: CubinCache, root: Path) -> None:
    assert cache.get(KEY) is None
    cache.put(KEY, ENTRY)
    assert cache.get(KEY) is not None
    assert cache.get(KEY) is not None
    assert cache.stats() == _cache.Stats(1, file_size(), 512 << 20, 1, 2, 1, 1, 0, 0)
    assert CubinCache(root).stats() == _cache.Stats(1, file_size(), 512 << 20, 0, 0, 0, 0, 0, 0)


def test_the_disk_is_read_once(cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, ENTRY)
    fresh = CubinCache(root)
    first = fresh.get(KEY)
    monkeypatch.setattr(os, "open", failing(errno.EIO))
    monkeypatch.setattr(os, "lstat", failing(errno.EIO))
    assert fresh.get(KEY) is first


def test_state_says_that_a_second_directory_is_read(root: Path, image: Path) -> None:
    assert CubinCache(root, read_only_dir=image).state() == f"ok, 0 entries, 0 B; reads {image} too"
    assert CubinCache(None, read_only_dir=image).state() == (
        f"memory only: no home directory, and CUFA_CACHE_DIR is not set; reads {image} too"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (512 << 20, "536.9 MB"),
        (10**12, "1000.0 GB"),
    ],
)
def test_size_for_people(size: int, text: str) -> None:
    assert _cache.human(size) == text


def test_a_relative_directory_is_that_of_the_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = CubinCache("store", read_only_dir="image")
    monkeypatch.chdir("/")
    assert cache.path == tmp_path / "store"
    assert cache.put(KEY, ENTRY)
    assert CubinCache(tmp_path / "store").get(KEY) == ENTRY


def test_from_env(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in _env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = CubinCache.from_env()
    assert cache.path == tmp_path / "cufa"
    assert (cache.max_size, cache.trust_shared, cache.enabled) == (512 << 20, False, True)
    assert cache.get(KEY) is None
    assert cache.put(key(2), ENTRY)
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("CUFA_CACHE_MAX_SIZE", "1K")
    monkeypatch.setenv("CUFA_CACHE_TRUST_SHARED", "1")
    monkeypatch.setenv("CUFA_CACHE_READONLY_DIR", str(image))
    cache = CubinCache.from_env()
    assert cache.path == tmp_path / "own"
    assert (cache.max_size, cache.trust_shared, cache.enabled) == (1024, True, True)
    assert cache.get(KEY) == ENTRY
    monkeypatch.setenv("CUFA_CACHE", "0")
    assert CubinCache.from_env().path is None
    assert not CubinCache.from_env().enabled


@pytest.mark.parametrize("name", ["CUFA_CACHE", "CUFA_CACHE_DIR", "CUFA_CACHE_MAX_SIZE", "CUFA_CACHE_TRUST_SHARED"])
def test_from_env_names_the_variable_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "~no such user")
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got '~no such user'; "):
        CubinCache.from_env()


# Notes


def test_a_note_is_kept_beside_the_entries(cache: CubinCache, root: Path) -> None:
    assert cache.note(KEY) is None
    assert cache.put(KEY, ENTRY)
    assert cache.keep_note(KEY, {"path": "/x", "versions": [1, 2]})
    assert cache.note(KEY) == CubinCache(root).note(KEY) == {"path": "/x", "versions": [1, 2]}
    assert CubinCache(root).get(KEY) == ENTRY
    assert (cache.stats().entries, cache.stats().writes) == (1, 1)
    assert list(cache.listed()) == [KEY]
    assert cache.clear() == 1
    assert cache.note(KEY) is None
    assert not CubinCache(None).keep_note(KEY, {}) and CubinCache(None).note(KEY) is None


def test_notes_are_as_careful_as_entries(cache: CubinCache, root: Path) -> None:
    cache.keep_note(KEY, {"a": 1})
    file = root / KEY[:2] / f"{KEY[2:]}.note"
    whole = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o622)
    assert CubinCache(root).note(KEY) is None
    file.chmod(0o600)
    assert CubinCache(root).note(KEY) == {"a": 1}
    file.write_bytes(whole[:-1])
    assert cache.verify() == [file]
    assert not file.exists()


def test_there_are_not_ever_more_notes(cache: CubinCache, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "MAX_NOTES", 3)
    cache.put(KEY, ENTRY)
    for number in range(5):
        cache.keep_note(key(number), {"number": number})
        set_used(root / key(number)[:2] / f"{key(number)[2:]}.note", 1000 - number)
        if number == 2:
            assert CubinCache(root).note(key(0)) == {"number": 0}  # and so the last one to be used
    assert [number for number in range(5) if cache.note(key(number))] == [0, 3, 4]
    assert cache.get(KEY) == ENTRY and cache.stats().entries == 1
