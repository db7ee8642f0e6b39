"""Every CUFA_* environment variable: default, valid values, and the whole message about a wrong one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cufa._compile import env as _env

FLAGS: dict[str, tuple[Callable[[], bool], bool]] = {
    "CUFA_CACHE": (_env.cache_enabled, True),
    "CUFA_CACHE_TRUST_SHARED": (_env.cache_trust_shared, False),
    "CUFA_DEBUG": (_env.debug, False),
    "CUFA_DISABLE_JIT": (_env.jit_disabled, False),
    "CUFA_LINEINFO": (_env.lineinfo, False),
}
PATHS: dict[str, Callable[[], Path | None]] = {
    "CUFA_CACHE_DIR": _env.cache_dir,
    "CUFA_CACHE_READONLY_DIR": _env.cache_read_only_dir,
    "CUFA_RECORD": _env.record_file,
    "CUFA_SAVE_SOURCE": _env.save_source_dir,
}
PATH_LISTS: dict[str, Callable[[], tuple[Path, ...]]] = {
    "CUFA_BUNDLE_PATH": _env.bundle_path,
    "CUFA_BUNDLE_KEYS": _env.bundle_keys,
}
READERS: dict[str, Callable[[], object]] = {
    **{name: reader for name, (reader, _) in FLAGS.items()},
    **PATHS,
    **PATH_LISTS,
    "CUFA_CACHE_MAX_SIZE": _env.cache_max_size,
    "CUFA_PROGRESS": _env.progress,
}
MEANINGS = {variable.name: variable.meaning for variable in _env.VARIABLES}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine that runs the tests, and a home directory that does not exist."""
    for name in [*os.environ]:
        if name.startswith(("CUFA_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")
    _env._absolute.cache_clear()


def fails_with(message: str) -> pytest.RaisesExc[ValueError]:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_the_table_holds_every_variable_that_is_read() -> None:
    names = [variable.name for variable in _env.VARIABLES]
    assert len(names) == len(set(names))
    assert set(names) == set(READERS)
    source = Path(_env.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'"(CUFA_\w+)"', source)) == set(names)


@pytest.mark.parametrize("variable", _env.VARIABLES, ids=lambda variable: variable.name)
def test_every_variable_is_described_in_one_line(variable: _env.Variable) -> None:
    assert re.fullmatch(r"CUFA_[A-Z_]+", variable.name)
    assert variable.default
    assert "\n" not in variable.meaning
    assert not variable.meaning.endswith(".")  # it ends a message, which adds the full stop


