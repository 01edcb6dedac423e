"""The table: every figure is there, and no line is too long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cat_rs.evaluation import Interval, Scores
from cat_rs.evaluation.measures import format_interval
from cat_rs.report import format_table, print_table
from cat_rs.report.table import MAX_WIDTH

from .conftest import ResultMaker


def test_demo_fits_one_table(make_result: ResultMaker) -> None:
    lines = format_table(make_result("plain LoRA", "CAT")).splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH
    headings = [line for line in lines if "plain LoRA" in line]
    assert len(headings) == 1
    assert headings[0].split() == ["base", "other", "seed", "plain", "LoRA", "CAT"]


def test_many_adapters_wrap_into_more_tables(make_result: ResultMaker) -> None:
    names = [f"adapter {number}" for number in range(7)]
    text = format_table(make_result(*names))
    assert max(map(len, text.splitlines())) <= MAX_WIDTH
    assert all(text.count(name) == 1 for name in names)


def test_every_measure_of_an_adapter_is_shown(make_result: ResultMaker) -> None:
    result = make_result("mine")
    values = {name: 0.1 + 0.01 * number for number, name in enumerate(Scores.__dataclass_fields__)}
    scores = Scores(**{name: Interval(value, value - 0.5, value + 0.5) for name, value in values.items()})
    text = format_table(replace(result, adapters={"mine": scores}))
    for interval in vars(scores).values():
        assert format_interval(interval) in text


def test_cells_stand_under_their_heading(make_result: ResultMaker) -> None:
    lines = format_table(make_result("plain LoRA", "CAT")).splitlines()
    heading = next(line for line in lines if "plain LoRA" in line)
    ups = next(line for line in lines if line.strip().startswith("UPS "))
    assert ups[heading.index("base")] == "-"
    assert ups[heading.index("other seed") :].startswith("0.800 ")
    assert ups[heading.index("plain LoRA") :].startswith("0.100 [0.090, 0.120]")
    assert ups[heading.index("CAT") :].startswith("0.200 [0.190, 0.220]")


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (None, "-"),
        (Interval(0.5, float("nan"), float("nan")), "0.500"),
        (Interval(0.9526, 0.94, 0.96), "0.953 [0.940, 0.960]"),
    ],
)
def test_interval_as_text(interval: Interval | None, text: str) -> None:
    assert format_interval(interval) == text


def test_print_writes_the_table(make_result: ResultMaker, capsys: pytest.CaptureFixture[str]) -> None:
    result = make_result("CAT")
    print_table(result)
    assert capsys.readouterr().out == format_table(result) + "\n"
