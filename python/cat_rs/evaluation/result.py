"""The result of an evaluation, and its JSON.

The JSON file is one object:

    format      "cat-rs evaluation 1"; the number grows when a reader of the old form would go wrong
    settings    {...}: what was compared, and how (sampler, seeds, prompts, encoder, versions)
    base        scores of the base model: identity, prompt similarity, diversity
    other_seed  scores of base pictures against base pictures from other noise; null for a single seed
    adapters    {name: scores}
    prompts     one object for each model and prompt: model, prompt, trigger (bool), diversity, and lists over
                the seeds: similarity (s to the base picture), identity, prompt_similarity, pixel_rmse, latent_rmse
    comparisons one object for each adapter after the first: a, the first one's name; b, its own name; and the
                differences b - a, as scores. They follow from `prompts`, and are not read.

Scores map each field of `Scores` to {"value", "low", "high"} (the 95 % bootstrap interval), or to null where the
measure does not apply. An interval of a single value has null bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from cat_rs.atomic import write_bytes
from cat_rs.evaluation.errors import EvaluationInputError
from cat_rs.evaluation.generation import PictureGrid
from cat_rs.evaluation.measures import Comparison, PromptScores, Scores
from cat_rs.evaluation.records import from_json, load_json, to_json
from cat_rs.evaluation.scores import compare_prompts

FORMAT = "cat-rs evaluation 1"


@dataclass(frozen=True)
class ModelPictures:
    """The pictures of one model."""

    trigger: PictureGrid
    no_trigger: PictureGrid


@dataclass(frozen=True)
class EvaluationPictures:
    """All pictures that were compared."""

    concept: tuple[Image.Image, ...]
    base: ModelPictures
    adapters: Mapping[str, ModelPictures]


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found.

    Attributes:
        settings: What was compared, and how.
        base: Scores of the base model, which has no preservation to score.
        other_seed: Base against base with other noise, the scale on which to read UPS; None for a single seed.
        adapters: Scores of each adapter.
        prompts: Scores of each model and prompt.
        pictures: The pictures; None in a result that was read from a file.
    """

    settings: Mapping[str, Any]
    base: Scores
    other_seed: Scores | None
    adapters: Mapping[str, Scores]
    prompts: tuple[PromptScores, ...]
    pictures: EvaluationPictures | None = field(default=None, compare=False, repr=False)

    def compare(self, a: str, b: str) -> Comparison:
        """Compare two adapters: the differences b - a, each with its 95 % bootstrap interval.

        Computed from `prompts`, so that a result read from a file can be compared too.

        Args:
            a: An adapter's name.
            b: Another's.

        Raises:
            EvaluationInputError: There is no such adapter, or it was scored on other prompts or seeds.
        """
        for argument, name in (("a", a), ("b", b)):
            if name not in self.adapters:
                raise EvaluationInputError(f"{argument}: expected one of {list(self.adapters)}, got {name!r}")
        rows_a, rows_b = ([row for row in self.prompts if row.model == name] for name in (a, b))
        return compare_prompts(a, rows_a, b, rows_b)

    def comparisons(self) -> tuple[Comparison, ...]:
        """Compare every adapter after the first with the first."""
        first, *others = self.adapters or [""]
        return tuple(self.compare(first, name) for name in others)

    def to_json(self) -> str:
        """Return the result without its pictures as JSON, in the form described at the top of this module."""
        return to_json(FORMAT, self, comparisons=self.comparisons())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced as a whole or not at all."""
        write_bytes(path, self.to_json().encode(errors="backslashreplace"))

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        """Read what `to_json` wrote.

        Raises:
            EvaluationInputError: The text is something else.
        """
        return from_json(FORMAT, cls, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationResult:
        """Read a result that `save` wrote; it has no pictures."""
        return load_json(FORMAT, cls, path)
