"""The Knowledge Preservation Score and the statistics it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cat_rs._native import _core
from cat_rs.errors import DtypeError, InvalidValueError

__all__ = ["KpsResult", "bootstrap_interval", "cross_similarity", "harmonic_mean", "kps", "similarity"]

Array = TypeVar("Array", torch.Tensor, np.ndarray)
Interval = tuple[float, float]


def _tensor(argument: str, array: torch.Tensor | np.ndarray) -> torch.Tensor:
    if not isinstance(array, torch.Tensor | np.ndarray):
        got = type(array).__name__
        raise DtypeError(f"similarity: `{argument}` must be a torch.Tensor or a numpy.ndarray, got {got}")
    if isinstance(array, np.ndarray):
        # torch can only view writable memory with positive strides.
        dense = np.ascontiguousarray(array)
        return torch.from_numpy(dense if dense.flags.writeable else dense.copy())
    return array.detach()


def _vector(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to(torch.float64).numpy()
    return np.ascontiguousarray(values, dtype=np.float64).reshape(-1)


def _like(result: torch.Tensor, *inputs: torch.Tensor | np.ndarray) -> Any:
    return result.numpy() if all(isinstance(array, np.ndarray) for array in inputs) else result


def similarity(a: Array, b: Array) -> Array:
    """s(a_i, b_i) = (1 + cos(a_i, b_i)) / 2, in [0, 1], in one pass over both.

    The mapping to [0, 1] is that of the CAT authors' evaluation code.

    Args:
        a: Embeddings, [N, D]; torch (float32, float64, bfloat16, float16, on the CPU) or numpy.
        b: Embeddings of the same shape.

    Returns:
        [N], float32, or float64 if an input is; numpy if both inputs are.

    Raises:
        ShapeError, DtypeError, DeviceError: Naming the argument, what was expected and what came.
        InvalidValueError: A row is zero or not finite; the message names it.
    """
    return _like(_core.paired_similarity(_tensor("a", a), _tensor("b", b)), a, b)


def cross_similarity(a: Array, b: Array, reduce: str = "mean") -> Array:
    """The mean or maximum over j of s(a_i, b_j), for each row of ``a``; no N x M matrix is formed.

    Args:
        a: Embeddings, [N, D]; torch or numpy.
        b: Embeddings, [M, D].
        reduce: "mean" or "max".

    Returns:
        [N], float32, or float64 if an input is; numpy if both inputs are.

    Raises:
        As :func:`similarity`.
    """
    return _like(_core.cross_similarity(_tensor("a", a), _tensor("b", b), reduce), a, b)


def harmonic_mean(values: Any) -> float:
    """n / sum(1 / v_i), in float64; 0 where a value is 0.

    Args:
        values: Numbers >= 0: torch, numpy or a sequence.

    Raises:
        InvalidValueError: No values, or one that is negative or not finite; the message names it.
    """
    return _core.harmonic_mean(_vector(values))


def bootstrap_interval(
    values: Any,
    statistic: str = "mean",
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A percentile bootstrap confidence interval; the same on any number of threads.

    Args:
        values: Numbers: torch, numpy or a sequence.
        statistic: "mean" or "harmonic_mean".
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling, >= 0.

    Returns:
        (low, high)

    Raises:
        InvalidValueError: Naming the argument, what was expected and what came.
    """
    return _bootstrap([_vector(values)], statistic, confidence, resamples, seed)


def _bootstrap(groups: Sequence[np.ndarray], statistic: str, confidence: float, resamples: int, seed: int) -> Interval:
    if statistic not in ("mean", "harmonic_mean"):
        raise InvalidValueError(
            f"bootstrap_interval: `statistic` must be 'mean' or 'harmonic_mean', got {statistic!r}"
        )
    if not 0 <= seed < 2**64:
        raise InvalidValueError(f"bootstrap_interval: `seed` must be in 0..2**64 - 1, got {seed}")
    return _core.bootstrap_interval(
        list(groups),
        harmonic=statistic == "harmonic_mean",
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


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
        resamples: Bootstrap samples.
        seed: Of the resampling.

    Raises:
        As :func:`similarity`.
    """
    no_trigger = _vector(similarity(base_no_trigger, adapted_no_trigger))
    trigger = _vector(similarity(base_trigger, adapted_trigger))
    ups, tps = harmonic_mean(no_trigger), harmonic_mean(trigger)
    intervals = [
        _bootstrap(groups, "harmonic_mean", 0.95, resamples, seed)
        for groups in ([no_trigger, trigger], [no_trigger], [trigger])
    ]
    return KpsResult(harmonic_mean([ups, tps]), ups, tps, *intervals)
