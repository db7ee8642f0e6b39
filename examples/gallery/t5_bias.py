"""T5's bias: distances share buckets, which grow with the distance, and each has a learned number for every head."""

import numpy as np
from arrays import normal, normals, tell, xp

import cufa

q, k, v, dout = normals(4, 2, 64, 4, 32)
reach = 63
buckets = cufa.t5_buckets(num_buckets=32, max_distance=128, reach=reach, bidirectional=True)
table = normal(32, 4, seed=4, dtype=xp.float32)  # bucket by head, as T5 keeps it
rel_bias = xp.ascontiguousarray(table[xp.asarray(buckets)].T)

found, lse = cufa.attention(q, k, v, softmax_scale=1.0, rel_bias=rel_bias, return_lse=True)
*_, drel_bias = cufa.attention_backward(dout, q, k, v, found, lse, softmax_scale=1.0, rel_bias=rel_bias)
dtable = xp.zeros_like(table)
for bucket in range(32):
    dtable[bucket] = drel_bias[:, np.flatnonzero(buckets == bucket)].sum(axis=1)

distances = np.arange(64)[:, None] - np.arange(64)
bias = xp.ascontiguousarray(rel_bias[:, distances + reach])[None]
expected = cufa.attention(q, k, v, softmax_scale=1.0, bias=bias)
tell(found, expected)
