"""The measures of an evaluation: the one table of them, and the records that hold their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

# The base model's name in results.
BASE = "base"

Statistic: TypeAlias = Literal["mean", "harmonic_mean"]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval; the bounds are NaN where there is only one value to resample."""

    value: float
    low: float
    high: float

    def mapped(self, scale: float, shift: float) -> Interval:
        """Return the interval of `scale * x + shift`."""
        bounds = sorted((scale * self.low + shift, scale * self.high + shift))
        return Interval(scale * self.value + shift, bounds[0], bounds[1])


@dataclass(frozen=True)
class Scores:
    """The figures of one model; None where a measure does not apply.

    s is the similarity to the base model's picture for the same prompt and seed, in [0, 1]; cosines are in [-1, 1].

    Attributes:
        kps: Harmonic mean of TPS and UPS. 1 if nothing was learned: read it beside `identity`.
        ups: Harmonic mean of s over the prompts without the trigger.
        tps: Harmonic mean of s over the prompts with the trigger.
        drift: (1 - mean cosine to the base picture) / 2, without the trigger, as PEFT's image benchmark defines it.
        identity: Mean cosine of the pictures with the trigger to the concept's pictures (DreamBooth's CLIP-I).
        prompt_similarity: Mean cosine of the pictures with the trigger to their prompts (CLIP-T). The class word
            replaces the trigger in these prompts, because the encoder does not know the trigger.
        prompt_similarity_no_trigger: The same for the prompts without the trigger.
        diversity: Mean 1 - cosine between pictures of one prompt, over seeds, without the trigger.
        diversity_retained: Diversity divided by the base model's.
        pixel_rmse: Mean root mean squared difference to the base picture, without the trigger; colours in [0, 1].
        latent_rmse: The same between the final latents. Neither depends on the encoder.
    """

    kps: Interval | None = None
    ups: Interval | None = None
    tps: Interval | None = None
    drift: Interval | None = None
    identity: Interval | None = None
    prompt_similarity: Interval | None = None
    prompt_similarity_no_trigger: Interval | None = None
    diversity: Interval | None = None
    diversity_retained: Interval | None = None
    pixel_rmse: Interval | None = None
    latent_rmse: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """Two adapters on the same prompts and seeds: figures of `b` minus those of `a`, as in `Scores`.

    Each has the interval of the difference, from resampling the prompts of both adapters together: prompts that are
    hard for both do not widen it. None where a measure does not apply.
    """

    a: str
    b: str
    kps: Interval | None = None
    ups: Interval | None = None
    tps: Interval | None = None
    drift: Interval | None = None
    identity: Interval | None = None
    prompt_similarity: Interval | None = None
    prompt_similarity_no_trigger: Interval | None = None
    diversity: Interval | None = None
    pixel_rmse: Interval | None = None
    latent_rmse: Interval | None = None


@dataclass(frozen=True)
class PromptScores:
    """The figures of one model for one prompt; tuples run over the seeds and are empty where a measure does not apply.

    Attributes:
        model: The adapter's name, or "base".
        prompt: The prompt.
        trigger: Whether the prompt holds the trigger.
        similarity: s to the base model's picture of the same seed.
        identity: Mean cosine to the concept's pictures.
        prompt_similarity: Cosine to the prompt.
        pixel_rmse: Root mean squared difference to the base picture.
        latent_rmse: The same between the final latents.
        diversity: Mean 1 - cosine between the pictures of this prompt; None for a single seed.
    """

    model: str
    prompt: str
    trigger: bool
    similarity: tuple[float, ...] = ()
    identity: tuple[float, ...] = ()
    prompt_similarity: tuple[float, ...] = ()
    pixel_rmse: tuple[float, ...] = ()
    latent_rmse: tuple[float, ...] = ()
    diversity: float | None = None


@dataclass(frozen=True)
class Measure:
    """How a field of `Scores` is computed from `PromptScores`, and what tables and pages call it.

    Attributes:
        label: Its name for readers.
        note: What it is, in a few words.
        column: The field of `PromptScores` that is summarized.
        trigger: Whether the prompts with the trigger are summarized or those without; None for both.
        statistic: The summary; None where it is not that of one column: KPS, and what is relative to the base model.
        complement: Whether the figure is 1 - the statistic.
    """

    label: str
    note: str
    column: str
    trigger: bool | None
    statistic: Statistic | None = "mean"
    complement: bool = False


