"""A sliding window, and a few tokens that see and are seen by all, as in Longformer."""

import numpy as np
from arrays import normals, tell, xp

import cufa
from cufa import masks

q, k, v = normals(3, 2, 64, 4, 32)
mask = masks.sliding_window(4, 4) | masks.global_tokens(2)
print(mask.draw(16, 16))
found = cufa.attention(q, k, v, mask=mask.to(q))  # what the mask reads lies where q does

tokens = np.arange(64)
seen = abs(tokens[:, None] - tokens) <= 4
seen[:2] = seen[:, :2] = True
expected = cufa.attention(q, k, v, mask=xp.asarray(seen[None, None]))
tell(found, expected)
