"""A learned number for every head and distance, with its gradient: as ``rel_bias`` and as a score function."""

from arrays import Array, normal, normals, tell, xp

import cufa

q, k, v, dout = normals(4, 2, 64, 4, 32)
reach = 63  # further away than any key
table = normal(4, 2 * reach + 1, seed=4, dtype=xp.float32)


def shifted(score: Array, batch: Array, head: Array, query: Array, key: Array, table: Array) -> Array:
    return score + table[head, query - key + reach]


out, lse = cufa.attention(q, k, v, rel_bias=table, return_lse=True)
*_, found = cufa.attention_backward(dout, q, k, v, out, lse, rel_bias=table)
*_, expected = cufa.attention_backward(dout, q, k, v, out, lse, score=(shifted, table))
tell(found, expected)
