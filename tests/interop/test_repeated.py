"""Calls like earlier ones: that they launch what those launched, and that others are not taken for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pretended
import pytest

torch: Any = pytest.importorskip("torch")

import cufa  # noqa: E402
from cufa._call import arrays as _arrays  # noqa: E402
from cufa._call import likeness as _likeness  # noqa: E402
from cufa._call import problem as _problem  # noqa: E402
from cufa._operations import call as _call  # noqa: E402
from cufa._operations import operation as _operation  # noqa: E402
from cufa._operations import repeated as _repeated  # noqa: E402

SHAPE = 1, 64, 2, 64


class Gpu(pretended.Gpu):
    """That of tensors of the host, which stand for those in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self._made = 0
        self._memory: dict[Any, Any] = {}

    def make(self, shape: Any, strides: Any, dtype: Any) -> Any:
        """New memory, which for the same tensors in the same order is always the same."""
        self._made += 1
        key = self._made, tuple(shape), dtype
        if key not in self._memory:
            self._memory[key] = torch.zeros(tuple(shape), dtype=dtype)
        return self._memory[key].detach()

    @contextlib.contextmanager
    def same_memory(self) -> Iterator[None]:
        self._made = 0
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    adapter = _arrays.TorchAdapter
    instance = _arrays._ADAPTERS.get(torch.Tensor) or _arrays._find_adapter("attention", "q", torch.zeros(1))
    spec = adapter.spec
    found.stand_in(monkeypatch, _repeated.Repeated)

    def made(self: Any, shape: Any, dtype: str, like: Any) -> tuple[Any, int]:
        array = found.make(shape, None, getattr(torch, dtype))
        return array, array.data_ptr()

    for owner, name, value in (
        (adapter, "spec", lambda self, layout: spec(self, layout)._replace(device=0)),
        (instance, "current_stream", lambda device: found.stream),
        (instance, "current_device", lambda: found.current),
        (adapter, "empty", made),
        (adapter, "empty_like", lambda self, array, shape, dtype: made(self, shape, dtype, array)),
        (torch._C._dynamo.guards, "_empty_strided_cuda", found.make),
        (_likeness, "VERSIONS", (_likeness.VERSIONS[0], (99, 0))),
    ):
        monkeypatch.setattr(owner, name, value)

    def forget() -> None:
        _problem._checked.cache_clear()
        _likeness.guards_of.cache_clear()
        for operation in _operation.made():
            operation.repeated.clear()

    forget()
    yield found
    forget()


