"""Whether the machine code of the compile matrix is the same as that of another version of the sources.

    python tests/compare_sass.py BASE [--most 40] [--only REGEX] [--all]

BASE is a commit. Of each kernel the translation unit and the headers it includes are compared without comments and
assertions: where these are the same, so is the code. The others are compiled, at most `--most` of them, evenly chosen,
and their machine code is compared; with `--all` every kernel is. No GPU is needed. The exit status is 1 if some differ.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import matrix
import sass
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]


def extract(commit: str, target: Path) -> None:
    """The sources of a commit."""
    command = ["git", "-C", str(HERE), "archive", commit, "cufa", "cuda_src", "tests"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(target, filter="data")


def run(tree: Path, *arguments: str, text: str = "") -> str:
    """What `matrix.py` of a tree prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")])}
    command = [sys.executable, str(tree / "tests" / "matrix.py"), *arguments]
    ran = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, cwd=tree, check=False)
    if ran.returncode:
        sys.exit(f"{tree / 'tests' / 'matrix.py'}:\n{ran.stderr}")
    return ran.stdout


class Tokens:
    """Sources without comments, assertions and the layout of lines, what they include in place, each header once."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = {name: COMMENT.sub("", text) for name, text in headers.items()}
        self._known: dict[tuple[str, ...], list[str]] = {}

    def of(self, source: str) -> list[str]:
        """Those of a translation unit, which begins with what it includes."""
        names = tuple(INCLUDE.findall(source))
        if names not in self._known:
            seen: set[str] = set()
            self._known[names] = self._split("".join(self._inlined(name, seen) for name in names))
        return self._known[names] + self._split(INCLUDE.sub("", COMMENT.sub("", source)))

    def _inlined(self, name: str, seen: set[str]) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return INCLUDE.sub(lambda match: self._inlined(match[1], seen), self._headers[name])

    def _split(self, text: str) -> list[str]:
        return re.findall(r"#.*|\w+|[^\w\s]", ASSERTION.sub("", text).replace("#pragma once", ""))


COMMENT = re.compile(r"//.*")
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
ASSERTION = re.compile(
    r'\bstatic_assert\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\))*\);'
)


def differing(trees: list[Path], labels: list[str]) -> list[str]:
    """Those of the kernels whose machine code differs."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / side for side in ("base", "new")]
        for tree, place in zip(trees, places, strict=True):
            place.mkdir()
            run(tree, "--compile", str(place), text=json.dumps(labels))
        for label in tqdm(labels, desc="disassemble", disable=None):
            one, other = (sass.disassemble(matrix.path_of(place, label).read_bytes()) for place in places)
            assert one, "needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
            if one != other:
                found.append(label)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit")
    parser.add_argument("--most", type=int, default=40, help="how many kernels to compile at most")
    parser.add_argument("--only", default="", help="regular expression that a kernel's label must contain")
    parser.add_argument("--all", action="store_true", help="compile every kernel")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        extract(arguments.base, base)
        sides: list[dict[str, Any]] = [json.loads(run(tree)) for tree in (base, HERE)]
        one, other = (side["units"] for side in sides)
        gone, new = sorted(one.keys() - other.keys()), sorted(other.keys() - one.keys())
        for word, labels in (("gone", gone), ("new", new)):
            for label in labels:
                print(f"{word}: {label}")
        shared = [label for label in one if label in other and re.search(arguments.only, label)]
        of_base, of_new = (Tokens(side["headers"]).of for side in sides)
        told = [
            label
            for label in shared
            if one[label][1] == other[label][1] and of_base(one[label][0]) == of_new(other[label][0])
        ]
        print(f"{len(told)} of {len(shared)} kernels have the same source, but for comments and assertions")
        rest = shared if arguments.all else sorted(set(shared) - set(told))
        step = 1 if arguments.all else max(1, -(-len(rest) // max(1, arguments.most)))
        compiled = rest[::step]
        wrong = differing([base, HERE], compiled) if compiled else []
        print(f"{len(compiled) - len(wrong)} of {len(compiled)} that were compiled have the same machine code")
        for label in wrong:
            print(f"differs: {label}")
    sys.exit(bool(wrong or gone))


if __name__ == "__main__":
    main()
