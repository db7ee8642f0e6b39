"""The pictures of the chapters: ``python docs/learn/pictures.py`` draws them anew.

They are SVG, written here and by no plotting library, so that a file is the same text on every machine and a test can
hold it to what this draws.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cufa.learn.counting import Size

FOLDER = Path(__file__).with_name("pictures")

BLUE, RED, GREEN, YELLOW, VIOLET, GRAY = "#3465a4", "#cc3a3a", "#4e9a3a", "#e0a800", "#8657a8", "#8a8f98"
PALE = {BLUE: "#d6e3f3", RED: "#f6d9d9", GREEN: "#dcefd6", YELLOW: "#fbefc8", VIOLET: "#e8dcf2", GRAY: "#e6e8eb"}

HBM, PRODUCTS = 4.45e12, 794e12
"""Of an H200, as measured in benchmarks/results: bytes a second of a large sum, FLOP/s of a large product."""


class Drawing:
    """Shapes of an SVG image, on white, so that it can be read on a dark page too."""

    def __init__(self, width: int, height: int) -> None:
        self.size, self.shapes = (width, height), [f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>']

    def rect(
        self, x: float, y: float, width: float, height: float, color: str, text: str = "", pale: bool = True
    ) -> None:
        fill = PALE[color] if pale else color
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"'
        self.shapes.append(f'<rect {place} fill="{fill}" stroke="{color}"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 4, text, color="#1d1f22" if pale else "#ffffff")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "middle",
        size: int = 12,
        color: str = "#1d1f22",
        backed: bool = False,
    ) -> None:
        """Lines of text, which `backed` ones keep clear of what was drawn before."""
        lines = text.split("\n")
        for number, line in enumerate(lines):
            escaped = line.replace("&", "&amp;").replace("<", "&lt;")
            at = y + (number - (len(lines) - 1) / 2) * (size + 3)
            if backed:
                width = 0.58 * size * len(line)
                left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
                place = f'x="{left - 2:.1f}" y="{at - size:.1f}" width="{width + 4:.1f}" height="{size + 4}"'
                self.shapes.append(f'<rect {place} fill="#ffffff"/>')
            place = f'x="{x:.1f}" y="{at:.1f}" text-anchor="{anchor}"'
            self.shapes.append(f'<text {place} font-size="{size}" fill="{color}">{escaped}</text>')

    def line(self, *points: tuple[float, float], color: str = GRAY, width: float = 1.5, dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dash}/>')

    def arrow(self, *points: tuple[float, float], color: str = GRAY, width: float = 1.5) -> None:
        (x0, y0), (x, y) = points[-2:]
        angle, head = math.atan2(y - y0, x - x0), 8 if width < 3 else 16
        end = (x - head / 2 * math.cos(angle), y - head / 2 * math.sin(angle))  # lest the line is wider than the tip
        self.line(*points[:-1], end, color=color, width=width)
        tips = [(x - head * math.cos(angle + turn), y - head * math.sin(angle + turn)) for turn in (0.4, -0.4)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in ((x, y), *tips))
        self.shapes.append(f'<polygon points="{path}" fill="{color}"/>')

    def svg(self) -> str:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        )
        return "\n".join([f'{head} font-family="sans-serif">', *self.shapes, "</svg>", ""])


def memory() -> str:
    """The memories of an H200, how large and how fast."""
    d = Drawing(720, 300)
    rows = [
        (GREEN, 170, "tensor cores", "", "794 TFLOP/s measured"),
        (BLUE, 230, "registers", "256 KB per SM, 33 MB in all", "as fast as the instructions"),
        (VIOLET, 300, "shared memory", "228 KB per SM, 29 MB in all", "128 bytes a clock per SM: 28 TB/s"),
        (YELLOW, 380, "L2 cache", "50 MB", "5.7 TB/s seen by a kernel of cufa's"),
        (RED, 470, "HBM", "141 GB", "4.45 TB/s measured"),
    ]
    for number, (color, width, name, much, fast) in enumerate(rows):
        y = 20 + 54 * number
        d.rect(240 - width / 2, y, width, 42, color, f"{name}\n{much}" if much else name)
        d.text(490, y + 25, fast, anchor="start")
        if number:
            d.arrow((240, y), (240, y - 12), color=color)
            d.arrow((240, y - 12), (240, y), color=color)
    return d.svg()


def passes() -> str:
    """What the textbook moves between slow memory and fast, beside one kernel that works tile by tile."""
    d = Drawing(760, 320)
    d.text(190, 24, "textbook: every step by itself", size=14)
    d.rect(20, 250, 340, 50, RED, "slow memory (HBM)")
    steps = [("S = Q Kᵀ", "Q, K", "S"), ("softmax", "S", "P"), ("O = P V", "P, V", "O")]
    for number, (name, read, written) in enumerate(steps):
        x = 30 + 115 * number
        d.rect(x, 60, 95, 44, BLUE, name)
        heavy = {"S": 5.0, "P": 5.0}
        d.arrow((x + 22, 250), (x + 22, 106), color=RED, width=heavy.get(read[0], 1.5))
        d.arrow((x + 73, 104), (x + 73, 248), color=RED, width=heavy.get(written, 1.5))
        d.text(x + 28, 178, read, anchor="start", size=13)
        d.text(x + 79, 178, written, anchor="start", size=13)
    d.text(570, 24, "FlashAttention: tile by tile", size=14)
    d.rect(400, 250, 340, 50, RED, "slow memory (HBM)")
    d.rect(410, 50, 320, 110, VIOLET)
    d.text(570, 68, "fast memory: shared memory and registers")
    for number, name in enumerate(("S tile", "softmax\nm, l", "P tile", "O += P V")):
        d.rect(418 + 78 * number, 88, 70, 44, BLUE, name)
        if number:
            d.arrow((410 + 78 * number, 110), (417 + 78 * number, 110), color=BLUE)
    d.arrow((470, 250), (470, 162), color=RED)
    d.arrow((570, 250), (570, 162), color=RED)
    d.arrow((670, 160), (670, 248), color=RED)
    for x, name in ((470, "Q once"), (570, "K, V per tile"), (670, "O once")):
        d.text(x + 4, 208, f" {name}", anchor="start", size=13)
    return d.svg()


def online_softmax() -> str:
    """Exponentials of a row of scores, as its blocks come in: a larger maximum shrinks what was there."""
    scores = np.array([0.2, 1.1, -0.4, 0.7, 1.6, 0.3, 2.0, -0.2, 0.9, 3.0, 1.2, 0.4])
    d = Drawing(760, 270)
    for step in range(3):
        x0, seen = 20 + 250 * step, scores[: 4 * step + 4]
        old = scores[: 4 * step].max(initial=-np.inf)
        m = seen.max()
        d.text(x0 + 110, 24, f"after block {step + 1}", size=14)
        d.line((x0, 200), (x0 + 220, 200))
        d.line((x0, 80), (x0 + 220, 80), dashed=True)
        for j, score in enumerate(seen):
            height, color = 120 * math.exp(score - m), (BLUE, GREEN, VIOLET)[j // 4]
            if j < 4 * step and old < m:
                before = 120 * math.exp(score - old)
                d.rect(x0 + 18 * j + 3, 200 - before, 13, before, GRAY)
            d.rect(x0 + 18 * j + 3, 200 - height, 13, height, color)
        l = float(np.exp(seen - m).sum())
        factor = f", old ones times exp({old:.1f} − {m:.1f}) = {math.exp(old - m):.2f}" if step else ""
        d.text(x0 + 110, 222, f"m = {m:.1f}, l = {l:.2f}")
        d.text(x0 + 110, 240, factor.removeprefix(", "))
    d.text(22, 74, "1", anchor="start", size=10)
    return d.svg()


def merging() -> str:
    """Four parts of the keys merged in three ways."""
    d = Drawing(760, 250)
    ways = [
        ("one after the other: a loop", [(0, 1), (4, 2), (5, 3)]),
        ("as a tree: splits, clusters", [(0, 1), (2, 3), (4, 5)]),
        ("from the end: causal blocks first", [(3, 2), (4, 1), (5, 0)]),
    ]
    for number, (title, merges) in enumerate(ways):
        x0 = 15 + 250 * number
        d.text(x0 + 112, 24, title, size=13)
        places = [(x0 + 28 + 56 * part, 200.0) for part in range(4)]
        for part, (x, y) in enumerate(places):
            d.rect(x - 24, y - 14, 48, 28, BLUE, f"part {part + 1}")
        heights = [0] * 4
        for left, right in merges:
            level = max(heights[left], heights[right]) + 1
            (xl, _), (xr, _) = places[left], places[right]
            x, y = (xl + xr) / 2, 200 - 48.0 * level
            for at in (left, right):
                d.line((places[at][0], places[at][1] - 14), (x, y + 11))
            d.rect(x - 14, y - 11, 28, 22, GREEN, "⊕")
            places.append((x, y + 3))
            heights.append(level)
    d.text(380, 238, "every ⊕ merges two states (m, l, o); the result is the same")
    return d.svg()


def loop_orders() -> str:
    """The tiles of the score matrix, and in which order versions 1 and 2 go over them."""
    d = Drawing(760, 330)
    for x0, title, outer in ((60, "v1: keys outside", "keys"), (440, "v2: queries outside", "queries")):
        d.text(x0 + 110, 24, title, size=14)
        for i in range(4):
            for j in range(4):
                current = (j if outer == "keys" else i) == 1
                d.rect(x0 + 56 * j, 60 + 48 * i, 50, 42, BLUE if current else GRAY)
        d.text(x0 - 14, 160, "Q", size=14)
        d.text(x0 + 110, 52, "K, V", size=12)
        for n in range(4):
            if outer == "keys":
                x = x0 + 56 * n + 25
                d.arrow((x, 66), (x, 240), color=RED if n == 1 else GRAY, width=2.5 if n == 1 else 1)
            else:
                y = 60 + 48 * n + 21
                d.arrow((x0 + 6, y), (x0 + 212, y), color=RED if n == 1 else GRAY, width=2.5 if n == 1 else 1)
    d.text(
        170,
        284,
        "kept: K_j, V_j\nper tile: read Q_i, O_i, l_i, m_i; write O_i, l_i, m_i\n"
        "passes follow each other, as each writes all of O",
    )
    d.text(560, 284, "kept: Q_i, O_i, l_i, m_i\nper tile: read K_j, V_j\npasses are independent: one thread block each")
    return d.svg()


def causal_tiles() -> str:
    """Tiles of a causal mask: computed, masked, skipped."""
    d = Drawing(600, 270)
    x0, y0, side, n = 40, 30, 26, 8
    size = Size(64 * n, 64 * n, 128, causal=True)
    for i in range(8):
        for j in range(8):
            color = BLUE if j < i else YELLOW if j == i else GRAY
            d.rect(x0 + side * j, y0 + side * i, side - 2, side - 2, color, pale=color != BLUE)
    d.text(x0 + 4 * side, 20, "keys")
    d.text(20, y0 + 4 * side, "Q")
    whole = n * (n - 1) // 2
    for number, (color, text) in enumerate(
        [
            (BLUE, f"{whole} of {n * n} tiles: every pair is seen, no mask"),
            (YELLOW, f"{n} on the diagonal: masked pair by pair"),
            (GRAY, f"{whole}: no pair is seen, skipped"),
        ]
    ):
        d.rect(280, 60 + 40 * number, 20, 20, color, pale=color != BLUE)
        d.text(308, 75 + 40 * number, text, anchor="start")
    d.text(
        *(
            280,
            210,
            f"computed: {(whole + n) / n**2:.1%} of all tiles,\nfor {size.pairs / (64 * n) ** 2:.1%} of all pairs ",
        ),
        anchor="start",
    )
    d.text(280, 240, f"({n} tiles of 64 queries and 64 keys a side)", anchor="start")
    return d.svg()


def backward() -> str:
    """What becomes of one tile in the gradients."""
    d = Drawing(760, 300)
    boxes = {
        "S": (90, 60, "S = scale · Q Kᵀ", BLUE),
        "P": (90, 140, "P = exp(S − lse)", GREEN),
        "dP": (310, 60, "dP = dO Vᵀ", BLUE),
        "dS": (310, 140, "dS = P ∘ (dP − D)", GREEN),
        "dV": (90, 230, "dV_j += Pᵀ dO", VIOLET),
        "dK": (310, 230, "dK_j += scale · dSᵀ Q", VIOLET),
        "dQ": (540, 230, "dQ_i += scale · dS K", RED),
    }
    for x, y, text, color in boxes.values():
        d.rect(x - 80, y - 20, 160, 40, color, text)
    for a, b in (("S", "P"), ("P", "dV"), ("dP", "dS"), ("P", "dS"), ("dS", "dK"), ("dS", "dQ")):
        (xa, ya, *_), (xb, yb, *_) = boxes[a], boxes[b]
        if ya == yb:
            d.arrow((xa + 80, ya), (xb - 80, yb))
        else:
            d.arrow((xa + (30 if xb > xa else 0), ya + 20), (xb, yb - 20))
    d.text(540, 70, "D = rowsum(dO ∘ O): once, before", size=12)
    d.arrow((480, 80), (392, 132))
    d.text(200, 280, "sums over queries: in registers until the last tile")
    d.text(550, 280, "a sum over keys: added in slow memory, tile by tile")
    d.text(620, 150, "five products: two again (S, dP),\nthree for gradients", size=12)
    return d.svg()


def schedules() -> str:
    """Who is busy when: one warpgroup after the textbook, two that take turns, and two that overlap inside as well."""
    d = Drawing(760, 420)

    def track(y: float, name: str, pieces: list[tuple[float, float, str, str]]) -> None:
        d.text(10, y + 15, name, anchor="start", size=11)
        for start, length, color, text in pieces:
            d.rect(130 + start, y, length - 2, 22, color, text)

    def softmax(start: float, length: float = 60) -> tuple[float, float, str, str]:
        return start, length, GREEN, "softmax"

    def product(start: float, name: str, length: float = 50) -> tuple[float, float, str, str]:
        return start, length, BLUE, name

    d.text(380, 22, "one warpgroup, one step after the other: tensor cores idle during every softmax", size=12)
    pieces = []
    for step in range(3):
        pieces += [product(160 * step, f"Q K{step}"), softmax(160 * step + 50), product(160 * step + 110, f"P V{step}")]
    track(34, "warpgroup 1", pieces)
    d.text(380, 92, "two warpgroups that take turns (ping-pong): one's softmax beside the other's products", size=12)
    busy: list[tuple[float, float, str, str]] = []
    for number in range(2):
        pieces = []
        for step in range(3):
            at = 200.0 * step + 100 * number
            turn = (
                [product(at, f"P V{step - 1}"), product(at + 50, f"Q K{step}")] if step else [product(at + 50, "Q K0")]
            )
            pieces += [*turn, softmax(at + 100)]
            busy += turn
        track(104 + 28 * number, f"warpgroup {number + 1}", [piece for piece in pieces if piece[0] < 600])
    track(160, "tensor cores", busy)
    d.text(380, 214, "one warpgroup that begins Q K of the next block before the softmax of this one", size=12)
    names = ["Q K0", "Q K1", "P V0", "Q K2", "P V1", "Q K3", "P V2", "Q K4", "P V3", "Q K5"]
    track(226, "its products", [product(50.0 * n + 10 * (n > 1), name) for n, name in enumerate(names)])
    track(254, "its softmax", [softmax(at) for at in (50.0, 110, 210, 310, 410)])
    d.text(380, 316, "meanwhile a warp of its own only loads: tensor copies (TMA) into a ring of stages", size=12)
    for stage in range(2):
        names = [f"load K{stage}", f"K{stage} is read", f"load K{stage + 2}", f"K{stage + 2} is read"]
        pieces = [(60.0 * stage + 120 * n, 118.0, YELLOW if n % 2 else VIOLET, name) for n, name in enumerate(names)]
        track(328 + 28 * stage, f"stage {stage}", pieces)
    d.text(380, 406, "an mbarrier says that a stage is full, another that it is empty", size=12)
    return d.svg()


INTENSITIES = {
    "textbook": lambda size: size.textbook(),
    "v1": lambda size: size.v1(),
    "v2": lambda size: size.v2(),
    "each array once": lambda size: size.least(),
}
"""Traffic of the marks on the roofline, by name."""


def marks() -> list[tuple[str, float]]:
    """Names and FLOP per byte, at 4096 tokens, head_dim 128 and 16 bits."""
    found = []
    for name, tiles in (
        ("textbook", [(64, 64)]),
        ("v1", [(64, 64)]),
        ("v2", [(64, 64), (128, 64), (192, 64)]),
        ("each array once", [(64, 64)]),
    ):
        for block_m, block_n in tiles:
            size = Size(4096, 4096, 128, block_m, block_n, itemsize=2)
            label = f"{name}, {block_m} queries a tile" if name.startswith("v") else name
            found.append((label, size.forward_flops() / INTENSITIES[name](size).total))
    return found


def roofline() -> str:
    """The roof of an H200 and the counted intensity of what this page counts."""
    d = Drawing(760, 400)
    left, right, top, bottom = 70, 740, 30, 340
    low, high, least, most = 10, 4000, 2e13, 1.5e15

    def x_of(intensity: float) -> float:
        return left + (right - left) * math.log(intensity / low) / math.log(high / low)

    def y_of(speed: float) -> float:
        return bottom - (bottom - top) * math.log(speed / least) / math.log(most / least)

    d.line((left, top), (left, bottom), (right, bottom), color="#1d1f22")
    for intensity in (10, 30, 100, 300, 1000, 3000):
        d.line((x_of(intensity), bottom), (x_of(intensity), bottom + 5))
        d.text(x_of(intensity), bottom + 20, str(intensity))
    for speed in (20, 50, 100, 200, 500, 1000):
        d.line((left - 5, y_of(speed * 1e12)), (left, y_of(speed * 1e12)))
        d.text(left - 8, y_of(speed * 1e12) + 4, str(speed), anchor="end")
    d.text(405, bottom + 44, "FLOP per byte between HBM and the SMs, if no cache helped")
    d.text(12, 20, "TFLOP/s", anchor="start")
    ridge = PRODUCTS / HBM
    d.text(x_of(ridge) + 4, y_of(PRODUCTS) - 8, f"{ridge:.0f}", size=11, color=RED)
    d.line((x_of(low), y_of(low * HBM)), (x_of(ridge), y_of(PRODUCTS)), (right, y_of(PRODUCTS)), color=RED, width=2.5)
    d.text(x_of(1100), y_of(PRODUCTS) - 8, "a large product, measured: 794 TFLOP/s", size=11, color=RED)
    d.text(x_of(24), y_of(60 * HBM), "HBM, measured: 4.45 TB/s", size=11, color=RED)
    for _, intensity in marks():
        roof = min(PRODUCTS, intensity * HBM)
        d.line((x_of(intensity), bottom), (x_of(intensity), y_of(roof)), color=BLUE, dashed=True)
        d.rect(x_of(intensity) - 4, y_of(roof) - 4, 8, 8, BLUE, pale=False)
    for number, (label, intensity) in enumerate(marks()):  # behind all lines, which would run through them
        roof = min(PRODUCTS, intensity * HBM)
        y = bottom - 14 - 28 * number if intensity < high / 4 else y_of(roof) + 40
        anchor, beside = ("start", 6) if intensity < high / 4 else ("end", -6)
        d.text(x_of(intensity) + beside, y, f"{label}: {intensity:.0f}", anchor=anchor, size=11, backed=True)
    return d.svg()


def swizzle() -> str:
    """Sixteen-byte chunks of eight rows, and the banks that they lie in, with and without the exclusive or."""
    colors = (BLUE, RED, GREEN, YELLOW, VIOLET, GRAY, "#2aa198", "#d33682")
    d = Drawing(760, 316)
    for x0, title, place in (
        (60, "plain: chunk c of row r at c", lambda r, c: c),
        (430, "swizzled: at c xor r", lambda r, c: c ^ r),
    ):
        d.text(x0 + 136, 24, title, size=14)
        for r in range(8):
            d.text(x0 - 8, 60 + 26 * r, f"row {r}", anchor="end", size=10)
            for c in range(8):
                x, y = x0 + 34 * place(r, c), 42 + 26 * r
                color = colors[c]
                pale = PALE.get(color, "#e4f3f2" if c == 6 else "#f8dbe9")
                stroke = "#1d1f22" if c == 2 else color
                d.shapes.append(
                    f'<rect x="{x}" y="{y}" width="31" height="23" rx="2" fill="{pale}" stroke="{stroke}" '
                    f'stroke-width="{2 if c == 2 else 1}"/>'
                )
                d.text(x + 15.5, y + 16, str(c), size=11)
        for c in range(8):
            d.text(x0 + 34 * c + 15, 264, f"{4 * c}–{4 * c + 3}", size=9)
        d.text(x0 + 136, 280, "banks", size=10)
    d.text(
        380,
        304,
        "A column of chunks (2, framed), as ldmatrix reads it: 8 accesses to 4 banks, or one to each of all 32.",
        size=11,
    )
    return d.svg()


PICTURES = {
    each.__name__: each
    for each in (
        memory,
        passes,
        online_softmax,
        merging,
        loop_orders,
        causal_tiles,
        backward,
        schedules,
        roofline,
        swizzle,
    )
}
"""By file name."""


def drawn() -> dict[str, str]:
    """What the files hold."""
    return {f"{name}.svg": draw() for name, draw in PICTURES.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, image in drawn().items():
        (FOLDER / name).write_text(image)
