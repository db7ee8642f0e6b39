"""``cufa cache`` and ``cufa.cache``: what they print, what they leave, and what they exit with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cufa
from cufa._cli.main import cufa as command
from cufa._compile import cache as _cache
from cufa._compile.cache import CubinCache, Entry, digest

META = {"kernel": "attention_forward_sm80", "what": "attention_forward_sm80 (bf16) for sm_80", "arch": "80"}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["cache", *arguments])


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [*os.environ]:
        if name.startswith("CUFA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def keys(store: Path) -> list[str]:
    """Three kernels, used in this order, and what a killed process has left."""
    found = [digest({"number": number}) for number in range(3)]
    for age, key in enumerate(found):
        CubinCache(store).put(key, Entry(bytes([age]) * 1000, META))
        os.utime(file_of(store, key), (time.time() - 1000 + age,) * 2)
    left = file_of(store, found[0]).with_name(".tmp-left")
    left.write_bytes(bytes(1000))
    os.utime(left, (time.time() - _cache.STALE_SECONDS - 60,) * 2)
    return found


def file_of(store: Path, key: str) -> Path:
    return store / key[:2] / f"{key[2:]}.cufa"


def test_path(store: Path) -> None:
    assert run("path").output == f"{store}\n"
    assert json.loads(run("path", "--json").output) == {"path": str(store), "read_only": None}
    assert cufa.cache.path == store and not store.exists()


def test_stats(store: Path, keys: list[str]) -> None:
    told = json.loads(run("stats", "--json").output)
    size = 1000 + sum(file_of(store, key).stat().st_size for key in keys)
    assert told == {
        "path": str(store),
        "state": f"ok, 3 entries, {_cache.human(size)}",
        "entries": 3,
        "size": size,
        "max_size": 512 << 20,
    }
    said = run("stats")
    assert said.exit_code == 0
    assert f"size       {_cache.human(size)} of 536.9 MB" in said.output
    assert (cufa.cache.stats().entries, cufa.cache.stats().size) == (3, size)
    assert cufa.cache.state == told["state"]


def test_list_and_extract(keys: list[str], tmp_path: Path) -> None:
    told = json.loads(run("list", "--json").output)
    assert [each["key"] for each in told] == sorted(keys)
    assert all(each["size"] == 1000 and each["what"] == META["what"] for each in told)
    assert run("list").output.endswith("3 kernels\n") and META["what"] in run("list").output
    out = tmp_path / "out.cubin"
    out.write_bytes(b"before")
    for key in (keys[1], keys[1][:20], keys[1].upper()):
        assert run("extract", key, str(out)).exit_code == 0
        assert out.read_bytes() == bytes([1]) * 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.cubin", "store"]


def test_extract_refuses(keys: list[str], tmp_path: Path, store: Path) -> None:
    out = tmp_path / "out.cubin"
    for key, message in (
        ("zz", "no kernel has a key that begins with 'zz'; cufa cache list"),
        ("", "3 kernels have keys"),
    ):
        refused = run("extract", key, str(out))
        assert refused.exit_code == 1 and message in refused.output
    refused = run("extract", keys[0], str(tmp_path / "nowhere" / "out"))
    assert refused.exit_code == 1 and f"{tmp_path / 'nowhere'} is no directory" in refused.output
    file_of(store, keys[0]).write_bytes(b"damaged")
    refused = run("extract", keys[0], str(out))
    assert refused.exit_code == 1 and "is damaged" in refused.output
    assert not out.exists()


def test_listing_is_no_use(store: Path, keys: list[str]) -> None:
    before = [file_of(store, key).stat().st_mtime for key in keys]
    run("list")
    run("stats")
    run("extract", keys[0], os.devnull + "/x")
    assert [file_of(store, key).stat().st_mtime for key in keys] == before


def test_verify(store: Path, keys: list[str]) -> None:
    whole = run("verify")
    assert (whole.exit_code, whole.output) == (0, "3 kernels checked, 0 damaged\n")
    bad = file_of(store, keys[1])
    bad.write_bytes(bad.read_bytes()[:-1])
    found = run("verify", "--json")
    assert found.exit_code == 1
    assert json.loads(found.output) == {"checked": 3, "damaged": [str(bad)]}
    assert not bad.exists()
    assert run("verify").exit_code == 0
    bad = file_of(store, keys[2])
    bad.write_bytes(b"")
    assert cufa.cache.verify() == [bad]


def test_prune(store: Path, keys: list[str]) -> None:
    size = file_of(store, keys[0]).stat().st_size
    assert json.loads(run("prune", "--json").output) == {"removed": 0, "entries": 3, "size": 3 * size}
    assert run("prune", "--max-size", f"{2 * size}").output.startswith("removed 1 kernel; left: 2 kernels, ")
    assert not file_of(store, keys[0]).exists()
    assert cufa.cache.prune(size) == 1
    assert run("prune", "--max-size", "0").output.startswith("removed 1 kernel; left: 0 kernels, 0 B")
    with pytest.raises(ValueError, match=r"cache\.prune: max_size is -1; pass a number of bytes"):
        cufa.cache.prune(-1)


@pytest.mark.parametrize("size", ["", "x", "-1", "1.5G", "1T", "9" * 30])
def test_prune_to_what_is_no_size(size: str, keys: list[str]) -> None:
    refused = run("prune", "--max-size", size)
    assert refused.exit_code == 2
    assert f"{size!r} is not a number of bytes such as 1048576, 512M or 2G." in refused.output
    assert cufa.cache.stats().entries == 3


def test_clear(store: Path, keys: list[str]) -> None:
    assert json.loads(run("clear", "--json").output) == {"removed": 3, "entries": 0, "size": 0}
    CubinCache(store).put(keys[0], Entry(b"", {}))
    assert cufa.cache.clear() == 1 and cufa.cache.stats().entries == 0


@pytest.mark.parametrize("name", ["path", "list", "verify", "prune", "clear"])
def test_without_a_directory(name: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE", "0")
    refused = run(name)
    assert (refused.exit_code, refused.output) == (1, "Error: there is no cache on disk: CUFA_CACHE is 0\n")
    assert cufa.cache.path is None and repr(cufa.cache) == "<cufa.cache: in memory>"
    monkeypatch.delenv("CUFA_CACHE")
    store.mkdir()
    store.chmod(0o777)
    refused = run(name)
    assert refused.exit_code == 1 and "can be written by other users" in refused.output
    assert run("stats").exit_code == 0


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_MAX_SIZE", "much")
    with pytest.raises(ValueError, match="CUFA_CACHE_MAX_SIZE: expected a number of bytes"):
        CliRunner().invoke(command, ["cache", "path"], catch_exceptions=False)


@pytest.mark.parametrize("name", ["path", "stats", "list", "verify", "prune", "clear"])
def test_no_command_imports_numpy(name: str, keys: list[str]) -> None:
    script = (
        "import sys; from cufa._cli.main import main; sys.argv[0] = 'cufa'\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, [m for m in ('numpy', 'cuda', 'cufa._kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, "cache", name], capture_output=True, text=True)
    assert done.stdout.endswith("\n0 []\n"), done.stdout + done.stderr
