"""The colours and fonts of drawn reports; the fonts are DejaVu Sans and its Mono, which come with matplotlib."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

PAPER = "#ffffff"
INK = "#1b1d21"
FAINT = "#656b74"
RULE = "#e4e6ea"
# One for each adapter or training; report.css has the same, and others for a dark scheme.
SERIES = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#475569")


@lru_cache(maxsize=16)
def font(size: int, *, bold: bool = False, mono: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, or DejaVu Sans Mono, in a size in pixels."""
    import matplotlib

    name = f"DejaVuSans{'Mono' if mono else ''}{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def line_height(face: ImageFont.FreeTypeFont) -> int:
    """Return the distance of two lines of text in pixels."""
    return round(1.35 * face.size)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int, *, max_lines: int | None = None) -> list[str]:
    """Break `text` at spaces into lines of at most `width` pixels.

    A word that is wider than a line, and what follows the last line, is cut and ends in an ellipsis.
    """
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    if max_lines is not None and len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    return [_fitted(line, face, width) for line in lines]


def _fitted(line: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    if face.getlength(line) <= width:
        return line
    while line and face.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"
