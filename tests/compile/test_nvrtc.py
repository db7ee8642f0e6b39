"""Which NVRTC it is: every byte counts, reading is done once, and nothing that is remembered is believed blindly."""

from __future__ import annotations

import hashlib
import os
import shutil
import site
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cufa._compile import jit as _jit
from cufa._compile import lease as _lease
from cufa._compile import nvrtc as _nvrtc
from cufa._compile.cache import CubinCache
from cufa._compile.nvrtc import Loaded, Nvrtc

ROOT = Path(__file__).parents[2]


@pytest.fixture
def notes(tmp_path: Path) -> CubinCache:
    return CubinCache(tmp_path / "store")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library with builtins in a wheel, which is found, loaded and by now old enough to be remembered."""
    packages = tmp_path / "site-packages"
    folder = packages / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvrtc.so.13").write_bytes(bytes(range(256)) * 40)
    (folder / "libnvrtc-builtins.so.13.5").write_bytes(b"builtins" * 100)
    path = str(folder / "libnvrtc.so.13")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(_nvrtc, "_is_loaded", lambda: False)
    monkeypatch.setattr(_nvrtc, "load", fake_load(path))
    monkeypatch.setattr(_nvrtc, "RECENT_SECONDS", -1.0)
    monkeypatch.setattr(_nvrtc, "_known", None)
    monkeypatch.setattr(_nvrtc, "_settled", None)
    return Path(path)


def fake_load(path: str, found_via: str = "site-packages", version: tuple[int, int] = (13, 5)) -> Any:
    def load() -> Loaded:
        return Loaded(path, found_via, version, (80, 90), None)

    load.cache_clear = lambda: None  # type: ignore[attr-defined]
    return load


def in_new_process(notes: CubinCache | None) -> Nvrtc:
    """What a new process finds, and nothing settles."""
    _nvrtc.forget()
    return _nvrtc.find(lambda: None if notes is None else CubinCache(notes.path))


def must_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise AssertionError("the library was read")

    monkeypatch.setattr(hashlib, "file_digest", fail)


def must_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise AssertionError("the library was loaded")

    fail.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(_nvrtc, "load", fail)


# Which files


LAYOUTS: dict[str, tuple[dict[str, str], str, set[str]]] = {
    "wheel": (
        {"libnvrtc.so.13": "", "libnvrtc-builtins.so.13.5": "", "libother.so": ""},
        "libnvrtc.so.13",
        {"libnvrtc.so.13", "libnvrtc-builtins.so.13.5"},
    ),
    "toolkit": (
        {
            "libnvrtc.so.13.5.37": "",
            "libnvrtc.so.13": "libnvrtc.so.13.5.37",
            "libnvrtc.so": "libnvrtc.so.13",
            "libnvrtc-builtins.so.13.5.37": "",
            "libnvrtc-builtins.so.13.5": "libnvrtc-builtins.so.13.5.37",
            "libnvrtc-builtins.so": "libnvrtc-builtins.so.13.5",
            "libnvrtc-builtins_static.a": "",
        },
        "libnvrtc.so.13",
        {"libnvrtc.so.13.5.37", "libnvrtc-builtins.so.13.5.37"},
    ),
    "conda": (
        {
            "targets/libnvrtc.so.12.9.86": "",
            "targets/libnvrtc-builtins.so.12.9.86": "",
            "libnvrtc.so.12": "targets/libnvrtc.so.12.9.86",
            "libnvrtc-builtins.so.12.9": "targets/libnvrtc-builtins.so.12.9.86",
        },
        "libnvrtc.so.12",
        {"targets/libnvrtc.so.12.9.86", "targets/libnvrtc-builtins.so.12.9.86"},
    ),
    "conda, builtins without a link": (
        {
            "targets/libnvrtc.so.12.9.86": "",
            "targets/libnvrtc-builtins.so.12.9": "",
            "libnvrtc.so.12": "targets/libnvrtc.so.12.9.86",
        },
        "libnvrtc.so.12",
        {"targets/libnvrtc.so.12.9.86", "targets/libnvrtc-builtins.so.12.9"},
    ),
    "Windows": (
        {"nvrtc64_130_0.dll": "", "nvrtc-builtins64_135.dll": "", "nvrtc64_130_0.alt.dll": ""},
        "nvrtc64_130_0.dll",
        {"nvrtc64_130_0.dll", "nvrtc-builtins64_135.dll"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_builtins_are_found_beside_the_library(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    files, library, expected = LAYOUTS[layout]
    for name, target in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target) if target else path.write_text(name)
    found = _nvrtc._files_of(str(tmp_path / library))
    assert {Path(path).relative_to(tmp_path).as_posix() for path in found} == expected
    assert found[0] == os.path.realpath(tmp_path / library)


def test_builtins_that_the_loader_might_take_count_too(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "libnvrtc-builtins.so.13.5").write_bytes(b"others")
    before = _nvrtc._digest(_nvrtc._files_of(str(library)))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"relative:{tmp_path / 'other'}:{tmp_path / 'missing'}:")
    assert _nvrtc._digest(_nvrtc._files_of(str(library))) != before


# Every byte


@settings(max_examples=60)
@given(data=st.data(), size=st.integers(1, 300_000), in_builtins=st.booleans())
def test_a_flipped_bit_anywhere_is_another_build(data: st.DataObject, size: int, in_builtins: bool) -> None:
    offset, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    content = bytearray(size)
    with tempfile.TemporaryDirectory() as folder:
        library, builtins = Path(folder, "libnvrtc.so.13"), Path(folder, "libnvrtc-builtins.so.13.5")
        for path in (library, builtins):
            path.write_bytes(content)
        before = _nvrtc._digest(_nvrtc._files_of(str(library)))
        content[offset] ^= 1 << bit
        (builtins if in_builtins else library).write_bytes(content)
        assert _nvrtc._digest(_nvrtc._files_of(str(library))) != before


def test_a_build_is_the_same_wherever_it_lies(library: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(library.parent, elsewhere)
    first, second = (_nvrtc._digest(_nvrtc._files_of(str(path / library.name))) for path in (library.parent, elsewhere))
    assert first == second
    (elsewhere / "libnvrtc-builtins.so.13.5").unlink()
    assert _nvrtc._digest(_nvrtc._files_of(str(elsewhere / library.name))) != first


# What is remembered


def test_a_new_process_neither_loads_nor_reads_it(
    library: Path, notes: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = in_new_process(notes)
    assert (found.path, found.version, found.archs) == (str(library), (13, 5), (80, 90))
    assert notes.stats().entries == 0  # notes are none
    must_not_read(monkeypatch)
    must_not_load(monkeypatch)
    assert in_new_process(notes) == found


def test_where_nothing_can_be_noted_it_is_read_once_per_process(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    file_digest = hashlib.file_digest

    def counted(file: Any, digest: Any) -> Any:
        read.append(file.name)
        return file_digest(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    for cache in (None, CubinCache(None)):
        read.clear()
        _nvrtc.forget()
        found = [_nvrtc.find(lambda cache=cache: cache) for _ in range(3)]
        assert found == [_nvrtc.settle(lambda cache=cache: cache)] * 3
        assert len(read) == 2  # the library and its builtins


def alter(path: Path) -> None:
    """Change a byte and nothing else that a program can set."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["libnvrtc.so.13", "libnvrtc-builtins.so.13.5"])
