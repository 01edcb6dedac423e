"""From embeddings, pictures and latents to scores.

Letters: P prompts, S seeds, N = P * S pictures of one model in the order of `PictureGrid`, C concept pictures,
D embedding width. A cosine is 2 s - 1, with s from `cat_rs.similarity`.

Intervals resample prompts, each with all of its pictures: those of one prompt are alike, and more of them are not as
much evidence as more prompts. With a single prompt they resample its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cat_rs.evaluation.errors import EvaluationInputError
from cat_rs.evaluation.result import Comparison, Interval, PromptScores, Scores
from cat_rs.ops.similarity import cross_similarity, similarity
from cat_rs.ops.statistics import bootstrap_difference, bootstrap_interval, harmonic_mean
from cat_rs.preservation_score import kps, kps_difference

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]
Statistic = Literal["mean", "harmonic_mean"]

# Rounding of float32 embeddings: a mean 1 - cosine below it is that of equal pictures.
_NO_DIVERSITY = 1e-6
_UNKNOWN = (math.nan, math.nan)


@dataclass(frozen=True)
class Embedded:
    """The pictures of one model for P prompts of one kind, as the scores need them.

    Attributes:
        prompts: The P prompts.
        seed_count: S.
        embeddings: [N, D].
        images: N pictures.
        latents: [N, ...].
    """

    prompts: tuple[str, ...]
    seed_count: int
    embeddings: torch.Tensor
    images: tuple[Image.Image, ...]
    latents: torch.Tensor


@dataclass(frozen=True)
class EmbeddedModel:
    """Everything of one model."""

    trigger: Embedded
    no_trigger: Embedded


@dataclass(frozen=True)
class References:
    """What pictures are compared with.

    Attributes:
        concept: [C, D], embeddings of the concept's pictures.
        trigger_texts: [P, D], embeddings of the prompts with the trigger, in the class word; None without a text side.
        no_trigger_texts: [P, D], embeddings of the prompts without the trigger.
    """

    concept: torch.Tensor
    trigger_texts: torch.Tensor | None
    no_trigger_texts: torch.Tensor | None


def score_base(base: EmbeddedModel, references: References) -> Scores:
    """Score the base model: what needs no comparison with another model."""
    return Scores(
        identity=_interval(concept_cosines(base.trigger, references), base.trigger.seed_count),
        prompt_similarity=_interval(text_cosines(base.trigger, references.trigger_texts), base.trigger.seed_count),
        prompt_similarity_no_trigger=_interval(
            text_cosines(base.no_trigger, references.no_trigger_texts), base.no_trigger.seed_count
        ),
        diversity=_interval(diversity(base.no_trigger)),
    )


def score_adapter(base: EmbeddedModel, adapted: EmbeddedModel, references: References) -> Scores:
    """Score an adapter: by itself, and against the base model's pictures for the same prompts and seeds."""
    own = score_base(adapted, references)
    return replace(
        _preservation(base, adapted),
        identity=own.identity,
        prompt_similarity=own.prompt_similarity,
        prompt_similarity_no_trigger=own.prompt_similarity_no_trigger,
        diversity=own.diversity,
        diversity_retained=_ratio(diversity(adapted.no_trigger), diversity(base.no_trigger)),
    )


def score_other_seed(base: EmbeddedModel) -> Scores | None:
    """Score the base model against itself with other noise, over every pair of seeds; None for a single seed."""
    if base.no_trigger.seed_count < 2:
        return None
    left, right = (
        EmbeddedModel(_picked(base.trigger, side), _picked(base.no_trigger, side)) for side in ("left", "right")
    )
    return _preservation(left, right)


def score_prompts(
    name: str, base: EmbeddedModel, model: EmbeddedModel, references: References
) -> tuple[PromptScores, ...]:
    """Score every prompt of a model; for the base model itself, without the comparison."""
    identity = concept_cosines(model.trigger, references)
    return _prompt_rows(name, True, base.trigger, model.trigger, references.trigger_texts, identity) + _prompt_rows(
        name, False, base.no_trigger, model.no_trigger, references.no_trigger_texts, np.empty(0)
    )


