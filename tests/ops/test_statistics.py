"""harmonic_mean and the bootstrap intervals against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cat_rs
from cat_rs.errors import CatRsError, DtypeError, InvalidValueError
from tests import references

Array = NDArray[np.float64]
STATISTICS = ["mean", "harmonic_mean"]
CLUSTERED = pytest.mark.parametrize("clustered", [False, True], ids=["independent", "clusters"])


def scores(seed: int, clusters: NDArray[np.int64]) -> Array:
    """Scores in [0, 1] that share most of what varies within a cluster."""
    random = np.random.default_rng(seed)
    shared = random.uniform(0.3, 0.9, clusters.max() + 1)[clusters]
    return np.clip(shared + random.normal(0, 0.05, len(clusters)), 0.05, 1)


def cluster_numbers(count: int, seed: int) -> NDArray[np.int64]:
    """Numbers of clusters of one to several values, not in order."""
    return np.random.default_rng(seed).integers(count // 3, size=count)


def assert_interval(ours: tuple[float, float], resampled: Array) -> None:
    """The ends agree with the quantiles of another generator's resamples."""
    # A 2.5 % quantile of 4000 draws has a standard error of about 0.04 standard deviations; there are two of them.
    np.testing.assert_allclose(ours, np.quantile(resampled, [0.025, 0.975]), rtol=0, atol=0.25 * resampled.std())


@pytest.mark.parametrize(
    "values",
    [[0.5, 0.25], (1.0,), torch.rand(50) + 0.1, np.linspace(0.2, 1, 9)[::2], torch.ones(2, dtype=torch.bfloat16)],
    ids=["list", "tuple", "torch", "strided", "bf16"],
)
def test_harmonic_mean(values: Any) -> None:
    plain = values.tolist() if isinstance(values, torch.Tensor) else values
    assert cat_rs.harmonic_mean(values) == pytest.approx(references.harmonic_mean(plain), rel=1e-14)


def test_harmonic_mean_with_a_zero_is_zero() -> None:
    assert cat_rs.harmonic_mean([0.5, 0.0, 1.0]) == 0


@CLUSTERED
@pytest.mark.parametrize("statistic", STATISTICS)
def test_bootstrap_interval_is_numpys(statistic: str, clustered: bool) -> None:
    clusters = cluster_numbers(40, seed=1)
    values = scores(0, clusters)
    expected = references.bootstrap([[values]], statistic, 4000, [clusters] if clustered else None)
    ours = cat_rs.bootstrap_interval(values, statistic, clusters=clusters if clustered else None, seed=3)
    assert_interval(ours, expected[0])


@CLUSTERED
@pytest.mark.parametrize("statistic", STATISTICS)
def test_bootstrap_difference_is_numpys(statistic: str, clustered: bool) -> None:
    clusters = cluster_numbers(40, seed=1)
    a = scores(0, clusters)
    b = np.clip(a + scores(1, clusters) / 4, 0.05, 1)
    expected = references.bootstrap([[a], [b]], statistic, 4000, [clusters] if clustered else None)
    ours = cat_rs.bootstrap_difference(a, b, statistic, clusters=clusters if clustered else None, seed=3)
    assert_interval(ours, expected[1] - expected[0])


@CLUSTERED
def test_kps_difference_is_numpys(clustered: bool) -> None:
    clusters = cluster_numbers(40, seed=1), cluster_numbers(25, seed=2)
    a = [scores(seed, own) for seed, own in enumerate(clusters)]
    b = [np.clip(values + scores(9, own) / 4, 0.05, 1) for values, own in zip(a, clusters, strict=True)]
    expected = references.bootstrap([a, b], "harmonic_mean", 4000, clusters if clustered else None)
    ours = cat_rs.kps_difference((a[0], a[1]), (b[0], b[1]), clusters=clusters if clustered else (None, None), seed=3)
    assert_interval(ours, expected[1] - expected[0])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_interval_covers_a_known_mean(confidence: float) -> None:
    random = np.random.default_rng(1)
    trials, hits = 400, 0
    for trial in range(trials):
        low, high = cat_rs.bootstrap_interval(
            random.normal(3.0, 2.0, 60), confidence=confidence, resamples=400, seed=trial
        )
        hits += low <= 3.0 <= high
    # Four standard errors, and the percentile interval's known shortfall of about a point at 60 values.
    slack = 4 * (confidence * (1 - confidence) / trials) ** 0.5
    assert confidence - 0.015 - slack <= hits / trials <= confidence + slack


