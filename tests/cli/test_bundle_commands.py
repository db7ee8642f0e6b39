"""The commands on bundles: what they print, write and refuse, and a wheel that pip installs."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import places
import pytest
from bundles import contents, item, made, rewritten, unit
from click.testing import CliRunner, Result

import cufa
from cufa._bundles import files as _files
from cufa._cli.bundle import BUNDLE_COMMANDS
from cufa._cli.main import cufa as command
from cufa._compile import cache as _cache
from cufa._compile import jit as _jit
from cufa._compile.bundle import SIGNATURE, BundleError, open_bundle

ROOT = Path(__file__).parents[2]
FILES = sorted(BUNDLE_COMMANDS.keys() - {"build"})


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.use(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_files, "gpus", list)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made(tmp_path / "some.cufa-bundle", item(unit()), item(unit(90), "90a", bytes(5000)))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["bundle", *map(str, arguments)])


def said(*arguments: object) -> str:
    """What a command prints that succeeds."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def fails(why: str, *arguments: object) -> None:
    """A command ends with a sentence and status 1, as `main` has it, and leaves the directory as it was."""
    before = sorted(Path().rglob("*"))
    done = run(*arguments)
    assert isinstance(done.exception, (BundleError, OSError)) and why in str(done.exception), repr(done.exception)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("name", FILES)
def test_every_command_has_help(name: str) -> None:
    text = said(name, "--help")
    assert f"bundle {name}" in text and name in said("--help")


@pytest.mark.parametrize("name", ["verify", "list", "install", "extract", "merge", "diff", "wheel"])
def test_bundles_that_are_none_end_in_one_sentence(name: str, tmp_path: Path, path: Path) -> None:
    bad = tmp_path / "bad"
    arguments = {
        "extract": [bad, "out"],
        "merge": ["out", path, bad],
        "diff": [path, bad],
        "wheel": [bad, "--version", "1", "--out", "out"],
    }.get(name, [bad])
    fails("No such file", name, *arguments)
    bad.write_bytes(path.read_bytes()[:-7])
    fails("is cut off, altered or no bundle", name, *arguments)
    done = subprocess.run(
        [sys.executable, "-m", "cufa", "bundle", name, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"cufa: {bad} is cut off")


@pytest.mark.parametrize("name", ["install", "extract", "merge", "wheel"])
def test_a_damaged_kernel_stops_whatever_would_pass_it_on(name: str, path: Path) -> None:
    rewritten(
        path, lambda files: files.update({each: bytes(4999) + b"x" for each in files if files[each] == bytes(5000)})
    )
    arguments = {"extract": ["out"], "wheel": ["--version", "1", "--out", "out"]}.get(name, [])
    fails("its SHA-256 is another", name, *(["out"] if name == "merge" else []), path, *arguments)


# verify


def test_verify(path: Path) -> None:
    text = said("verify", path)
    assert text.startswith(f"{path}: 2 kernels, ") and "whole, not signed" in text and "no GPU is here; --arch" in text
    assert "  sm_80: serves with 1 kernel\n  sm_90: serves with 1 kernel\n" in said(
        "verify", path, "--arch", "sm_90a,80"
    )
    done = run("verify", path, "--arch", "sm_86")
    assert done.exit_code == 1
    assert "  sm_86: does not serve: it was built for sm_80 and sm_90a, and sm_86, which could run" in done.output
    done = run("verify", path, "--arch", "sm_120a")
    assert done.exit_code == 1
    assert (
        "  sm_120: does not serve: it was built for sm_80 and sm_90a; cufa bundle build --arch sm_120a" in done.output
    )


def test_verify_asks_the_gpus_of_this_machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "gpus", lambda: [80, 100])
    done = run("verify", path)
    assert done.exit_code == 1 and "sm_80: serves" in done.output and "sm_100: does not serve" in done.output