def compare_prompts(a: str, rows_a: Sequence[PromptScores], b: str, rows_b: Sequence[PromptScores]) -> Comparison:
    """Compare two models by the scores of the same prompts: the differences b - a.

    Args:
        a: One model's name.
        rows_a: The scores of its prompts.
        b: The other's name.
        rows_b: The scores of its prompts.

    Raises:
        EvaluationInputError: The prompts or the numbers of seeds differ.
    """
    if [(row.prompt, row.trigger) for row in rows_a] != [(row.prompt, row.trigger) for row in rows_b]:
        raise EvaluationInputError(f"compare: expected the same prompts of {a!r} and {b!r}, got others")

    def paired(measure: str, trigger: bool) -> Paired:
        """The values of both, and of which prompt each pair is."""
        sides: tuple[list[float], list[float]] = [], []
        of_prompts: list[int] = []
        for number, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=True)):
            if row_a.trigger is not trigger:
                continue
            values = [_values_of(row, measure) for row in (row_a, row_b)]
            if len(values[0]) != len(values[1]):
                raise EvaluationInputError(
                    f"compare: expected as many values of {measure} of {a!r} as of {b!r} for {row_a.prompt!r}, "
                    f"got {len(values[0])} and {len(values[1])}"
                )
            for side, own in zip(sides, values, strict=True):
                side.extend(own)
            of_prompts.extend([number] * len(values[0]))
        return Paired(np.array(sides[0]), np.array(sides[1]), np.array(of_prompts, dtype=np.int64))

    def difference(measure: str, trigger: bool, statistic: Statistic = "mean") -> Interval | None:
        pairs = paired(measure, trigger)
        return paired_interval(pairs, statistic) if len(pairs.a) else None

    no_trigger, with_trigger = paired("similarity", False), paired("similarity", True)
    similarity_change = difference("similarity", False)
    return Comparison(
        a,
        b,
        kps=paired_kps_interval(no_trigger, with_trigger) if len(no_trigger.a) and len(with_trigger.a) else None,
        ups=difference("similarity", False, "harmonic_mean"),
        tps=difference("similarity", True, "harmonic_mean"),
        # Drift is 1 - mean s.
        drift=None if similarity_change is None else similarity_change.mapped(-1.0, 0.0),
        identity=difference("identity", True),
        prompt_similarity=difference("prompt_similarity", True),
        prompt_similarity_no_trigger=difference("prompt_similarity", False),
        diversity=difference("diversity", False),
        pixel_rmse=difference("pixel_rmse", False),
        latent_rmse=difference("latent_rmse", False),
    )


class Paired(NamedTuple):
    """Values of two adapters for the same pictures.

    Attributes:
        a: Those of one, [N].
        b: Those of the other, [N].
        prompts: Numbers of the prompts, [N].
    """

    a: Values
    b: Values
    prompts: Numbers


def paired_interval(pairs: Paired, statistic: Statistic) -> Interval:
    """Return statistic(b) - statistic(a) with its 95 % interval of a paired bootstrap over the prompts."""
    a, b = (harmonic_mean(side) if statistic == "harmonic_mean" else float(side.mean()) for side in pairs[:2])
    if len(pairs.a) == 1:
        return Interval(b - a, *_UNKNOWN)
    return Interval(b - a, *bootstrap_difference(pairs.a, pairs.b, statistic, clusters=_clusters(pairs.prompts)))


def paired_kps_interval(no_trigger: Paired, trigger: Paired) -> Interval:
    """Return KPS(b) - KPS(a) with its 95 % interval of a paired bootstrap over the prompts of each kind."""
    kinds = no_trigger, trigger
    of_a, of_b = (no_trigger.a, trigger.a), (no_trigger.b, trigger.b)
    a, b = (harmonic_mean([harmonic_mean(values) for values in side]) for side in (of_a, of_b))
    if min(len(kind.a) for kind in kinds) == 1:
        return Interval(b - a, *_UNKNOWN)
    clusters = _clusters(no_trigger.prompts), _clusters(trigger.prompts)
    return Interval(b - a, *kps_difference(of_a, of_b, clusters=clusters))


def paired_similarity(base: Embedded, other: Embedded) -> Values:
    """Return s between pictures with the same number; [N]."""
    return _float64(similarity(base.embeddings, other.embeddings))


def concept_cosines(pictures: Embedded, references: References) -> Values:
    """Return the mean cosine of each picture to the concept's pictures; [N]."""
    return 2.0 * _float64(cross_similarity(pictures.embeddings, references.concept, reduce="mean")) - 1.0


def text_cosines(pictures: Embedded, texts: torch.Tensor | None) -> Values:
    """Return the cosine of each picture to its prompt; [N], or nothing without embedded texts."""
    if texts is None:
        return np.empty(0)
    return 2.0 * _float64(similarity(pictures.embeddings, texts.repeat_interleave(pictures.seed_count, dim=0))) - 1.0


def diversity(pictures: Embedded) -> Values:
    """Return for each prompt the mean 1 - cosine over the pairs of its pictures; [P], or nothing for one seed."""
    if pictures.seed_count < 2:
        return np.empty(0)
    pairs = paired_similarity(_picked(pictures, "left"), _picked(pictures, "right"))
    return _float64((2.0 - 2.0 * pairs).reshape(len(pictures.prompts), -1).mean(axis=1))


def pixel_rmse(base: Embedded, other: Embedded) -> Values:
    """Return the root mean squared difference of the colours in [0, 1]; [N]."""
    pairs = zip(base.images, other.images, strict=True)
    return np.array([_rms(_colours(left) - _colours(right)) for left, right in pairs])


def latent_rmse(base: Embedded, other: Embedded) -> Values:
    """Return the root mean squared difference of the final latents; [N]."""
    difference = (base.latents.double() - other.latents.double()).flatten(start_dim=1)
    return _float64(difference.square().mean(dim=1).sqrt())


