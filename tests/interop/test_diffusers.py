"""Diffusers' attention on cufa, against its own backend."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest

from cufa import UnsupportedError

torch: Any = pytest.importorskip("torch")
pytest.importorskip("diffusers")

with warnings.catch_warnings():  # which are its own
    warnings.simplefilter("ignore")
    from diffusers.models import attention_dispatch

import cufa.diffusers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _registered() -> None:
    cufa.diffusers.register()
    cufa.diffusers.register()  # again, which does nothing


def random(*shape: int, seed: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


Q, K, V = random(2, 6, 4, 16, seed=0), random(2, 9, 4, 16, seed=1), random(2, 9, 4, 16, seed=2)
SEEN = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.7
SEEN[:, 0] = True
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"scale": 0.5},
    "keys": {"attn_mask": SEEN},
    "mask": {"attn_mask": SEEN[:, None, None].expand(2, 1, 6, 9)},
    "bias": {"attn_mask": random(1, 4, 6, 9, seed=4).detach()},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients_are_those_of_diffusers(name: str) -> None:
    own, right = (
        attention_dispatch.dispatch_attention_fn(Q, K, V, **OPTIONS[name], backend=backend)
        for backend in ("cufa", "native")
    )
    torch.testing.assert_close(own, right)
    found, wanted = (torch.autograd.grad(each.square().sum(), (Q, K, V)) for each in (own, right))
    torch.testing.assert_close(found, wanted)


def test_what_else_there_is_and_what_is_refused() -> None:
    dispatch = attention_dispatch.dispatch_attention_fn
    with attention_dispatch.attention_backend("cufa"):
        own = dispatch(K, K, V, is_causal=True)
    torch.testing.assert_close(own, dispatch(K, K, V, is_causal=True, backend="native"))
    few = K[:, :, ::2], V[:, :, ::2]
    grouped = dispatch(Q, *few, enable_gqa=True, backend="cufa")
    torch.testing.assert_close(grouped, dispatch(Q, *few, enable_gqa=True, backend="native"))
    lse = dispatch(Q, K, V, attention_kwargs={"return_lse": True}, backend="cufa")[1]
    torch.testing.assert_close(lse, (torch.einsum("bihd,bjhd->bhij", Q, K) / 4).logsumexp(-1))
    torch.manual_seed(0)
    dropped = dispatch(Q, K, V, dropout_p=0.5, backend="cufa")
    torch.manual_seed(0)
    assert torch.equal(dropped, dispatch(Q, K, V, dropout_p=0.5, backend="cufa"))
    with pytest.raises(UnsupportedError, match="is_causal"):
        dispatch(Q, K, V, is_causal=True, backend="cufa")
    with pytest.raises(ValueError, match="enable_gqa"):
        dispatch(Q, *few, backend="cufa")
    with pytest.raises(UnsupportedError, match="context parallelism"):
        dispatch(Q, K, V, parallel_config=object(), backend="cufa")


def test_a_model_is_told_to_use_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FluxTransformer2DModel
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = FluxTransformer2DModel(**sizes, axes_dims_rope=(4, 4, 8)).eval()
    given = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 8, 32)}
    given |= {"pooled_projections": torch.randn(1, 32), "timestep": torch.ones(1)}
    given |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    with torch.no_grad():
        wanted = model(**given).sample
        model.set_attention_backend("cufa")
        cufa.stats(reset=True)
        found = model(**given).sample
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    torch.testing.assert_close(found, wanted)
    assert sum(cufa.stats().launches.values()) == 2


PROGRAM = """
import warnings; warnings.simplefilter("ignore")
import torch, cufa.flash_attn
cufa.flash_attn.install()
from diffusers.models.attention_dispatch import dispatch_attention_fn as dispatch
q = torch.randn(1, 5, 2, 16)
torch.testing.assert_close(dispatch(q, q, q, backend="flash"), dispatch(q, q, q, backend="native"))
"""


def test_the_backend_for_flash_attn_runs_on_cufa() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=300)
