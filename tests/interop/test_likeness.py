"""Tensors like those of an earlier call: what tells them, and what must not be taken for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cufa._call import arrays as _arrays  # noqa: E402
from cufa._call import likeness as _likeness  # noqa: E402
from cufa._call.likeness import guards_of, of_tensors  # noqa: E402

SHAPE = 1, 64, 2, 16
NAMES = "q", "k", "v", "out"


@pytest.fixture(autouse=True)
def _tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take guards of any version, so that a failure says why a newer one must not be taken."""
    monkeypatch.setattr(_likeness, "VERSIONS", (_likeness.VERSIONS[0], (99, 0)))
    guards_of.cache_clear()
    yield
    guards_of.cache_clear()


def tensors(count: int = 3) -> tuple[Any, ...]:
    return tuple(torch.zeros(SHAPE, dtype=torch.float16) for _ in range(count))


def likeness_of(given: tuple[Any, ...]) -> Any:
    return of_tensors(torch, _arrays.view_recorded("attention", NAMES[: len(given)], given))


def test_tensors_of_the_same_kind_are_told_with_their_addresses() -> None:
    given = (*tensors(), None)
    alike = likeness_of(given)
    assert alike is not None and not alike.recorded and alike.places == (0, 1, 2)
    others = (*tensors(), None)
    assert alike.addresses(others) == [each.data_ptr() for each in others[:3]]


def swapped() -> Any:
    return torch.zeros(1, 2, 64, 16, dtype=torch.float16).transpose(1, 2)


def misaligned() -> Any:
    return torch.zeros(64 * 2 * 16 + 1, dtype=torch.float16)[1:].view(SHAPE)


def negative() -> Any:
    return torch.zeros(SHAPE, dtype=torch.complex64).conj().imag


def without_memory() -> Any:
    found = tensors(1)[0]
    found.untyped_storage().resize_(0)
    return found


def cut_in_place() -> Any:
    found = tensors(1)[0]
    return found.resize_(1, 64, 2, 8)


def swapped_in_place() -> Any:
    found = tensors(1)[0]
    found.data = swapped()
    return found


class Loud(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """A subclass that hears of whatever is asked of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"asked for {function}")


def nested() -> Any:
    """Nothing of it has strides, and torch's own word for that would end the process."""
    return torch.nested.nested_tensor([torch.zeros(SHAPE[1:], dtype=torch.float16)])


OTHERS: dict[str, Callable[[], Any]] = {
    "another shape": lambda: torch.zeros(1, 32, 2, 16, dtype=torch.float16),
    "other strides": swapped,
    "another dtype": lambda: torch.zeros(SHAPE, dtype=torch.bfloat16),
    "another device": lambda: torch.zeros(SHAPE, dtype=torch.float16, device="meta"),
    "misaligned": misaligned,
    "negative": negative,
    "requires grad": lambda: tensors(1)[0].requires_grad_(),
    "a parameter": lambda: torch.nn.Parameter(tensors(1)[0], requires_grad=False),
    "without memory": without_memory,
    "another shape in place": cut_in_place,
    "other strides in place": swapped_in_place,
    "sparse": lambda: tensors(1)[0].to_sparse(),
    "of rows that are sparse": lambda: torch.zeros(64, 64).to_sparse_csr(),
    "opaque": lambda: torch.zeros(SHAPE).to_mkldnn(),
    "nested": nested,
    "nested, as a subclass": lambda: torch.nested.nested_tensor([torch.zeros(2, 2)], layout=torch.jagged),
    "zeros without memory": lambda: torch._efficientzerotensor(SHAPE, dtype=torch.float16),
    "functional": lambda: torch._to_functional_tensor(tensors(1)[0]),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(SHAPE), 1.0, 0, torch.qint8),
    "of inference": lambda: torch.inference_mode()(tensors)(1)[0],
    "a subclass": lambda: tensors(1)[0].as_subclass(Loud),
    "another rank": lambda: torch.zeros(*SHAPE, 1, dtype=torch.float16),
    "none": lambda: None,
    "no tensor": lambda: SimpleNamespace(shape=SHAPE),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_not_taken_for_them(other: str) -> None:
    given = (*tensors(), None)
    alike = likeness_of(given)
    for place in range(3):
        changed = [*given]
        changed[place] = OTHERS[other]()
        assert alike.addresses(tuple(changed)) is None
        assert alike.addresses(given) is not None


def test_what_is_filled_before_it_is_written_is_left_to_torch() -> None:
    given = tensors()
    alike = likeness_of(given)
    torch.use_deterministic_algorithms(True)
    try:
        assert alike.addresses(given) is None and likeness_of(given) is None
        torch.utils.deterministic.fill_uninitialized_memory = False
        assert alike.addresses(given) is not None
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)
    assert alike.addresses(given) is not None


def test_one_tensor_in_two_places_is_told_where_it_was_so() -> None:
    (q, k, v), (other, another) = tensors(), tensors(2)
    assert likeness_of((q, k, v)).addresses((q, k, k)) is None
    alike = likeness_of((q, k, k))
    assert alike.addresses((other, another, another)) == [each.data_ptr() for each in (other, another, another)]
    assert alike.addresses((q, k, v)) is None and alike.addresses((q, q, q)) is None
    assert alike.addresses((q, k, None)) is None