def test_clusters_make_the_interval_of_values_that_are_alike_honest() -> None:
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 4)
    trials, hits, naive_hits = 300, 0, 0
    for trial in range(trials):
        values = np.repeat(random.normal(3.0, 2.0, 60), 4) + random.normal(0.0, 0.2, 240)
        low, high = cat_rs.bootstrap_interval(values, clusters=clusters, resamples=400, seed=trial)
        hits += low <= 3.0 <= high
        low, high = cat_rs.bootstrap_interval(values, resamples=400, seed=trial)
        naive_hits += low <= 3.0 <= high
    slack = 4 * (0.95 * 0.05 / trials) ** 0.5
    assert 0.95 - 0.015 - slack <= hits / trials <= 0.95 + slack
    # Taken for independent, four equal values make the interval half as wide: it covers two thirds of the time.
    assert naive_hits / trials < 0.8


def test_clusters_of_one_value_change_nothing() -> None:
    random = np.random.default_rng(0)
    a, b = random.uniform(0.2, 1.0, (2, 33))
    own = np.sort(random.permutation(100)[:33]) - 50
    for statistic in STATISTICS:
        assert cat_rs.bootstrap_interval(a, statistic, clusters=own) == cat_rs.bootstrap_interval(a, statistic)
        plain = cat_rs.bootstrap_difference(a, b, statistic)
        assert cat_rs.bootstrap_difference(a, b, statistic, clusters=own) == plain
    plain = cat_rs.kps_difference((a, a[:20]), (b, b[:20]))
    assert cat_rs.kps_difference((a, a[:20]), (b, b[:20]), clusters=(own, own[:20])) == plain


def test_repeated_values_are_worth_one_value_a_cluster() -> None:
    values = np.random.default_rng(0).uniform(0.2, 1.0, 20)
    clusters = np.repeat(np.arange(20), 5)
    for statistic in STATISTICS:
        ours = cat_rs.bootstrap_interval(np.repeat(values, 5), statistic, clusters=clusters)
        assert ours == pytest.approx(cat_rs.bootstrap_interval(values, statistic), rel=1e-14)


def test_order_of_a_cluster_and_its_number_do_not_matter() -> None:
    clusters = cluster_numbers(40, seed=1)
    values = scores(0, clusters)
    expected = cat_rs.bootstrap_interval(values, clusters=clusters)
    order = np.random.default_rng(0).permutation(40)
    assert cat_rs.bootstrap_interval(values[order], clusters=clusters[order]) == pytest.approx(expected, rel=1e-14)
    assert cat_rs.bootstrap_interval(values, clusters=3 * clusters - 2**40) == expected
    for same in (clusters.tolist(), torch.from_numpy(clusters), clusters.astype(np.uint8)):
        assert cat_rs.bootstrap_interval(values, clusters=same) == expected


def test_difference_of_means_is_the_mean_of_differences() -> None:
    clusters = cluster_numbers(40, seed=1)
    a, b = scores(0, clusters), scores(1, clusters)
    for own in (None, clusters):
        expected = cat_rs.bootstrap_interval(b - a, clusters=own, seed=5)
        assert cat_rs.bootstrap_difference(a, b, clusters=own, seed=5) == pytest.approx(expected, abs=1e-14)


def test_exchanging_the_adapters_changes_the_sign() -> None:
    clusters = cluster_numbers(40, seed=1)
    a, b = (scores(0, clusters), scores(1, clusters)), (scores(2, clusters), scores(3, clusters))
    low, high = cat_rs.bootstrap_difference(a[0], b[0], "harmonic_mean")
    assert cat_rs.bootstrap_difference(b[0], a[0], "harmonic_mean") == pytest.approx((-high, -low), abs=1e-15)
    low, high = cat_rs.kps_difference(a, b)
    assert cat_rs.kps_difference(b, a) == pytest.approx((-high, -low), abs=1e-15)


