"""Charts of a check: effect against damage at several scales, and the size of each layer's update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cat_rs.adapter_check import PictureCheck, WeightReport
from cat_rs.evaluation import Interval
from cat_rs.report.charts import FONT_SIZE, new_chart
from cat_rs.report.style import FAINT, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED_LAYERS = 4


def draw_strength(checked: PictureCheck, series: int) -> Figure:
    """Draw drift with the trigger, which is wanted, against drift without it; where none is known, against scale."""
    figure, axes = new_chart(4.8, 3.8)
    colour = SERIES[series]
    wanted = [each.effect for each in checked.scales if each.effect is not None]
    across = [each.value for each in wanted] or [each.scale for each in checked.scales]
    axes.plot(across, [each.damage.value for each in checked.scales], color=colour, linewidth=1.4, alpha=0.6, zorder=2)
    for place, each in zip(across, checked.scales, strict=True):
        _whiskers(axes, each.effect or Interval(place, place, place), each.damage, colour)
        face = colour if each.on_front or not wanted else "white"
        axes.plot(place, each.damage.value, "o", color=colour, markerfacecolor=face, markersize=6.5, zorder=4)
        label = axes.annotate(
            f"{each.scale:g}",
            (place, each.damage.value),
            xytext=(8, -9),
            textcoords="offset points",
            fontsize=FONT_SIZE,
        )
        label.set(color=INK, fontweight="bold" if each.scale == checked.safest else "normal", parse_math=False)
    axes.axhline(checked.max_drift, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel("drift with the trigger: what it is for →" if wanted else "scale")
    axes.set_ylabel("drift without the trigger: damage →")
    axes.set_ylim(bottom=0)
    axes.margins(0.12, 0.12)
    return figure


def draw_layers(weights: WeightReport, series: int) -> Figure:
    """Draw the size of each layer's update in the order of the file; layers out of line are named."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = new_chart(4.8, 3.8)
    relative = all(layer.relative is not None for layer in weights.layers)
    sizes = np.array([(layer.relative if relative else layer.norm) or np.nan for layer in weights.layers])
    flagged = {name for finding in weights.findings for name in finding.layers}
    names = [f"{layer.component}: {layer.module}" for layer in weights.layers]
    odd = np.array([name in flagged for name in names], dtype=bool)
    places = np.arange(len(sizes))
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3.5}
    axes.plot(places[~odd], sizes[~odd], color=SERIES[series], alpha=0.7, **style)
    axes.plot(places[odd], sizes[odd], color=INK, **style)
    for place in places[odd][:_NAMED_LAYERS]:
        axes.annotate(
            names[place],
            (place, sizes[place]),
            xytext=(-6 if place > len(sizes) / 2 else 6, 3),
            textcoords="offset points",
            ha="right" if place > len(sizes) / 2 else "left",
            fontsize=FONT_SIZE - 1,
            color=INK,
            parse_math=False,
        ).set_in_layout(False)
    if np.isfinite(sizes).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("layers, in the order of the file")
    axes.set_ylabel("norm of the update / of the weight" if relative else "norm of the update")
    return figure


def _whiskers(axes: Axes, across: Interval, up: Interval, colour: str) -> None:
    style: dict[str, Any] = {"color": colour, "linewidth": 1.1, "alpha": 0.45, "zorder": 2}
    axes.plot([across.low, across.high], [up.value, up.value], **style)
    axes.plot([across.value, across.value], [up.low, up.high], **style)
