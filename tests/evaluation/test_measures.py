"""The table of measures: it agrees with the records, and every table and page shows all of it."""

from __future__ import annotations

from dataclasses import fields

from cat_rs.evaluation import Comparison, Interval, PromptScores, Scores
from cat_rs.evaluation.measures import MEASURES, labelled_values
from cat_rs.report import html, table


def names(record: type) -> list[str]:
    return [field.name for field in fields(record)]


def test_every_score_is_a_measure_in_its_order() -> None:
    assert list(MEASURES) == names(Scores)


def test_comparisons_have_every_measure_that_is_not_relative_to_the_base() -> None:
    assert names(Comparison) == ["a", "b", *(name for name in MEASURES if name != "diversity_retained")]


def test_columns_are_those_of_prompts() -> None:
    columns = {measure.column for measure in MEASURES.values()}
    assert columns == set(names(PromptScores)) - {"model", "prompt", "trigger"}


def test_tables_and_pages_show_every_measure_once() -> None:
    for groups in (table._SECTIONS, html._GROUPS):
        assert sorted(name for _, shown in groups for name in shown) == sorted(MEASURES)


def test_labelled_values_leave_out_what_does_not_apply() -> None:
    scores = Scores(ups=Interval(0.95349, 0.9, 1.0), prompt_similarity=Interval(0.25, 0.2, 0.3))
    assert labelled_values(scores, "prompt_similarity", "kps", "ups") == ["CLIP-T 0.250", "UPS 0.953"]
