"""Scores against plain float64 NumPy definitions, on random embeddings."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cat_rs.evaluation import Interval, Scores
from cat_rs.evaluation.scores import (
    Embedded,
    EmbeddedModel,
    References,
    all_kinds,
    ratio_of,
    score_kind,
    score_kind_other_seed,
    score_model,
    score_other_seed,
)

from .conftest import noise_picture

PROMPTS, SEEDS, WIDTH = 3, 4, 8
TOLERANCE = 1e-6

Array = NDArray[np.float64]


def random_pictures(number: int, seeds: int = SEEDS) -> Embedded:
    generator = torch.Generator().manual_seed(number)
    count = PROMPTS * seeds
    return Embedded(
        prompts=tuple(f"prompt {index}" for index in range(PROMPTS)),
        seed_count=seeds,
        # Off-centre, as CLIP's embeddings are: harmonic means are then far from 0.
        embeddings=torch.randn(count, WIDTH, generator=generator) + 1.0,
        images=tuple(noise_picture(1000 * number + index) for index in range(count)),
        latents=torch.randn(count, 4, 2, 2, generator=generator),
    )


def random_model(number: int, seeds: int = SEEDS) -> EmbeddedModel:
    return EmbeddedModel(random_pictures(2 * number, seeds), random_pictures(2 * number + 1, seeds))


def random_references() -> References:
    generator = torch.Generator().manual_seed(99)
    concept, trigger, no_trigger = (torch.randn(PROMPTS, WIDTH, generator=generator) for _ in range(3))
    return References(concept, trigger, no_trigger)


def score_base(model: EmbeddedModel, references: References) -> Scores:
    return score_model("base", model, references)[0]


def score_adapter(base: EmbeddedModel, adapted: EmbeddedModel, references: References) -> Scores:
    return score_model("mine", adapted, references, base)[0]


def cosines(left: torch.Tensor, right: torch.Tensor) -> Array:
    """All cosines between the rows of two matrices."""
    a, b = left.double().numpy(), right.double().numpy()
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None, :]


def harmonic(values: Array) -> float:
    return float(len(values) / np.sum(1.0 / values))


def of_own_prompt(pictures: Embedded, texts: torch.Tensor) -> Array:
    return np.array([cosines(pictures.embeddings, texts)[n, n // SEEDS] for n in range(PROMPTS * SEEDS)])


def spread(pictures: Embedded) -> Array:
    """Mean 1 - cosine over the pairs of each prompt."""
    all_cosines = cosines(pictures.embeddings, pictures.embeddings)
    return np.array(
        [
            np.mean(
                [1 - all_cosines[p * SEEDS + i, p * SEEDS + j] for i, j in itertools.combinations(range(SEEDS), 2)]
            )
            for p in range(PROMPTS)
        ]
    )


def value(interval: Interval | None) -> float:
    assert interval is not None
    assert interval.low <= interval.value <= interval.high
    return interval.value


def repeated(model: EmbeddedModel, seeds: int) -> EmbeddedModel:
    """A model that draws the same picture for every seed."""

    def grid(pictures: Embedded) -> Embedded:
        numbers = np.repeat(np.arange(len(pictures.prompts)), seeds)
        images = tuple(pictures.images[number] for number in numbers)
        return Embedded(pictures.prompts, seeds, pictures.embeddings[numbers], images, pictures.latents[numbers])

    return EmbeddedModel(grid(model.trigger), grid(model.no_trigger))


def test_preservation_is_as_defined() -> None:
    base, adapted = random_model(0), random_model(1)
    scores = score_adapter(base, adapted, random_references())
    cos_plain = np.diag(cosines(base.no_trigger.embeddings, adapted.no_trigger.embeddings))
    cos_trigger = np.diag(cosines(base.trigger.embeddings, adapted.trigger.embeddings))
    ups, tps = harmonic((1 + cos_plain) / 2), harmonic((1 + cos_trigger) / 2)
    assert value(scores.ups) == pytest.approx(ups, abs=TOLERANCE)
    assert value(scores.tps) == pytest.approx(tps, abs=TOLERANCE)
    assert value(scores.kps) == pytest.approx(harmonic(np.array([ups, tps])), abs=TOLERANCE)
    assert value(scores.drift) == pytest.approx((1 - cos_plain.mean()) / 2, abs=TOLERANCE)


def test_intervals_resample_prompts() -> None:
    """All pictures of a prompt are one: more of them are no more evidence."""
    base, adapted = random_model(0, seeds=1), random_model(1, seeds=1)
    references = random_references()
    once = score_adapter(base, adapted, references)
    often = score_adapter(*(repeated(model, 4) for model in (base, adapted)), references)
    for name in ("kps", "ups", "tps", "drift", "identity", "prompt_similarity", "pixel_rmse", "latent_rmse"):
        few, many = getattr(once, name), getattr(often, name)
        assert many.value == pytest.approx(few.value, abs=TOLERANCE), name
        assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1), name


def test_distances_are_as_defined() -> None:
    base, adapted = random_model(0), random_model(1)
    scores = score_adapter(base, adapted, random_references())
    pixels = [
        np.sqrt(np.mean(((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) / 255) ** 2))
        for a, b in zip(base.no_trigger.images, adapted.no_trigger.images, strict=True)
    ]
    latents = (base.no_trigger.latents - adapted.no_trigger.latents).double().numpy().reshape(PROMPTS * SEEDS, -1)
    assert value(scores.pixel_rmse) == pytest.approx(np.mean(pixels), abs=TOLERANCE)
    assert value(scores.latent_rmse) == pytest.approx(np.sqrt((latents**2).mean(axis=1)).mean(), abs=TOLERANCE)


def test_identity_and_prompt_similarity_are_mean_cosines() -> None:
    model, references = random_model(1), random_references()
    scores = score_base(model, references)
    assert references.trigger_texts is not None
    assert references.no_trigger_texts is not None
    identity = cosines(model.trigger.embeddings, references.concept).mean()
    trigger = of_own_prompt(model.trigger, references.trigger_texts).mean()
    no_trigger = of_own_prompt(model.no_trigger, references.no_trigger_texts).mean()
    assert value(scores.identity) == pytest.approx(identity, abs=TOLERANCE)
    assert value(scores.prompt_similarity) == pytest.approx(trigger, abs=TOLERANCE)
    assert value(scores.prompt_similarity_no_trigger) == pytest.approx(no_trigger, abs=TOLERANCE)


def test_diversity_and_its_ratio_to_the_base() -> None:
    base, adapted = random_model(0), random_model(1)
    scores = score_adapter(base, adapted, random_references())
    own, reference = spread(adapted.no_trigger), spread(base.no_trigger)
    assert value(scores.diversity) == pytest.approx(own.mean(), abs=TOLERANCE)
    assert value(scores.diversity_retained) == pytest.approx(own.mean() / reference.mean(), abs=TOLERANCE)


def test_other_seed_runs_over_every_pair_of_seeds() -> None:
    base = random_model(0)
    scores = score_other_seed(base)
    assert scores is not None
    all_cosines = cosines(base.no_trigger.embeddings, base.no_trigger.embeddings)
    pairs = [
        all_cosines[prompt * SEEDS + i, prompt * SEEDS + j]
        for prompt in range(PROMPTS)
        for i, j in itertools.combinations(range(SEEDS), 2)
    ]
    assert value(scores.ups) == pytest.approx(harmonic((1 + np.array(pairs)) / 2), abs=TOLERANCE)
    assert value(scores.drift) == pytest.approx((1 - np.mean(pairs)) / 2, abs=TOLERANCE)
    assert scores.identity is None


def test_unchanged_model_preserves_everything() -> None:
    base = random_model(0)
    scores = score_adapter(base, base, random_references())
    assert value(scores.kps) == pytest.approx(1, abs=TOLERANCE)
    assert value(scores.drift) == pytest.approx(0, abs=TOLERANCE)
    assert value(scores.diversity_retained) == pytest.approx(1, abs=TOLERANCE)
    assert (value(scores.pixel_rmse), value(scores.latent_rmse)) == (0, 0)


def test_single_seed_has_no_diversity_and_no_reference() -> None:
    base, adapted = random_model(0, seeds=1), random_model(1, seeds=1)
    scores = score_adapter(base, adapted, random_references())
    assert (scores.diversity, scores.diversity_retained, score_other_seed(base)) == (None, None, None)
    assert value(scores.ups) < 1


def test_single_pair_has_no_interval() -> None:
    def one(number: int) -> Embedded:
        pictures = random_pictures(number, seeds=1)
        return Embedded(pictures.prompts[:1], 1, pictures.embeddings[:1], pictures.images[:1], pictures.latents[:1])

    base, adapted = EmbeddedModel(one(0), one(1)), EmbeddedModel(one(2), one(3))
    scores = score_adapter(base, adapted, References(random_references().concept, None, None))
    for interval in (scores.ups, scores.tps, scores.drift, scores.identity, scores.pixel_rmse):
        assert interval is not None
        assert np.isnan([interval.low, interval.high]).all()


def test_a_ratios_interval_has_the_noise_of_both() -> None:
    generator = np.random.default_rng(3)
    base = 0.2 + 0.1 * generator.random((400, 1))
    ratio = ratio_of(0.5 * base, base)
    # Half as much for each prompt: whichever prompts are drawn, the ratio is a half.
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5,) * 3)
    own = 0.1 + 0.05 * generator.random((400, 1))
    drawn = generator.integers(400, size=(20_000, 400))
    resampled = own.ravel()[drawn].mean(axis=1) / base.ravel()[drawn].mean(axis=1)
    ratio = ratio_of(own, base)
    assert ratio is not None
    spread = float(resampled.std())
    assert (ratio.low, ratio.high) == pytest.approx(np.quantile(resampled, (0.025, 0.975)), abs=0.15 * spread)
    # With the base model's diversity taken for exact, it would be two thirds as wide.
    alone = ratio_of(own, np.full_like(base, base.mean()))
    assert alone is not None
    assert alone.high - alone.low < 0.8 * (ratio.high - ratio.low)


def test_collapsed_base_has_no_ratio() -> None:
    base, adapted = random_model(0), random_model(1)
    same = torch.ones_like(base.no_trigger.embeddings)
    plain = base.no_trigger
    collapsed = EmbeddedModel(base.trigger, Embedded(plain.prompts, SEEDS, same, plain.images, plain.latents))
    assert score_adapter(collapsed, adapted, random_references()).diversity_retained is None


def test_encoder_without_text_side_gives_no_prompt_similarity() -> None:
    references = References(random_references().concept, None, None)
    scores = score_base(random_model(0), references)
    assert (scores.prompt_similarity, scores.prompt_similarity_no_trigger) == (None, None)
    assert scores.identity is not None


def test_prompt_rows_add_up_to_the_scores() -> None:
    base, adapted, references = random_model(0), random_model(1), random_references()
    rows = score_model("mine", adapted, references, base)[1]
    scores = score_adapter(base, adapted, references)
    trigger, no_trigger = [row for row in rows if row.trigger], [row for row in rows if not row.trigger]
    assert [row.prompt for row in trigger] == list(adapted.trigger.prompts)
    assert {len(row.similarity) for row in rows} == {SEEDS}
    similarities = np.array([row.similarity for row in no_trigger]).ravel()
    assert harmonic(similarities) == pytest.approx(value(scores.ups), abs=TOLERANCE)
    assert np.mean([row.identity for row in trigger]) == pytest.approx(value(scores.identity), abs=TOLERANCE)
    assert np.mean([row.diversity for row in no_trigger]) == pytest.approx(value(scores.diversity), abs=TOLERANCE)
    assert all(row.identity == () for row in no_trigger)


def test_prompt_rows_of_the_base_have_no_comparison() -> None:
    base = random_model(0)
    rows = score_model("base", base, random_references())[1]
    assert all(row.similarity == row.pixel_rmse == row.latent_rmse == () for row in rows)
    assert all(len(row.prompt_similarity) == SEEDS for row in rows)


def test_prompts_of_one_kind_are_scored_as_those_without_the_trigger() -> None:
    base, adapted, references = random_model(0), random_model(1), random_references()
    whole, all_rows = score_model("mine", adapted, references, base)
    kind, rows = score_kind("mine", adapted.no_trigger, references.no_trigger_texts, base.no_trigger)
    with_trigger = {"kps": None, "tps": None, "identity": None, "prompt_similarity": None}
    assert kind == replace(whole, **with_trigger)
    assert rows == tuple(row for row in all_rows if not row.trigger)
    floor = score_other_seed(base)
    assert floor is not None
    assert score_kind_other_seed(base.no_trigger) == replace(floor, **with_trigger)
    assert score_kind_other_seed(random_pictures(0, seeds=2)) is not None
    assert score_kind_other_seed(random_pictures(0, seeds=1)) is None


def test_kinds_are_joined_prompt_by_prompt() -> None:
    first, second = random_pictures(0), random_pictures(1)
    both = all_kinds([first, second])
    assert both.prompts == first.prompts + second.prompts
    one, other = (score_kind("x", each, None, first)[1] for each in (first, second))
    assert score_kind("x", both, None, all_kinds([first, first]))[1] == one + other
