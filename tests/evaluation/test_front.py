"""Which of several models no other exceeds, and which is the best."""

from __future__ import annotations

import math

import pytest

from cat_rs.evaluation.front import choose_best, on_front
from cat_rs.evaluation.measures import Interval


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.9)], [True]),
        ([(0.5, 0.9), (0.6, 0.8)], [True, True]),
        ([(0.5, 0.9), (0.6, 0.9)], [False, True]),
        ([(0.5, 0.9), (0.4, 0.8)], [True, False]),
        ([(0.5, 0.9), (0.5, 0.9)], [True, True]),
    ],
)
def test_what_is_on_the_front(points: list[tuple[float, float]], expected: list[bool]) -> None:
    assert on_front(points) == expected


@pytest.mark.parametrize(
    ("points", "base", "keep", "expected"),
    [
        ([(0.7, 0.9)], 0.4, 0.95, 0),
        ([(0.5, 0.99), (0.69, 0.95), (0.7, 0.9)], 0.4, 0.95, 1),
        ([(0.5, 0.99), (0.69, 0.95), (0.7, 0.9)], 0.4, 1.0, 2),
        ([(0.5, 0.99), (0.69, 0.95), (0.7, 0.9)], 0.4, 0.0, 0),
        ([(0.7, 0.9), (0.7, 0.9)], 0.4, 0.95, 0),
        # 0.68 is 93 % of the way from 0.4 to 0.7, though 97 % of 0.7.
        ([(0.5, 0.99), (0.68, 0.95), (0.7, 0.9)], 0.4, 0.95, 2),
        ([(0.5, 0.99), (0.68, 0.95), (0.7, 0.9)], -0.4, 0.95, 1),
        # None has come beyond the base model.
        ([(0.3, 0.9), (0.2, 0.95)], 0.4, 0.95, None),
        ([(0.4, 0.9)], 0.4, 0.0, None),
    ],
)
def test_the_rule_of_the_best(
    points: list[tuple[float, float]], base: float, keep: float, expected: int | None
) -> None:
    assert choose_best(points, Interval(base, base, base), keep) == expected
    assert choose_best(points, Interval(base, math.nan, math.nan), keep) == expected


@pytest.mark.parametrize(
    ("high", "expected"),
    [(0.45, 0), (0.5, 1), (0.6999, 1), (0.7, None)],
)
def test_the_best_is_beyond_the_base_models_interval(high: float, expected: int | None) -> None:
    assert choose_best([(0.5, 0.99), (0.7, 0.9)], Interval(0.4, 0.3, high), 0.0) == expected
