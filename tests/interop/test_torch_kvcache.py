"""torch and calls that change caches in place: served as they are, or refused, and never half."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import cufa
from cufa import UnsupportedError
from cufa.testing import KVCacheCase, assert_kvcache_close

torch: Any = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CASE = KVCacheCase(
    batch=2,
    seqlen_q=2,
    seqlen_new=2,
    lengths=(3, 9),
    capacity=16,
    page_size=8,
    num_heads_q=4,
    num_heads_k=2,
    rotary_dim=6,
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_cpu(flat: Any, view: Any) -> Any:
    return torch.as_tensor(flat).clone().as_strided(view.shape, view.strides, view.offset)


def attend(arrays: dict[str, Any]) -> Any:
    return cufa.attention_with_kvcache(**arrays, causal=True)


def check(out: Any, arrays: dict[str, Any]) -> None:
    caches = arrays["k_cache"], arrays["v_cache"]
    assert_kvcache_close(out, caches=caches, **CASE.arrays(), **{**CASE.options, "causal": True})


@pytest.mark.parametrize("way", ["plain", "compiled", "no_grad", "autocast", "inference"])
def test_tensors(way: str) -> None:
    arrays = CASE.arrays(on_cpu)
    if way == "compiled":
        out = torch.compile(lambda x: attend(x) * 1.0)(arrays)
    elif way == "no_grad":
        arrays["q"].requires_grad_()
        with torch.no_grad():
            out = attend(arrays)
    elif way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(arrays)
        assert out.dtype is torch.float32
    elif way == "inference":
        with torch.inference_mode():
            out = attend(arrays)
    else:
        out = attend(arrays)
    check(out, arrays)


@pytest.mark.parametrize("name", ["q", "k_cache", "v"])
def test_gradients_are_refused(name: str) -> None:
    arrays = CASE.arrays(on_cpu)
    before = {each: arrays[each].clone() for each in ("k_cache", "v_cache")}
    arrays[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=f"attention_with_kvcache: {name} requires grad, but there are no grad"):
        attend(arrays)
    for each, cache in before.items():
        assert torch.equal(cache.view(torch.int32), arrays[each].detach().view(torch.int32))


def test_transforms_are_refused() -> None:
    arrays = CASE.arrays(on_cpu)
    with pytest.raises(UnsupportedError, match="traced or transformed by torch"):
        torch.func.vmap(lambda q: attend(arrays | {"q": q}))(arrays["q"][None])
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(UnsupportedError, match="traced or transformed by torch"),
    ):
        attend(arrays)
    check(attend(arrays), arrays)
