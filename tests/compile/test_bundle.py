"""Bundles: what is refused in reading, where they are looked for, who is trusted, and why one does not serve."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundles
import places
import plans
import pytest
from bundles import contents, item, made, rewritten, unit, with_manifest
from hypothesis import given
from hypothesis import strategies as st

import cufa
from cufa._compile import bundle as _bundle
from cufa._compile import cache as _cache
from cufa._compile import jit as _jit
from cufa._compile import lookup as _lookup
from cufa._compile.bundle import MANIFEST, SIGNATURE, BundleError, command_for, open_bundle, runs_on, serves
from cufa._kernels import align
from cufa._operations import explanation as _explain
from cufa._terms import TERMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bundles but those of the test, which are looked for anew."""
    places.use(tmp_path, monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made(tmp_path / "some.cufa-bundle", item("one"), item("two", "90a", b"\0" * 5000))


def read(path: Path) -> dict[tuple[str, str], bytes]:
    """Everything that a bundle serves."""
    with open_bundle(path) as bundle:
        return {(each.key, each.target): each.cubin for each in bundle.items()}


def refused(path: Path, why: str) -> None:
    """One sentence, with the file and what to do."""
    with pytest.raises(BundleError) as raised:
        read(path)
    text = str(raised.value)
    assert text.startswith(f"cufa: {path} ") and why in text and "\n" not in text and text.endswith("fetch it anew.")


# The file


def test_what_is_written_is_read(path: Path) -> None:
    assert read(path) == {
        (each.key, each.target): each.cubin for each in (item("one"), item("two", "90a", b"\0" * 5000))
    }
    with open_bundle(path) as bundle:
        manifest = bundle.manifest
        assert (manifest.cufa, manifest.preset, manifest.archs) == (cufa.__version__, None, ("80",))
        assert manifest.nvrtc == ("13.0 abc",) and manifest.targets == ["80", "90a"]
        assert [each.meta for each in bundle.items()] == [bundles.META, bundles.META | {"arch": "90a"}]
    assert {*contents(path)} == {MANIFEST, *(f"kernels/{each.key}-{each.target}.cubin" for each in manifest.entries)}


def test_the_same_kernels_make_the_same_bytes(tmp_path: Path, path: Path) -> None:
    again = made(tmp_path / "again", item("two", "90a", b"\0" * 5000), item("one"))
    os.utime(again, (1, 1))
    assert again.read_bytes() == path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_bundle_without_kernels(tmp_path: Path) -> None:
    assert read(made(tmp_path / "empty")) == {}


KEYS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)


