"""Harmonic means, and bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cat_rs._native import _core
from cat_rs.arguments import check, check_memory, refusing
from cat_rs.errors import DtypeError

__all__ = [
    "Interval",
    "bootstrap_difference",
    "bootstrap_interval",
    "bootstrap_joined",
    "bootstrap_joined_difference",
    "harmonic_mean",
    "vector",
]

Interval = tuple[float, float]

_NUMBERS = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def vector(op: str, argument: str, values: Any) -> np.ndarray:
    """Numbers as the kernels take them: float64, [N], on the CPU."""
    with refusing(op, argument, "numbers", values):
        check_memory(op, argument, values)
        if isinstance(values, torch.Tensor):
            if values.dtype not in _NUMBERS:  # PyTorch does not survive to convert some others
                raise DtypeError(f"{op}: `{argument}` must be numbers, got {values.dtype}")
            values = values.detach().to("cpu", torch.float64).numpy()
        return np.ascontiguousarray(values, dtype=np.float64).reshape(-1)


def harmonic_mean(values: Any) -> float:
    """n / sum(1 / v_i), in float64; 0 where a value is 0.

    Args:
        values: Numbers >= 0: torch, numpy or a sequence.

    Raises:
        InvalidValueError: No values, or one that is negative or not finite; the message names it.
    """
    return _core.harmonic_mean(vector("harmonic_mean", "values", values))


def bootstrap_interval(
    values: Any,
    statistic: str = "mean",
    *,
    clusters: Any = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A percentile bootstrap confidence interval; the same on any number of threads.

    Values that are not independent, such as those of several seeds of one prompt, belong to one cluster: whole
    clusters are then drawn with replacement, as many as there are, and the statistic is that of all values drawn.
    Of independent values it would make the interval too narrow.

    Args:
        values: Numbers, [N]: torch, numpy or a sequence; at least two.
        statistic: "mean" or "harmonic_mean".
        clusters: Integers, [N]: values with the same number form a cluster; at least two clusters. Each value is one
            of its own if None.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling, in 0..2**64 - 1.

    Returns:
        (low, high)

    Raises:
        InvalidValueError: Naming the argument, what was expected and what came.
        DtypeError: ``clusters`` are not integers.
    """
    op = "bootstrap_interval"
    _check(op, statistic, seed)
    return _core.bootstrap_interval(
        [(vector(op, "values", values), _clusters(op, "clusters", clusters))],
        harmonic=statistic == "harmonic_mean",
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_difference(
    a: Any,
    b: Any,
    statistic: str = "mean",
    *,
    clusters: Any = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A percentile bootstrap confidence interval of statistic(b) - statistic(a) over paired values.

    Each resample draws the same indices of both, so that what a pair has in common, such as its prompt and seed,
    cancels: the interval is that of a paired comparison.

    Args:
        a: Numbers, [N]: torch, numpy or a sequence; at least two.
        b: Numbers, [N]; ``b[i]`` is paired with ``a[i]``.
        statistic: "mean" or "harmonic_mean".
        clusters: Integers, [N]: pairs with the same number are drawn together; see :func:`bootstrap_interval`.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling, in 0..2**64 - 1.

    Returns:
        (low, high)

    Raises:
        DtypeError, InvalidValueError, ShapeError: As :func:`bootstrap_interval`.
    """
    op = "bootstrap_difference"
    _check(op, statistic, seed)
    return _core.bootstrap_difference(
        vector(op, "a", a),
        vector(op, "b", b),
        _clusters(op, "clusters", clusters),
        harmonic=statistic == "harmonic_mean",
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_joined(groups: Sequence[tuple[Any, Any]], *, resamples: int, seed: int) -> Interval:
    """The 95 % interval of the harmonic mean of the harmonic means of groups (values, clusters), resampled apart."""
    op = "bootstrap_interval"
    return _core.bootstrap_interval(
        [(vector(op, "values", values), _clusters(op, "clusters", clusters)) for values, clusters in groups],
        harmonic=True,
        confidence=0.95,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_joined_difference(
    op: str, a: Sequence[Any], b: Sequence[Any], clusters: Sequence[Any], *, seed: int, **settings: Any
) -> Interval:
    """As :func:`bootstrap_difference`, of the harmonic mean of two groups' harmonic means; ``op`` is for errors."""
    _check(op, "harmonic_mean", seed)
    numbers = [_clusters(op, f"clusters[{index}]", group) for index, group in enumerate(clusters)]
    first, second = (
        [vector(op, f"{name}[{index}]", values) for index, values in enumerate(groups)]
        for name, groups in (("a", a), ("b", b))
    )
    return _core.kps_difference(first, second, numbers, seed=seed, **settings)


def _clusters(op: str, argument: str, clusters: Any) -> np.ndarray | None:
    if clusters is None:
        return None
    with refusing(op, argument, "integers", clusters):
        check_memory(op, argument, clusters)
        numbers = np.asarray(clusters)
    if numbers.dtype.kind not in "iu":
        raise DtypeError(f"{op}: `{argument}` must be integers, got {numbers.dtype}")
    return np.ascontiguousarray(numbers, dtype=np.int64).reshape(-1)


def _check(op: str, statistic: str, seed: int) -> None:
    check(op, "statistic", statistic, "'mean' or 'harmonic_mean'", lambda name: name in ("mean", "harmonic_mean"))
    check(op, "seed", seed, "in 0..2**64 - 1", lambda seed: 0 <= seed < 2**64)