def test_a_file_that_changed_is_read_again(name: str, library: Path, notes: CubinCache) -> None:
    before = in_new_process(notes)
    alter(library.with_name(name))
    assert in_new_process(notes).build != before.build


def test_more_builtins_are_another_build(library: Path, notes: CubinCache) -> None:
    before = in_new_process(notes)
    library.with_name("libnvrtc-builtins.so.13.6").write_bytes(b"more")
    assert in_new_process(notes).build != before.build


def test_a_library_that_changed_just_now_is_not_remembered(
    library: Path, notes: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the resolution of times it could change again, and they would not tell."""
    monkeypatch.setattr(_nvrtc, "RECENT_SECONDS", 60.0)
    in_new_process(notes)
    assert notes.path is not None and not list(notes.path.rglob("*.note"))


def test_what_is_loaded_already_is_taken(library: Path, notes: CubinCache, monkeypatch: pytest.MonkeyPatch) -> None:
    other = library.with_name("libnvrtc.so.12")
    other.write_bytes(b"another")
    in_new_process(notes)
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(other), "was-already-loaded-from-elsewhere", (12, 9)))
    assert in_new_process(notes).version == (13, 5)
    monkeypatch.setattr(_nvrtc, "_is_loaded", lambda: True)
    assert in_new_process(notes).version == (12, 9)


def install_a_package(packages: Path) -> None:
    (packages / "other-1.0.dist-info").mkdir()


def install_below_nvidia(packages: Path) -> None:
    (packages / "nvidia" / "cuda_nvrtc").mkdir()


def install_beside(packages: Path) -> None:
    (packages / "nvidia" / "cu13" / "lib" / "libnvrtc.so.14").write_bytes(b"newer")


@pytest.mark.parametrize("change", [install_a_package, install_below_nvidia, install_beside])
def test_what_is_installed_later_is_searched_for(
    change: Callable[[Path], None], library: Path, notes: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_new_process(notes)
    change(library.parents[3])
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(library), version=(14, 0)))
    assert in_new_process(notes).version == (14, 0)


def test_a_conda_environment_is_searched_anew(
    library: Path, notes: CubinCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_new_process(notes)
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(library), "conda", version=(14, 0)))
    assert in_new_process(notes).version == (13, 5)
    (tmp_path / "conda" / "lib").mkdir(parents=True)
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    assert in_new_process(notes).version == (14, 0)


@pytest.mark.parametrize("found_via", ["system-search", "CUDA_PATH", "was-already-loaded-from-elsewhere", "None"])
def test_what_a_linker_finds_is_not_remembered(
    found_via: str, library: Path, notes: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(library), found_via))
    in_new_process(notes)
    must_not_read(monkeypatch)  # what is in the file is
    taken: list[Path] = []
    take = _lease.take
    monkeypatch.setattr(_lease, "take", lambda path, *rest: taken.append(path) or take(path, *rest))
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(library), found_via, version=(12, 9)))
    assert in_new_process(notes).version == (12, 9)
    if found_via in ("system-search", "CUDA_PATH"):  # which is known, so that nobody waits for a note
        assert not taken


def test_damaged_notes_are_made_again(library: Path, notes: CubinCache) -> None:
    before = in_new_process(notes)
    assert notes.path is not None
    for note in notes.path.rglob("*.note"):
        note.write_bytes(note.read_bytes()[:-1])
    assert in_new_process(notes) == before
    assert len(list(notes.path.rglob("*.note"))) == 2


@pytest.mark.parametrize("note", [{}, {"build": 1}, {"build": "b", "version": 13, "archs": []}, {"path": ["x"]}])
def test_notes_that_make_no_sense_are_not_believed(note: dict[str, Any], library: Path, notes: CubinCache) -> None:
    before = in_new_process(notes)
    assert notes.path is not None
    keys = [path.parent.name + path.stem for path in notes.path.rglob("*.note")]
    for key in keys:
        assert notes.keep_note(key, note)
        assert in_new_process(notes)[1:] == before[1:]


def test_notes_are_trusted_as_entries_are(library: Path, notes: CubinCache, monkeypatch: pytest.MonkeyPatch) -> None:
    in_new_process(notes)
    assert notes.path is not None
    for note in notes.path.rglob("*.note"):
        note.chmod(0o666)
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(library), version=(14, 0)))
    assert in_new_process(notes).version == (14, 0)


# What compiles


def test_what_is_loaded_settles_the_key(
    library: Path, notes: CubinCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process expects one NVRTC, and when it is to compile another one has been loaded."""
    monkeypatch.setenv("CUFA_CACHE_DIR", str(notes.path))
    other = library.with_name("libnvrtc.so.12")
    other.write_bytes(b"another")
    in_new_process(notes)
    _nvrtc.forget()
    unit = _jit.unit_of(plans.forward(plans.static("bf16", 64, 64), 80))
    expected = _jit.key_of(unit)
    monkeypatch.setattr(_nvrtc, "load", fake_load(str(other), "was-already-loaded-from-elsewhere", (12, 9)))
    asked = []

    def compile_source(source: str, options: list[str], what: str, texts: Any) -> _jit.Compiled:
        asked.append(options)
        return _jit.Compiled(b"cubin", "Used 8 registers, 0 bytes spill stores, 0 bytes spill loads", 0.0)

    monkeypatch.setattr(_jit, "compile_source", compile_source)
    assert _jit.key_of(unit) == expected
    _jit.entry_of(unit)
    assert len(asked) == 1
    assert _jit.key_of(unit) != expected and _jit.nvrtc().version == (12, 9)
    assert _jit.cache().get(expected) is None
    assert _jit.cache().get(_jit.key_of(unit)) is not None


def run_script(script: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_process_whose_kernels_are_cached_does_not_load_nvrtc(tmp_path: Path) -> None:
    script = """
        import plans
        from cufa._compile import jit as _jit
        from cufa._compile import nvrtc as _nvrtc
        unit = _jit.unit_of(plans.forward(plans.static("bf16", 64, 64), 80))
        print(_jit.key_of(unit), _nvrtc._is_loaded())
        print(_jit.nvrtc() == _nvrtc.settle(lambda: None))
    """
    outputs = [run_script(script, CUFA_CACHE_DIR=str(tmp_path / "store")).split() for _ in range(2)]
    (key, *first), (same, *second) = outputs
    assert key == same
    assert (first, second) == (["True", "True"], ["False", "True"])


def test_pathfinder_finds_a_conda_environment(tmp_path: Path) -> None:
    """The library of this environment, laid out as conda does."""
    path = Path(_nvrtc.load().path)
    (tmp_path / "lib").mkdir()
    for file in (path, *path.parent.glob("libnvrtc-builtins.so*")):
        (tmp_path / "lib" / file.name).symlink_to(file)
    script = """
        import site
        site.getsitepackages = lambda: []
        from cufa._compile import jit as _jit
        from cufa._compile import nvrtc as _nvrtc
        found = _jit.nvrtc()
        print(found.found_via, _nvrtc._is_loaded(), found.build, found.path)
    """
    environment = {"CONDA_PREFIX": str(tmp_path), "CUFA_CACHE_DIR": str(tmp_path / "store")}
    build = _nvrtc._digest(_nvrtc._files_of(str(path)))
    for loaded in ("True", "False"):
        assert run_script(script, **environment).split() == ["conda", loaded, build, str(tmp_path / "lib" / path.name)]


def test_of_many_processes_one_reads_it(tmp_path: Path) -> None:
    script = """
        import hashlib, sys
        from cufa._compile import jit as _jit
        file_digest, read = hashlib.file_digest, []
        hashlib.file_digest = lambda file, digest: read.append(file.name) or file_digest(file, digest)
        sys.stdin.readline()
        print(_jit.nvrtc().build, len(read))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUFA_CACHE_DIR": str(tmp_path / "store")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    outputs = [process.communicate("\n", timeout=60)[0].split() for process in processes]
    assert len({build for build, _ in outputs}) == 1
    assert sorted(int(count) for _, count in outputs) == [0, 0, 0, 0, 2]
    assert not list((tmp_path / "store").rglob(".*"))
