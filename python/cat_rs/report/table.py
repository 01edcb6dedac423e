"""The result of an evaluation as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from cat_rs.evaluation import Comparison, EvaluationResult, Scores
from cat_rs.evaluation.measures import LEGEND, MEASURES, format_interval
from cat_rs.report.wording import encoder_of, extent_of

MAX_WIDTH = 100
_GAP = "  "

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
    measures = [name for _, names in _SECTIONS for name in names]
    labels = ["", *(f" {MEASURES[name].label}" for name in measures)]
    columns = [
        [model, *(format_interval(getattr(scores, name)) for name in measures)] for model, scores in models.items()
    ]
    caption = f"{extent_of(result)}; encoder {encoder_of(result)}; 95 % bootstrap intervals"
    tables = [_table(labels, block) for block in _blocks(columns, width - _width(labels))]
    return "\n\n".join([caption, *tables, "\n".join(LEGEND)])


def format_comparisons(result: EvaluationResult) -> str:
    """Return how the adapters after the first differ from the first, as text; empty for one adapter."""
    tables = [_comparison(comparison) for comparison in result.comparisons()]
    return "\n\n".join(table for table in tables if table)


def print_table(result: EvaluationResult) -> None:
    """Print `format_table(result)` and, of several adapters, `format_comparisons(result)`."""
    print("\n\n".join(filter(None, (format_table(result), format_comparisons(result)))))


def _comparison(comparison: Comparison) -> str:
    rows = []
    for title, names in _SECTIONS:
        where = title.partition(":")[0]
        figures = ((MEASURES[name].label, getattr(comparison, name, None)) for name in names)
        rows += [(f" {label}, {where}", interval) for label, interval in figures if interval is not None]
    if not rows:
        return ""
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.ljust(width)}{_GAP}{format_interval(interval, '+')}" for label, interval in rows]
    return "\n".join([f"{comparison.b} minus {comparison.a}, picture by picture; 95 % intervals over prompts", *lines])


def _blocks(columns: Sequence[Sequence[str]], width: int) -> list[list[Sequence[str]]]:
    """Group columns so that each group fits into `width`; a single wider column stands alone."""
    blocks: list[list[Sequence[str]]] = []
    used = 0
    for column in columns:
        needed = len(_GAP) + _width(column)
        if not blocks or used + needed > width:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += needed
    return blocks


def _table(labels: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Put columns beside their labels, and the sections' titles between the rows."""
    widths = [_width(column) for column in (labels, *columns)]
    heading, *rows = (
        _GAP.join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(labels, *columns, strict=True)
    )
    lines, remaining = [heading, "-" * (sum(widths) + len(_GAP) * len(columns))], iter(rows)
    for title, names in _SECTIONS:
        lines += [title, *islice(remaining, len(names))]
    return "\n".join(lines)


def _width(column: Sequence[str]) -> int:
    return max(map(len, column))
