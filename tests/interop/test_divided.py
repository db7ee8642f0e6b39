"""XLA divides calls that merge states, and that rotate, among devices: gradients too are what they are on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DIVIDED = """
import jax, numpy as np, rotary
from jax.sharding import NamedSharding, PartitionSpec as P
from states import NAMES, Call
import cufa

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("b", "h"))

def check(call, *pairs):
    def both(*arrays):
        results, pull = jax.vjp(call, *arrays)
        return *results, *pull(tuple(jax.numpy.sin(x) for x in results))
    whole = both(*(jax.numpy.asarray(x) for x, _ in pairs))
    found = jax.jit(both)(*(jax.device_put(x, NamedSharding(mesh, P(*spec))) for x, spec in pairs))
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    return found[0].sharding.spec

dense, lse = ("b", None, "h", None), ("b", "h", None)
host = Call(shape=(4, 8, 4, 16), values="apart").host()
pairs = zip((host[name] for name in NAMES), (dense, lse) * 2)
assert check(cufa.merge_states, *pairs) == P("b", None, "h")
host = Call(shape=(4, 8, 4, 16), states=2, values="apart").host()  # states on devices of their own are gathered
pairs = (host["out_a"], ("b", None, None, "h", None)), (host["lse_a"], ("b", None, "h", None))
check(cufa.merge_states, *pairs)
host = Call(shape=(8, 4, 16), states=4, values="apart").host()
assert check(cufa.merge_states, (host["out_a"], ("b", None, "h")), (host["lse_a"], ("b", "h"))) == P(None, "h")
for heads in (1, 2):  # a single key head is on all devices, and what becomes of it no sum over them
    host = rotary.Call(batch=4, seqlen=8, num_heads_k=heads, places="offsets").host()
    rest = {name: jax.numpy.asarray(x) for name, x in host.items() if name not in "qk"}
    pairs = (host["q"], dense), (host["k"], dense if heads == 2 else ("b",))
    assert check(lambda q, k: cufa.rotary(q, k, **rest), *pairs) == P("b")
"""


def test_jax_divides_calls_among_devices() -> None:
    pytest.importorskip("jax")
    root = Path(__file__).parents[2]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", DIVIDED], env=os.environ | flags | path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
