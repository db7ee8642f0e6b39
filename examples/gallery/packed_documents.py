"""Documents one behind the other in a row of tokens, each of which sees itself alone: by blocks, and as sequences."""

import numpy as np
from arrays import normals, tell, xp

import cufa
from cufa import masks

offsets = np.array([0, 100, 130, 300, 512], np.int32)
q, k, v = normals(3, 1, 512, 4, 32)
mask = masks.causal() & masks.document(offsets=offsets)
blocks = cufa.BlockMask.of(mask, 1, 1, 512, 512, block_size=64, like=q)  # made once, for all layers and steps
print(blocks.draw())

found = cufa.attention(q, k, v, mask=blocks)
cu_seqlens = xp.asarray(offsets)
expected = cufa.attention_varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, causal=True)[None]
tell(found, expected)
