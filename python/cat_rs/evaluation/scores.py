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
from cat_rs.evaluation.measures import (
    MEASURES,
    Comparison,
    Interval,
    PromptScores,
    Scores,
    Statistic,
    prompt_values,
)
from cat_rs.ops.similarity import cross_similarity, similarity
from cat_rs.ops.statistics import bootstrap_difference, bootstrap_interval, harmonic_mean
from cat_rs.preservation_score import kps, kps_difference

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]
Columns = dict[str, Values]
"""Field of `PromptScores` -> its values, [P, S], of diversity [P, 1]; without those that do not apply."""

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


def score_model(
    name: str, model: EmbeddedModel, references: References, base: EmbeddedModel | None = None
) -> tuple[Scores, tuple[PromptScores, ...]]:
    """Score a model as a whole and prompt by prompt.

    Args:
        name: What the prompts' scores call it.
        model: Its pictures.
        references: What the pictures are compared with.
        base: The base model's pictures for the same prompts and seeds; None for the base model itself.
    """
    trigger = _own_columns(model.trigger, references.trigger_texts)
    trigger["identity"] = concept_cosines(model.trigger, references)
    no_trigger = _own_columns(model.no_trigger, references.no_trigger_texts)
    if base is None:
        scores = _summary(trigger, no_trigger)
    else:
        trigger |= _compared_columns(base.trigger, model.trigger)
        no_trigger |= _compared_columns(base.no_trigger, model.no_trigger)
        scores = replace(
            _summary(trigger, no_trigger),
            kps=_kps(base, model),
            diversity_retained=ratio_of(diversity(model.no_trigger), diversity(base.no_trigger)),
        )
    rows = _prompt_rows(name, True, model.trigger, trigger) + _prompt_rows(name, False, model.no_trigger, no_trigger)
    return scores, rows


def score_other_seed(base: EmbeddedModel) -> Scores | None:
    """Score the base model against itself with other noise, over every pair of seeds; None for a single seed."""
    if base.no_trigger.seed_count < 2:
        return None
    left, right = (
        EmbeddedModel(_picked(base.trigger, side), _picked(base.no_trigger, side)) for side in ("left", "right")
    )
    trigger = _compared_columns(left.trigger, right.trigger)
    no_trigger = _compared_columns(left.no_trigger, right.no_trigger)
    return replace(_summary(trigger, no_trigger), kps=_kps(left, right))


def score_kind(
    name: str, pictures: Embedded, texts: torch.Tensor | None = None, base: Embedded | None = None
) -> tuple[Scores, tuple[PromptScores, ...]]:
    """Score a model on prompts of one kind as a whole and prompt by prompt, by the measures without the trigger.

    Args:
        name: What the prompts' scores call it.
        pictures: Its pictures.
        texts: [P, D], embeddings of what the prompts ask for; None leaves prompt similarity out.
        base: The base model's pictures for the same prompts and seeds; None for the base model itself.
    """
    columns = _own_columns(pictures, texts)
    if base is not None:
        columns |= _compared_columns(base, pictures)
    scores = _summary({}, columns)
    if base is not None:
        scores = replace(scores, diversity_retained=ratio_of(diversity(pictures), diversity(base)))
    return scores, _prompt_rows(name, False, pictures, columns)


def score_kind_other_seed(base: Embedded) -> Scores | None:
    """Score the base model on prompts of one kind against itself with other noise; None for a single seed."""
    if base.seed_count < 2:
        return None
    return _summary({}, _compared_columns(_picked(base, "left"), _picked(base, "right")))


def all_kinds(pictures: Sequence[Embedded]) -> Embedded:
    """Return the pictures of several kinds of prompts as those of one."""
    return Embedded(
        tuple(prompt for each in pictures for prompt in each.prompts),
        pictures[0].seed_count,
        torch.cat([each.embeddings for each in pictures]),
        tuple(image for each in pictures for image in each.images),
        torch.cat([each.latents for each in pictures]),
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

    def paired(column: str, trigger: bool | None) -> Paired:
        """The values of both, and of which prompt each pair is."""
        sides: tuple[list[float], list[float]] = [], []
        of_prompts: list[int] = []
        for number, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=True)):
            if row_a.trigger is not trigger:
                continue
            values = [prompt_values(row, column) for row in (row_a, row_b)]
            if len(values[0]) != len(values[1]):
                raise EvaluationInputError(
                    f"compare: expected as many values of {column} of {a!r} as of {b!r} for {row_a.prompt!r}, "
                    f"got {len(values[0])} and {len(values[1])}"
                )
            for side, own in zip(sides, values, strict=True):
                side.extend(own)
            of_prompts.extend([number] * len(values[0]))
        return Paired(np.array(sides[0]), np.array(sides[1]), np.array(of_prompts, dtype=np.int64))

    differences = {}
    for name, measure in MEASURES.items():
        if measure.statistic is not None:
            pairs = paired(measure.column, measure.trigger)
            if len(pairs.a):
                difference = paired_interval(pairs, measure.statistic)
                differences[name] = difference.mapped(-1.0, 0.0) if measure.complement else difference
    no_trigger, trigger = paired("similarity", False), paired("similarity", True)
    if len(no_trigger.a) and len(trigger.a):
        differences["kps"] = paired_kps_interval(no_trigger, trigger)
    return Comparison(a, b, **differences)


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
    difference = _statistic(pairs.b, statistic) - _statistic(pairs.a, statistic)
    if len(pairs.a) == 1:
        return Interval(difference, *_UNKNOWN)
    return Interval(difference, *bootstrap_difference(pairs.a, pairs.b, statistic, clusters=_clusters(pairs.prompts)))


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
    """Return s between pictures with the same number; [P, S]."""
    return by_prompt(similarity(base.embeddings, other.embeddings), base)


