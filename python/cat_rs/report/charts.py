"""The charts of a report: the front of identity and preservation, and the curves of trainings.

As SVG, a chart's text stays text and its colours become the page's custom properties, so that they follow the reader's
light or dark scheme; as PNG it has the colours of the light scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.evaluation import Interval
from cat_rs.report.curves import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

INK = "#1b1d21"
FAINT = "#656b74"
RULE = "#e4e6ea"
SERIES = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#475569")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_PROPERTIES = {INK: "--ink", FAINT: "--faint", RULE: "--rule"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}

_SMOOTHING = 0.05
_MAX_POINTS = 400
_SIZE = 9.8
_LABEL_LENGTH = 30


@dataclass(frozen=True)
class FrontPoint:
    """One adapter, or one checkpoint of it.

    Attributes:
        label: What stands beside the point.
        series: The number of its colour.
        identity: How well the concept is drawn.
        ups: What was kept of the base model.
        step: The optimizer step of a checkpoint; None for a finished adapter.
        best: Whether the training marked this checkpoint as its best.
    """

    label: str
    series: int
    identity: Interval
    ups: Interval
    step: int | None = None
    best: bool = False


@dataclass(frozen=True)
class Front:
    """Adapters that were evaluated alike: points that may share a chart.

    Attributes:
        title: What they have in common.
        points: The points; checkpoints of one series are connected in the order of their steps.
        base: Identity of the base model, whose UPS is 1.
        other_seed: UPS of the base model against itself, from other noise.
    """

    title: str
    points: tuple[FrontPoint, ...]
    base: Interval | None = None
    other_seed: Interval | None = None


@dataclass(frozen=True)
class Curve:
    """One figure of one training over its steps: means of neighbouring steps, and the same smoothed."""

    name: str
    series: int
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    smoothed: NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """The curves of one figure."""

    key: str
    title: str
    note: str
    curves: tuple[Curve, ...]
    logarithmic: bool


def curve(name: str, series: int, steps: NDArray[np.float64], values: NDArray[np.float64]) -> Curve:
    """Smooth a logged figure, and thin it out to what a chart can show."""
    smooth = smoothed(values, max(1, round(_SMOOTHING * len(values))))
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_POINTS))
    return Curve(name, series, *(_means(column, parts) for column in (steps, values, smooth)))


def draw_front(front: Front) -> Figure:
    """Draw identity against UPS: up is kept, right is learned."""
    figure, axes = _empty((4.8, 3.8))
    labels: list[Annotation] = []
    if front.other_seed is not None:
        _draw_other_seed(axes, front.other_seed)
    for number in sorted({point.series for point in front.points}):
        _draw_series(axes, [point for point in front.points if point.series == number], number)
    if front.base is not None:
        _whiskers(axes, front.base, Interval(1.0, math.nan, math.nan), FAINT)
        axes.plot(front.base.value, 1.0, "D", color="none", markeredgecolor=FAINT, markersize=7, markeredgewidth=1.5)
        labels.append(_label(axes, "base model", front.base.value, 1.0, FAINT))
    labels += [
        _label(axes, point.label, point.identity.value, point.ups.value, INK, bold=point.best)
        for point in front.points
        if point.label
    ]
    axes.set_xlabel("identity: the concept is drawn →")
    axes.set_ylabel("UPS: the base model is kept →")
    axes.margins(0.14, 0.1)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.03))
    _place(figure, labels, front)
    return figure


def draw_panel(panel: Panel) -> Figure:
    """Draw the curves of one figure over the steps: raw in a faint line, smoothed in a strong one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _empty((5.2, 3.2))
    for line in panel.curves:
        colour = SERIES[line.series]
        # matplotlib draws no line through a single point.
        marker = "o" if len(line.steps) == 1 else None
        axes.plot(line.steps, line.smoothed, color=colour, linewidth=1.9, marker=marker, zorder=3)
        axes.plot(line.steps, line.values, color=colour, linewidth=0.8, alpha=0.28, zorder=2)
    known = np.concatenate([line.values for line in panel.curves])
    known = known[np.isfinite(known) & (known > 0)]
    if panel.logarithmic and len(known):
        axes.set_yscale("log")
        # At the first steps the preservation loss is rounding, decades below the rest.
        axes.set_ylim(bottom=0.7 * float(np.quantile(known, 0.02)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif not panel.logarithmic:
        axes.set_ylim(bottom=0)
        axes.margins(y=0.08)
    axes.margins(x=0.02)
    axes.set_xlabel("step")
    return figure


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


def _empty(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(which="both", colors=FAINT, labelsize=_SIZE - 0.7, length=0, pad=5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=FAINT, fontsize=_SIZE)
    return figure, axes


def _draw_other_seed(axes: Axes, ups: Interval) -> None:
    axes.axhline(ups.value, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    if not math.isnan(ups.low):
        axes.axhspan(ups.low, ups.high, color=FAINT, alpha=0.08, linewidth=0, zorder=0)


def _draw_series(axes: Axes, points: Sequence[FrontPoint], number: int) -> None:
    colour, marker = SERIES[number], _MARKERS[number]
    checkpoints = sorted((point for point in points if point.step is not None), key=lambda point: point.step or 0)
    path = [[point.identity.value for point in checkpoints], [point.ups.value for point in checkpoints]]
    axes.plot(*path, color=colour, linewidth=1.4, alpha=0.6, zorder=2)
    for point in points:
        passing = point.step is not None and not point.best
        _whiskers(axes, point.identity, point.ups, colour, alpha=0.2 if passing else 0.45)
        size = 4.5 if passing else 6.5
        axes.plot(point.identity.value, point.ups.value, marker, color=colour, markersize=size, zorder=4)
        if point.best:
            axes.plot(
                point.identity.value,
                point.ups.value,
                "o",
                color="none",
                markeredgecolor=colour,
                markersize=14,
                zorder=4,
            )


def _whiskers(axes: Axes, identity: Interval, ups: Interval, colour: str, alpha: float = 0.45) -> None:
    style: dict[str, Any] = {"color": colour, "linewidth": 1.1, "alpha": alpha, "zorder": 2, "solid_capstyle": "round"}
    axes.plot([identity.low, identity.high], [ups.value, ups.value], **style)
    axes.plot([identity.value, identity.value], [ups.low, ups.high], **style)


def _label(axes: Axes, text: str, left: float, top: float, colour: str, *, bold: bool = False) -> Annotation:
    label = axes.annotate(
        _shortened(text),
        (left, top),
        xytext=_CORNERS[0][0],
        textcoords="offset points",
        ha=_CORNERS[0][1],
        va=_CORNERS[0][2],
        color=colour,
        fontsize=_SIZE,
        fontweight="bold" if bold else "normal",
        # A dollar sign in a name starts no formula.
        parse_math=False,
        zorder=5,
    )
    label.set_in_layout(False)
    return label


def _shortened(text: str) -> str:
    """Return a name that fits beside its point: names that differ do so at an end more often than in the middle."""
    return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH // 2]}…{text[-_LABEL_LENGTH // 2 + 1 :]}"


_CORNERS = (
    ((9, 7), "left", "bottom"),
    ((9, -7), "left", "top"),
    ((-9, 7), "right", "bottom"),
    ((-9, -7), "right", "top"),
    ((0, 12), "center", "bottom"),
    ((0, -12), "center", "top"),
)
"""Where a label may stand: its distance from the point, and how it is aligned there."""


def _place(figure: Figure, labels: Sequence[Annotation], front: Front) -> None:
    """Move each label to the corner of its point where it covers least of the labels, points and edges there are."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    centres = [(point.identity.value, point.ups.value) for point in front.points]
    centres += [] if front.base is None else [(front.base.value, 1.0)]
    pixels = axes.transData.transform(np.array(centres).reshape(-1, 2))
    placed = [line.get_window_extent().padded(1) for line in axes.lines]
    for label in labels:
        boxes = []
        for offset, horizontal, vertical in _CORNERS:
            label.set(position=offset, ha=horizontal, va=vertical)
            boxes.append(label.get_window_extent())
        costs = [_covered(box, placed, pixels, axes.bbox) for box in boxes]
        best = int(np.argmin(costs))
        offset, horizontal, vertical = _CORNERS[best]
        label.set(position=offset, ha=horizontal, va=vertical)
        placed.append(boxes[best])


def _covered(box: Bbox, placed: Sequence[Bbox], points: NDArray[np.float64], frame: Bbox) -> float:
    """Return the area of `box` that lies on other labels or outside the frame, a point counting as its whole area."""
    area = box.width * box.height
    cost = area - _shared(box, frame)
    cost += sum(_shared(box, other) for other in placed)
    return cost + area * sum(bool(box.contains(*point)) for point in points)


def _shared(box: Bbox, other: Bbox) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def _means(values: NDArray[np.float64], parts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the mean of each part, without its NaN; NaN where there is nothing else."""
    known = [values[part][np.isfinite(values[part])] for part in parts]
    return np.array([part.mean() if len(part) else math.nan for part in known])
