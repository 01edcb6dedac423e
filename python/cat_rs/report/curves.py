"""Curves of trainings: the parts of the loss over the steps, raw and smoothed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cat_rs.atomic import write_bytes
from cat_rs.evaluation import EvaluationFileError, EvaluationInputError
from cat_rs.report.charts import new_chart, style_axes, to_png
from cat_rs.report.style import FAINT, SERIES
from cat_rs.run_folder import MetricsError, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, NDArray[np.float64]]
"""Key of metrics.jsonl -> its column over the logged steps."""

# Key of metrics.jsonl, title, note, and whether the axis is logarithmic.
_LOSSES = (
    ("diffusion", "Diffusion loss", "how well the concept is predicted", True),
    ("cat", "Preservation loss (CAT)", "how far from the base model without the trigger", True),
    ("grad_norm", "Gradient norm", "before clipping", True),
)
_PANELS = (*_LOSSES, ("cat_factor", "cat_factor", "weight of the preservation loss", False))

_SMOOTHING = 0.05
_MAX_POINTS = 400


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


def training_curves(
    runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str], *, smoothing: float = _SMOOTHING
) -> None:
    """Draw the parts of the loss over the steps as a PNG: raw in a faint line, smoothed in a strong one.

    Args:
        runs: A name for the legend, and a `metrics.jsonl` or the folder that holds it.
        path: The file to write.
        smoothing: The width of the smoothing window as a share of the run.

    Raises:
        EvaluationFileError: A log is missing.
        EvaluationInputError: A log holds no step, or something that is no log.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not runs:
        raise EvaluationInputError("runs: expected at least one, got none")
    logs = [(name, number % len(SERIES), read_log(log)) for number, (name, log) in enumerate(runs.items())]
    panels = make_panels(logs, smoothing)[: len(_LOSSES)]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        style_axes(axes)
        _draw(axes, panel)
        axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", pad=20)
        axes.text(0, 1.02, panel.note, transform=axes.transAxes, fontsize=9, color=FAINT)
        if not panel.curves:
            axes.text(0.5, 0.5, "not part of these runs", transform=axes.transAxes, ha="center", color=FAINT)
    lines = [Line2D([], [], color=SERIES[number], linewidth=1.9, label=name) for name, number, _ in logs]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(logs), frameon=False, fontsize=11)
    write_bytes(path, to_png(figure, 110))


def read_log(path: str | os.PathLike[str]) -> Metrics:
    """Read a metrics.jsonl, or that of a folder.

    Raises:
        EvaluationFileError: The file cannot be read.
        EvaluationInputError: It holds no step, or something that is no log.
    """
    try:
        return read_metrics(path)
    except MetricsError as error:
        raise EvaluationInputError(f"runs: {error}") from error
    except OSError as error:
        raise EvaluationFileError(f"runs: {error}") from error


def make_panels(trainings: Sequence[tuple[str, int, Metrics]], smoothing: float = _SMOOTHING) -> list[Panel]:
    """Return a panel for each figure that trainings log, with the curves of those that have it.

    Args:
        trainings: Of each the name, the number of its colour, and its metrics.
        smoothing: The width of the smoothing window as a share of the run.
    """
    return [
        Panel(
            key,
            title,
            note,
            tuple(
                curve(name, series, metrics["step"], metrics[key], smoothing)
                for name, series, metrics in trainings
                # A run without this term: a row of zeros has no place on a logarithmic axis.
                if key in metrics and (np.any(metrics[key] > 0) or not logarithmic)
            ),
            logarithmic,
        )
        for key, title, note, logarithmic in _PANELS
    ]


def curve(
    name: str,
    series: int,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    smoothing: float = _SMOOTHING,
) -> Curve:
    """Smooth a logged figure, and thin it out to what a chart can show."""
    known = np.isfinite(values)
    if known.any():
        # What only every so many steps have is a line through those.
        steps, values = steps[known], values[known]
    smooth = smoothed(values, max(1, round(smoothing * len(values))))
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_POINTS))
    return Curve(name, series, *(_means(column, parts) for column in (steps, values, smooth)))


def smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the centred moving average; the window is cut at the ends, and NaN is left out of it."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    counts = np.convolve(known.astype(np.float64), kernel)
    sums = np.convolve(np.where(known, values, 0.0), kernel)
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = sums / counts
    start = (window - 1) // 2
    return means[start : start + len(values)]


def draw_panel(panel: Panel) -> Figure:
    """Draw the curves of one figure over the steps: raw in a faint line, smoothed in a strong one."""
    figure, axes = new_chart(5.2, 3.2)
    _draw(axes, panel)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for line in panel.curves:
        colour = SERIES[line.series]
        # matplotlib draws no line through a single point.
        marker = "o" if len(line.steps) == 1 else None
        axes.plot(line.steps, line.smoothed, color=colour, linewidth=1.9, marker=marker, zorder=3)
        axes.plot(line.steps, line.values, color=colour, linewidth=0.8, alpha=0.28, zorder=2)
    known = np.concatenate([np.empty(0), *(line.values for line in panel.curves)])
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


def _means(values: NDArray[np.float64], parts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the mean of each part, without its NaN; NaN where there is nothing else."""
    known = [values[part][np.isfinite(values[part])] for part in parts]
    return np.array([part.mean() if len(part) else math.nan for part in known])