def test_verify_as_json(path: Path) -> None:
    found = json.loads(said("verify", path, "--arch", "80", "--json"))
    assert found["good"] and found["kernels"] == 2 and not found["signed"] and found["cufa"] == cufa.__version__
    assert found["serving"] == {"sm_80": {"kernels": 1, "why_not": ""}}
    done = run("verify", "nothing", "--json")
    assert done.exit_code == 1 and "No such file" in json.loads(done.output)["error"]


def test_verify_names_every_damaged_kernel(path: Path) -> None:
    rewritten(path, lambda files: files.update({name: files[name][::-1] for name in files if "-80" in name}))
    done = run("verify", path)
    assert done.exit_code == 1 and done.output.count("damaged: ") == 1 and "-80.cubin is not what" in done.output


def test_verify_of_other_sources(tmp_path: Path) -> None:
    old = made(tmp_path / "old", item(), made_from=("0.0.9", "3f" * 32))
    done = run("verify", old, "--arch", "80")
    assert done.exit_code == 1
    assert f"it was made from cufa 0.0.9 sources 3f3f3f3f…, this is {cufa.__version__} (" in done.output


def test_verify_says_who_could_have_written_it(path: Path) -> None:
    path.chmod(0o666)
    done = run("verify", path)
    assert done.exit_code == 1 and f"is not used here: {path} can be written by other users" in done.output


def test_an_architecture_that_is_none(path: Path) -> None:
    done = run("verify", path, "--arch", "hopper")
    assert done.exit_code == 2 and "'hopper' is no architecture; write sm_80 or sm_90a." in done.output


# list


def test_list_of_a_bundle(path: Path) -> None:
    lines = said("list", path).splitlines()
    assert lines[0].split() == ["what", "target", "size", "registers", "spill_bytes", "key"]
    assert [line.split()[-5:-1] for line in lines[1:]] == [["80", "18", "128", "0"], ["90a", "5000", "128", "0"]]
    assert [row["target"] for row in json.loads(said("list", path, "--json"))] == ["80", "90a"]