def concept_cosines(pictures: Embedded, references: References) -> Values:
    """Return the mean cosine of each picture to the concept's pictures; [P, S]."""
    similarities = cross_similarity(pictures.embeddings, references.concept, reduce="mean")
    return 2.0 * by_prompt(similarities, pictures) - 1.0


def text_cosines(pictures: Embedded, texts: torch.Tensor) -> Values:
    """Return the cosine of each picture to its prompt; [P, S]."""
    of_pictures = texts.repeat_interleave(pictures.seed_count, dim=0)
    return 2.0 * by_prompt(similarity(pictures.embeddings, of_pictures), pictures) - 1.0


def diversity(pictures: Embedded) -> Values | None:
    """Return for each prompt the mean 1 - cosine over the pairs of its pictures; [P, 1], or None for one seed."""
    if pictures.seed_count < 2:
        return None
    pairs = paired_similarity(_picked(pictures, "left"), _picked(pictures, "right"))
    return (2.0 - 2.0 * pairs).mean(axis=1, keepdims=True)


def pixel_rmse(base: Embedded, other: Embedded) -> Values:
    """Return the root mean squared difference of the colours in [0, 1]; [P, S]."""
    pairs = zip(base.images, other.images, strict=True)
    squares = [np.mean(np.square(_colours(left) - _colours(right))) for left, right in pairs]
    return by_prompt(np.sqrt(squares), base)


def latent_rmse(base: Embedded, other: Embedded) -> Values:
    """Return the root mean squared difference of the final latents; [P, S]."""
    difference = (base.latents.double() - other.latents.double()).flatten(start_dim=1)
    return by_prompt(difference.square().mean(dim=1).sqrt(), base)


def _own_columns(pictures: Embedded, texts: torch.Tensor | None) -> Columns:
    """Return what needs no comparison with another model."""
    columns = {
        "prompt_similarity": None if texts is None else text_cosines(pictures, texts),
        "diversity": diversity(pictures),
    }
    return {name: values for name, values in columns.items() if values is not None}


def _compared_columns(base: Embedded, other: Embedded) -> Columns:
    """Return how close pictures are to the base model's."""
    return {
        "similarity": paired_similarity(base, other),
        "pixel_rmse": pixel_rmse(base, other),
        "latent_rmse": latent_rmse(base, other),
    }


def _summary(trigger: Columns, no_trigger: Columns) -> Scores:
    """Summarize every column as the table of measures says."""
    scores = {}
    for name, measure in MEASURES.items():
        values = (trigger if measure.trigger else no_trigger).get(measure.column)
        if measure.statistic is not None and values is not None:
            interval = interval_of(values, measure.statistic)
            scores[name] = interval.mapped(-1.0, 1.0) if measure.complement else interval
    return Scores(**scores)


def _kps(base: EmbeddedModel, other: EmbeddedModel) -> Interval:
    """Return KPS with its interval, of which both kinds of prompts are resampled."""
    pairs = ((base.no_trigger, other.no_trigger), (base.trigger, other.trigger))
    similarities = [paired_similarity(left, right) for left, right in pairs]
    value = harmonic_mean([harmonic_mean(values) for values in similarities])
    if min(values.size for values in similarities) == 1:
        return Interval(value, *_UNKNOWN)
    embeddings = (pictures.embeddings for pair in pairs for pictures in pair)
    clusters = (_prompt_clusters(similarities[0]), _prompt_clusters(similarities[1]))
    return Interval(value, *kps(*embeddings, clusters=clusters).kps_interval)


def _prompt_rows(name: str, trigger: bool, pictures: Embedded, columns: Columns) -> tuple[PromptScores, ...]:
    rows = []
    for index, prompt in enumerate(pictures.prompts):
        values = {column: tuple(of_prompts[index].tolist()) for column, of_prompts in columns.items()}
        (own_diversity,) = values.pop("diversity", (None,))
        rows.append(PromptScores(name, prompt, trigger, diversity=own_diversity, **values))
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


def interval_of(values: Values, statistic: Statistic = "mean") -> Interval:
    """Return the statistic of values [P, K] and its interval; a single value has no bounds."""
    value = _statistic(values.ravel(), statistic)
    if values.size == 1:
        return Interval(value, *_UNKNOWN)
    return Interval(value, *bootstrap_interval(values, statistic, clusters=_prompt_clusters(values)))


def _statistic(values: Values, statistic: Statistic) -> float:
    return harmonic_mean(values) if statistic == "harmonic_mean" else float(values.mean())


def _prompt_clusters(values: Values) -> Numbers | None:
    """Return what to resample together of values [P, K]."""
    return _clusters(np.repeat(np.arange(len(values)), values.shape[1]))


def _clusters(prompts: Numbers) -> Numbers | None:
    """Return what to resample together: the pictures of a prompt, which are alike; of a single prompt, each alone."""
    return prompts if (prompts != prompts[0]).any() else None


def ratio_of(numerator: Values | None, denominator: Values | None) -> Interval | None:
    """Return the ratio R = a / b of the means of paired values [P, K]; None where there is none or b is nothing.

    Its interval is the bootstrap interval of the mean of R + (a_i - R b_i) / b, the ratio's linearization: the mean
    is exactly R, and no resample divides by a small number.
    """
    if numerator is None or denominator is None or denominator.mean() <= _NO_DIVERSITY:
        return None
    ratio = numerator.mean() / denominator.mean()
    return interval_of(ratio + (numerator - ratio * denominator) / denominator.mean())


def _colours(image: Image.Image) -> Values:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0


def by_prompt(values: torch.Tensor | NDArray[np.floating], pictures: Embedded) -> Values:
    return np.asarray(values, dtype=np.float64).reshape(len(pictures.prompts), pictures.seed_count)
