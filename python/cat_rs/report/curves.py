"""The loss over the steps of one or several training runs."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.atomic import write_bytes
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("diffusion", "diffusion loss", "how well the concept is drawn"),
    ("cat", "preservation loss (CAT)", "how far from the base model without the trigger"),
    ("grad_norm", "gradient norm", "before clipping"),
)
_COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#a16207", "#0e7490")


def training_curves(
    runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str], *, smoothing: float = 0.05
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

    if not runs:
        raise EvaluationInputError("runs: expected at least one, got none")
    logs = {name: read_metrics(log) for name, log in runs.items()}
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    for axes, (key, title, note) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        _draw_panel(axes, logs, key, smoothing)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=20)
        axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color="#60656c")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(logs), frameon=False, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def read_metrics(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float64]]:
    """Read a `metrics.jsonl`: a column for each key, NaN where a line lacks it.

    A last line that was cut off while it was written is left out.

    Args:
        path: The file, or the folder that holds it.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationFileError(f"runs: {file} cannot be read: {error}") from error
    rows = _rows(lines, file)
    if not rows:
        raise EvaluationInputError(f"runs: expected at least one logged step in {file}, got none")
    keys = {key for row in rows for key in row}
    return {key: np.array([_number(row.get(key)) for row in rows]) for key in sorted(keys)}


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


def _rows(lines: Sequence[str], file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise EvaluationInputError(f"runs: line {number} of {file} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise EvaluationInputError(f"runs: expected an object with a step in line {number} of {file}, got {line}")
        rows.append(row)
    return rows


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _draw_panel(axes: Axes, logs: Mapping[str, Mapping[str, NDArray[np.float64]]], key: str, smoothing: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = []
    for number, (name, log) in enumerate(logs.items()):
        steps, values = log["step"], log.get(key, np.full(len(log["step"]), math.nan))
        if not np.any(values > 0):
            # A run without this term: a row of zeros has no place on a logarithmic axis.
            values = np.full(len(steps), math.nan)
        colour = _COLOURS[number % len(_COLOURS)]
        window = max(1, round(smoothing * len(values)))
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9, marker="o" if len(steps) == 1 else None)
        axes.plot(steps, smoothed(values, window), color=colour, linewidth=2.0, label=name)
        drawn.append(values)
    known = np.concatenate(drawn)
    known = known[np.isfinite(known) & (known > 0)]
    if len(known):
        axes.set_yscale("log")
        # At the first steps the preservation loss is rounding, decades below the rest.
        axes.set_ylim(bottom=0.7 * float(np.quantile(known, 0.02)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.text(0.5, 0.5, "not part of these runs", transform=axes.transAxes, ha="center", color="#60656c")
    axes.set_xlabel("step")
    axes.grid(True, which="major", color="#e3e6ea", linewidth=0.8)
    axes.grid(True, which="minor", color="#f1f3f5", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
