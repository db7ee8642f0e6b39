"""The rungs of the ladder in their order: what each needs, whether it is right, and how fast it is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
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


class Size(NamedTuple):
    """What is measured: the sizes of a problem, its dtype, and whether it has a causal mask."""

    batch: int = 1
    seqlen: int = 4096
    heads: int = 16
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = False

    @property
    def pairs(self) -> int:
        """Queries and keys that see each other, of all heads."""
        each = self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2
        return self.batch * self.heads * each

    @property
    def flops(self) -> int:
        """Multiplications and additions of the two products."""
        return 4 * self.pairs * self.head_dim

    def bytes_asked_for(self, rows: int) -> int:
        """Bytes that a kernel asks the global memory for, where so many rows of q share one reading of k and v."""
        keys = sum(
            min(self.seqlen, first + rows) if self.causal else self.seqlen for first in range(0, self.seqlen, rows)
        )
        return 2 * self.batch * self.heads * self.head_dim * (2 * self.seqlen + 2 * keys)


class Measured(NamedTuple):
    """What came of measuring a rung.

    Attributes
    ----------
    name, title : str
    seconds : float
        The median of a call.
    flops : int
    bytes_asked_for : int or None
        None if the rung does not say how it reads k and v.
    error : float
        The largest of an element beside the float64 reference, in a small problem.
    """

    name: str
    title: str
    seconds: float
    flops: int
    bytes_asked_for: int | None
    error: float

    @property
    def tflops(self) -> float:
        """Multiplications and additions in a second, in units of 10^12."""
        return self.flops / self.seconds / 1e12


def why_not(rung: Rung) -> str:
    """Why a rung cannot run here, in a few words; empty if it can."""
    if rung.needs == "numpy":
        return ""
    from .._api.config import is_available
    from .._driver import driver as _driver

    if not is_available():
        return "there is no GPU of compute capability 8.0 or newer"
    if rung.needs == "sm_90" and _driver.device(_driver.current_ordinal() or 0).arch != 90:
        return "it needs compute capability 9.0"
    needed = {"numba": ("numba", "cupy"), "triton": ("triton", "torch")}.get(rung.needs, ())
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return f"it needs {' and '.join(missing)}"
    if rung.needs in ("cuda", "sm_90") and not any(map(importlib.util.find_spec, ("cupy", "torch"))):
        return "it needs CuPy or torch, to hold arrays"
    return ""


def framework_of(rung: Rung) -> Any:
    """The module whose arrays a rung is measured on."""
    if rung.needs == "numpy":
        return np
    has_cupy = importlib.util.find_spec("cupy") is not None
    return importlib.import_module("torch" if rung.needs == "triton" or not has_cupy else "cupy")


def measure(rung: Rung, size: Size, *, seconds: float = 0.5) -> Measured:
    """Hold a rung to the reference in a small problem, and measure it in a large one.

    Parameters
    ----------
    rung : Rung
        Of one that has gradients alone these are measured.
    size : Size
        Its dtype is another one if the rung does not take it, and the title says so.
    seconds : float
        How long to measure, about.

    Raises
    ------
    AssertionError
        If the rung is wrong.
    """
    module, xp = rung.load(), framework_of(rung)
    dtypes = DTYPES[rung.needs]
    title = module.TITLE if size.dtype in dtypes else f"{module.TITLE} ({dtypes[0]})"
    size = size if size.dtype in dtypes else size._replace(dtype=dtypes[0])
    small, large = _cases(size)
    check_case(rung, small, xp)
    call, expected = _call(module, small, xp)
    error = _largest_difference(call(), expected)
    call, _ = _call(module, large, xp, exact=False)
    rows = getattr(module, "ROWS", None)
    return Measured(
        rung.name,
        title,
        _timed(call, large.arrays(xp)["q"], rung.needs, seconds),
        size.flops if hasattr(module, "attention") else size.flops * 5 // 2,
        None if rows is None else size.bytes_asked_for(rows),
        error,
    )


def measure_cufa(size: Size, xp: Any, *, seconds: float = 0.5) -> Measured:
    """The same of `cufa.attention`, where the ladder leads to."""
    import cufa

    small, large = _cases(size)
    call, expected = _call(cufa, small, xp)
    error = _largest_difference(call(), expected)
    call, _ = _call(cufa, large, xp, exact=False)
    time = _timed(call, large.arrays(xp)["q"], "cuda", seconds)
    return Measured("cufa.attention", "what the ladder leads to", time, size.flops, None, error)


def _cases(size: Size) -> tuple[Case, Case]:
    """A small problem, whose lengths no tile divides, and that to measure."""
    from ..testing import Case

    def case(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Case:
        return Case(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads_q=heads,
            num_heads_k=heads,
            head_dim=size.head_dim,
            head_dim_v=size.head_dim,
            dtype=size.dtype,
            causal=size.causal,
        )

    return case(1, 2, 200, 333), case(size.batch, size.heads, size.seqlen, size.seqlen)


def _call(module: Any, case: Case, xp: Any, *, exact: bool = True) -> tuple[Callable[[], Any], Any]:
    """A call of what a module has, attention or else its gradients, and the right result if `exact`."""
    from .. import reference
    from ..testing import to_numpy

    arrays, asked = case.arrays(xp), {"causal": case.causal}
    specified: Any = reference
    wide = {name: to_numpy(each).astype(np.float64) for name, each in arrays.items()} if exact else {}
    if hasattr(module, "attention"):
        expected = specified.attention(**wide, **case.options) if exact else None
        return lambda: module.attention(**arrays, **asked), expected
    out, lse = specified.attention(**arrays, return_lse=True, **case.options)
    dout = np.random.default_rng(case.seed).standard_normal(out.shape).astype(case.dtype)
    expected = specified.attention_backward(dout.astype(np.float64), **wide, **case.options) if exact else None
    return lambda: module.attention_backward(**arrays, out=out, lse=lse, dout=dout, **asked), expected


def _largest_difference(found: Any, expected: Any) -> float:
    from ..testing import to_numpy

    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    return max(float(np.abs(to_numpy(a).astype(np.float64) - b).max()) for a, b in pairs)


def _timed(call: Callable[[], Any], like: Any, needs: str, seconds: float) -> float:
    from ..testing import bench

    if needs != "numba":
        return bench(call, like=like, seconds=seconds, min_repeats=3).median
    from numba import cuda

    def finished() -> None:  # Numba launches on a stream of its own, which no event of another framework sees
        call()
        cuda.synchronize()

    return bench(finished, seconds=seconds, min_repeats=3).median
