"""The Knowledge Preservation Score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cat_rs.arguments import check
from cat_rs.errors import CatRsError
from cat_rs.ops.similarity import Array, similarity
from cat_rs.ops.statistics import (
    Interval,
    bootstrap_interval,
    bootstrap_joined,
    bootstrap_joined_difference,
    harmonic_mean,
    vector,
)

__all__ = ["KpsResult", "kps", "kps_difference"]


@dataclass(frozen=True)
class KpsResult:
    """The Knowledge Preservation Score and its parts, each with a 95 % bootstrap interval (low, high).

    A model that learned nothing has KPS 1: read it beside identity and prompt similarity, never alone.

    Attributes:
        kps: Harmonic mean of ``tps`` and ``ups``.
        ups: Harmonic mean of s over the pairs without the trigger ("unconditioned").
        tps: Harmonic mean of s over the pairs with the trigger ("token-conditioned").
    """

    kps: float
    ups: float
    tps: float
    kps_interval: Interval
    ups_interval: Interval
    tps_interval: Interval


def kps(
    base_no_trigger: Array,
    adapted_no_trigger: Array,
    base_trigger: Array,
    adapted_trigger: Array,
    *,
    clusters: tuple[Any, Any] = (None, None),
    resamples: int = 10_000,
    seed: int = 0,
) -> KpsResult:
    """The Knowledge Preservation Score of an adapter, from image embeddings.

    UPS = harmonic mean of s over pairs without the trigger, TPS with it, KPS = harmonic mean of the two, with
    s(a, b) = (1 + cos) / 2. A pair is an image of the base and one of the adapted model for the same prompt, seed and
    sampler. The CAT paper describes the score in words and publishes s alone; this aggregation is this project's
    reading of it.

    Args:
        base_no_trigger: Embeddings of the base model's images, [N, D]; torch or numpy.
        adapted_no_trigger: Of the adapted model's images for the same prompts and seeds.
        base_trigger: As above, for the prompts with the trigger, [M, D].
        adapted_trigger: As above.
        clusters: For the pairs without and with the trigger, integers, [N] and [M], or None: pairs with the same
            number, such as those of one prompt, are resampled together; see :func:`cat_rs.bootstrap_interval`.
        resamples: Bootstrap samples.
        seed: Of the resampling, in 0..2**64 - 1.

    Raises:
        DeviceError, DtypeError, ShapeError: As :func:`cat_rs.similarity` and :func:`cat_rs.bootstrap_interval`.
        InvalidValueError: The same, and of a single pair.
    """
    _check_two("kps", "clusters", clusters)
    parts = (
        ("no_trigger", base_no_trigger, adapted_no_trigger, clusters[0]),
        ("trigger", base_trigger, adapted_trigger, clusters[1]),
    )
    groups, means, intervals = [], [], []
    for kind, base, adapted, numbers in parts:
        try:
            values = vector("kps", f"base_{kind}", similarity(base, adapted))
            intervals.append(
                bootstrap_interval(values, "harmonic_mean", clusters=numbers, resamples=resamples, seed=seed)
            )
        except (CatRsError, TypeError) as error:
            raise type(error)(f"kps of base_{kind} (a) and adapted_{kind} (b): {error}") from error
        means.append(harmonic_mean(values))
        groups.append((values, numbers))
    interval = bootstrap_joined(groups, resamples=resamples, seed=seed)
    ups, tps = means
    return KpsResult(harmonic_mean(means), ups, tps, interval, *intervals)


def kps_difference(
    a: tuple[Any, Any],
    b: tuple[Any, Any],
    *,
    clusters: tuple[Any, Any] = (None, None),
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A percentile bootstrap confidence interval of KPS(b) - KPS(a), of two adapters of one base model.

    KPS is the harmonic mean of the harmonic means of the two kinds of values. Each kind is resampled by itself, with
    the same indices for both adapters.

    Args:
        a: The first adapter's similarities to the base model, as :func:`cat_rs.similarity` returns them: those of the
            pairs without the trigger, [N], and of those with it, [M]; at least two of each.
        b: The second adapter's, for the same prompts and seeds.
        clusters: For the two kinds, integers, [N] and [M], or None: pairs with the same number are drawn together;
            see :func:`cat_rs.bootstrap_interval`.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling, in 0..2**64 - 1.

    Returns:
        (low, high)

    Raises:
        DtypeError, InvalidValueError, ShapeError: As :func:`cat_rs.bootstrap_interval`.
    """
    for argument, groups in (("a", a), ("b", b), ("clusters", clusters)):
        _check_two("kps_difference", argument, groups)
    return bootstrap_joined_difference(
        "kps_difference", a, b, clusters, confidence=confidence, resamples=resamples, seed=seed
    )


def _check_two(op: str, argument: str, groups: Sequence[Any]) -> None:
    check(op, argument, groups, "two groups, without and with the trigger", lambda groups: len(groups) == 2)
