"""What the charts of a report share: axes, and the ways from a figure to SVG and PNG.

As SVG, a chart's text stays text and its colours become the page's custom properties, so that they follow the reader's
light or dark scheme; as PNG it has the colours of the light scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cat_rs.report.style import FAINT, INK, RULE, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT_SIZE = 9.8
_PROPERTIES = {INK: "--ink", FAINT: "--faint", RULE: "--rule"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}


def new_chart(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of this size in inches, and its empty axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Leave of the axes a grid, a base line and faint labels."""
    axes.grid(True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(which="both", colors=FAINT, labelsize=FONT_SIZE - 0.7, length=0, pad=5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=FAINT, fontsize=FONT_SIZE)


def to_svg(figure: Figure, prefix: str) -> str:
    """Return a chart as an `<svg>` element for a page.

    Args:
        figure: The chart.
        prefix: What makes the element's ids differ from those of every other chart on the page.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing: Mapping[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The chart's own rules would hold for the whole page, which has them in its style sheet.
    text = re.sub(r"<style\b.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text.replace("\n", " "), count=1)
    for colour, name in _PROPERTIES.items():
        text = text.replace(f": {colour}", f": var({name})")
    return text


def to_png(figure: Figure, dpi: int) -> bytes:
    """Return a chart as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
