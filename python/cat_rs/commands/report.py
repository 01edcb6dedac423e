"""`cat-rs report`: one page from evaluations and trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cat_rs.options import check_absent, option

_WHAT = "runs and report"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is reported."""

    runs: tuple[str, ...] = option(
        group=_WHAT,
        help="folders that evaluate, demo, train or check wrote, or a results.json",
        metavar="RUN",
        positional=True,
    )
    output: str = option(
        "report", group=_WHAT, help="folder for report.html, report.png and report.json", metavar="DIR"
    )
    overwrite: bool = option(False, group=_WHAT, help="replace an earlier report")
    title: str | None = option(None, group=_WHAT, help="headline; says what was compared if not given")


def run(settings: Settings) -> None:
    """Write report.html, report.png and report.json."""
    from cat_rs.report import write_report
    from cat_rs.report.writer import REPORT_FILES

    check_absent("output", [Path(settings.output, name) for name in REPORT_FILES], overwrite=settings.overwrite)
    write_report(settings.runs, settings.output, title=settings.title)
    print(f"report: {Path(settings.output, 'report.html')}")
