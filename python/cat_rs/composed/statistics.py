"""Harmonic means, and bootstrap intervals of means: NumPy, with the draws of the extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.composed.checks import Checks, integer, number

__all__ = ["bootstrap_difference", "bootstrap_interval", "harmonic_mean", "kps_difference"]

Values = NDArray[np.float64]
Clusters = NDArray[np.int64] | None
# The values and the clusters of a group, by the names of their arguments: the same draws for all of its samples.
_Group = tuple[list[tuple[str, Values]], tuple[str, Clusters]]
# Draws that are in memory at once.
_DRAWS = 1 << 20


def harmonic_mean(values: Values) -> float:
    """See `cat_rs.harmonic_mean`."""
    checks = Checks("harmonic_mean")
    if len(values) == 0:
        checks.refuse("values", "at least one number", "none")
    _check_numbers(checks, "values", values, harmonic=True)
    return float(_harmonic(values))


def bootstrap_interval(
    groups: Sequence[tuple[Values, Clusters]], *, harmonic: bool, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """See `cat_rs.bootstrap_interval`; several groups are resampled apart and joined by their harmonic mean."""
    named: list[_Group] = [([("values", values)], ("clusters", clusters)) for values, clusters in groups]
    return _interval("bootstrap_interval", named, harmonic, confidence, resamples, seed)


def bootstrap_difference(
    a: Values, b: Values, clusters: Clusters, *, harmonic: bool, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """See `cat_rs.bootstrap_difference`."""
    group: _Group = ([("a", a), ("b", b)], ("clusters", clusters))
    return _interval("bootstrap_difference", [group], harmonic, confidence, resamples, seed)


def kps_difference(
    a: Sequence[Values],
    b: Sequence[Values],
    clusters: Sequence[Clusters],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """See `cat_rs.kps_difference`."""
    groups: list[_Group] = [
        ([(f"a[{index}]", a[index]), (f"b[{index}]", b[index])], (f"clusters[{index}]", clusters[index]))
        for index in range(2)
    ]
    return _interval("kps_difference", groups, True, confidence, resamples, seed)


def _interval(
    op: str, groups: Sequence[_Group], harmonic: bool, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """The interval of the first sample's statistic, or of the second's less the first's."""
    checks = Checks(op)
    confidence = number("confidence", confidence)
    resamples = integer("resamples", resamples, -(2**63), 2**63 - 1, "-2**63..2**63 - 1")
    seed = integer("seed", seed, 0, 2**64 - 1, "0..2**64 - 1")
    if not groups:
        checks.refuse("values", "at least one group", "none")
    if not 0 < confidence < 1:
        checks.refuse("confidence", "in (0, 1)", confidence)
    if resamples < 2:
        checks.refuse("resamples", "at least 2", resamples)
    for group in groups:
        _check_group(checks, group, harmonic)
    samples = np.concatenate([_statistics(groups, harmonic, part, seed) for part in _parts(groups, resamples)], axis=1)
    values = samples[0] if len(samples) == 1 else samples[1] - samples[0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _parts(groups: Sequence[_Group], resamples: int) -> Sequence[NDArray[np.uint64]]:
    """The numbers of the resamples, in parts whose draws fit into memory."""
    longest = max(len(values) for samples, _ in groups for _, values in samples)
    size = max(1, _DRAWS // longest)
    return [np.arange(start, min(start + size, resamples), dtype=np.uint64) for start in range(0, resamples, size)]


def _statistics(groups: Sequence[_Group], harmonic: bool, resamples: NDArray[np.uint64], seed: int) -> Values:
    """Each sample's statistic in each resample, [S, R]; of several groups the harmonic mean."""
    drawn, of_groups = 0, []
    for samples, (_, clusters) in groups:
        values = np.stack([values for _, values in samples])
        with np.errstate(divide="ignore"):
            terms = 1 / values if harmonic else values
        sizes = np.ones(terms.shape[1])
        if clusters is not None:
            _, members, counts = np.unique(clusters, return_inverse=True, return_counts=True)
            terms = np.stack([np.bincount(members, row) for row in terms])
            sizes = counts.astype(np.float64)
        draws = _draws(seed, resamples, drawn, len(sizes))
        drawn += len(sizes)
        means = terms[:, draws].sum(2) / sizes[draws].sum(1)
        of_groups.append(1 / means if harmonic else means)
    return of_groups[0] if len(of_groups) == 1 else _harmonic(np.stack(of_groups))


def _draws(seed: int, resamples: NDArray[np.uint64], drawn: int, bound: int) -> NDArray[np.int64]:
    """Uniform numbers in 0..bound - 1, [R, bound]: those of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    gamma, stream = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
    with np.errstate(over="ignore"):
        start = _mixed(np.uint64(seed) + gamma) ^ (resamples * stream)
        steps = np.arange(drawn + 1, drawn + bound + 1, dtype=np.uint64)
        z = _mixed(start[:, None] + steps * gamma)
    # The high half of z * bound, of which no integer here holds both.
    half, low, wide = np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64(bound)
    return (((z >> half) * wide + ((z & low) * wide >> half)) >> half).astype(np.int64)


def _mixed(z: Any) -> Any:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _harmonic(values: Values) -> Any:
    """n / sum(1 / v) over the first dimension; 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        return len(values) / (1 / values).sum(0)


def _check_group(checks: Checks, group: _Group, harmonic: bool) -> None:
    samples, (name, clusters) = group
    first, values = samples[0]
    if len(values) < 2:
        checks.refuse(first, "at least two numbers to resample", len(values))
    for argument, numbers in samples:
        _check_count(checks, argument, numbers, samples)
        _check_numbers(checks, argument, numbers, harmonic=harmonic)
    if clusters is not None:
        _check_count(checks, name, clusters, samples)
        if (clusters == clusters[0]).all():
            checks.refuse(name, "at least two clusters to resample", 1)


def _check_count(checks: Checks, argument: str, numbers: NDArray[Any], samples: list[tuple[str, Values]]) -> None:
    first, values = samples[0]
    if len(numbers) != len(values):
        checks.refuse(argument, f"as many numbers as `{first}`, {len(values)}", len(numbers))


def _check_numbers(checks: Checks, argument: str, values: Values, *, harmonic: bool) -> None:
    bad = [(~np.isfinite(values), "finite")]
    if harmonic:
        bad.append((values < 0, ">= 0 for a harmonic mean"))
    for wrong, expected in bad:
        if wrong.any():
            index = int(wrong.argmax())
            checks.refuse(argument, expected, f"{values[index]} at index {index}")