def _preservation(base: EmbeddedModel, other: EmbeddedModel) -> Scores:
    """Score how close pictures are to the base model's."""
    no_trigger, trigger = (
        paired_similarity(left, right)
        for left, right in ((base.no_trigger, other.no_trigger), (base.trigger, other.trigger))
    )
    seeds = base.no_trigger.seed_count, base.trigger.seed_count
    ups, tps = (
        _resampled(values, "harmonic_mean", count) for values, count in zip((no_trigger, trigger), seeds, strict=True)
    )
    bounds = _UNKNOWN
    if min(len(no_trigger), len(trigger)) > 1:
        bounds = kps(
            base.no_trigger.embeddings,
            other.no_trigger.embeddings,
            base.trigger.embeddings,
            other.trigger.embeddings,
            clusters=(_prompt_numbers(no_trigger, seeds[0]), _prompt_numbers(trigger, seeds[1])),
        ).kps_interval
    return Scores(
        kps=Interval(harmonic_mean([ups.value, tps.value]), *bounds),
        ups=ups,
        tps=tps,
        # (1 - mean cosine) / 2 is 1 - mean s.
        drift=_resampled(no_trigger, "mean", seeds[0]).mapped(-1.0, 1.0),
        pixel_rmse=_interval(pixel_rmse(base.no_trigger, other.no_trigger), seeds[0]),
        latent_rmse=_interval(latent_rmse(base.no_trigger, other.no_trigger), seeds[0]),
    )


def _prompt_rows(
    name: str, trigger: bool, base: Embedded, model: Embedded, texts: torch.Tensor | None, identity: Values
) -> tuple[PromptScores, ...]:
    nothing = np.empty(0)
    compared = base is not model
    columns = {
        "similarity": paired_similarity(base, model) if compared else nothing,
        "identity": identity,
        "prompt_similarity": text_cosines(model, texts),
        "pixel_rmse": pixel_rmse(base, model) if compared else nothing,
        "latent_rmse": latent_rmse(base, model) if compared else nothing,
    }
    spread = diversity(model)
    rows = []
    for index, prompt in enumerate(model.prompts):
        mine = slice(index * model.seed_count, (index + 1) * model.seed_count)
        values = {key: tuple(column[mine].tolist()) for key, column in columns.items()}
        own_spread = float(spread[index]) if len(spread) else None
        rows.append(PromptScores(name, prompt, trigger, diversity=own_spread, **values))
    return tuple(rows)


def _picked(pictures: Embedded, side: Literal["left", "right"]) -> Embedded:
    """Return one side of all pairs of pictures that share a prompt: P * S (S - 1) / 2 pictures, prompt by prompt."""
    left, right = np.triu_indices(pictures.seed_count, k=1)
    seeds = left if side == "left" else right
    first = np.arange(len(pictures.prompts))[:, None] * pictures.seed_count
    numbers = (first + seeds[None, :]).ravel()
    return Embedded(
        pictures.prompts,
        len(seeds),
        pictures.embeddings[numbers],
        tuple(pictures.images[number] for number in numbers),
        pictures.latents[numbers],
    )


def _values_of(row: PromptScores, measure: str) -> tuple[float, ...]:
    value = getattr(row, measure)
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _interval(values: Values, seed_count: int = 1) -> Interval | None:
    """Return the mean and its interval; None where there is no value."""
    return _resampled(values, "mean", seed_count) if len(values) else None


def _resampled(values: Values, statistic: Statistic, seed_count: int) -> Interval:
    """Return the statistic and its interval, whose bounds are unknown where there is a single value to resample."""
    value = harmonic_mean(values) if statistic == "harmonic_mean" else float(values.mean())
    if len(values) == 1:
        return Interval(value, *_UNKNOWN)
    return Interval(value, *bootstrap_interval(values, statistic, clusters=_prompt_numbers(values, seed_count)))


def _prompt_numbers(values: Values, seed_count: int) -> Numbers | None:
    """Return the clusters of values that run over the seeds of one prompt after the other."""
    return _clusters(np.arange(len(values)) // seed_count) if seed_count > 1 else None


def _clusters(prompts: Numbers) -> Numbers | None:
    """Return what to resample together: the pictures of a prompt, which are alike; of a single prompt, each alone."""
    return prompts if (prompts != prompts[0]).any() else None


def _ratio(numerator: Values, denominator: Values) -> Interval | None:
    """Return the ratio R = a / b of the means of paired diversities; None where the base has none.

    Its interval is the bootstrap interval of the mean of R + (a_i - R b_i) / b, the ratio's linearization: the mean
    is exactly R, and no resample divides by a small number.
    """
    if len(denominator) == 0 or denominator.mean() <= _NO_DIVERSITY:
        return None
    ratio = numerator.mean() / denominator.mean()
    return _interval(ratio + (numerator - ratio * denominator) / denominator.mean())


def _colours(image: Image.Image) -> Values:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0


def _rms(difference: Values) -> float:
    return float(np.sqrt(np.mean(np.square(difference))))


def _float64(values: torch.Tensor | NDArray[np.floating]) -> Values:
    return np.asarray(values, dtype=np.float64)
