"""Training steps with dropout: the gradients are told the step's seed, and drop the same entries."""

from arrays import normals, tell, xp

import cufa

q, k, v, target = normals(4, 2, 64, 4, 32)
losses = []
for step in range(20):
    dropout = {"dropout_p": 0.1, "seed": step}
    out, lse = cufa.attention(q, k, v, return_lse=True, **dropout)
    dout = out - target
    losses.append(float((dout.astype(xp.float32) ** 2).mean()))
    dq, dk, dv = cufa.attention_backward(dout, q, k, v, out, lse, **dropout)
    v = v - dv  # the values learn
print(f"loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
assert losses[-1] < losses[0]

# v enters linearly, so the derivative along a direction is a difference.
found = (dv * target).astype(xp.float32).sum()
expected = ((cufa.attention(q, k, v + dv + target, **dropout) - out) * dout).astype(xp.float32).sum()
tell(found, expected)
