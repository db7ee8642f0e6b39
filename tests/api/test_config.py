"""The report on this machine where its surroundings are odd."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pytest

import cufa


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_show_config_of_a_path_that_is_no_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_CACHE_DIR", os.fsdecode(b"/tmp/caf\xe9/\xc3\xa9"))
    printed = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    cufa.show_config()
    printed.flush()
    text = printed.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    name = "\\xe9" if encoding == "ascii" else "é"
    assert re.search(r"directory +/tmp/caf\\udce9/" + re.escape(name) + "$", text, re.MULTILINE)


def test_show_config_where_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("CUFA_CACHE_DIR", "a cache of this test alone")
    cufa.show_config()
    assert "ValueError: CUFA_CACHE_DIR: expected an absolute path, because the working" in capsys.readouterr().out
