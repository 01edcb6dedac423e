"""The statistics of evaluations: time of bootstrap intervals, error of the KPS, memory at a million pairs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests import references

import cat_rs
from benchmarks import harness
from benchmarks.harness import OURS, Case, Contender

NAME = "statistics"
SECONDS_BAR = "<= 1"
MEGABYTES_BAR = "<= 64"
ERROR_BARS = {torch.float32: "<= 1e-6", torch.float16: "<= 1e-3", torch.bfloat16: "<= 1e-2"}
# Resamples drawn at a time by the contenders that hold all indices, and pairs that the reference takes at a time.
BATCH, BLOCK = 100, 10_000

Array = NDArray[np.float64]
Interval = tuple[float, float]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def numpy_interval(a: Array, b: Array | None, resamples: int) -> Interval:
    """The interval of the mean of a, or of the harmonic mean of b less that of a, a batch of resamples at a time."""
    generator = np.random.default_rng(0)
    statistics = []
    for start in range(0, resamples, BATCH):
        indices = generator.integers(len(a), size=(min(BATCH, resamples - start), len(a)))
        if b is None:
            statistics.append(a[indices].mean(axis=1))
        else:
            statistics.append(1 / (1 / b)[indices].mean(axis=1) - 1 / (1 / a)[indices].mean(axis=1))
    low, high = np.quantile(np.concatenate(statistics), (0.025, 0.975))
    return float(low), float(high)


def scipy_interval(values: Array, resamples: int) -> Interval:
    """The interval of the mean, as scipy.stats has it."""
    from scipy import stats

    done = stats.bootstrap((values,), np.mean, n_resamples=resamples, batch=BATCH, method="percentile")
    return float(done.confidence_interval.low), float(done.confidence_interval.high)


def check_interval(what: str, got: Interval, expected: Interval, standard_error: float, resamples: int) -> None:
    """Two random generators: the ends agree to the error of an estimated quantile, some standard errors / sqrt(R)."""
    allowed = 10 * standard_error / resamples**0.5
    for end, ours, theirs in zip(("low", "high"), got, expected, strict=True):
        if not abs(ours - theirs) <= allowed:
            raise harness.BenchmarkError(f"{NAME} {what} {end}: expected {theirs} +- {allowed:.3g}, got {ours}")


def bootstrap(count: int, resamples: int, report: harness.Report) -> None:
    """Intervals of a mean, of a paired difference of harmonic means, and of a mean over clusters of four values."""
    random = np.random.default_rng(0)
    a, b = random.uniform(0.5, 1.0, (2, count))
    clusters = np.arange(count) // 4
    ways: dict[str, dict[str, Callable[[], Interval]]] = {
        "interval": {
            "numpy": lambda: numpy_interval(a, None, resamples),
            OURS: lambda: cat_rs.bootstrap_interval(a, resamples=resamples),
        },
        "difference": {
            "numpy": lambda: numpy_interval(a, b, resamples),
            OURS: lambda: cat_rs.bootstrap_difference(a, b, "harmonic_mean", resamples=resamples),
        },
        "clusters": {OURS: lambda: cat_rs.bootstrap_interval(a, clusters=clusters, resamples=resamples)},
    }
    if importlib.util.find_spec("scipy"):
        ways["interval"]["scipy"] = lambda: scipy_interval(a, resamples)
    size = f"{resamples} resamples of {count}"
    for mode, contenders in ways.items():
        for name, run in contenders.items():
            if name != OURS:
                check_interval(f"{mode} {name}", contenders[OURS](), run(), a.std() * (2 / count) ** 0.5, resamples)
        samples = harness.measure(
            [Contender(name, run) for name, run in contenders.items()], report.repeats, warm_up=1
        )
        report.add_times(Case(mode, "float64", size), samples)
        low, middle, high = harness.quantiles(samples[OURS])
        report.add_value(f"seconds, {mode}, {size}", middle, low, high, SECONDS_BAR)
        for name in contenders.keys() - {OURS}:
            report.add_ratio(f"{name} / cat_rs, {mode}, {size}", samples[name], samples[OURS])


def accuracy(count: int, width: int, report: harness.Report) -> None:
    """The KPS and its parts against float64 arithmetic on the embeddings before they were rounded."""
    exact = torch.randn(2, count, width, dtype=torch.float64) + 0.5
    # Adapted pictures from nearly the base's to those of another prompt.
    exact[1] = exact[0] + torch.linspace(0.05, 4, count, dtype=torch.float64)[:, None] * exact[1]
    expected = np.concatenate(
        [references.similarity(*exact[:, start : start + BLOCK]) for start in range(0, count, BLOCK)]
    )
    trigger = slice(0, count // 2)
    ups, tps = references.harmonic_mean(expected), references.harmonic_mean(expected[trigger])
    figures = {"kps": references.harmonic_mean([ups, tps]), "ups": ups, "tps": tps}
    for dtype, bar in ERROR_BARS.items():
        base, adapted = exact.to(dtype)
        result = cat_rs.kps(base, adapted, base[trigger], adapted[trigger], resamples=2)
        errors = {name: abs(getattr(result, name) - value) for name, value in figures.items()}
        similarities = cat_rs.similarity(base, adapted).double().numpy()
        errors["similarity"] = float(np.abs(similarities - expected).max())
        case = Case("kps", dtype_name(dtype), f"{count}x{width}")
        for name, error in errors.items():
            report.add(OURS, case, f"error of {name}", "absolute", [error])
        worst = max(errors.values())
        report.add_value(f"largest error, {case.dtype}, {case.shape}", worst, worst, worst, bar)


def memory(count: int, width: int, report: harness.Report) -> None:
    """By how much the process grows, its inputs aside."""
    for dtype in (torch.float32, torch.bfloat16):
        # The pairs are neighbouring rows: two inputs at the price of one.
        rows = torch.randn(count + 1, width, dtype=dtype)
        a, b = rows[:-1], rows[1:]
        values = cat_rs.similarity(a, b)
        clusters = np.arange(count) // 4
        operations: dict[str, Callable[[], Any]] = {
            "similarity": lambda a=a, b=b: cat_rs.similarity(a, b),
            "drift": lambda a=a, b=b: 1 - cat_rs.similarity(a, b).mean(),
            "kps": lambda a=a, b=b: cat_rs.kps(a, b, a, b, resamples=2),
            "bootstrap_interval": lambda s=values, c=clusters: cat_rs.bootstrap_interval(s, clusters=c, resamples=2),
            "bootstrap_difference": lambda s=values: cat_rs.bootstrap_difference(s, s, resamples=2),
            "kps_difference": lambda s=values, c=clusters: cat_rs.kps_difference(
                (s, s), (s, s), clusters=(c, c), resamples=2
            ),
        }
        for name, run in operations.items():
            case = Case(name, dtype_name(dtype), f"{count}x{width}")
            megabytes = harness.extra_memory(run) / 1e6
            report.add(OURS, case, "extra memory", "MB", [megabytes])
            report.add_value(
                f"MB of extra memory, {name}, {case.dtype}, {case.shape}",
                megabytes,
                megabytes,
                megabytes,
                MEGABYTES_BAR,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=20).parse_args(argv)
    report = harness.start(NAME, "Statistics of evaluations", options, argv)
    memory(*((1000, 64) if options.smoke else (1_000_000, 512)), report)
    accuracy(*((1000, 64) if options.smoke else (100_000, 512)), report)
    bootstrap(*((200, 100) if options.smoke else (10_000, 10_000)), report)
    report.note(
        "extra memory: growth of the process at most while the operation ran once, its result included. Two "
        "resamples: each further one takes some bytes."
    )
    report.note(
        "error: against float64 arithmetic on the same embeddings before they were rounded to the dtype; of "
        "similarity, the largest over all pairs."
    )
    report.note("numpy and, where it is installed, scipy draw 100 resamples at a time: all at once do not fit memory.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