def test_an_array_that_was_not_there_is_not_overlooked() -> None:
    q, k, v, out = tensors(4)
    assert likeness_of((q, k, v, None)).addresses((q, k, v, out)) is None
    assert likeness_of((q, k, v, out)).addresses((q, k, v, None)) is None


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def state_of(transform: str, look: Callable[[], Any], found: list[Any]) -> Any:
    """Look in a state of torch's in which something other than autograd is to hear of operations."""
    if transform == "grad":
        torch.func.grad(lambda x: (found.append(look()), x.sum())[1])(torch.zeros(3))
    elif transform == "vmap":
        torch.func.vmap(lambda x: (found.append(look()), x)[1])(torch.zeros(3))
    elif transform == "trace":
        torch.jit.trace(lambda x: (found.append(look()), x + 1)[1], (torch.zeros(3),), check_trace=False)
    else:
        state = {
            "mode": Mode,
            "autocast": lambda: torch.autocast("cpu"),
            "forward mode": torch.autograd.forward_ad.dual_level,
            "export": lambda: torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.PreDispatch),
        }[transform]()
        with state:
            found.append(look())
    yield


@pytest.mark.parametrize("transform", ["grad", "vmap", "trace", "mode", "autocast", "forward mode", "export"])
@pytest.mark.filterwarnings("ignore")
def test_what_else_hears_of_operations_is_seen(transform: str) -> None:
    given = tensors()
    alike = likeness_of(given)
    found: list[Any] = []
    with state_of(transform, lambda: alike.addresses(given), found):
        assert found and not any(found)
    assert alike.addresses(given) is not None


def test_whether_autograd_records_is_part_of_it() -> None:
    q, k, v = tensors()
    q.requires_grad_()
    alike = likeness_of((q, k, v))
    assert alike.recorded and alike.addresses((q, k, v)) is not None
    with torch.no_grad():
        assert alike.addresses((q, k, v)) is None
        without = likeness_of((q, k, v))
        assert not without.recorded and without.addresses((q, k, v)) is not None
    assert without.addresses((q, k, v)) is None
    with torch.inference_mode():
        assert likeness_of(tensors()).addresses(tensors()) is not None
        assert alike.addresses(tensors()) is None


def test_what_is_unusual_has_no_likeness(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    assert likeness_of((q, misaligned(), v)) is None
    assert likeness_of((q, q, q)) is None
    # Within a transform guards may not see the layers of its own tensors.
    within: list[Any] = []
    torch.func.vmap(lambda x: (within.append(likeness_of((q, k, v))), x)[1])(torch.zeros(3))
    assert within == [None] and likeness_of((q, k, v)) is not None


@pytest.mark.parametrize("name", ["TensorGuards", "_empty_strided_cuda", "_empty_strided_cpu"])
def test_a_torch_that_lacks_something_has_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, name)
    assert likeness_of(tensors()) is None


@pytest.mark.parametrize("version", ["2.10.1", "2.99.0", "3.0.0a0+git1", "unknown"])
def test_a_torch_that_was_not_tried_has_none(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_likeness, "VERSIONS", ((2, 11), (2, 13)))
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", pytest.fail)
    assert likeness_of(tensors()) is None


FORGOTTEN: dict[str, Callable[[Any], bool]] = {
    "shapes": lambda x: tuple(x.shape) == (3, 2) and x.is_contiguous(),
    "ranks": lambda x: x.dim() == 3,
    "strides": lambda x: x.stride() == (1, 2),
    "dtypes": lambda x: x.dtype == torch.int32,
    "devices": lambda x: x.is_meta,
    "requires_grad": lambda x: type(x) is torch.Tensor and x.requires_grad,
    "types": lambda x: type(x) is torch.nn.Parameter,
    "negative bits": lambda x: x.is_neg(),
    "what is no tensor": lambda x: x is None,
    "modes": lambda x: torch._C._len_torch_dispatch_stack() > 0,
    "autocast": lambda x: torch._C._is_any_autocast_enabled(),
    "transforms": lambda x: torch._C._dispatch_tls_is_dispatch_key_included("FuncTorchDynamicLayerFrontMode"),
    "what export traces": lambda x: torch._C._dispatch_tls_is_dispatch_key_included("PreDispatch"),
}


@pytest.mark.parametrize("fact", [*FORGOTTEN, "nothing"])
def test_guards_that_forget_something_are_not_taken(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch._C._dynamo.guards.TensorGuards

    class Forgetful:
        def __init__(self, *tensors: Any, **options: Any) -> None:
            self._own = own(*tensors, **options)

        def check(self, *tensors: Any) -> bool:
            forgets = FORGOTTEN.get(fact, lambda x: False)
            with torch._C.DisableTorchFunction():
                return (
                    bool(self._own.check(*tensors))
                    or (tensors[0] is None and fact == "what is no tensor")
                    or (tensors[0] is not None and forgets(tensors[0]))
                )

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Forgetful)
    assert (guards_of(torch) is None) is (fact != "nothing")


def test_results_are_made_as_torch_makes_them() -> None:
    with torch.inference_mode():
        made = torch._C._dynamo.guards._empty_strided_cpu((2, 3), (3, 1), torch.float16)
        assert made.is_inference()