def test_what_pairs_have_in_common_cancels() -> None:
    a = np.random.default_rng(0).uniform(0.2, 0.8, 50)
    assert cat_rs.bootstrap_difference(a, a, "harmonic_mean") == (0.0, 0.0)
    assert cat_rs.kps_difference((a, a), (a, a)) == (0.0, 0.0)
    assert cat_rs.bootstrap_difference(a, a + 0.1) == pytest.approx((0.1, 0.1), abs=1e-14)
    low, high = cat_rs.bootstrap_difference(a, a * 1.1, "harmonic_mean")
    assert 0 < low <= 0.1 * references.harmonic_mean(a) <= high


def test_equal_values_have_an_interval_of_no_width() -> None:
    clusters = cluster_numbers(30, seed=1)
    half, quarter = np.full(30, 0.5), np.full(30, 0.25)
    for own in (None, clusters):
        for statistic in STATISTICS:
            assert cat_rs.bootstrap_interval(half, statistic, clusters=own) == (0.5, 0.5)
            assert cat_rs.bootstrap_difference(half, quarter, statistic, clusters=own) == (-0.25, -0.25)
        assert cat_rs.kps_difference((half, half), (quarter, quarter), clusters=(own, own)) == (-0.25, -0.25)


def test_a_zero_in_every_resample_is_a_harmonic_mean_of_zero() -> None:
    zeros, ones = np.zeros(4), np.ones(4)
    assert cat_rs.bootstrap_difference(zeros, ones, "harmonic_mean") == (1.0, 1.0)
    assert cat_rs.kps_difference((zeros, ones), (ones, ones)) == (1.0, 1.0)


def test_bootstrap_of_the_mean_takes_negative_values() -> None:
    low, high = cat_rs.bootstrap_interval([-1.0, -2.0, 0.5])
    assert -2.0 <= low <= high <= 0.5


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values, others = np.random.default_rng(0).uniform(0.2, 1.0, (2, 30))
    clusters = cluster_numbers(30, seed=1)
    functions: list[Callable[[int], tuple[float, float]]] = [
        lambda seed: cat_rs.bootstrap_interval(values, "harmonic_mean", seed=seed),
        lambda seed: cat_rs.bootstrap_interval(values, clusters=clusters, seed=seed),
        lambda seed: cat_rs.bootstrap_difference(values, list(others), seed=seed),
        lambda seed: cat_rs.kps_difference((values, values), (others, others), clusters=(None, clusters), seed=seed),
    ]
    for function in functions:
        torch.set_num_threads(1)
        first = function(2**64 - 1)
        torch.set_num_threads(2)
        assert function(2**64 - 1) == first
        assert function(1) != first


@pytest.mark.parametrize(
    ("values", "text"),
    [
        pytest.param([0.5, -0.25], "must be >= 0 .* got -0.25 at index 1", id="negative"),
        pytest.param([0.5, float("nan")], "must be finite, got [Nn]a[Nn] at index 1", id="nan"),
        pytest.param([float("inf"), 0.5], "must be finite, got inf at index 0", id="inf"),
    ],
)
def test_bad_values_are_named(values: list[float], text: str) -> None:
    good = [0.5, 0.5]
    with pytest.raises(InvalidValueError, match=f"^harmonic_mean: `values` {text}"):
        cat_rs.harmonic_mean(values)
    with pytest.raises(InvalidValueError, match=f"^bootstrap_interval: `values` {text}"):
        cat_rs.bootstrap_interval(values, "harmonic_mean")
    with pytest.raises(InvalidValueError, match=f"^bootstrap_difference: `a` {text}"):
        cat_rs.bootstrap_difference(values, good, "harmonic_mean")
    with pytest.raises(InvalidValueError, match=f"^bootstrap_difference: `b` {text}"):
        cat_rs.bootstrap_difference(good, values, "harmonic_mean")
    with pytest.raises(InvalidValueError, match=rf"^kps_difference: `b\[1\]` {text}"):
        cat_rs.kps_difference((good, good), (good, values))
    with pytest.raises(InvalidValueError, match=rf"^kps_difference: `a\[0\]` {text}"):
        cat_rs.kps_difference((values, good), (good, good))


