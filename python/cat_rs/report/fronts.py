"""The front of a report: a chart of identity against preservation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.evaluation import Interval
from cat_rs.report.charts import FONT_SIZE, new_chart
from cat_rs.report.style import FAINT, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
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


def draw_front(front: Front) -> Figure:
    """Draw identity against UPS: up is kept, right is learned."""
    figure, axes = new_chart(4.8, 3.8)
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
        fontsize=FONT_SIZE,
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