MEASURES: Mapping[str, Measure] = {
    "kps": Measure("KPS", "harmonic mean of UPS and TPS", "similarity", None, None),
    "ups": Measure(
        "UPS", "similarity to the base model's pictures, without the trigger", "similarity", False, "harmonic_mean"
    ),
    "tps": Measure("TPS", "similarity to the base model's pictures", "similarity", True, "harmonic_mean"),
    # (1 - mean cosine) / 2 is 1 - mean s.
    "drift": Measure(
        "drift", "(1 - mean cosine to the base model's picture) / 2", "similarity", False, complement=True
    ),
    "identity": Measure("identity", "mean cosine to the concept's pictures, with the trigger", "identity", True),
    "prompt_similarity": Measure("CLIP-T", "mean cosine to the prompt", "prompt_similarity", True),
    "prompt_similarity_no_trigger": Measure("CLIP-T", "mean cosine to the prompt", "prompt_similarity", False),
    "diversity": Measure("diversity", "mean 1 - cosine between pictures of one prompt", "diversity", False),
    "diversity_retained": Measure("retained", "diversity as a share of the base model's", "diversity", False, None),
    "pixel_rmse": Measure(
        "pixel RMSE", "distance to the base model's pictures, without an encoder", "pixel_rmse", False
    ),
    "latent_rmse": Measure("latent RMSE", "the same between the final latents", "latent_rmse", False),
}
"""Field of `Scores`, in its order -> the measure."""

# One line for each group of measures, for plain text.
LEGEND = (
    "UPS, TPS   harmonic mean of (1 + cos) / 2 between base and adapted picture, same prompt and seed",
    "KPS        harmonic mean of UPS and TPS",
    "drift      (1 - mean cos) / 2;  pixel and latent RMSE: distances that need no encoder",
    "diversity  mean 1 - cos between pictures of one prompt;  retained: as a share of the base model's",
    "identity   mean cos to the concept's pictures (CLIP-I);  CLIP-T: mean cos to the prompt",
)

# The same at length, for a page.
MEANINGS = {
    "UPS": "How close the pictures without the trigger are to the base model's, for the same prompt and noise: "
    "the harmonic mean of (1 + cosine) / 2. 1 means that nothing changed.",
    "TPS": "The same for the prompts with the trigger, where change is wanted.",
    "KPS": "The harmonic mean of UPS and TPS, this project's reading of the Knowledge Preservation Score. A model "
    "that learned nothing has a KPS of 1, so it says something only beside identity.",
    "Identity, CLIP-T": "Mean cosine of the pictures with the trigger to the concept's pictures, and to their "
    "prompts.",
    "Drift": "(1 - mean cosine to the base model's picture) / 2, without the trigger.",
    "Diversity, retained": "How much pictures of one prompt differ from seed to seed, and what share of the base "
    "model's diversity that is. A low share means that the model draws one thing again and again.",
    "Pixel and latent RMSE": "Distances to the base model's pictures that need no encoder.",
}


def prompt_values(row: PromptScores, column: str) -> tuple[float, ...]:
    """Return what a field holds: a value for each seed, a single one of diversity, none where it is absent."""
    value = getattr(row, column)
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def labelled_values(scores: Scores, *names: str) -> list[str]:
    """Return texts such as "UPS 0.953" of the named measures; those that do not apply are left out."""
    figures = ((MEASURES[name].label, getattr(scores, name)) for name in names)
    return [f"{label} {figure.value:.3f}" for label, figure in figures if figure is not None]


def format_interval(interval: Interval | None, sign: str = "") -> str:
    """Return "0.953 [0.941, 0.962]"; the value alone if it has no interval, "-" if there is no value."""
    if interval is None:
        return "-"
    value, low, high = (f"{number:{sign}.3f}" for number in (interval.value, interval.low, interval.high))
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"
