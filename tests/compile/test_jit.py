"""From a plan to a cubin: the source, the key, the cache, the compiler's messages."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path
from typing import Any

import plans
import pytest

import cufa
from cufa._call.problem import Static
from cufa._compile import jit as _jit
from cufa._compile import nvrtc as _nvrtc
from cufa._kernels import Plan

FACTS = Static("bf16", 64, 64, "causal", plans.ALL_TERMS, True, False, 16, 16, True, False)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUFA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def plan() -> Plan:
    return plans.forward(FACTS, 80)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler was asked for."""
    asked: list[str] = []
    compile_source = _jit.compile_source

    def counted(source: str, options: list[str], what: str, texts: Any) -> _jit.Compiled:
        asked.append(what)
        return compile_source(source, options, what, texts)

    monkeypatch.setattr(_jit, "compile_source", counted)
    return asked


def run_script(script: str, *arguments: object, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter that imports cufa from `path`."""
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop what this process remembers, as a new one would have."""
    monkeypatch.setattr(_jit, "_caches", {})


def test_source_names_every_member(plan: Plan) -> None:
    source = _jit.unit_of(plan).source
    assert "using variant = attention::Variant<attention::Softcap<bf16>, attention::Alibi>;" in source
    assert "using mask = attention::CausalMask;" in source
    for name, value in vars(plan.config).items():
        if name not in ("element", "variant", "mask"):
            assert f" {name} = {str(value).lower()};" in source
    assert "attention_forward_sm80(const __grid_constant__ attention::Params params)" in source


def test_key_depends_on_everything(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [_jit.key_of(_jit.unit_of(plan)), _jit.key_of(_jit.unit_of(plans.forward(FACTS._replace(head_dim=63), 80)))]
    keys.append(_jit.key_of(_jit.unit_of(plans.forward(FACTS, 86))))
    monkeypatch.setenv("CUFA_LINEINFO", "1")
    keys.append(_jit.key_of(_jit.unit_of(plan)))
    monkeypatch.delenv("CUFA_LINEINFO")
    headers, nvrtc = _jit.headers(), _jit.nvrtc()
    for name in headers:
        monkeypatch.setattr(_jit, "headers", lambda name=name: headers | {name: headers[name] + b" "})
        keys.append(_jit.key_of(_jit.unit_of(plan)))
    monkeypatch.setattr(_jit, "headers", lambda: headers)
    monkeypatch.setattr(_jit, "nvrtc", lambda: nvrtc._replace(build="another"))
    keys.append(_jit.key_of(_jit.unit_of(plan)))
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(_jit, "nvrtc", lambda: nvrtc._replace(path="elsewhere"))
    assert _jit.key_of(_jit.unit_of(plan)) == keys[0]


def test_compiles_once_and_is_kept(
    plan: Plan, compiles: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = _jit.entry_of(_jit.unit_of(plan))
    assert entry.meta["kernel"] == "attention_forward_sm80" and entry.meta["arch"] == "80"
    assert 0 < entry.meta["registers"] <= 255
    forget(monkeypatch)
    assert _jit.entry_of(_jit.unit_of(plan)) == entry
    assert compiles == ["attention_forward_sm80 (bf16, head_dim 64, causal, sinks, softcap, alibi) for sm_80"]
    assert len(list(own_cache.rglob("*.cufa"))) == 1


def test_a_damaged_entry_is_compiled_again(
    plan: Plan, compiles: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = _jit.entry_of(_jit.unit_of(plan))
    (file,) = own_cache.rglob("*.cufa")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    forget(monkeypatch)
    assert _jit.entry_of(_jit.unit_of(plan)).cubin == entry.cubin
    assert len(compiles) == 2


def test_threads_compile_a_kernel_once(plan: Plan, compiles: list[str]) -> None:
    entries: list[Any] = []
    threads = [threading.Thread(target=lambda: entries.append(_jit.entry_of(_jit.unit_of(plan)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiles) == 1 and len(entries) == 8


def test_compiling_can_be_forbidden(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DISABLE_JIT", "1")
    with pytest.raises(
        cufa.MissingKernelError, match=r"is not in the cache, and CUFA_DISABLE_JIT forbids compiling it"
    ):
        _jit.entry_of(_jit.unit_of(plan))


def test_the_source_can_be_kept(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_SAVE_SOURCE", str(tmp_path / "kept"))
    _jit.entry_of(_jit.unit_of(plan))
    (kept,) = (tmp_path / "kept").iterdir()
    assert (kept / "kernel.cu").read_text() == _jit.unit_of(plan).source
    assert (kept / "attention/mainloop_sm80.cuh").read_bytes() == _jit.headers()["attention/mainloop_sm80.cuh"]
    assert "registers" in (kept / "log.txt").read_text()


def test_keeping_the_source_follows_no_link(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have planted what lies in the directory, if they can write it."""
    precious, elsewhere = tmp_path / "precious", tmp_path / "elsewhere"
    precious.write_text("unharmed")
    elsewhere.mkdir()
    monkeypatch.setenv("CUFA_SAVE_SOURCE", str(tmp_path / "kept"))
    source = _jit.unit_of(plan).source
    kept = _jit._save_source(source, _jit.headers(), "log")
    assert kept is not None
    (kept / "kernel.cu").unlink()
    (kept / "kernel.cu").symlink_to(precious)
    (kept / "log.txt").unlink()
    os.link(precious, kept / "log.txt")
    assert _jit._save_source(source, _jit.headers(), "another log") == kept
    assert precious.read_text() == "unharmed"
    assert (kept / "kernel.cu").read_text() == source and not (kept / "kernel.cu").is_symlink()
    assert (kept / "log.txt").read_text() == "another log"
    (kept / "core").rename(tmp_path / "core")
    (kept / "core").symlink_to(elsewhere)
    assert _jit._save_source(source, _jit.headers(), "log") is None
    kept.rename(tmp_path / "kept before")
    kept.symlink_to(elsewhere)
    assert _jit._save_source(source, _jit.headers(), "log") is None
    assert not list(elsewhere.iterdir())
    assert not list(tmp_path.rglob(".tmp-*"))
    monkeypatch.setenv("CUFA_SAVE_SOURCE", str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(elsewhere)  # named by the user, and so followed
    assert _jit._save_source(source, _jit.headers(), "log") == tmp_path / "link" / kept.name
    assert (elsewhere / kept.name / "kernel.cu").read_text() == source


def test_a_broken_source_shows_the_log() -> None:
    with pytest.raises(cufa.CompileError) as raised:
        _jit.compile_source("int f() { return nothing; }", _jit.options_of("80"), "a broken kernel")
    text = str(raised.value)
    assert text.startswith("cufa: compiling a broken kernel failed (NVRTC_ERROR_COMPILATION). Set CUFA_SAVE_SOURCE")
    assert 'identifier "nothing" is undefined' in text


def test_a_missing_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import pathfinder

    def missing(name: str) -> Any:
        raise RuntimeError(f"{name} is nowhere")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    _nvrtc.forget()
    try:
        with pytest.raises(cufa.CompileError, match=r"nvrtc is nowhere\. Install it with pip install 'cufa\[cuda13\]'"):
            _jit.nvrtc()
    finally:
        _nvrtc.forget()


def test_an_nvrtc_that_went_from_disk_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cuda import pathfinder

    found = pathfinder.load_nvidia_dynamic_lib("nvrtc")

    class Gone:
        abs_path, found_via = str(tmp_path / "libnvrtc.so"), found.found_via

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", lambda name: Gone)
    _nvrtc.forget()
    try:
        with pytest.raises(
            cufa.CompileError, match=r"libnvrtc\.so cannot be read: No such file .* start the process again"
        ):
            _jit.nvrtc()
    finally:
        _nvrtc.forget()


@pytest.mark.parametrize(("arch", "target"), [(80, "80"), (89, "89"), (90, "90"), (120, "120"), (129, "121")])
def test_a_gpu_newer_than_nvrtc_takes_its_family(plan: Plan, arch: int, target: str) -> None:
    assert _jit.target_of(_jit.unit_of(plan._replace(arch=arch))) == target


def test_kernels_for_one_architecture_alone_are_compiled_for_it() -> None:
    assert _jit.target_of(_jit.unit_of(plans.forward(FACTS, 90))) == "90a"
    assert _jit.target_of(_jit.unit_of(plans.forward(FACTS._replace(tma=False), 90))) == "90"


def test_a_gpu_of_a_new_family_needs_a_newer_nvrtc(plan: Plan) -> None:
    with pytest.raises(cufa.CompileError, match=r"does not compile for compute capability 99\.0; install a newer one"):
        _jit.target_of(_jit.unit_of(plan._replace(arch=990)))


SMALL = 'extern "C" __global__ void small() {}'


@pytest.mark.parametrize(("wanted", "terminal", "said"), [("1", False, True), ("0", True, False), ("", True, True)])
def test_compiling_is_announced(
    wanted: str,
    terminal: bool,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("CUFA_PROGRESS", wanted)
    caplog.set_level(logging.INFO, "cufa")
    _jit.compile_source(SMALL, _jit.options_of("80"), "a kernel")
    assert stderr.getvalue() == ("cufa: compiling a kernel ...\n" if said else "")
    assert [record.getMessage()[:18] for record in caplog.records] == ["compiling a kernel", "compiled a kernel "]


class BrokenStream(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("trouble", ["no thread", "closed", "broken", "none", "log"])
def test_announcing_never_fails_a_call(
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("can't start new thread")

    streams: dict[str, Any] = {"closed": io.StringIO(), "broken": BrokenStream(), "none": None}
    if trouble in streams:
        monkeypatch.setattr(sys, "stderr", streams[trouble])
    if trouble == "closed":
        streams["closed"].close()
    elif trouble == "no thread":
        monkeypatch.setattr(threading.Thread, "start", fail)
    elif trouble == "log":
        caplog.set_level(logging.INFO, "cufa")
        monkeypatch.setattr(logging.getLogger("cufa"), "_log", fail)
    monkeypatch.setenv("CUFA_PROGRESS", "1")
    monkeypatch.setenv("CUFA_SAVE_SOURCE", os.devnull)  # a warning too
    assert b"small" in _jit.compile_source(SMALL, _jit.options_of("80"), "a kernel").cubin
    assert not capsys.readouterr().out


def test_kernels_compile_while_the_interpreter_ends(own_cache: Path) -> None:
    run = run_script(
        f"""
        import atexit, os, sys
        from cufa._compile import jit as _jit
        from cufa._kernels import choose
        from cufa._operations.forward import FORWARD
        from cufa._call.problem import Static
        facts = Static("f16", 64, 64, "none", (), False, False, 16, 16, True, False)
        units = [_jit.unit_of(choose(FORWARD, facts, arch))._replace(source={SMALL!r}) for arch in (80, 86)]
        def compile(unit, entry_of=_jit.entry_of, write=os.write):
            write(1, b"%d " % len(entry_of(unit).cubin))
        class Final:
            def __del__(self, compile=compile, unit=units[1]):
                compile(unit)
        last = Final()  # finalized with this module, when nothing can be imported any more
        _jit.nvrtc()
        atexit.register(compile, units[0])
        os.environ["CUFA_PROGRESS"] = "1"
        sys.stderr.close()
        """
    )
    sizes = [int(size) for size in run.stdout.split()]
    assert run.returncode == 0 and len(sizes) == 2 and min(sizes) > 100, run.stdout
    assert len(list(own_cache.rglob("*.cufa"))) >= 1 and not list(own_cache.rglob(".tmp-*"))


def test_a_child_forked_while_threads_compile_can_compile() -> None:
    """Whether cufa's locks are held at that moment or NVRTC's own."""
    run = run_script(
        """
        import os, signal, threading, time, warnings
        from cufa._compile import jit as _jit
        from cufa._kernels import choose
        from cufa._operations.forward import FORWARD
        from cufa._call.problem import Static
        warnings.simplefilter("ignore")  # about the fork of a process with threads, which is the point
        os.environ["CUFA_CACHE"] = "0"
        facts = Static("f16", 64, 64, "none", (), False, False, 16, 16, True, False)
        unit = _jit.unit_of(choose(FORWARD, facts, 80))

        def child(work):
            pid = os.fork()
            if not pid:
                try:
                    signal.alarm(20)
                    work()
                    os._exit(0)
                except BaseException as error:
                    print(repr(error), flush=True)
                    os._exit(1)
            return os.waitpid(pid, 0)[1]

        compile_source = _jit.compile_source
        small = 'extern "C" __global__ void small() {}'
        of_small = unit._replace(source=small)
        for moment in (0.02, 0.05):  # where NVRTC is loaded, and in it
            thread = threading.Thread(target=_jit.entry_of, args=(unit if moment == 0.05 else of_small,))
            thread.start()
            time.sleep(moment)
            print("nvrtc", child(lambda: compile_source(small, _jit.options_of("80"), "small")))
            thread.join()
            _jit._caches.clear()

        inside, go_on = threading.Event(), threading.Event()
        def slow(source, options, what, texts):
            inside.set()
            go_on.wait(20)
            return compile_source(source, options, what, texts)
        _jit.compile_source = slow
        thread = threading.Thread(target=_jit.entry_of, args=(of_small,))
        thread.start()
        inside.wait(20)
        def same_kernel():
            _jit.compile_source = compile_source
            assert not _jit._key_locks
            assert b"small" in _jit.entry_of(of_small).cubin
        with _jit._lock:
            locked = _jit._lock
            print("locks", child(same_kernel))
            assert _jit._lock is locked
        go_on.set()
        thread.join()
        print("parent", b"small" in _jit.entry_of(of_small).cubin)
        """
    )
    assert run.stdout.split("\n")[:-1] == ["nvrtc 0", "nvrtc 0", "locks 0", "parent True"], run.stdout + run.stderr


def test_cufa_works_from_a_zip_file(plan: Plan, tmp_path: Path) -> None:
    """Laid out as a wheel is, and as the source tree is."""
    for prefix in ("cufa/", ""):
        archive = tmp_path / f"package{len(prefix)}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for top, below in (("cufa", ""), ("cuda_src", prefix)):
                for path in (ROOT / top).rglob("*"):
                    if path.suffix in (".py", ".cuh", ".typed"):
                        file.write(path, below + path.relative_to(ROOT).as_posix())
        run = run_script(
            """
            import numpy
            import cufa
            from cufa._compile import jit as _jit
            from cufa._kernels import choose
            from cufa._operations.forward import FORWARD
            from cufa._terms import TERMS
            from cufa._call.problem import Static
            assert ".zip" in cufa.__file__
            facts = Static("bf16", 64, 64, "causal", (TERMS[0], TERMS[-1]), True, False, 16, 16, True, False)
            key = _jit.key_of(_jit.unit_of(choose(FORWARD, facts, 80)))
            q = numpy.ones((1, 4, 1, 8), numpy.float32)
            print(key, len(_jit.headers()), cufa.attention(q, q, q).sum(), cufa.show_config())
            """,
            path=archive,
        )
        expected = f"{_jit.key_of(_jit.unit_of(plan))} {len(_jit.headers())} 32.0 None"
        assert run.stdout.splitlines()[-1:] == [expected], run.stderr


def test_the_wheel_is_small_and_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode and "No matching distribution" in run.stderr:
        pytest.skip("needs an index to build from")
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("cufa-*.whl")
    assert wheel.stat().st_size <= 960 << 10  # a quarter is CUDA sources; the ladder has 50 KB
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"cufa/cuda_src/{name}" for name in _jit.headers()} <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cufa").rglob("*.py")}
    rungs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cufa" / "learn").glob("*.cu")}
    others = {"cufa/py.typed", "cufa/_transformers/kernels/build/torch-universal/metadata.json"}
    assert rungs and modules | rungs | others <= names
