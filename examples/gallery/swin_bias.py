"""Swin's bias: a learned number for every head and offset in two dimensions, inside windows of 7 × 7 tokens."""

from arrays import Array, normal, normals, tell, xp

import cufa

side = 7
q, k, v = normals(3, 16, side * side, 3, 32)  # every window is a sequence
table = normal(3, 2 * side - 1, 2 * side - 1, seed=3, dtype=xp.float32)


def swin(score: Array, batch: Array, head: Array, query: Array, key: Array) -> Array:
    rows = query // side - key // side
    columns = query % side - key % side
    return score + table[head, rows + side - 1, columns + side - 1]


found = cufa.attention(q, k, v, score=swin)

tokens = xp.arange(side * side)
rows = (tokens // side)[:, None] - tokens // side + side - 1
columns = (tokens % side)[:, None] - tokens % side + side - 1
expected = cufa.attention(q, k, v, bias=xp.ascontiguousarray(table[:, rows, columns])[None])
tell(found, expected)
