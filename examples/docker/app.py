"""One causal attention on the GPU, held to the same on the CPU: a program whose kernel comes from a bundle.

Arrays are copied to the GPU and back, and nothing else is asked of CuPy, which would compile kernels of its own.
"""

from __future__ import annotations

import time

import cupy
import numpy as np

import cufa


def main() -> None:
    host = np.random.default_rng(0).standard_normal((3, 1, 1024, 16, 128), dtype=np.float32).astype(np.float16)
    q, k, v = (cupy.asarray(each) for each in host)
    began = time.perf_counter()
    out = cupy.asnumpy(cufa.attention(q, k, v, causal=True))
    milliseconds = 1e3 * (time.perf_counter() - began)
    cufa.testing.assert_close(out, *host, causal=True)
    compiled = cufa.stats().kernels["compiled"]
    print(f"first result after {milliseconds:.0f} ms, {compiled} kernels compiled, as the float64 reference has it")


if __name__ == "__main__":
    main()
