"""A report of evaluations and trainings: one HTML page that needs no other file, a picture of it, and its figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cat_rs.atomic import write_bytes
from cat_rs.report.content import read_report, report_json
from cat_rs.report.html import render_html
from cat_rs.report.overview import draw_overview

REPORT_FILES = ("report.json", "report.png", "report.html")


def write_report(
    runs: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Write report.html, report.png and report.json.

    Args:
        runs: What to report on: folders that `cat-rs evaluate`, `demo`, `train` and `check` wrote, or the JSON of all
            but a training.
        folder: The folder to write into.
        title: The headline; says what was compared if not given.

    Raises:
        EvaluationFileError: A file is missing or cannot be read; names it.
        EvaluationInputError: A file holds something else; names it.
    """
    report = read_report(runs, title=title)
    contents = (
        report_json(report).encode(errors="backslashreplace"),
        draw_overview(report),
        render_html(report).encode(errors="backslashreplace"),
    )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, data in zip(REPORT_FILES, contents, strict=True):
        write_bytes(target / name, data)
