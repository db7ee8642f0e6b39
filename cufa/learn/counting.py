"""What the rungs in NumPy move between slow memory and fast: counted as they run, and as formulas.

An array in *slow memory* (`Slow`) counts the bytes that a program reads from it and writes to it. Slicing it with
``[]`` copies a part into fast memory, an ordinary array, whose arithmetic is free. Assigning to a slice copies back. An
operation on whole arrays, as rung 1 has them, is what it is on a GPU without fusion: a kernel that reads its operands
from slow memory and writes its result there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Traffic:
    """Bytes from and to slow memory."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written


class Slow(np.ndarray[Any, Any]):
    """An array in slow memory. Results of operations on it, and arrays made like it, share its `traffic`."""

    traffic: Traffic

    def __array_finalize__(self, like: Any) -> None:
        self.traffic = getattr(like, "traffic", None) or Traffic()

    def __getitem__(self, index: Any) -> Any:
        part = np.array(np.asarray(self)[index])
        self.traffic.read += part.nbytes
        return part

    def __setitem__(self, index: Any, value: Any) -> None:
        plain = np.asarray(self)
        self.traffic.written += plain[index].nbytes
        plain[index] = value

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        operands = [np.asarray(x) if isinstance(x, Slow) else x for x in inputs]
        self.traffic.read += sum(x.nbytes for x in inputs if isinstance(x, Slow))
        result = np.asarray(getattr(ufunc, method)(*operands, **options)).view(Slow)
        result.traffic = self.traffic
        self.traffic.written += result.nbytes
        return result


def in_slow_memory(*arrays: NDArray[Any]) -> tuple[Traffic, list[Slow]]:
    """Copies of arrays, in slow memory, and the traffic that they share.

    Examples
    --------
    >>> import numpy as np
    >>> from cufa.learn import r04_queries_outer
    >>> from cufa.learn.counting import in_slow_memory
    >>> traffic, (q, k, v) = in_slow_memory(*np.ones((3, 256, 64), np.float32))
    >>> out, lse = r04_queries_outer.head(q, k, v, causal=False, scale=0.125)
    >>> traffic.read // 2**10, traffic.written // 2**10  # q once, k and v by each of four blocks; out and lse
    (576, 65)
    """
    traffic = Traffic()
    slow = [np.array(x).view(Slow) for x in arrays]
    for x in slow:
        x.traffic = traffic
    return traffic, slow


@dataclass(frozen=True)
class Size:
    """One head of one sequence, and how it is cut into tiles. head_dim is the same for q, k and v."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    block_m: int = 64
    block_n: int = 64
    causal: bool = False
    itemsize: int = 4

    @property
    def pairs(self) -> int:
        """Queries and keys that see each other: the scores that have to be computed."""
        if not self.causal:
            return self.seqlen_q * self.seqlen_k
        offset = self.seqlen_k - self.seqlen_q
        return sum(max(i + offset + 1, 0) for i in range(self.seqlen_q))

    def _tiles(self) -> list[tuple[int, int]]:
        """Rows and columns of each tile that is computed: that has a pair."""
        offset = self.seqlen_k - self.seqlen_q
        found = []
        for i in range(0, self.seqlen_q, self.block_m):
            end = min(i + self.block_m, self.seqlen_q)
            for j in range(0, self.seqlen_k, self.block_n):
                if not self.causal or j <= end - 1 + offset:
                    found.append((end - i, min(j + self.block_n, self.seqlen_k) - j))
        return found

    def forward_flops(self) -> int:
        """Multiplications and additions of the two products, of pairs that see each other alone."""
        return 4 * self.head_dim * self.pairs

    def backward_flops(self) -> int:
        """Those of the five products."""
        return 10 * self.head_dim * self.pairs

    def least(self) -> Traffic:
        """If q, k and v are read once, and out is written once: what no kernel can do without."""
        return Traffic(
            (self.seqlen_q + 2 * self.seqlen_k) * self.head_dim * self.itemsize,
            self.seqlen_q * self.head_dim * self.itemsize,
        )

    def textbook(self) -> Traffic:
        """Rung 1, without a mask: each operation reads and writes all of its operands.

        Of S and P: the two products write and read one each; scaling, the difference to the maximum, its exponential
        and the division read one and write one each, and maximum and sum read one.
        """
        scores = self.seqlen_q * self.seqlen_k
        rows = self.seqlen_q  # of m and l, and of whether they are what a row without keys has, a byte each
        least = self.least()
        read = least.read + (1 + 4 + 2) * scores * self.itemsize
        written = least.written + (1 + 4) * scores * self.itemsize
        return Traffic(read + 2 * rows * self.itemsize, written + 2 * rows * (self.itemsize + 1))

    def v1(self) -> Traffic:
        """Rung 3: keys and values once; of each tile q, out, l and m, of which all but q are written, too."""
        rows = sum(m for m, _ in self._tiles())
        first = self.seqlen_q * (self.head_dim + 2)  # out, l and m are set before the first tile
        return Traffic(
            (2 * self.seqlen_k * self.head_dim + rows * (2 * self.head_dim + 2)) * self.itemsize,
            (first + rows * (self.head_dim + 2)) * self.itemsize,
        )

    def v2(self) -> Traffic:
        """Rung 4: q once, of each tile k and v; out and lse once."""
        columns = sum(n for _, n in self._tiles())
        return Traffic(
            (self.seqlen_q + 2 * columns) * self.head_dim * self.itemsize,
            self.seqlen_q * (self.head_dim + 1) * self.itemsize,
        )

    def backward(self) -> Traffic:
        """Rung 5: delta; keys and values once; of each tile q, dout, lse, delta and dq, which is written, too."""
        rows = sum(m for m, _ in self._tiles())
        before = self.seqlen_q * self.head_dim
        return Traffic(
            (2 * before + 2 * self.seqlen_k * self.head_dim + rows * (3 * self.head_dim + 2)) * self.itemsize,
            (before + self.seqlen_q + 2 * self.seqlen_k * self.head_dim + rows * self.head_dim) * self.itemsize,
        )
