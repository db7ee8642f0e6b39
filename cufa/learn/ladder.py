"""The rungs of the ladder in their order: what each needs, whether it is right, and how fast it is."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from ..testing import Case


class Rung(NamedTuple):
    """A step of the ladder.

    Attributes
    ----------
    name : str
        Of its module in `cufa.learn`.
    needs : {'numpy', 'triton', 'numba', 'cuda', 'sm_90'}
        ``cuda`` is a GPU of compute capability 8.0 or newer, and ``sm_90`` is Hopper.
    """

    name: str
    needs: str

    def load(self) -> ModuleType:
        """The module."""
        return importlib.import_module(f"cufa.learn.{self.name}")

    @property
    def title(self) -> str:
        """What the module calls itself."""
        return str(self.load().TITLE)


RUNGS = (
    Rung("r01_textbook", "numpy"),
    Rung("r02_online", "numpy"),
    Rung("r03_keys_outer", "numpy"),
    Rung("r04_queries_outer", "numpy"),
    Rung("r05_backward", "numpy"),
    Rung("r06_split_keys", "numpy"),
    Rung("n03_numba_v1", "numba"),
    Rung("n04_numba_v2", "numba"),
    Rung("t04_triton", "triton"),
    Rung("r07_thread_per_row", "cuda"),
    Rung("r08_shared_tiles", "cuda"),
    Rung("r09_warp_rows", "cuda"),
    Rung("r10_tensor_cores", "cuda"),
    Rung("r11_async_copies", "cuda"),
    Rung("r12_swizzle", "cuda"),
    Rung("r13_hopper", "sm_90"),
)

DTYPES = {"numpy": ("float32", "float64"), "numba": ("float32",), "triton": ("float16",)}
DTYPES |= dict.fromkeys(("cuda", "sm_90"), ("float16", "bfloat16"))
"""Of the arrays that rungs take, by what they need."""

HEAD_DIMS = {"numpy": (1, 16, 33), "numba": (64,), "triton": (64,)} | dict.fromkeys(("cuda", "sm_90"), (64, 128))


def rung(name: str) -> Rung:
    """The rung of a name, or of a name's beginning, as ``r07``."""
    found = [each for each in RUNGS if each.name == name or each.name.startswith(f"{name}_")]
    if len(found) != 1:
        raise ValueError(f"cufa.learn: there is no rung {name!r}; there are {', '.join(each.name for each in RUNGS)}.")
    return found[0]


def cases(rung: Rung, max_seqlen: int = 150) -> SearchStrategy[Case]:
    """Problems that a rung solves, as a Hypothesis strategy: lengths around tiles of 16, 32, 64 and 128."""
    from hypothesis import strategies as st

    from ..testing import Case

    edges = [each for each in (1, 2, 17, 63, 64, 65, 100, 127, 128, 129, 150, 257) if each <= max_seqlen]
    heads = st.integers(1, 2)
    strategy: SearchStrategy[Case] = heads.flatmap(
        lambda heads: st.sampled_from(HEAD_DIMS[rung.needs]).flatmap(
            lambda head_dim: st.builds(
                Case,
                batch=st.integers(1, 2),
                seqlen_q=st.sampled_from(edges),
                seqlen_k=st.sampled_from(edges),
                num_heads_q=st.just(heads),
                num_heads_k=st.just(heads),
                head_dim=st.just(head_dim),
                head_dim_v=st.just(head_dim),
                dtype=st.sampled_from(DTYPES[rung.needs]),
                causal=st.booleans(),
                softmax_scale=st.sampled_from((None, 0.3)),
                seed=st.integers(0, 99),
            )
        )
    )
    return strategy


def check_case(rung: Rung, case: Case, xp: Any = np) -> None:
    """Hold a rung to the float64 reference in one problem.

    Parameters
    ----------
    rung : Rung
    case : Case
    xp : module or callable
        Where the arrays are: NumPy, CuPy or torch, as `cufa.testing.Case.arrays` takes it.

    Raises
    ------
    AssertionError
        If a result is not as close to the reference as rounding allows.
    """
    from .. import reference
    from ..testing import assert_close, assert_gradients_close

    module, arrays, options = rung.load(), case.arrays(xp), case.options
    asked: dict[str, Any] = {"causal": case.causal, "softmax_scale": case.softmax_scale}
    if hasattr(module, "attention_backward"):
        q, k, v = arrays["q"], arrays["k"], arrays["v"]
        out, lse = reference.attention(q, k, v, return_lse=True, **options)
        dout = np.random.default_rng(case.seed).standard_normal(out.shape).astype(q.dtype)
        found = module.attention_backward(q, k, v, out, lse, dout, **asked)
        assert_gradients_close(found, dout, **arrays, **options)
    if hasattr(module, "attention"):
        assert_close(module.attention(**arrays, **asked), **arrays, **options)


def check(rung: Rung, xp: Any = np, *, max_examples: int = 20, max_seqlen: int = 150) -> None:
    """Hold a rung to the float64 reference in many problems, which Hypothesis draws.

    Raises
    ------
    AssertionError
        As `check_case`, with a small problem that fails.
    """
    from hypothesis import given, settings

    @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)
    @given(cases(rung, max_seqlen))
    def held(case: Case) -> None:
        check_case(rung, case, xp)

    held()
