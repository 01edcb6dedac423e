"""Which of several models no other exceeds, and which of them is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cat_rs.evaluation.measures import Interval


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points (identity, UPS) no other exceeds in one figure without falling behind in the other."""

    def dominates(other: tuple[float, float], point: tuple[float, float]) -> bool:
        return other != point and other[0] >= point[0] and other[1] >= point[1]

    return [not any(dominates(other, point) for other in points) for point in points]


def choose_best(points: Sequence[tuple[float, float]], base: Interval, keep: float) -> int | None:
    """Choose among the points (identity, UPS) of a run.

    Args:
        points: At least one.
        base: The base model's identity; a point that is not beyond its interval may have learned nothing.
        keep: The part of the way from there to the run's highest identity that a point must have come, in [0, 1].

    Returns:
        The index of the highest UPS among those points, the first of equal ones; None if there is no such point.
    """
    highest = max(identity for identity, _ in points)
    least = min(base.value + keep * (highest - base.value), highest)
    floor = base.value if math.isnan(base.high) else base.high
    fit = [index for index, (identity, _) in enumerate(points) if identity > floor and identity >= least]
    return max(fit, key=lambda index: (points[index][1], -index), default=None)