@given(
    kernels=st.dictionaries(
        st.tuples(KEYS, st.sampled_from(["80", "86", "90", "90a", "100a", "121"])), st.binary(max_size=300), max_size=8
    )
)
def test_any_keys_and_bytes(kernels: dict[tuple[str, str], bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "bundle"
    made(path, *(_bundle.Item(key, target, cubin, bundles.META) for (key, target), cubin in kernels.items()))
    assert read(path) == kernels


@pytest.mark.parametrize(
    "bad",
    [
        item()._replace(key="../../x"),
        item()._replace(key="A" * 64),
        item()._replace(target="80/../.."),
        item()._replace(target="sm_80"),
        item(kernel="a/b"),
        item(what="\x1b[31mred"),
        item(registers=True),
        item(seconds="1"),
        item(config=[1]),
    ],
)
def test_what_no_reader_takes_is_not_written(bad: _bundle.Item, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle is written"):
        made(tmp_path / "bad", bad)
    with pytest.raises(BundleError, match="lists a kernel twice"):
        made(tmp_path / "bad", item(), item())
    with pytest.raises(ValueError, match="not JSON compliant"):
        made(tmp_path / "bad", item(seconds=float("nan")))
    assert not [*tmp_path.iterdir()]


def test_a_failed_write_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        made(path, item("three"))
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == [path.name]


SMALL = st.integers(0, 2**32)


@given(offset=SMALL)
def test_truncation_at_any_offset(offset: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = made(
        tmp_path_factory.mktemp("cut") / "bundle", item("one"), item("two", cubin=random.Random(0).randbytes(99))
    )
    data = path.read_bytes()
    path.write_bytes(data[: offset % len(data)])
    refused(path, "")


@given(offset=SMALL, bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(
    offset: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = made(
        tmp_path_factory.mktemp("flip") / "bundle", item("one"), item("two", cubin=random.Random(0).randbytes(99))
    )
    before, data = read(path), bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert read(path).items() <= before.items()
    except BundleError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@given(data=st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"PK\5\6" + tail))
def test_any_bytes_are_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bytes") / "bundle"
    path.write_bytes(data)
    refused(path, "")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../x", "which escapes its directory"),
        ("kernels/../../x", "which escapes its directory"),
        ("/etc/passwd", "which escapes its directory"),
        ("C:x", "which escapes its directory"),
        ("..\\x", "which escapes its directory"),
        ("readme", "which is no kernel"),
        ("kernels/", "which is no kernel"),
        ("kernels/a.cubin", "which is no kernel"),
        (f"kernels/{'0' * 64}-80.cubin\0.txt", "which is no kernel"),
        (f"kernels/{'0' * 64}-80.cubin", "which its manifest does not list"),
    ],
)
def test_names_that_do_not_belong_there(path: Path, name: str, why: str) -> None:
    rewritten(path, lambda files: files.update({"placeholder" if "\0" in name else name: b"x"}))
    if "\0" in name:  # which zipfile itself would cut off there
        data = path.read_bytes().replace(b"placeholder", b"manif\0.json")
        path.write_bytes(data)
    refused(path, why)


def test_names_that_are_there_twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[1], b"another")
    refused(path, "twice")


@pytest.mark.parametrize("kind", [0o120000, 0o040000, 0o010000, 0o020000])
def test_special_files_in_an_archive(path: Path, kind: int) -> None:
    files = contents(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16 if name.startswith("kernels") else 0
            archive.writestr(info, content)
    refused(path, "is a link or another special file")


def test_missing_files(path: Path) -> None:
    files = contents(path)
    rewritten(path, lambda files: files.pop([*files][1]))
    refused(path, "which its manifest lists")
    rewritten(path, lambda files: files.pop(MANIFEST))
    refused(path, "it has no manifest.json")
    assert len(files) == 3


def test_sizes_that_lie(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = path.read_bytes()
    for size in (4999, 5001, 2**31):  # in both headers of the file of zeros
        path.write_bytes(data.replace((5000).to_bytes(4, "little"), size.to_bytes(4, "little")))
        refused(path, "")
    path.write_bytes(data)
    with_manifest(path, lambda manifest: manifest["entries"][1].update(size=5001))
    refused(path, "has 5000 bytes, and the manifest says 5001")
    with_manifest(path, lambda manifest: manifest["entries"][1].update(size=1 << 40))
    refused(path, "is the limit")


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte of zeros in a megabyte, first told and then denied."""
    bomb = tmp_path / "bomb"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(MANIFEST, "w") as file:
        for _ in range(1 << 7):
            file.write(bytes(1 << 20))
    refused(bomb, "and 67108864 is the limit")
    data = bomb.read_bytes()
    bomb.write_bytes(data.replace((1 << 27).to_bytes(4, "little"), (1 << 10).to_bytes(4, "little")))
    refused(bomb, "")
    many = made(tmp_path / "many", item("one"), item("two"))
    monkeypatch.setattr(_bundle, "MAX_SIZE", 600)
    refused(many, "and 600 is the limit")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda manifest: manifest.update(schema=2), "its schema is 2, and cufa"),
        (lambda manifest: manifest.pop("schema"), "its schema is None"),
        (lambda manifest: manifest.update(format="zip"), "is not that of a bundle"),
        (lambda manifest: manifest.update(entries={}), "entries in its manifest.json is {}"),
        (lambda manifest: manifest.update(entries=[3]), "is not an object"),
        (lambda manifest: manifest.update(archs=[3]), "is not a text"),
        (lambda manifest: manifest.update(cufa="0.1\x1b[2J"), "cufa in its manifest.json is"),
        (lambda manifest: manifest.update(sources="abc"), "is not a digest"),
        (lambda manifest: manifest.update(preset=3), "preset in its manifest.json is not a text"),
        (lambda manifest: manifest["entries"].append(manifest["entries"][0]), "lists a kernel twice"),
        (lambda manifest: manifest["entries"][0].update(key="../x"), "key of an entry of its manifest.json is '../x'"),
        (lambda manifest: manifest["entries"][0].update(target="80a/.."), "target of an entry"),
        (lambda manifest: manifest["entries"][0].update(kernel="../x"), "kernel of an entry"),
        (lambda manifest: manifest["entries"][0].update(size=-1), "has -1 bytes"),
        (lambda manifest: manifest["entries"][0].update(size=1e3), "size in its manifest.json is 1000.0"),
        (lambda manifest: manifest["entries"][0].pop("registers"), "registers in its manifest.json is None"),
        (lambda manifest: manifest["entries"][0].update(sha256="0" * 64), "its SHA-256 is another"),
    ],
)
def test_manifests_that_are_wrong(path: Path, change: Callable[[dict[str, Any]], Any], why: str) -> None:
    refused(with_manifest(path, change), why)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b'{"schema": NaN}', b"3", b"null"])
def test_manifests_that_are_no_json(path: Path, text: bytes) -> None:
    refused(rewritten(path, lambda files: files.update({MANIFEST: text})), "its manifest.json is not")


def test_other_things_in_a_bundle_s_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_bundle(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(BundleError, match="is not a regular file"):
            open_bundle(name)


# Which GPUs


@pytest.mark.parametrize(
    ("built", "arch", "runs"),
    [
        *((80, 80, 1), (80, 86, 1), (80, 89, 1), (86, 89, 1), (89, 86, 0), (80, 90, 0), (90, 80, 0), (100, 103, 1)),
        *((80, 87, 0), (87, 89, 0), (87, 87, 1), (100, 110, 0), (120, 121, 1)),
    ],
)
def test_runs_on(built: int, arch: int, runs: int) -> None:
    assert runs_on(built, arch) == bool(runs)


def test_kernels_for_one_architecture_alone_serve_it_alone() -> None:
    hopper, plain = unit(90), unit(90, tma=False)
    assert (hopper.target_suffix, plain.target_suffix) == ("a", "")
    assert serves("90a", hopper) and not serves("90", hopper) and not serves("90a", hopper._replace(arch=91))
    assert serves("90", plain) and not serves("80", plain)


def test_the_newest_that_serves_is_taken(tmp_path: Path) -> None:
    wanted = unit(89)
    with open_bundle(made(tmp_path / "x", *(item(wanted, each) for each in ("80", "86", "90", "120")))) as bundle:
        found = bundle.find(_jit.source_key(wanted), wanted)
        assert found is not None and found.target == "86"
        assert bundle.find("0" * 64, wanted) is None


# The key


def test_the_key_is_of_the_source_and_not_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_nvrtc() -> Any:
        raise AssertionError("NVRTC was asked")

    monkeypatch.setattr(_jit, "nvrtc", no_nvrtc)
    key = _jit.source_key(unit())
    assert re.fullmatch(r"[0-9a-f]{64}", key) and _jit.source_key(unit()) == key
    others = [unit(head_dim=63), unit(mask="none"), unit()._replace(source=unit().source + " ")]
    headers = unit().headers
    others += [unit()._replace(headers={**headers, name: headers[name] + b" "}) for name in headers]
    keys = [key, *map(_jit.source_key, others)]
    monkeypatch.setenv("CUFA_LINEINFO", "1")
    assert len({*keys, _jit.source_key(unit())}) == len(others) + 2


def test_gpus_of_a_family_share_kernels_where_the_source_is_the_same() -> None:
    assert _jit.source_key(unit(86)) == _jit.source_key(unit(89))


# Looking up


def named(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    monkeypatch.setenv("CUFA_BUNDLE_PATH", os.pathsep.join(map(str, paths)))


def served(**options: Any) -> bytes | None:
    found = _jit.bundled(unit(**options))
    return None if found is None else found.entry.cubin


def test_without_bundles_none_serves() -> None:
    assert served() is None and _jit.why_not_bundled(unit()) == ""


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named ones as they are named, those of a directory by name, then installed ones, then wheels."""
    folder, installed = tmp_path / "folder", tmp_path / "cache" / "bundles"
    folder.mkdir(), installed.mkdir(parents=True)
    tmp_path.chmod(0o755)
    files = [tmp_path / "z.cufa-bundle", folder / "a.cufa-bundle", folder / "b.cufa-bundle"]
    files += [installed / "c.cufa-bundle", tmp_path / "wheel.cufa-bundle"]
    for number, file in enumerate(files):
        made(file, item(unit(), cubin=b"%d" % number))
    (folder / "ignored").write_bytes(b"what has another suffix")
    named(monkeypatch, files[0], folder, tmp_path / "z.cufa-bundle")
    monkeypatch.setattr(_lookup, "_in_wheels", lambda: ((files[-1], ""),))
    for number, file in enumerate(files):
        monkeypatch.setattr(_lookup, "_known", {})
        assert served() == b"%d" % number
        file.unlink()
    monkeypatch.setattr(_lookup, "_known", {})
    assert served() is None


def test_a_bundle_comes_before_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _jit.cache().put(_jit.key_of(unit()), _cache.Entry(b"cached", {}))
    assert _jit.entry_of(unit()).cubin == b"cached"
    named(monkeypatch, made(tmp_path / "x", item(unit(), cubin=b"bundled")))
    entry = _jit.entry_of(unit())
    assert entry.cubin == b"bundled"
    assert entry.meta == {
        name: value for name, value in (bundles.META | {"what": unit().words}).items() if name != "config"
    }


def test_a_bundle_is_opened_once_and_only_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(path: Path) -> _bundle.Bundle:
        opened.append(path)
        return open_bundle(path)

    monkeypatch.setattr(_lookup, "open_bundle", counted)
    first, second = made(tmp_path / "1", item(unit())), made(tmp_path / "2", item(unit(90), "90a"))
    named(monkeypatch, first, second)
    for _ in range(3):
        assert served() is not None
    assert opened == [first]
    assert served(arch=90) is not None and served(arch=90) is not None
    assert opened == [first, second]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("damage", ["manifest", "kernel", "cut", "missing", "fifo"])
def test_a_damaged_bundle_is_one_warning(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = made(tmp_path / "bad", item(unit(), cubin=b"bad"), item("two"))
    named(monkeypatch, path, made(tmp_path / "good", item(unit(), cubin=b"good")))
    if damage == "manifest":
        with_manifest(path, lambda manifest: manifest.update(schema=7))
    elif damage == "kernel":
        rewritten(path, lambda files: files.update({name: b"BAD" for name in files if files[name] == b"bad"}))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        path.unlink()
        if damage == "fifo":
            os.mkfifo(path)
    assert [served(), served()] == [b"good", b"good"]
    (warning,) = warnings_of(caplog)
    assert warning.startswith("bundle not used: ") and str(path) in warning
    assert str(path) in _jit.why_not_bundled(unit(mask="none"))


def test_a_bundle_that_is_replaced_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By renaming, what was opened goes on serving; written over, it is found damaged."""
    path = made(tmp_path / "x", item(unit(), cubin=b"old"), item(unit(90), "90a", b"old too"))
    named(monkeypatch, path)
    assert served() == b"old"
    made(path, item("other"))
    assert served(arch=90) == b"old too"
    monkeypatch.setattr(_lookup, "_known", {})
    made(path, item(unit(), cubin=random.Random(0).randbytes(50_000)))
    assert _lookup.bundles().places[0].bundle() is not None
    path.write_bytes(bytes(path.stat().st_size))
    assert served() is None


@pytest.mark.parametrize("trouble", ["mode", "owner", "directory", "link"])
def test_bundles_that_others_can_write_are_not_used(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = made(folder / "x", item(unit()))
    where = path
    if trouble == "mode":
        path.chmod(0o664)
    elif trouble == "owner":
        monkeypatch.setattr(_cache.os, "geteuid", lambda: 12345)
        if os.getuid() == 0:
            os.chown(path, 54321, -1)
    else:
        folder.chmod(0o777)
        if trouble == "link":
            where = tmp_path / "link"
            where.symlink_to(path)
    named(monkeypatch, where)
    assert served() is None
    (warning,) = warnings_of(caplog)
    assert "CUFA_CACHE_TRUST_SHARED=1" in warning
    monkeypatch.setenv("CUFA_CACHE_TRUST_SHARED", "1")
    assert served() is not None


def test_a_link_to_a_bundle_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "x", item(unit()))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    named(monkeypatch, tmp_path / "link")
    assert served() is not None


def test_a_wrong_variable_is_reported_by_the_call_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_BUNDLE_PATH", "~nobody of this name/x")
    with pytest.raises(ValueError, match="CUFA_BUNDLE_PATH: expected a path whose home"):
        served()


def test_threads_open_a_bundle_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins = {arch: random.Random(arch).randbytes(100_000) for arch in (80, 90)}
    items = [item(unit(80), "80", cubins[80]), item(unit(90), "90a", cubins[90])]
    named(monkeypatch, made(tmp_path / "x", *items))
    opened: list[Path] = []
    monkeypatch.setattr(_lookup, "open_bundle", lambda path: (opened.append(path), open_bundle(path))[1])
    found: list[bool] = []
    units = {arch: unit(arch) for arch in cubins}

    def look(arch: int) -> None:
        for _ in range(20):
            one = _jit.bundled(units[arch])
            found.append(one is not None and one.entry.cubin == cubins[arch])

    threads = [threading.Thread(target=look, args=(arch,)) for arch in (80, 90) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and len(found) == 160 and all(found)


def run_script(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_looks_for_itself(tmp_path: Path) -> None:
    """Parent and child read at the same time, whatever another thread holds at the fork."""
    made(tmp_path / "x", item(unit(), cubin=bytes(range(256)) * 2000), item(unit(90), "90a", b"hopper" * 90_000))
    script = """
    import os, warnings
    from bundles import unit
    from cufa._compile import jit, lookup
    warnings.simplefilter("ignore")
    units = {80: unit(80), 90: unit(90)}
    expected = {80: bytes(range(256)) * 2000, 90: b"hopper" * 90_000}
    def right(times):
        return all(jit.bundled(units[arch]).entry.cubin == expected[arch] for arch in (80, 90) for _ in range(times))
    assert right(1)
    with lookup.bundles()._lock, lookup._lock:
        children = [os.fork() or 0 for _ in range(1)]
        if 0 in children:
            os._exit(0 if right(30) else 1)
    assert right(30)
    print([os.waitpid(pid, 0)[1] for pid in children])
    """
    assert run_script(script, CUFA_BUNDLE_PATH=str(tmp_path / "x")) == "[0]\n"


def test_nvrtc_is_neither_found_nor_loaded_where_a_bundle_serves(tmp_path: Path) -> None:
    compiled = _jit.entry_of(unit())
    path = made(tmp_path / "x", item(unit(), cubin=compiled.cubin, **compiled.meta))
    script = """
    import sys
    sys.modules["cuda"] = sys.modules["cuda.pathfinder"] = sys.modules["cuda.bindings"] = None
    import cufa
    from bundles import unit
    from cufa._compile import jit, nvrtc
    found = jit.bundled(unit())
    entry = jit.entry_of(unit(89))
    print(found.path, len(entry.cubin), entry.meta["registers"], nvrtc._known)
    for ask in (jit.entry_of, jit.is_cached):
        try:
            ask(unit(90))
        except (cufa.CompileError, cufa.MissingKernelError) as error:
            print(type(error).__name__, error)
    """
    environment = {"CUFA_BUNDLE_PATH": str(path), "CUFA_CACHE_DIR": str(tmp_path / "none")}
    same = _jit.source_key(unit(89)) == _jit.source_key(unit(80))
    script = script if same else script.replace("unit(89)", "unit(80)")
    first, second, third = run_script(script, **environment).splitlines()
    assert first == f"{path} {len(compiled.cubin)} {compiled.meta['registers']} None"
    assert second == third and second.startswith(
        "CompileError cufa: NVRTC, which compiles the kernels, cannot be loaded"
    )
    _, missing, also = run_script(script, CUFA_DISABLE_JIT="1", **environment).splitlines()
    assert missing == also
    assert missing.startswith(
        "MissingKernelError cufa: attention_forward_sm90 (f16, head_dim 64, causal) for sm_90 is "
    )
    assert "was built for sm_80; this GPU is sm_90; cufa bundle build --arch sm_90a --operation attention" in missing
    assert not (tmp_path / "none").exists()


def test_what_the_interpreter_can_no_longer_import_is_not_needed(tmp_path: Path) -> None:
    """A kernel that is wanted while the interpreter ends, and bundles that were not opened before."""
    made(tmp_path / "x", item(unit()))
    script = """
    from bundles import unit
    from cufa._compile import jit
    class Final:
        def __del__(self, unit=unit(), bundled=jit.bundled, print=print):
            print(bundled(unit) is None or "served")
    last = Final()
    """
    assert run_script(script, CUFA_BUNDLE_PATH=str(tmp_path / "x")) in ("True\n", "served\n")


def test_what_the_driver_refuses_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(cubin: bytes) -> Any:
        if cubin == b"refused":
            raise cufa.CudaError("cuLibraryLoadData failed: CUDA_ERROR_INVALID_IMAGE")
        return cubin

    monkeypatch.setattr(_jit, "_libraries", {})
    monkeypatch.setattr(_jit, "load_library", load)
    monkeypatch.setattr(_jit._driver, "call", lambda name, library, kernel: library)
    _jit.cache().put(_jit.key_of(unit()), _cache.Entry(b"cached", {}))
    named(monkeypatch, made(tmp_path / "x", item(unit(), cubin=b"refused"), item(unit(90), "90a", b"good")))
    assert _jit._load(unit()) == [b"cached"]
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"the driver refused {unit().words} of {tmp_path / 'x'}: cuLibraryLoadData")
    assert _jit._load(unit(90)) == _jit._load(unit(90)) == [b"good"]


# Why not


def test_why_a_bundle_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.cufa-bundle"
    named(monkeypatch, path)

    def why(wanted: Any, *items: _bundle.Item, **options: Any) -> str:
        monkeypatch.setattr(_lookup, "_known", {})
        made(path, *items, **options)
        sentence = _jit.why_not_bundled(wanted)
        prefix, suffix = f"No bundle serves: {path} ", f"; {command_for(wanted.plan)} makes one that serves."
        assert sentence.startswith(prefix) and sentence.endswith(suffix)
        return sentence.removeprefix(prefix).removesuffix(suffix)

    built = [item("one", "80"), item("two", "86")]
    assert why(unit(90), *built) == "was built for sm_80 and sm_86; this GPU is sm_90"
    assert why(unit(90)) == "was built for nothing; this GPU is sm_90"
    other = {"made_from": ("0.0.9", "3f2a" + "0" * 60)}
    sources = _lookup._sources.version()[:8]
    told = f"was made from cufa 0.0.9 sources 3f2a0000…, this is {cufa.__version__} ({sources}…)"
    assert why(unit(), item("one"), **other) == told
    assert why(unit(element="f32", head_dim=72, head_dim_v=72), item("one")) == (
        "has no attention_forward_sm80 (f32, head_dim 72, causal)"
    )
    assert why(unit(86), item(unit(80, short=True, pack=4))) == (
        "has attention_forward_sm80 (f16, head_dim 64, causal) for other architectures, or other lengths or layouts of "
        "arrays, only"
    )


def test_why_counts_every_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [made(tmp_path / name, item("one")) for name in "ab"]
    named(monkeypatch, *paths, tmp_path / "c")
    sentence = _jit.why_not_bundled(unit(90))
    assert sentence.count("was built for sm_80; this GPU is sm_90") == 2
    assert f"{tmp_path / 'c'}, which CUFA_BUNDLE_PATH names: No such file or directory" in sentence


def test_a_forbidden_compile_says_which_command_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    with pytest.raises(cufa.MissingKernelError) as raised:
        _jit.entry_of(unit())
    assert "No bundle is there; " in str(raised.value) and command_for(unit().plan) in str(raised.value)
    named(monkeypatch, made(tmp_path / "x", item("one", "120")))
    with pytest.raises(cufa.MissingKernelError, match=r"was built for sm_120; this GPU is sm_80; cufa bundle build"):
        _jit.entry_of(unit())
    named(monkeypatch, made(tmp_path / "y", item(unit())))
    assert _jit.entry_of(unit()).cubin == item().cubin


@pytest.mark.parametrize(
    ("plan", "command"),
    [
        (
            plans.forward(bundles.FACTS, 80),
            "sm_80 --operation attention --dtype float16 --head-dim 64 --feature causal",
        ),
        (
            plans.forward(plans.static("bf16", 192, 128, mask="window", varlen=True, sinks=True, softcap=True), 90),
            "sm_90a --operation attention_varlen --dtype bfloat16 --head-dim 192:128 --feature window "
            "--feature softcap --feature sinks",
        ),
        (
            plans.backward(plans.static("f32", 72, 72, mask="causal", alibi=True), 89, deterministic=True),
            "sm_89 --operation attention_backward --dtype float32 --head-dim 72 --feature causal --feature alibi "
            "--feature deterministic",
        ),
        (
            plans.forward(plans.static("bf16", 64, 64, copy_bytes=4), 80),
            "sm_80 --operation attention --dtype bfloat16 --head-dim 64 --feature unaligned",
        ),
        (
            plans.forward(plans.static("bf16", 36, 36, copy_bytes=8), 80),
            "sm_80 --operation attention --dtype bfloat16 --head-dim 36",
        ),
        (align.plan_for(120), "sm_120a --operation attention --dtype bfloat16 --head-dim 64 --feature unaligned"),
    ],
)
def test_the_command_for_a_kernel(plan: Any, command: str) -> None:
    arch = command.split()[0]
    assert command_for(plan) == f"cufa bundle build --arch {command} --out cufa-{arch}.cufa-bundle"


def test_no_command_knows_score_terms_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(type(TERMS[0])):  # type: ignore[misc]
        pass

    wanted = unit(terms=(Own(),))
    assert command_for(wanted.plan) == ""
    named(monkeypatch, made(tmp_path / "x", item("one")))
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    with pytest.raises(cufa.MissingKernelError, match="bundles hold no score terms but cufa's own"):
        _jit.entry_of(wanted)


def test_explain_says_where_a_kernel_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that is not there, without compiling what a bundle has."""
    plan = unit().plan
    grid = SimpleNamespace(blocks=(1,))
    monkeypatch.setattr(_explain, "planned", lambda problem: (problem, None, plan, grid, None, 0))
    monkeypatch.setattr(_explain._problem, "device_name", lambda device: "a GPU")
    problem: Any = SimpleNamespace(device=0, function="attention")
    path = made(tmp_path / "x", item(unit()))
    named(monkeypatch, path)
    monkeypatch.setattr(_jit, "compile_unit", None)
    told = _explain.explained(problem)
    assert (told.state, told.bundle, told.not_bundled, told.registers) == ("bundled", str(path), "", 128)
    assert "kernel is  bundled (compiling it took 1.50 s)" in str(told) and f"bundle     {path}\n" in str(told)
    _jit.cache().put(_jit.key_of(unit()), _cache.Entry(b"cached", bundles.META))
    named(monkeypatch, made(tmp_path / "y", item("one", "120")))
    told = _explain.explained(problem)
    assert (told.state, told.bundle) == ("cached", "")
    assert f"  bundle     No bundle serves: {tmp_path / 'y'} was built for sm_120; this GPU is sm_80; cufa" in str(told)


# Signatures


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """PEM files: two pairs, and what is none."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import x25519

    found = {}

    def keep(name: str, data: bytes) -> None:
        found[name] = tmp_path / f"{name}.pem"
        found[name].write_bytes(data)
        found[name].chmod(0o600)

    private = (pem.Encoding.PEM, pem.PrivateFormat.PKCS8)
    public = (pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    for name in ("ours", "theirs"):
        key = ed25519.Ed25519PrivateKey.generate()
        keep(name, key.private_bytes(*private, pem.NoEncryption()))
        keep(f"{name}.pub", key.public_key().public_bytes(*public))
        keep(f"{name}.locked", key.private_bytes(*private, pem.BestAvailableEncryption(b"secret")))
    other = x25519.X25519PrivateKey.generate()
    keep("other", other.private_bytes(*private, pem.NoEncryption()))
    keep("other.pub", other.public_key().public_bytes(*public))
    keep("junk", b"junk")
    return found


@pytest.mark.parametrize(
    ("signed_by", "accepted", "why"),
    [
        (None, [], ""),
        ("ours", [], ""),
        ("ours", ["ours.pub"], ""),
        ("ours", ["theirs.pub", "ours.pub"], ""),
        (None, ["ours.pub"], "is not signed, and CUFA_BUNDLE_KEYS asks for it; sign it with cufa bundle merge"),
        ("ours", ["theirs.pub"], "is signed by none of the keys in CUFA_BUNDLE_KEYS"),
        ("ours", ["junk"], "holds no Ed25519 public key in PEM"),
        ("ours", ["other.pub"], "holds no Ed25519 public key in PEM"),
        ("ours", ["ours"], "holds no Ed25519 public key in PEM"),
        ("ours", ["missing.pub"], "cannot be read: No such file"),
    ],
)
def test_who_has_signed(
    signed_by: str | None,
    accepted: list[str],
    why: str,
    keys: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cufa._compile.signing import signer_of

    signer = None if signed_by is None else signer_of(keys[signed_by])
    named(monkeypatch, path := made(tmp_path / "x", item(unit()), signer=signer))
    assert (SIGNATURE in contents(path)) == (signed_by is not None)
    monkeypatch.setenv("CUFA_BUNDLE_KEYS", os.pathsep.join(str(keys.get(name, tmp_path / name)) for name in accepted))
    assert (served() is None) == bool(why)
    assert [why in each for each in warnings_of(caplog)] == ([True] if why else [])


def test_a_signature_covers_everything(keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cufa._compile.signing import signer_of

    path = made(tmp_path / "x", item(unit(), cubin=b"right"), signer=signer_of(keys["ours"]))
    whole = path.read_bytes()
    named(monkeypatch, path)
    monkeypatch.setenv("CUFA_BUNDLE_KEYS", str(keys["ours.pub"]))
    assert served() == b"right"
    other = made(tmp_path / "y", item(unit(), cubin=b"wrong"))
    swapped = [
        lambda files: files.update({**contents(other), SIGNATURE: files[SIGNATURE]}),
        lambda files: files.update({name: b"wrong" for name in files if name.startswith("kernels")}),
        lambda files: files.update({MANIFEST: files[MANIFEST] + b" "}),
        lambda files: files.update({SIGNATURE: bytes(64)}),
        lambda files: files.update({SIGNATURE: files[SIGNATURE][:63]}),
        lambda files: files.update({SIGNATURE: files[SIGNATURE] + b"\0"}),
        lambda files: files.pop(SIGNATURE),
    ]
    for change in swapped:
        path.write_bytes(whole)
        rewritten(path, change)
        monkeypatch.setattr(_lookup, "_known", {})
        assert served() is None


def test_keys_that_others_can_write_are_not_believed(
    keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cufa._compile.signing import signer_of

    named(monkeypatch, made(tmp_path / "x", item(unit()), signer=signer_of(keys["ours"])))
    monkeypatch.setenv("CUFA_BUNDLE_KEYS", str(keys["ours.pub"]))
    keys["ours.pub"].chmod(0o666)
    assert served() is None and "can be written by other users" in warnings_of(caplog)[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("junk", "holds no PEM private key"),
        ("ours.pub", "holds no PEM private key"),
        ("other", "is not Ed25519"),
        ("ours.locked", "is protected by a passphrase"),
    ],
)
def test_keys_that_cannot_sign(name: str, why: str, keys: dict[str, Path]) -> None:
    from cufa._compile.signing import signer_of

    with pytest.raises(BundleError, match=why):
        signer_of(keys[name])


def test_signatures_need_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cufa._compile.signing import signer_of

    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    named(monkeypatch, made(tmp_path / "x", item(unit())))
    monkeypatch.setenv("CUFA_BUNDLE_KEYS", str(tmp_path / "key.pem"))
    assert served() is None
    (warning,) = warnings_of(caplog)
    assert "CUFA_BUNDLE_KEYS is set" in warning and "pip install 'cufa[signing]'" in warning
    with pytest.raises(BundleError, match=r"pip install 'cufa\[signing\]'"):
        signer_of(tmp_path / "key.pem")


# Cost


def test_zipfile_is_imported_for_bundles_alone(tmp_path: Path) -> None:
    script = """
    import sys
    from bundles import unit
    for name in ("zipfile", "importlib.metadata", "cryptography"):
        sys.modules.pop(name, None)
    from cufa._compile import jit
    jit.bundled(unit())
    print(*(name in sys.modules for name in ("zipfile", "importlib.metadata", "cryptography")))
    """
    assert run_script(script, CUFA_CACHE_DIR=str(tmp_path)) == "False False False\n"
    assert run_script(script, CUFA_BUNDLE_PATH=str(made(tmp_path / "x", item(unit())))) == "True False False\n"
