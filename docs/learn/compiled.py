"""What the compiler makes of the rungs in CUDA: ``python docs/learn/compiled.py`` writes results/compiled.md anew.

It needs NVRTC, ``cuobjdump`` and ``nvdisasm``, and no GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from cufa.learn import host, ladder

FILE = Path(__file__).with_name("results") / "compiled.md"
ARCH = "sm_90"
COUNTED = {
    "tensor products": ("HMMA", "HGMMA"),
    "float32 products and sums": ("FFMA", "FMUL", "FADD"),
    "conversions": ("HADD2", "F2F", "F2FP", "PRMT"),
    "exponentials": ("MUFU.EX2",),
    "shared memory": ("LDS", "LDSM", "STS"),
    "global memory": ("LDG", "LDGSTS", "UTMALDG", "STG"),
}
"""Opcodes by what the table calls them."""


def blocks_on_an_sm(threads: int, registers: int, shared_bytes: int) -> int:
    """Of compute capability 9.0, where registers are given out by 256, and a block takes 1 KB more of shared memory."""
    of_block = -(-registers * 32 // 256) * 256 * (threads // 32)
    return min(65536 // of_block, 228 * 1024 // (shared_bytes + 1024), 2048 // threads)


def row(name: str, head_dim: int) -> str:
    module = ladder.rung(name).load()
    kernel = host.kernel(name, "float16", head_dim).compile(ARCH)
    threads = getattr(module, "THREADS", 128)
    shared = kernel.shared_bytes + getattr(module, "shared_bytes", lambda head_dim: 0)(head_dim)
    # What has the predicate !PT never runs: three such reads of shared memory stand before each cp.async, as a delay.
    listing = re.sub(r"^.*@!PT .*\n", "", kernel.sass or "", flags=re.MULTILINE)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    counts = Counter(
        kind for op in opcodes for kind, of in COUNTED.items() if f"{op}.".startswith(tuple(f"{each}." for each in of))
    )
    resident = f"{blocks_on_an_sm(threads, kernel.registers, shared)} × {threads // 32}"
    cells = [name, head_dim, module.ROWS, kernel.registers, kernel.spill_bytes, f"{shared:,}", resident]
    return " | ".join(map(str, [*cells, f"{kernel.instructions:,}", *(f"{counts[kind]:,}" for kind in COUNTED)]))


def table() -> str:
    """The file."""
    heads = ["rung", "head_dim", "rows that share a reading", "registers", "bytes spilled", "shared bytes"]
    heads += ["blocks × warps on an SM", "instructions", *COUNTED]
    names = [rung.name for rung in ladder.RUNGS if rung.needs in ("cuda", "sm_90")]
    rows = [row(name, head_dim) for name in names for head_dim in host.HEAD_DIMS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *(f"| {each} |" for each in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(table())