def tensor(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.zeros(*shape, dtype=dtype)


def calls() -> dict[str, Callable[[], Any]]:
    q, k, v, out, dout = (tensor(*SHAPE) for _ in range(5))
    own = [each.clone().requires_grad_() for each in (q, k, v)]
    frozen = [own[0], k.clone(), own[2]]
    few, more = tensor(1, 64, 1, 64), tensor(1, 64, 8, 64)
    lse, floats, bias = tensor(1, 2, 64, dtype=torch.float32), tensor(2, dtype=torch.float32), tensor(1, 2, 64, 64)
    own_bias = bias.clone().requires_grad_()
    offsets, lengths = torch.tensor([0, 30, 64], dtype=torch.int32), torch.tensor([50], dtype=torch.int32)
    packed = [each[0] for each in (q, k, v)]
    cache, step = tensor(1, 4096, 2, 64), tensor(1, 1, 2, 64)
    table = torch.arange(64, dtype=torch.int32).view(1, 64)
    pages = tensor(64, 64, 2, 64)
    return {
        "attention": lambda: cufa.attention(q, k, v, causal=True),
        "lse": lambda: cufa.attention(q, k, v, causal=True, return_lse=True),
        "one tensor twice": lambda: cufa.attention(q, k, k, return_lse=True),
        "grouped": lambda: cufa.attention(more, few, few),
        "a window": lambda: cufa.attention(q, k, v, window_size=(16, 0), softcap=3.0),
        "sinks": lambda: cufa.attention(q, k, v, sinks=floats),
        "ALiBi": lambda: cufa.attention(q, k, v, alibi_slopes=floats, sinks=floats),
        "a bias": lambda: cufa.attention(q, k, v, bias=bias),
        "recorded": lambda: cufa.attention(*own, causal=True),
        "recorded with lse": lambda: cufa.attention(*own, causal=True, return_lse=True),
        "recorded, of which one needs none": lambda: cufa.attention(*frozen, causal=True),
        "recorded with a bias": lambda: cufa.attention(*own, bias=own_bias),
        "packed": lambda: cufa.attention_varlen(*packed, offsets, offsets, causal=True),
        "gradients": lambda: cufa.attention_backward(dout, q, k, v, out, lse, causal=True),
        "deterministic gradients": lambda: cufa.attention_backward(dout, q, k, v, out, lse, deterministic=True),
        "packed gradients": lambda: cufa.attention_varlen_backward(
            dout[0], *packed, out[0], lse[0], offsets, offsets, causal=True
        ),
        "a cache": lambda: cufa.attention_with_kvcache(step, cache, cache, cache_seqlens=lengths),
        "pages": lambda: cufa.attention_with_kvcache(step, pages, pages, cache_seqlens=lengths, block_table=table),
        "states": lambda: cufa.merge_states(out, lse, dout, lse),
    }


@pytest.mark.parametrize("kind", calls())
def test_calls_launch_what_they_launched_before(kind: str, gpu: Gpu) -> None:
    call = calls()[kind]
    first, second = (gpu.launches(call) for _ in range(2))
    assert first == second and first and not gpu.short_cuts
    assert gpu.launches(call) == first and gpu.launches(call) == first
    assert gpu.short_cuts == 2


def changing_calls() -> dict[str, Callable[[], Any]]:
    q, k, v = (tensor(*SHAPE) for _ in range(3))
    cache, step, lengths = tensor(1, 4096, 2, 64), tensor(1, 1, 2, 64), torch.tensor([50], dtype=torch.int32)
    out = tensor(*SHAPE)
    wide = tensor(1, 64, 2, 65)[..., :64]
    return {
        "a given result": lambda: cufa.attention(q, k, v, out=out),
        "new rows of a cache": lambda: cufa.attention_with_kvcache(
            step, cache, cache.clone(), k=step, v=step, cache_seqlens=lengths
        ),
        "a late option": lambda: cufa.attention(q, k, v, dropout_p=0.5, seed=3),
        "rows that are not aligned": lambda: cufa.attention(wide, k, v),
        "a tensor in all places": lambda: cufa.attention(q, q, q),
    }


@pytest.mark.parametrize("kind", changing_calls())
def test_some_calls_always_go_the_ordinary_way(kind: str, gpu: Gpu) -> None:
    call = changing_calls()[kind]
    for _ in range(4):
        assert gpu.launches(call)
    assert not gpu.short_cuts


def test_streams_and_the_current_gpu_are_asked_for_each_time(gpu: Gpu) -> None:
    call = calls()["lse"]
    for _ in range(3):
        gpu.launches(call)
    assert gpu.short_cuts == 1
    gpu.stream = 8
    assert {stream for stream, *_ in gpu.launches(call)} == {8} and gpu.short_cuts == 2
    gpu.current = 1
    assert gpu.launches(call) and gpu.short_cuts == 2
    gpu.current = 0
    assert gpu.launches(call) and gpu.short_cuts == 3


@pytest.mark.filterwarnings("ignore")  # torch would rather have nested tensors of another layout
def test_other_calls_with_the_same_arrays_are_not_taken_for_them(gpu: Gpu) -> None:
    q, k, v = (tensor(*SHAPE) for _ in range(3))
    for _ in range(3):
        cufa.attention(q, k, v, return_lse=True)
    assert gpu.short_cuts == 1
    cufa.attention(q, k, v, return_lse=True, causal=True)
    cufa.attention(q, k, v, return_lse=True, softmax_scale=2.0)
    cufa.attention(q, k, v, return_lse=True, sinks=tensor(2, dtype=torch.float32))
    cufa.attention(q, k, v, return_lse=True, out=tensor(*SHAPE))
    cufa.attention(q, k, v.bfloat16().half().transpose(1, 2).contiguous().transpose(1, 2), return_lse=True)
    assert gpu.short_cuts == 1
    with pytest.raises(ValueError, match="dtype"):
        cufa.attention(q, k, v.bfloat16(), return_lse=True)
    with pytest.raises(cufa.UnsupportedError, match="nested"):
        cufa.attention(torch.nested.nested_tensor([q[0]]), k, v, return_lse=True)
    with pytest.raises(cufa.UnsupportedError, match="nested"):
        cufa.attention(q, k, torch.nested.nested_tensor([v[0]]), return_lse=True)
    with pytest.raises(TypeError):
        cufa.attention(q, k, None, return_lse=True)  # type: ignore[arg-type]
    assert gpu.short_cuts == 1
    cufa.attention(q, k, v, return_lse=True)
    assert gpu.short_cuts == 2


def test_autograd_records_what_it_is_to_record(gpu: Gpu) -> None:
    q, k, v = (tensor(*SHAPE) for _ in range(3))
    for turn in range(12):
        q.requires_grad_(turn % 2 == 1)
        with torch.set_grad_enabled(turn % 3 > 0):
            assert cufa.attention(q, k, v).requires_grad is (turn % 2 == 1 and turn % 3 > 0)
    assert gpu.short_cuts


def test_values_are_checked_where_they_were(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(_call, "debugging", lambda: True)
    monkeypatch.setattr(_call, "check_on_gpu", lambda *_: checked.append(_))
    for _ in range(4):
        gpu.launches(calls()["packed"])
    assert len(checked) == 4 and not gpu.short_cuts


def test_no_more_is_remembered_than_has_use(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (tensor(*SHAPE) for _ in range(3))
    # One problem, but tensors that are other ones for autograd.
    for turn in range(32):
        for index, each in enumerate((q, k, v)):
            each.requires_grad_(bool(turn // 2 >> index & 1))
        cufa.attention(q, k, v, return_lse=True)
    (known,) = (each for each in _operation.made() if each.name == "attention" and each.repeated)
    kinds = known.repeated[torch.Tensor]
    assert all(len(each) <= _repeated.MAX_KNOWN for each in kinds.values())
    monkeypatch.setattr(_repeated, "MAX_KINDS", 16)
    for rows in range(1, _repeated.MAX_KINDS + 20):
        for _ in range(2):
            cufa.attention(q[:, :1], tensor(1, rows, 2, 64), tensor(1, rows, 2, 64))
    for scale in range(1, _repeated.MAX_KINDS + 3):
        for _ in range(2):
            cufa.attention(q, k, v, softmax_scale=float(scale))
    assert len(kinds) <= _repeated.MAX_KINDS


# On a GPU.


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What calls that are like earlier ones compute."""
    found: list[Any] = []
    run = _repeated.Repeated.__call__

    def noted(self: Any, addresses: list[int]) -> list[Any]:
        found.append(self.problem)
        return run(self, addresses)

    monkeypatch.setattr(_repeated.Repeated, "__call__", noted)
    return found


def random(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.gpu
def test_calls_in_turn_have_the_bits_of_each_alone(again: list[Any]) -> None:
    q, k, v = random(2, 128, 4, 64), random(2, 160, 2, 64), random(2, 160, 2, 64)
    sinks, slopes = random(4, dtype=torch.float32), random(4, dtype=torch.float32).abs()
    kinds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((q, k, v), {}),
        ((q, k, v), {"sinks": sinks}),
        ((q, k, v), {"alibi_slopes": slopes}),
        ((q, k, k), {}),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}),
        ((q[:, :64], k, v), {}),
        ((q[:, :64].clone(), k, v), {}),
    ]
    options: dict[str, Any] = {"causal": True, "return_lse": True}
    alone = [[each.clone() for each in cufa.attention(*arrays, **more, **options)] for arrays, more in kinds]
    again.clear()
    for _ in range(5):
        for (arrays, more), expected in zip(kinds, alone, strict=True):
            copies = {id(each): each.clone() for each in arrays}  # with their strides
            found = cufa.attention(*(copies[id(each)] for each in arrays), **more, **options)
            assert all(map(torch.equal, found, expected))
    assert len(again) >= 2 * len(kinds)  # more kinds have the same options and shapes than are known at a time


@pytest.mark.gpu
@pytest.mark.parametrize("fills", [False, True])
def test_gradients_in_turn_are_those_of_each_alone(fills: bool, again: list[Any]) -> None:
    arrays = [random(2, 128, 4, 64) for _ in range(3)]
    dout = random(2, 128, 4, 64)
    out, lse = cufa.attention(*arrays, causal=True, return_lse=True)
    expected = cufa.attention_backward(dout, *arrays, out, lse, causal=True, deterministic=True)
    stream = torch.cuda.Stream()
    again.clear()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    try:
        for turn in range(6):
            own = [each.clone().requires_grad_() for each in arrays]
            torch.cuda.synchronize()
            with torch.cuda.stream(stream if turn % 2 else torch.cuda.current_stream()):
                found = cufa.attention(*own, causal=True)
                assert torch.equal(found, out)
                found.backward(dout)
            torch.cuda.synchronize()
            for each, gradient in zip(own, expected, strict=True):
                assert torch.equal(each.grad, gradient)
            with torch.no_grad():
                assert not cufa.attention(*own, causal=True).requires_grad
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)
    assert not again if fills else {each.operation.gradient for each in again} == {False, True}


@pytest.mark.gpu
def test_a_graph_replays_them(again: list[Any]) -> None:
    q, k, v = (random(2, 128, 4, 64) for _ in range(3))
    options: dict[str, Any] = {"causal": True, "return_lse": True}
    for _ in range(3):
        cufa.attention(q, k, v, **options)
    again.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cufa.attention(q, k, v, **options)
    assert len(again) == 1
    for _ in range(3):
        q.normal_()
        graph.replay()
        assert all(map(torch.equal, found, cufa.attention(q, k, v, **options)))


@pytest.mark.gpu
def test_threads_with_streams_of_their_own_do_not_meet(again: list[Any]) -> None:
    options: dict[str, Any] = {"causal": True, "return_lse": True}
    given = [[random(2, 128, 4, 64) for _ in range(3)] for _ in range(4)]
    expected = [cufa.attention(*arrays, **options) for arrays in given]
    torch.cuda.synchronize()

    def same(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [cufa.attention(*given[index], **options) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(
            torch.equal(each, right) for pair in found for each, right in zip(pair, expected[index], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(4)))
    assert again


@pytest.mark.gpu
def test_results_are_on_the_gpu_of_the_arrays(again: list[Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given = [[random(2, 128, 4, 64).to(f"cuda:{device}") for _ in range(3)] for device in range(2)]
    expected = [cufa.attention(*arrays, return_lse=True) for arrays in given]
    for turn in range(16):
        device, current = turn % 2, turn // 2 % 2
        with torch.cuda.device(current):
            found = cufa.attention(*given[device], return_lse=True)
        assert {each.device.index for each in found} == {device}
        assert all(map(torch.equal, found, expected[device]))
    assert {each.device for each in again} == {0, 1}
