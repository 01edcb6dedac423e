"""The Knowledge Preservation Score and the statistics it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cat_rs._native import _core, stream_of
from cat_rs.errors import CatRsError, DtypeError, InvalidValueError

__all__ = [
    "KpsResult",
    "bootstrap_difference",
    "bootstrap_interval",
    "cross_similarity",
    "harmonic_mean",
    "kps",
    "kps_difference",
    "similarity",
]

Array = TypeVar("Array", torch.Tensor, np.ndarray)
Interval = tuple[float, float]


def _tensor(argument: str, array: torch.Tensor | np.ndarray) -> torch.Tensor:
    if not isinstance(array, torch.Tensor | np.ndarray):
        got = type(array).__name__
        raise DtypeError(f"similarity: `{argument}` must be a torch.Tensor or a numpy.ndarray, got {got}")
    if isinstance(array, np.ndarray):
        return torch.from_numpy(_viewable(array))
    return array.detach()


def _viewable(array: np.ndarray) -> np.ndarray:
    """The array, or another at the same memory, that PyTorch can view; a copy where its strides rule that out."""
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    return array if array.flags.writeable else np.asarray(_Writable(array))


class _Writable:
    """A read-only array said to be writable: PyTorch warns of the others, also where it only reads."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        # Whose memory it is.
        self.array = array


def _vector(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.ascontiguousarray(values, dtype=np.float64).reshape(-1)


def _clusters(op: str, argument: str, clusters: Any) -> np.ndarray | None:
    if clusters is None:
        return None
    numbers = np.asarray(clusters)
    if numbers.dtype.kind not in "iu":
        raise DtypeError(f"{op}: `{argument}` must be integers, got {numbers.dtype}")
    return np.ascontiguousarray(numbers, dtype=np.int64).reshape(-1)


def _like(result: torch.Tensor, *inputs: torch.Tensor | np.ndarray) -> Any:
    return result.numpy() if all(isinstance(array, np.ndarray) for array in inputs) else result


def similarity(a: Array, b: Array) -> Array:
    """s(a_i, b_i) = (1 + cos(a_i, b_i)) / 2, in [0, 1], in one pass over both.

    The mapping to [0, 1] is that of the CAT authors' evaluation code. Embeddings are read where they are, whatever
    their strides; only a numpy array with negative strides is copied.

    Args:
        a: Embeddings, [N, D]; torch (float32, float64, bfloat16, float16, on the CPU or on CUDA) or numpy. On CUDA the
            call waits for the values.
        b: Embeddings of the same shape.

    Returns:
        [N], float32, or float64 if an input is; numpy if both inputs are.

    Raises:
        ShapeError, DtypeError, DeviceError: Naming the argument, what was expected and what came.
        InvalidValueError: A row is zero or not finite; the message names it.
    """
    first = _tensor("a", a)
    return _like(_core.paired_similarity(first, _tensor("b", b), stream_of(first)), a, b)


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
    first = _tensor("a", a)
    return _like(_core.cross_similarity(first, _tensor("b", b), reduce, stream_of(first)), a, b)


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
        [(_vector(values), _clusters(op, "clusters", clusters))],
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
        As :func:`bootstrap_interval`.
    """
    op = "bootstrap_difference"
    _check(op, statistic, seed)
    return _core.bootstrap_difference(
        _vector(a),
        _vector(b),
        _clusters(op, "clusters", clusters),
        harmonic=statistic == "harmonic_mean",
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


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
        a: The first adapter's similarities to the base model, as :func:`similarity` returns them: those of the pairs
            without the trigger, [N], and of those with it, [M]; at least two of each.
        b: The second adapter's, for the same prompts and seeds.
        clusters: For the two kinds, integers, [N] and [M], or None: pairs with the same number are drawn together;
            see :func:`bootstrap_interval`.
        confidence: Coverage, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling, in 0..2**64 - 1.

    Returns:
        (low, high)

    Raises:
        As :func:`bootstrap_interval`.
    """
    op = "kps_difference"
    _check(op, "harmonic_mean", seed)
    for argument, groups in (("a", a), ("b", b), ("clusters", clusters)):
        _check_two(op, argument, groups)
    return _core.kps_difference(
        [_vector(values) for values in a],
        [_vector(values) for values in b],
        [_clusters(op, f"clusters[{index}]", numbers) for index, numbers in enumerate(clusters)],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def _check(op: str, statistic: str, seed: int) -> None:
    if statistic not in ("mean", "harmonic_mean"):
        raise InvalidValueError(f"{op}: `statistic` must be 'mean' or 'harmonic_mean', got {statistic!r}")
    if not 0 <= seed < 2**64:
        raise InvalidValueError(f"{op}: `seed` must be in 0..2**64 - 1, got {seed}")


def _check_two(op: str, argument: str, groups: Sequence[Any]) -> None:
    if len(groups) != 2:
        expected = "two groups, without and with the trigger"
        raise InvalidValueError(f"{op}: `{argument}` must be {expected}, got {len(groups)}")


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
            number, such as those of one prompt, are resampled together; see :func:`bootstrap_interval`.
        resamples: Bootstrap samples.
        seed: Of the resampling, in 0..2**64 - 1.

    Raises:
        As :func:`similarity` and :func:`bootstrap_interval`; a single pair is an InvalidValueError.
    """
    _check_two("kps", "clusters", clusters)
    parts = (
        ("no_trigger", base_no_trigger, adapted_no_trigger, clusters[0]),
        ("trigger", base_trigger, adapted_trigger, clusters[1]),
    )
    groups, means, intervals = [], [], []
    for kind, base, adapted, numbers in parts:
        try:
            values = _vector(similarity(base, adapted))
            intervals.append(
                bootstrap_interval(values, "harmonic_mean", clusters=numbers, resamples=resamples, seed=seed)
            )
        except CatRsError as error:
            raise type(error)(f"kps of base_{kind} (a) and adapted_{kind} (b): {error}") from error
        means.append(harmonic_mean(values))
        groups.append((values, _clusters("kps", "clusters", numbers)))
    interval = _core.bootstrap_interval(groups, harmonic=True, confidence=0.95, resamples=resamples, seed=seed)
    ups, tps = means
    return KpsResult(harmonic_mean(means), ups, tps, interval, *intervals)
