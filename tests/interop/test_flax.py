"""Flax's attention on cufa: against its definition, and in layers of Flax where that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cufa import UnsupportedError

jax: Any = pytest.importorskip("jax")
jnp = jax.numpy

from cufa.flax import dot_product_attention as attend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
RNG = np.random.default_rng(0)


def random(*shape: int) -> Any:
    return jnp.asarray(RNG.standard_normal(shape, dtype=np.float32))


def eager(q: Any, k: Any, v: Any, bias: Any = 0.0, mask: Any = True) -> Any:
    scores = jnp.einsum("...ihd,...jhd->...hij", q, k) * q.shape[-1] ** -0.5 + bias
    return jnp.einsum("...hij,...jhd->...ihd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1), v)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_biases_and_masks(batch: tuple[int, ...]) -> None:
    q, k, v = random(*batch, 5, 2, 8), random(*batch, 6, 2, 8), random(*batch, 6, 2, 8)
    mask = jnp.asarray(RNG.random((*batch, 1, 5, 6)) < 0.6).at[..., 0].set(True)
    for options in (
        {"bias": random(*batch, 2, 5, 6)},
        {"bias": random(2, 1, 6), "mask": mask[..., :1, :]},
        {"bias": random(5, 6)},
    ):
        np.testing.assert_allclose(attend(q, k, v, **options), eager(q, k, v, **options), atol=2e-6)
    if batch != (2, 3):  # the others take as long again
        return
    same = eager(k, k, v, mask=np.tri(6, dtype=bool))
    np.testing.assert_allclose(attend(k, k, v, is_causal=True), same, atol=2e-6)
    found, wanted = (
        jax.jit(jax.grad(lambda *x, f=f: (f(*x, mask=mask) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
        for f in (attend, eager)
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_other_arguments() -> None:
    q, k = random(1, 5, 2, 8), random(1, 6, 2, 8)
    assert attend(q, k, k, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert attend(q.astype(jnp.bfloat16), k, k).dtype == jnp.float32
    half = attend(q, k, k, promote_dtype=lambda x, dtype: [y.astype(dtype) for y in x], dtype=jnp.float16)
    assert half.dtype == jnp.float16
    plain = attend(q, k, k, dropout_rate=0.5, deterministic=True, broadcast_dropout=False, force_fp32_for_softmax=True)
    np.testing.assert_array_equal(plain, attend(q, k, k))
    many = random(2, 3, 6, 2, 8)
    for other in (many.swapaxes(0, 1), many.reshape(6, 6, 2, 8), many[:1]):  # as many sequences, or some
        with pytest.raises(ValueError, match="axes before the last three"):
            attend(many, other, other)
    for refused in (
        {"dropout_rate": 0.5},
        {"precision": "highest"},
        {"module": 1},
        {"einsum_dot_general": 1},
        {"is_causal": True},
    ):
        with pytest.raises(UnsupportedError, match=next(iter(refused))):
            attend(q, k, k, **refused)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_of_flax(kind: str) -> None:
    flax = pytest.importorskip(f"flax.{kind}")
    x, mask = random(2, 6, 16), np.tri(6, dtype=bool)[None, None]
    outs = []
    for function in (attend, flax.dot_product_attention):
        options = {"num_heads": 2, "attention_fn": function, "dropout_rate": 0.1, "deterministic": True}
        if kind == "linen":
            layer = flax.MultiHeadDotProductAttention(**options)
            outs.append(layer.apply(layer.init(jax.random.key(0), x), x, mask=mask))
        else:
            layer = flax.MultiHeadAttention(in_features=16, decode=False, rngs=flax.Rngs(0), **options)
            outs.append(layer(x, mask=mask))
    np.testing.assert_allclose(*outs, atol=2e-6)
