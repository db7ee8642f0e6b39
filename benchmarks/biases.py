"""What kernels for Hopper may do with biases, each beside what they do: by turns, in one process.

    python benchmarks/biases.py [--only REGEX] [--repeats 30]

Each way is the sources with something changed: what is staged, the tiles of the forward, whether heads of all sequences
follow each other, whether a kernel of its own makes the gradient of a bias, its tiles, and when dP begins. What loses
is to go.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import cufa
from cufa._bench.frameworks import Torch
from cufa._bench.measure import captured, take_turns
from cufa._call import problem as _problem
from cufa._compile import jit as _jit
from cufa._kernels import backward_sm90, choose
from cufa._kernels.forward_sm90 import ForwardSm90
from cufa._terms import bias as _bias

Change = tuple[Any, str, Any]
"""An object, the name of its attribute, and a value for that."""

SHAPES = {
    "bias (1, h, s, s)": (8, 2048, lambda b, s, h: (1, h, s, s)),
    "bias (b, 1, s, s)": (8, 2048, lambda b, s, h: (b, 1, s, s)),
    "relative table": (4, 4096, lambda b, s, h: (h, 2 * s - 1)),
}
HEADS, HEAD_DIM = 16, 128


def tile_of(*tile: Any) -> list[Change]:
    return [(ForwardSm90, "tile", lambda self, static: tile)]


def without(header: str, condition: str) -> list[Change]:
    """A header of ``cuda_src`` where a condition never holds."""
    headers = dict(_jit.headers())
    source = headers[header].decode()
    assert source.count(condition) == 1
    headers[header] = source.replace(condition, "false").encode()
    return [(_jit, "headers", lambda: headers)]


FORWARD: dict[str, list[Change]] = {
    "as it is": [],
    "loaded ahead": [(ForwardSm90, "may_stage", False)],
    "nothing early": [
        (ForwardSm90, "tile", lambda self, static, own=ForwardSm90.tile: (*own(self, static)[:2], 0, False))
    ],
    "128×96": tile_of(128, 96, 4, False),
    "192×80": tile_of(192, 80, 0, False),
    "heads in order": without("attention/scheduler.cuh", "Config::variant::sequences_share"),
}
BACKWARD: dict[str, list[Change]] = {
    "as it is": [],
    "dP late": without("attention/backward_mainloop_sm90.cuh", "Variant::loading == 1 && Variant::light"),
    "added in memory": [(_bias, "APART_TILES", 1 << 62)],
    "two chunks": [(backward_sm90, "bias_chunks", lambda static: 2 * any(term.apart for term in static.terms))],
}


_loaded: list[Any] = []


@contextlib.contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    """Sources with changes: nothing that was decided before counts."""

    def forget() -> None:
        _problem._checked.cache_clear()
        choose.cache_clear()
        _loaded.append(dict(_jit._kernels))  # graphs still run them
        _jit._kernels.clear()

    forget()
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield
    forget()


def calls_of(shape: str) -> dict[str, tuple[dict[str, list[Change]], float, Callable[[], Any]]]:
    """For each direction the ways, its operations, and the call."""
    batch, seqlen, extents = SHAPES[shape]
    q, k, v, dout = (torch.randn(batch, seqlen, HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(4))
    array = torch.randn(extents(batch, seqlen, HEADS), device="cuda")
    more = {"rel_bias": array} if shape == "relative table" else {"bias": array.bfloat16()}
    out, lse = cufa.attention(q, k, v, return_lse=True, **more)
    operations = 4.0 * batch * HEADS * seqlen**2 * HEAD_DIM

    def backward(deterministic: bool) -> Any:
        return cufa.attention_backward(dout, q, k, v, out, lse, **more, deterministic=deterministic)

    return {
        "forward": (FORWARD, operations, lambda: (cufa.attention(q, k, v, **more),)),
        "backward": (BACKWARD, 2.5 * operations, lambda: backward(False)),
        "backward, deterministic": (BACKWARD, 2.5 * operations, lambda: backward(True)),
    }


def compare(row: str, ways: dict[str, list[Change]], operations: float, call: Callable[[], Any], repeats: int) -> None:
    """Print what each way takes, and how far its results are from those of the sources as they are."""
    clock = Torch().clock()
    graphs, far, expected = {}, {}, None
    for way, changes in ways.items():
        with changed(changes):
            results = [each.float() for each in call()]
            expected = expected or results
            far[way] = max(float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))
            graph = captured(call, clock)
            if graph is not None:
                graphs[way] = graph
    for way, seconds in take_turns(graphs, clock, repeats).items():
        speed = f"{1e3 * seconds:.3f} ms, {operations / seconds / 1e12:.0f} TFLOP/s"
        print(f"{row}, {way}: {speed}, {far[way]:.1e} from as it is", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that a row's name must contain")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())
    for shape in SHAPES:
        for direction, found in calls_of(shape).items():
            if re.search(arguments.only, f"{shape}, {direction}"):
                compare(f"{shape}, {direction}", *found, arguments.repeats)


if __name__ == "__main__":
    main()
