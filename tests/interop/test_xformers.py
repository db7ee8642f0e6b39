"""`cufa.xformers` against its definition in float64, with biases of its own classes and, where it is, of xformers'."""

from __future__ import annotations

from typing import Any

import pytest

from cufa import UnsupportedError

torch: Any = pytest.importorskip("torch")

import cufa.xformers as own  # noqa: E402
from cufa.xformers import memory_efficient_attention as attend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eager(q: Any, k: Any, v: Any, bias: Any = 0.0) -> Any:
    """Of (batch, rows, heads, columns); a row that sees no key is 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    weights = (scores - scores.detach().amax(-1, keepdim=True).clamp(min=-1e9)).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", weights / torch.where(total > 0, total, 1.0), v)


def allowed(rows: int, keys: int, top_left: bool, left: int | None, right: int | None) -> Any:
    """0 where a query sees a key, else -infinity."""
    distance = torch.arange(keys) - torch.arange(rows)[:, None] - (0 if top_left else keys - rows)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen &= (distance <= right) if right is not None else seen
    seen &= (distance >= -left) if left is not None else seen
    return torch.where(seen, 0.0, -torch.inf).double()


LENGTHS, MORE = (3, 5, 4), (4, 5, 6)
# Of a class: how it is made, and what a block of it is (top_left, left, right).
DENSE: dict[str, tuple[tuple[Any, ...], tuple[bool, int | None, int | None]]] = {
    "LowerTriangularMask": ((), (True, None, 0)),
    "LowerTriangularFromBottomRightMask": ((), (False, None, 0)),
    "LowerTriangularFromBottomRightLocalAttentionMask": ((3,), (False, 2, 0)),
    "LocalAttentionFromBottomRightMask": ((2, 1), (False, 2, 1)),
}
BLOCKS: dict[str, tuple[str, tuple[Any, ...], tuple[bool, int | None, int | None]]] = {
    "BlockDiagonalMask": ("", (), (False, None, None)),
    "BlockDiagonalCausalMask": ("make_causal", (), (True, None, 0)),
    "BlockDiagonalCausalFromBottomRightMask": ("make_causal_from_bottomright", (), (False, None, 0)),
    "BlockDiagonalCausalLocalAttentionMask": ("make_local_attention", (3,), (True, 2, 0)),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        "make_local_attention_from_bottomright",
        (3,),
        (False, 2, 0),
    ),
}
PADDED = {
    "BlockDiagonalPaddedKeysMask": (False, None, None),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (False, None, 0),
}


@pytest.fixture(params=["cufa", "xformers"])
def classes(request: pytest.FixtureRequest) -> Any:
    return own if request.param == "cufa" else pytest.importorskip("xformers.ops.fmha.attn_bias")


def check(given: tuple[Any, ...], bias: Any, mask: Any) -> None:
    """Compare results, and gradients by what was given."""
    leaves = [x.clone().requires_grad_() for x in given]
    out, wanted = attend(*leaves, bias), eager(*leaves, mask)
    torch.testing.assert_close(out, wanted)
    found, right = (torch.autograd.grad(each.square().sum(), leaves) for each in (out, wanted))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize("name", DENSE)
def test_masks(name: str, rows: int, keys: int, classes: Any) -> None:
    arguments, meant = DENSE[name]
    bias, mask = getattr(classes, name)(*arguments), allowed(rows, keys, *meant)
    if classes is not own:
        torch.testing.assert_close(bias.materialize((rows, keys), torch.float64), mask)
    given = random(2, rows, 4, 16), random(2, keys, 2, 16, seed=1), random(2, keys, 2, 8, seed=2)
    check(given, bias, mask)
    if name == "LowerTriangularMask":
        added = random(2, 4, rows, keys, seed=3)
        check(given, bias.add_bias(added), mask + added)


def of_blocks(rows: tuple[int, ...], keys: tuple[int, ...], meant: Any, padding: int | None = None) -> Any:
    """The mask of packed sequences."""
    found = torch.full((sum(rows), padding * len(keys) if padding else sum(keys)), -torch.inf, dtype=torch.float64)
    for index, (count, length) in enumerate(zip(rows, keys, strict=True)):
        row, column = sum(rows[:index]), padding * index if padding else sum(keys[:index])
        found[row : row + count, column : column + length] = allowed(count, length, *meant)
    return found


@pytest.mark.parametrize("keys", [LENGTHS, MORE])
@pytest.mark.parametrize("name", BLOCKS)
def test_masks_of_blocks(name: str, keys: tuple[int, ...], classes: Any) -> None:
    method, arguments, meant = BLOCKS[name]
    bias = classes.BlockDiagonalMask.from_seqlens(LENGTHS, keys)
    bias = getattr(bias, method)(*arguments) if method else bias
    assert type(bias).__name__ == name
    mask = of_blocks(LENGTHS, keys, meant)
    if classes is not own:
        torch.testing.assert_close(bias.materialize(tuple(mask.shape), torch.float64), mask)
    check((random(1, 12, 4, 16), random(1, sum(keys), 2, 16, seed=1), random(1, sum(keys), 2, 16, seed=2)), bias, mask)


@pytest.mark.parametrize("name", PADDED)
def test_padded_keys(name: str, classes: Any) -> None:
    bias = getattr(classes, name).from_seqlens(q_seqlen=LENGTHS, kv_padding=8, kv_seqlen=MORE)
    mask = of_blocks(LENGTHS, MORE, PADDED[name], 8)
    if classes is not own:
        torch.testing.assert_close(bias.materialize(tuple(mask.shape), torch.float64), mask)
    check((random(1, 12, 4, 16), random(1, 24, 2, 16, seed=1), random(1, 24, 2, 16, seed=2)), bias, mask)


def test_lists_of_tensors(classes: Any) -> None:
    tensors = [random(1, 3, 2, 16), random(2, 5, 2, 16)]
    bias, x = classes.BlockDiagonalMask.from_tensor_list(tensors)
    for part, tensor in zip(bias.split(attend(x, x, x, bias)), tensors, strict=True):
        torch.testing.assert_close(part, eager(tensor, tensor, tensor))
    with pytest.raises(ValueError, match="batch size is 2"):
        attend(*[tensors[1]] * 3, bias)


def test_wrong_lengths_and_windows_are_refused() -> None:
    """Kernels on a GPU look at no lengths, and a window of no keys would be none."""
    mask = own.BlockDiagonalMask.from_seqlens([2, 3], [2, 4])
    for wrong in (
        lambda: mask.make_local_attention(0),
        lambda: mask.make_local_attention_from_bottomright(-1),
        lambda: own.LowerTriangularFromBottomRightMask().make_local_attention(0),
        lambda: own.LocalAttentionFromBottomRightMask(-1, 2),
        lambda: own.LocalAttentionFromBottomRightMask(2, -1),
        lambda: own.BlockDiagonalMask.from_seqlens([2, -1, 3]),
        lambda: own.BlockDiagonalPaddedKeysMask.from_seqlens([1, 1], 6, [-1, 3]),
    ):
        with pytest.raises(ValueError, match="must be at least"):
            wrong()
    with pytest.raises(ValueError, match="2 lengths but kv_seqlen 1"):
        own.BlockDiagonalMask.from_seqlens([2, 3], [5])
    with pytest.raises(ValueError, match="2 lengths but kv_seqlen 1"):
        own.BlockDiagonalPaddedKeysMask.from_seqlens([1, 1], 6, [3])
    with pytest.raises(ValueError, match="kv_padding is 6"):
        own.BlockDiagonalPaddedKeysMask.from_seqlens([1, 1], 6, [7, 3])
    x = random(1, 9, 2, 16)
    for rows, keys, name in ((6, 6, "query"), (4, 6, "query"), (5, 7, "key"), (5, 5, "key")):
        with pytest.raises(ValueError, match=f"{name} has"):
            attend(x[:, :rows], x[:, :keys], x[:, :keys], mask)


def test_the_other_arguments() -> None:
    q, k, v = (random(2, 6, 4, 16, seed=seed) for seed in range(3))
    torch.testing.assert_close(attend(q, k, v, scale=0.5), eager(q * 2, k, v))
    assert attend(q, k, v, output_dtype=torch.float32).dtype is torch.float32
    added = random(2, 4, 6, 6, seed=3).requires_grad_()
    found, right = attend(q, k, v, added), eager(q, k, v, added)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), added)[0] for x in (found, right)))
    one = eager(q[:, :, :1], k[:, :, :1], v[:, :, :1], added[:, :1])
    torch.testing.assert_close(attend(q[:, :, 0], k[:, :, 0], v[:, :, 0], added[:, 0]), one[:, :, 0])
    grouped = q.unflatten(2, (2, 2)), *(x[:, :, :2, None].expand(2, 6, 2, 2, 16) for x in (k, v))
    torch.testing.assert_close(attend(*grouped).flatten(2, 3), eager(q, k[:, :, :2], v[:, :, :2]))
    copied = grouped[0], *(x.contiguous() for x in grouped[1:])
    found = attend(*copied, added.unflatten(1, (2, 2))).flatten(2, 3)
    torch.testing.assert_close(found, eager(q, k[:, :, :2], v[:, :, :2], added))
    for expanded in ((1,), (2,), (0, 1, 2), (0, 2)):  # of which only keys and values together are fewer heads
        given = [grouped[i] if i and i in expanded else copied[i] for i in range(3)]
        given[0] = q[:, :, :2, None].expand(2, 6, 2, 2, 16) if 0 in expanded else given[0]
        wanted = eager(given[0].flatten(2, 3), k[:, :, :2], v[:, :, :2])
        torch.testing.assert_close(attend(*given).flatten(2, 3), wanted)
    torch.manual_seed(1)
    first = attend(q, k, v, p=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, attend(q, k, v, p=0.5)) and not torch.equal(first, attend(q, k, v))
    with pytest.raises(UnsupportedError, match=r"^memory_efficient_attention: p is given under torch\.func\.vmap"):
        torch.func.vmap(lambda x: attend(x, x, x, p=0.5), randomness="different")(q[None])
    with pytest.raises(UnsupportedError, match="op is not supported"):
        attend(q, k, v, op=object())
    with pytest.raises(UnsupportedError, match="attn_bias is a object"):
        attend(q, k, v, object())
    with pytest.raises(ValueError, match="dimensions"):
        attend(q[0, 0], k[0, 0], v[0, 0])
