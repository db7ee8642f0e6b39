"""Text and images in one sequence: the tokens of an image see each other, all else is causal."""

import numpy as np
from arrays import normals, tell, xp

import cufa
from cufa import masks

q, k, v = normals(3, 1, 64, 4, 32)
images = np.array([[[4, 20], [30, 46]]], np.int32)  # (batch, images, 2): from, to
mask = masks.causal() | masks.image_ranges(images)
print(mask.draw(24, 24))
found = cufa.attention(q, k, v, mask=mask.to(q))  # what the mask reads lies where q does

seen = np.tri(64, dtype=bool)
for start, end in images[0]:
    seen[start:end, start:end] = True
expected = cufa.attention(q, k, v, mask=xp.asarray(seen[None, None]))
tell(found, expected)
