"""The pictures of masks on the pages: ``python docs/pictures.py`` draws them anew."""

from __future__ import annotations

from pathlib import Path

from cufa import masks

PICTURES = {
    "causal": masks.causal(),
    "sliding_window": masks.sliding_window(3, 0),
    "chunked": masks.chunked(4) & masks.causal(),
    "dilated": masks.dilated(3) & masks.sliding_window(9, 0),
    "prefix_lm": masks.prefix_lm(5),
    "document": masks.document(offsets=[0, 3, 9, 14]) & masks.causal(),
    "image_ranges": masks.causal() | masks.image_ranges([[2, 6], [8, 12]]),
    "global_tokens": (masks.sliding_window(2, 0) | masks.global_tokens(2)) & masks.causal(),
}
"""By file name."""

FOLDER = Path(__file__).with_name("pictures")
SIDE = 14


def drawn() -> dict[str, str]:
    """What the files hold."""
    return {f"{name}.svg": mask.to_svg(SIDE, SIDE) + "\n" for name, mask in PICTURES.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, image in drawn().items():
        (FOLDER / name).write_text(image)
