"""Scores times the sigmoid of a learned number for every head and distance, with the gradient by the table."""

from arrays import Array, normal, tell, xp

import cufa
from cufa import functions

q, k, v, dout = (normal(2, 64, 4, 32, seed=seed, dtype=xp.float32) for seed in range(4))
table = normal(4, 16, seed=4, dtype=xp.float32)  # from a distance of 15 on keys share a number


def gated(score: Array, batch: Array, head: Array, query: Array, key: Array, table: Array) -> Array:
    return score * functions.sigmoid(table[head, functions.minimum(abs(query - key), 15)])


def loss(table: Array) -> Array:
    return (cufa.attention(q, k, v, score=(gated, table)) * dout).astype(xp.float32).sum()


out, lse = cufa.attention(q, k, v, score=(gated, table), return_lse=True)
*_, dtable = cufa.attention_backward(dout, q, k, v, out, lse, score=(gated, table))
direction = normal(4, 16, seed=5, dtype=xp.float32)
found = (dtable * direction).sum()
expected = (loss(table + 0.05 * direction) - loss(table - 0.05 * direction)) / 0.1
tell(found, expected)
