"""Every fourth key of a window: it reaches four times as far for the same work."""

from arrays import Array, normals, tell

import cufa
from cufa import masks

q, k, v = normals(3, 2, 64, 4, 32)
mask = masks.dilated(4) & masks.sliding_window(16, 0)
print(mask.draw(20, 20))
found = cufa.attention(q, k, v, mask=mask)


def seen(batch: Array, head: Array, query: Array, key: Array) -> Array:
    distance = query - key
    return (distance >= 0) & (distance <= 16) & (distance % 4 == 0)


expected = cufa.attention(q, k, v, mask=seen)
tell(found, expected)
