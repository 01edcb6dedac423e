"""The result of an evaluation as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from cat_rs.evaluation import Comparison, EvaluationResult, Interval, Scores
from cat_rs.evaluation.measures import LEGEND, MEASURES
from cat_rs.report.wording import encoder_of, extent_of

MAX_WIDTH = 100
_GAP = "  "
_ABSENT = "-"

_SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "without the trigger: what survived of the base model",
        (
            "ups",
            "drift",
            "pixel_rmse",
            "latent_rmse",
            "diversity",
            "diversity_retained",
            "prompt_similarity_no_trigger",
        ),
    ),
    ("with the trigger: what was learned", ("identity", "prompt_similarity", "tps")),
    ("both: KPS is 1 where nothing was learned, read it beside identity", ("kps",)),
)


@dataclass(frozen=True)
class _Column:
    """One model: its heading, and a cell for each row of the table."""

    heading: str
    cells: tuple[str, ...]

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.heading, *self.cells))


def format_table(result: EvaluationResult, *, width: int = MAX_WIDTH) -> str:
    """Return the scores with their intervals as text: a row a measure, a column a model.

    Args:
        result: The result of `cat_rs.evaluation.evaluate`.
        width: The longest line. Columns that do not fit follow in a second table.
    """
    models: dict[str, Scores] = {"base": result.base}
    if result.other_seed is not None:
        models["other seed"] = result.other_seed
    models |= result.adapters
    columns = [_column(name, scores) for name, scores in models.items()]
    labels = [f" {MEASURES[name].label}" for _, names in _SECTIONS for name in names]
    label_width = max(map(len, labels))
    caption = f"{extent_of(result)}; encoder {encoder_of(result)}; 95 % bootstrap intervals"
    blocks = _blocks(columns, width - label_width)
    tables = ["\n".join(_table_lines(labels, block, label_width)) for block in blocks]
    return "\n\n".join([caption, *tables, "\n".join(LEGEND)])


def format_comparisons(result: EvaluationResult) -> str:
    """Return how the adapters after the first differ from the first, as text; empty for one adapter."""
    tables = [_comparison(comparison) for comparison in result.comparisons()]
    return "\n\n".join(table for table in tables if table)


def print_table(result: EvaluationResult) -> None:
    """Print `format_table(result)` and, of several adapters, `format_comparisons(result)`."""
    print("\n\n".join(filter(None, (format_table(result), format_comparisons(result)))))


def format_interval(interval: Interval | None) -> str:
    """Return "0.953 [0.941, 0.962]"; the value alone if it has no interval, "-" if there is no value."""
    if interval is None:
        return _ABSENT
    if math.isnan(interval.low):
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _comparison(comparison: Comparison) -> str:
    rows = []
    for title, names in _SECTIONS:
        where = title.partition(":")[0]
        figures = ((MEASURES[name].label, getattr(comparison, name, None)) for name in names)
        rows += [(f" {label}, {where}", interval) for label, interval in figures if interval is not None]
    if not rows:
        return ""
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.ljust(width)}{_GAP}{_format_difference(interval)}" for label, interval in rows]
    return "\n".join([f"{comparison.b} minus {comparison.a}, picture by picture; 95 % intervals over prompts", *lines])


def _format_difference(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.value:+.3f}"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _column(name: str, scores: Scores) -> _Column:
    return _Column(
        name, tuple(format_interval(getattr(scores, measure)) for _, names in _SECTIONS for measure in names)
    )


def _blocks(columns: Sequence[_Column], width: int) -> list[list[_Column]]:
    """Group columns so that each group fits into `width`; a single wider column stands alone."""
    blocks: list[list[_Column]] = []
    used = 0
    for column in columns:
        needed = len(_GAP) + column.width
        if not blocks or used + needed > width:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += needed
    return blocks


def _table_lines(labels: Sequence[str], columns: Sequence[_Column], label_width: int) -> list[str]:
    def line(label: str, texts: Sequence[str]) -> str:
        cells = (text.ljust(column.width) for text, column in zip(texts, columns, strict=True))
        return _GAP.join([label.ljust(label_width), *cells]).rstrip()

    heading = line("", [column.heading for column in columns])
    lines = [heading, "-" * (label_width + sum(len(_GAP) + column.width for column in columns))]
    rows = zip(labels, zip(*(column.cells for column in columns), strict=True), strict=True)
    for title, names in _SECTIONS:
        lines += [title, *(line(*row) for row in islice(rows, len(names)))]
    return lines