def test_list_of_what_is_found(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("list").startswith("No bundle is here")
    said("install", path)
    monkeypatch.setenv("CUFA_BUNDLE_PATH", str(tmp_path / "missing"))
    missing, installed = json.loads(said("list", "--json"))
    assert missing["kernels"] is None and "No such file" in missing["unused"]
    assert installed["from"] == "installed" and installed["targets"] == ["sm_80", "sm_90a"] and not installed["unused"]
    assert "sm_80, sm_90a" in said("list")


# install


def test_what_is_installed_is_found_and_private(path: Path, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert said("install", path) == f"installed {tmp_path}/cache/bundles/some.cufa-bundle\n"
    finally:
        os.umask(old)
    there = tmp_path / "cache" / "bundles" / "some.cufa-bundle"
    assert there.read_bytes() == path.read_bytes()
    assert [each.stat().st_mode & 0o777 for each in (there, there.parent, there.parent.parent)] == [0o600, 0o700, 0o700]
    path.unlink()
    found = _jit.bundled(unit())
    assert found is not None and found.path == there
    _jit.cache().clear()
    assert there.exists()  # as it is no entry of the cache
    assert said("uninstall", "some") == f"removed {there}\n"
    fails("no bundle some is installed; there are: none", "uninstall", "some")


@pytest.mark.parametrize("name", ["../x", "../../some.cufa-bundle", "/etc/passwd", ""])
def test_only_installed_bundles_are_uninstalled(name: str, path: Path) -> None:
    said("install", path)
    fails("is installed; there are: some.cufa-bundle", "uninstall", name)


def test_a_bundle_of_another_name_gets_the_suffix(path: Path, tmp_path: Path) -> None:
    assert said("install", path.rename(tmp_path / "plain")).endswith("/bundles/plain.cufa-bundle\n")


def test_installing_where_others_can_write(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache" / "bundles").mkdir(parents=True)
    (tmp_path / "cache" / "bundles").chmod(0o777)
    fails("bundles are not installed: ", "install", path)
    (tmp_path / "cache" / "bundles").rmdir()
    (tmp_path / "cache" / "bundles").symlink_to(tmp_path)
    fails("is a symbolic link", "install", path)
    monkeypatch.setenv("CUFA_CACHE_TRUST_SHARED", "1")
    said("install", path)


def test_installing_without_a_home(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUFA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    fails("there is no home directory to install bundles in; set CUFA_CACHE_DIR", "install", path)


def test_a_full_disk_leaves_nothing_installed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said("install", path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "fsync", full)
    fails("No space left", "install", path)


def test_installing_sweeps_what_killed_ones_have_left(path: Path, tmp_path: Path) -> None:
    said("install", path)
    folder = tmp_path / "cache" / "bundles"
    for name, age in (("old", 2 * _cache.STALE_SECONDS), ("new", 0.0)):
        (folder / f".tmp-{name}").write_bytes(b"")
        os.utime(folder / f".tmp-{name}", (time.time() - age,) * 2)
    said("install", path)
    assert sorted(each.name for each in folder.iterdir()) == [".tmp-new", "some.cufa-bundle"]


# extract


def test_extract(path: Path, tmp_path: Path) -> None:
    assert said("extract", path, "out") == "wrote 2 kernels and manifest.json to out\n"
    with open_bundle(path) as bundle:
        expected = {_files.extracted_name(each): bundle.cubin(each) for each in bundle.manifest.entries}
        expected["manifest.json"] = bundle.text
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()} == expected
    fails("out is not an empty directory; name a new one", "extract", path, "out")
    fails("is not an empty directory", "extract", path, path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    said("extract", path, "link")
    assert len([*(tmp_path / "empty").iterdir()]) == 3 and not [*tmp_path.glob(".tmp-*")]


def test_extracting_onto_a_full_disk_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if len(data) == 5000:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    fails("No space left", "extract", path, "out")


# merge and diff


def test_merge_and_diff(tmp_path: Path) -> None:
    one = made(tmp_path / "one", item("a"), item("b"), preset="inference")
    two = made(tmp_path / "two", item("b"), item("c", "90a"), preset="training")
    assert said("merge", "both", one, two) == "wrote 3 kernels to both\n"
    with open_bundle("both") as bundle:
        assert bundle.manifest.preset is None and len(bundle.manifest.entries) == 3
    assert said("diff", one, one) == ""
    done = run("diff", one, "both")
    assert done.exit_code == 1 and done.output.count("only in both: a_kernel") == 1
    found = json.loads(run("diff", "both", two, "--json").output)
    assert [len(found[name]) for name in ("only_first", "only_second", "different")] == [1, 0, 0]
    assert run("merge", "again", two, one).exit_code == 0
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "both").keys()
    fails("both exists; name a new file", "merge", "both", one)


def test_merging_what_differs(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", item("a", cubin=b"1")), made(tmp_path / "two", item("a", cubin=b"2"))
    fails(f"{one} and {two} hold different machine code of a_kernel (f16) for sm_80", "merge", "out", one, two)
    said("merge", "out", one, two, "--keep-first")
    assert run("diff", "out", one).exit_code == 0
    done = run("diff", "out", two)
    assert done.exit_code == 1 and done.output.startswith("different: a_kernel (f16) for sm_80, built for sm_80 (")


def test_merging_other_sources(tmp_path: Path) -> None:
    old = made(tmp_path / "old", item("a"), made_from=("0.0.9", "3f" * 32))
    fails(
        "from cufa 0.0.9 sources 3f3f3f3f…, so no process would use both",
        "merge",
        "out",
        made(tmp_path / "x", item()),
        old,
    )
    said("merge", "out", old)
    with open_bundle("out") as bundle:
        assert (bundle.manifest.cufa, bundle.manifest.sources) == ("0.0.9", "3f" * 32)


def test_signing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization as pem

    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    fails("key.pub holds no PEM private key", "merge", "signed", path, "--sign", "key.pub")
    said("merge", "signed", path, "--sign", "key.pem")
    key.public_key().verify(contents(tmp_path / "signed")[SIGNATURE], contents(tmp_path / "signed")["manifest.json"])
    monkeypatch.setenv("CUFA_BUNDLE_KEYS", str(tmp_path / "key.pub"))
    for arguments in (["install", path], ["merge", "out", path], ["wheel", path, "--version", "1", "--out", "out"]):
        fails("is not signed, and CUFA_BUNDLE_KEYS asks for it", *arguments)
    done = run("verify", path)
    assert done.exit_code == 1 and "is not used here: " in done.output
    assert "whole, signed" in said("verify", "signed")
    said("install", "signed")


# wheel


def make_wheel(path: Path, **options: str) -> Path:
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    return Path(said("wheel", path, *flags).removeprefix("wrote ").strip())


def test_a_wheel_is_whole_and_always_the_same(path: Path) -> None:
    wheel = make_wheel(path, name="Cufa_Kernels.Team", version="1.2.post3", out="a")
    assert wheel.name == "cufa_kernels_team-1.2.post3-py3-none-any.whl"
    assert make_wheel(path, name="cufa-kernels-team", version="1.2.post3", out="b").read_bytes() == wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        rows = [*csv.reader(archive.read("cufa_kernels_team-1.2.post3.dist-info/RECORD").decode().splitlines())]
        assert [name for name, _, _ in rows] == archive.namelist()
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={expected}", str(len(data)))
        assert archive.read("cufa_kernels_team/kernels.cufa-bundle") == path.read_bytes()


@pytest.mark.parametrize(
    "name", ["numpy", "cufa", "cufa-kernel", "cufa-kernelsx", "cufa-kernels-", "cufa-kernels/../x", ""]
)
def test_names_that_a_wheel_may_not_have(name: str, path: Path) -> None:
    fails(
        "is no name for a wheel of kernels; it begins with cufa-kernels",
        "wheel",
        path,
        "--version",
        "1",
        "--name",
        name,
    )


@pytest.mark.parametrize("version", ["", "one", "1.0-1", "../1", "1.0 ", "v1", "1..2"])
def test_versions_that_a_wheel_may_not_have(version: str, path: Path) -> None:
    fails("is no version of a Python package", "wheel", path, "--version", version)


def test_a_wheel_that_pip_has_installed_is_found(path: Path, tmp_path: Path) -> None:
    """By a process that cannot load NVRTC; as is one whose entry point fails, which stops nobody."""
    wheel = make_wheel(path, name="cufa-kernels-team", version="1.0", out="wheels")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", "site", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "site" / "broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[cufa.bundles]\nabroken = nowhere_to_be_found:path\n")
    script = (
        "import sys; sys.modules['cuda'] = None\n"
        "from bundles import unit\n"
        "from cufa._compile import jit, lookup\n"
        "found = jit.bundled(unit())\n"
        "print(found.path, found.entry.cubin, [place.origin for place in lookup.bundles().places])\n"
        "print(jit.why_not_bundled(unit(mask='none')))"
    )
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path / "site")))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": places}
    )
    first, second = done.stdout.splitlines()
    there = tmp_path / "site" / "cufa_kernels_team" / "kernels.cufa-bundle"
    assert first == f"{there} {item().cubin!r} ['wheel', 'wheel']"
    assert "abroken = nowhere_to_be_found:path of the group cufa.bundles fails: ModuleNotFoundError" in second
    assert there.read_bytes() == path.read_bytes()


def test_help_imports_no_numpy() -> None:
    modules = ("numpy", "zipfile", "cuda", "cryptography")
    assert places.imported_by(["bundle", "--help"], modules).endswith("[]\n")