@pytest.mark.parametrize("variable", _env.VARIABLES, ids=lambda variable: variable.name)
def test_the_written_default_means_the_same_as_nothing(
    variable: _env.Variable, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = READERS[variable.name]()
    for blank in ("", " ", "\t"):
        monkeypatch.setenv(variable.name, blank)
        assert READERS[variable.name]() == expected
    if variable.kind not in ("path", "paths"):  # the default of a path is described in words
        monkeypatch.setenv(variable.name, variable.default)
        assert READERS[variable.name]() == expected


@pytest.mark.parametrize("name", FLAGS)
def test_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, default = FLAGS[name]
    assert read() is default
    for text, value in (("0", False), ("1", True), (" 1 ", True), ("0\n", False)):
        monkeypatch.setenv(name, text)
        assert read() is value


@pytest.mark.parametrize("text", ["yes", "true", "2", "01", "-1", "auto", "\u0661"])
@pytest.mark.parametrize("name", FLAGS)
def test_flag_that_cannot_be_read(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with fails_with(f"{name}: expected 0 or 1, got {text!r}; {MEANINGS[name]}."):
        FLAGS[name][0]()


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _env.progress() is None
    for text, value in (("0", False), ("1", True), ("auto", None), ("AUTO", None), (" auto ", None)):
        monkeypatch.setenv("CUFA_PROGRESS", text)
        assert _env.progress() is value


def test_progress_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_PROGRESS", "Always")
    with fails_with(
        "CUFA_PROGRESS: expected 0, 1 or auto, got 'Always'; "
        "1 says on stderr what is being compiled, 0 does not, auto does on a terminal."
    ):
        _env.progress()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1048576", 1048576),
        ("3k", 3 * 1024),
        ("3K", 3 * 1024),
        ("512M", 512 * 1024**2),
        (" 512 m ", 512 * 1024**2),
        ("2G", 2 * 1024**3),
        ("0007", 7),
        ("9" * 18, 10**18 - 1),
    ],
)
def test_cache_max_size(text: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_MAX_SIZE", text)
    assert _env.cache_max_size() == value


def test_cache_max_size_default() -> None:
    assert _env.cache_max_size() == 512 * 1024**2


@pytest.mark.parametrize(
    "text", ["-1", "+1", "1.5G", "1e9", "512MB", "1T", "M", "0x10", "1_000", "1  M", "\u0661", "9" * 19]
)
def test_cache_max_size_that_cannot_be_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_MAX_SIZE", text)
    with fails_with(
        f"CUFA_CACHE_MAX_SIZE: expected a number of bytes such as 1048576, 512M or 2G, got {text!r}; "
        "most bytes of kernels kept on disk, the least recently used going first."
    ):
        _env.cache_max_size()


# No surrogates: os.environ uses them for bytes that are not UTF-8, and then only some of them.
TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


@given(text=TEXT | st.text("0123456789KMG autohe.-", max_size=8))
def test_any_text_is_read_or_named_in_a_value_error(text: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, read in READERS.items():
            monkeypatch.setenv(name, text)
            try:
                read()
            except ValueError as error:
                assert str(error).startswith(f"{name}: expected ")
                assert str(error).endswith(f", got {text.strip()!r}; {MEANINGS[name]}.")
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", PATHS)
def test_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, value in (
        ("/opt/kernels", Path("/opt/kernels")),
        (" /opt/kernels ", Path("/opt/kernels")),
        ("/opt/my kernels/", Path("/opt/my kernels")),
        ("/opt/../srv/./k", Path("/srv/k")),
        ("~", Path("/home/someone")),
        ("~/kernels", Path("/home/someone/kernels")),
        ("kernels", tmp_path / "kernels"),
        ("./~kernels", tmp_path / "~kernels"),
        ("$HOME/kernels", tmp_path / "$HOME" / "kernels"),
    ):
        monkeypatch.setenv(name, text)
        assert PATHS[name]() == value


@pytest.mark.parametrize("name", PATHS)
def test_path_of_an_unknown_user(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "~no such user/kernels")
    with fails_with(
        f"{name}: expected a path whose home directory can be found, got '~no such user/kernels'; {MEANINGS[name]}."
    ):
        PATHS[name]()


@pytest.mark.parametrize("name", PATH_LISTS)
def test_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = PATH_LISTS[name]
    for parts, value in (
        ([""], ()),
        (["/opt/a"], (Path("/opt/a"),)),
        (["/opt/b", "", " ~/a ", "c/../d"], (Path("/opt/b"), Path("/home/someone/a"), tmp_path / "d")),
    ):
        monkeypatch.setenv(name, os.pathsep.join(parts))
        assert read() == value
    text = os.pathsep.join(["/opt/a", "~no such user/b"])
    monkeypatch.setenv(name, text)
    with fails_with(f"{name}: expected a path whose home directory can be found, got {text!r}; {MEANINGS[name]}."):
        read()


def test_bundles_are_installed_beside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _env.bundle_dir() == Path("/home/someone/.cache/cufa/bundles")
    monkeypatch.delenv("HOME")
    assert _env.bundle_dir() is None


@pytest.mark.parametrize("name", ["CUFA_CACHE_READONLY_DIR", "CUFA_SAVE_SOURCE"])
def test_path_without_default(name: str) -> None:
    assert PATHS[name]() is None


@pytest.mark.parametrize(
    ("own", "xdg", "home", "expected"),
    [
        ("/own", "/xdg", "/home/me", "/own"),
        ("", "/xdg", "/home/me", "/xdg/cufa"),
        (None, "/xdg", "/home/me", "/xdg/cufa"),
        (None, "", "/home/me", "/home/me/.cache/cufa"),
        (None, None, "/home/me", "/home/me/.cache/cufa"),
        (None, "relative", "/home/me", "/home/me/.cache/cufa"),
        (None, "~/xdg", "/home/me", "/home/me/.cache/cufa"),
        (None, "/xdg", None, "/xdg/cufa"),
        (None, None, "", None),
        (None, None, "relative", None),
        (None, None, None, None),
    ],
)
def test_cache_dir_follows_the_xdg_rules(
    own: str | None, xdg: str | None, home: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CUFA_CACHE_DIR", own), ("XDG_CACHE_HOME", xdg), ("HOME", home)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert _env.cache_dir() == (None if expected is None else Path(expected))


def test_a_later_chdir_does_not_move_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUFA_CACHE_DIR", "kernels")
    assert _env.cache_dir() == tmp_path / "kernels"
    monkeypatch.chdir("/")
    assert _env.cache_dir() == tmp_path / "kernels"
    monkeypatch.setenv("CUFA_CACHE_DIR", "others")
    assert _env.cache_dir() == Path("/others")


@pytest.mark.parametrize("name", PATHS)
def test_a_relative_path_in_a_directory_that_is_gone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv(name, "kernels")
    with fails_with(
        f"{name}: expected an absolute path, because the working directory is gone, got 'kernels'; {MEANINGS[name]}."
    ):
        PATHS[name]()
    monkeypatch.setenv(name, "/kernels")
    assert PATHS[name]() == Path("/kernels")


def test_describe_without_any_variable_set() -> None:
    assert _env.describe() == [(v.name, v.default, v.meaning) for v in _env.VARIABLES]


def test_describe_shows_wrong_values_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE", "Nope")
    monkeypatch.setenv("CUFA_CACHE_DIR", "~no such user")
    monkeypatch.setenv("CUFA_LINEINFO", "")
    values = {name: value for name, value, _ in _env.describe()}
    assert values["CUFA_CACHE"] == "Nope"
    assert values["CUFA_CACHE_DIR"] == "~no such user"
    assert values["CUFA_LINEINFO"] == "0"
    assert [name for name, _, _ in _env.describe()] == [variable.name for variable in _env.VARIABLES]
