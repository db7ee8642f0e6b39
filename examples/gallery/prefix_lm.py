"""A prefix that all tokens see, and causality behind it: of another length in each sequence."""

import numpy as np
from arrays import normals, tell, xp

import cufa
from cufa import masks

q, k, v = normals(3, 2, 64, 4, 32)
prefixes = np.array([25, 6], np.int32)
mask = masks.prefix_lm(prefixes)
print(mask.draw(12, 12, batch=1))
found = cufa.attention(q, k, v, mask=mask.to(q))  # what the mask reads lies where q does

tokens = np.arange(64)
seen = (tokens <= tokens[:, None]) | (tokens < prefixes[:, None, None])
expected = cufa.attention(q, k, v, mask=xp.asarray(seen[:, None]))  # (batch, 1, seqlen_q, seqlen_k)
tell(found, expected)
