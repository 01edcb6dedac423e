"""What all models of an evaluation share, and how the batches of each become one result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.generation import PictureBatch, PictureRequest, joined, request_batches
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.pictures import Pictures, PictureSource, check_same_sizes, load_pictures
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationPictures, EvaluationResult, ModelPictures
from cat_rs.evaluation.scores import Embedded, EmbeddedModel, References, score_model, score_other_seed

AdapterPath = str | os.PathLike[str] | None


@dataclass(frozen=True)
class ModelBatch:
    """The pictures of one model that one call of the pipeline generates."""

    model: str
    adapter: AdapterPath
    trigger: bool
    requests: tuple[PictureRequest, ...]

    def labels(self) -> tuple[str, ...]:
        """Return what errors call the pictures."""
        return tuple(f"{request.prompt!r} (seed {request.seed}, {self.model})" for request in self.requests)


@dataclass(frozen=True)
class EmbeddedBatch:
    """A generated batch with its embeddings, [B, D]."""

    batch: ModelBatch
    pictures: PictureBatch
    embeddings: torch.Tensor


class EvaluationTask:
    """Prompts, sampler settings, encoder and concept: the same for the base model and every adapter.

    Args:
        pipeline: The pipeline that generates.
        adapters: The adapters by name, for the settings in the result.
        prompts: Prompts with the trigger and without it.
        encoder: Embeds pictures and prompts.
        concept_images: The pictures of the concept.
        config: The sampler settings.

    Attributes:
        evaluator: The encoder, with batches and checks.
        config: The sampler settings.
        settings: What a reader needs to repeat the evaluation, as JSON types.
    """

    def __init__(
        self,
        pipeline: Any,
        adapters: Mapping[str, AdapterPath],
        prompts: EvaluationPrompts,
        encoder: KpsEvaluator | EncoderSource,
        concept_images: PictureSource,
        config: EvaluationConfig,
    ) -> None:
        self.evaluator = encoder if isinstance(encoder, KpsEvaluator) else KpsEvaluator(encoder)
        self.config = config
        self._prompts = prompts
        self._concept = load_pictures(concept_images)
        has_text = self.evaluator.has_text
        self._references = References(
            concept=self.evaluator.embed_images(self._concept),
            trigger_texts=self.evaluator.embed_texts(prompts.class_captions()) if has_text else None,
            no_trigger_texts=self.evaluator.embed_texts(prompts.no_trigger) if has_text else None,
        )
        self.settings = {
            "pipeline": type(pipeline).__name__,
            "scheduler": type(pipeline.scheduler).__name__,
            "adapters": {name: None if path is None else os.fspath(path) for name, path in adapters.items()},
            "encoder": self.evaluator.name,
            "sampling": {**asdict(config), "seeds": list(config.seeds)},
            "prompts": {
                "trigger": list(prompts.trigger),
                "no_trigger": list(prompts.no_trigger),
                "trigger_words": list(prompts.trigger_words),
                "class_word": prompts.class_word,
            },
            "concept_images": list(self._concept.names),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }

    def batches(self, models: Mapping[str, AdapterPath]) -> list[ModelBatch]:
        """Return what the pipeline generates for every model, in the order of the pictures."""
        return [
            ModelBatch(name, path, trigger, requests)
            for name, path in models.items()
            for trigger, prompts in self._kinds()
            for requests in request_batches(prompts, self.config)
        ]

    def result(self, embedded: Sequence[EmbeddedBatch]) -> EvaluationResult:
        """Score the batches of the base model and of each adapter.

        Raises:
            EvaluationInputError: A picture differs in size from the base model's.
        """
        names = list(dict.fromkeys(item.batch.model for item in embedded))
        first: dict[bool, Pictures] = {}
        pictures, models = {}, {}
        for name in names:
            grids, sides = [], []
            for trigger, prompts in self._kinds():
                own = [item for item in embedded if (item.batch.model, item.batch.trigger) == (name, trigger)]
                grid = joined(prompts, self.config.seeds, [item.pictures for item in own])
                labelled = Pictures(grid.images, tuple(label for item in own for label in item.batch.labels()))
                check_same_sizes(first.setdefault(trigger, labelled), labelled)
                embeddings = torch.cat([item.embeddings for item in own])
                grids.append(grid)
                sides.append(Embedded(prompts, len(grid.seeds), embeddings, grid.images, grid.latents))
            pictures[name], models[name] = ModelPictures(*grids), EmbeddedModel(*sides)
        base = models[BASE]
        scored = {
            name: score_model(name, model, self._references, None if name == BASE else base)
            for name, model in models.items()
        }
        adapters = [name for name in names if name != BASE]
        return EvaluationResult(
            settings=self.settings,
            base=scored[BASE][0],
            other_seed=score_other_seed(base),
            adapters={name: scored[name][0] for name in adapters},
            prompts=tuple(row for _, rows in scored.values() for row in rows),
            pictures=EvaluationPictures(
                self._concept.images, pictures[BASE], {name: pictures[name] for name in adapters}
            ),
        )

    def _kinds(self) -> tuple[tuple[bool, tuple[str, ...]], ...]:
        """Whether the prompts hold the trigger, and the prompts."""
        return (True, self._prompts.trigger), (False, self._prompts.no_trigger)