@pytest.mark.parametrize("values", [[], [0.3]], ids=["none", "one"])
def test_too_few_values_to_resample_are_an_error(values: list[float]) -> None:
    text = f"must be at least two numbers to resample, got {len(values)}"
    with pytest.raises(InvalidValueError, match=f"^bootstrap_interval: `values` {text}"):
        cat_rs.bootstrap_interval(values)
    with pytest.raises(InvalidValueError, match=f"^bootstrap_difference: `a` {text}"):
        cat_rs.bootstrap_difference(values, values)
    with pytest.raises(InvalidValueError, match=rf"^kps_difference: `a\[1\]` {text}"):
        cat_rs.kps_difference(([0.5, 0.5], values), ([0.5, 0.5], values))


def test_the_harmonic_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match=r"^harmonic_mean: `values` must be at least one number, got none"):
        cat_rs.harmonic_mean([])


def test_values_that_are_not_paired_are_an_error() -> None:
    three, two = [0.5] * 3, [0.5] * 2
    with pytest.raises(InvalidValueError, match=r"^bootstrap_difference: `b` must be as many .* as `a`, 3, got 2"):
        cat_rs.bootstrap_difference(three, two)
    with pytest.raises(InvalidValueError, match=r"^kps_difference: `b\[1\]` must be as many .* as `a\[1\]`, 2, got 3"):
        cat_rs.kps_difference((three, two), (three, three))
    with pytest.raises(InvalidValueError, match=r"^kps_difference: `a` must be two groups, .* of length 3"):
        cat_rs.kps_difference((three, three, three), (three, three))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clusters", "error", "text"),
    [
        pytest.param([1, 2], InvalidValueError, "must be as many numbers as `.*`, 3, got 2", id="too-few"),
        pytest.param([7, 7, 7], InvalidValueError, "must be at least two clusters to resample, got 1", id="one"),
        pytest.param([1.0, 2.0, 3.0], DtypeError, "must be integers, got float64", id="floats"),
        pytest.param(["a", "b", "c"], DtypeError, "must be integers, got <U1", id="text"),
    ],
)
def test_bad_clusters_are_named(clusters: Any, error: type[CatRsError], text: str) -> None:
    values = [0.5] * 3
    with pytest.raises(error, match=f"^bootstrap_interval: `clusters` {text}"):
        cat_rs.bootstrap_interval(values, clusters=clusters)
    with pytest.raises(error, match=f"^bootstrap_difference: `clusters` {text}"):
        cat_rs.bootstrap_difference(values, values, clusters=clusters)
    with pytest.raises(error, match=rf"^kps_difference: `clusters\[1\]` {text}"):
        cat_rs.kps_difference((values, values), (values, values), clusters=(None, clusters))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param({"confidence": 0.0}, r"`confidence` must be in \(0, 1\), got 0", id="confidence-0"),
        pytest.param({"confidence": 1.0}, r"`confidence` must be in \(0, 1\), got 1", id="confidence-1"),
        pytest.param({"confidence": float("nan")}, "`confidence` .* got [Nn]a[Nn]", id="confidence-nan"),
        pytest.param({"resamples": 1}, "`resamples` must be at least 2, got 1", id="resamples-1"),
        pytest.param({"resamples": -5}, "`resamples` must be at least 2, got -5", id="resamples-negative"),
        pytest.param({"seed": -1}, r"`seed` must be in 0\.\.2\*\*64 - 1, got -1", id="seed"),
        pytest.param(
            {"statistic": "median"}, "`statistic` must be 'mean' or 'harmonic_mean', got 'median'", id="statistic"
        ),
    ],
)
def test_bad_bootstrap_settings_are_named(arguments: dict[str, Any], text: str) -> None:
    values = [1.0, 2.0]
    with pytest.raises(InvalidValueError, match=f"^bootstrap_interval: {text}"):
        cat_rs.bootstrap_interval(values, **arguments)
    with pytest.raises(InvalidValueError, match=f"^bootstrap_difference: {text}"):
        cat_rs.bootstrap_difference(values, values, **arguments)
    if "statistic" not in arguments:
        with pytest.raises(InvalidValueError, match=f"^kps_difference: {text}"):
            cat_rs.kps_difference((values, values), (values, values), **arguments)
