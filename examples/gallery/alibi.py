"""ALiBi written by hand: a score function that reads an array of slopes."""

from arrays import Array, normals, tell, xp

import cufa

q, k, v = normals(3, 2, 64, 4, 32)
slopes = (2.0 ** -xp.arange(2.0, 10.0, 2.0)).astype(xp.float32)  # one for each head


def alibi(score: Array, batch: Array, head: Array, query: Array, key: Array) -> Array:
    return score - slopes[head] * abs(query - key)


found = cufa.attention(q, k, v, score=alibi)
expected = cufa.attention(q, k, v, alibi_slopes=slopes)
tell(found, expected)
