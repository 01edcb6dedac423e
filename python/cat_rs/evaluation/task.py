"""What all models of an evaluation share, and how the batches of each become one result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.generation import (
    PictureBatch,
    PictureGrid,
    PictureRequest,
    ScaledAdapter,
    joined,
    request_batches,
)
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.pictures import Pictures, PictureSource, check_same_sizes, load_pictures
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationPictures, EvaluationResult, ModelPictures
from cat_rs.evaluation.scores import Embedded, EmbeddedModel, References, score_model, score_other_seed

AdapterPath = str | os.PathLike[str] | None
Models = Mapping[str, tuple[ScaledAdapter, ...]]
"""Name -> the adapters that make the model; none are the base model."""


@dataclass(frozen=True)
class ModelBatch:
    """The pictures of one model that one call of the pipeline generates; all prompts are of one kind."""

    model: str
    adapters: tuple[ScaledAdapter, ...]
    kind: str
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


class KindPictures(NamedTuple):
    """The pictures of one model for the prompts of one kind."""

    grid: PictureGrid
    embedded: Embedded


class PictureTask:
    """Prompts by kind, sampler settings and encoder: the same for the base model and every other.

    Args:
        kinds: Kind -> its prompts.
        encoder: Embeds pictures and prompts.
        config: The sampler settings.

    Attributes:
        evaluator: The encoder, with batches and checks.
        config: The sampler settings.
    """

    def __init__(
        self, kinds: Mapping[str, tuple[str, ...]], encoder: KpsEvaluator | EncoderSource, config: EvaluationConfig
    ) -> None:
        self.evaluator = encoder if isinstance(encoder, KpsEvaluator) else KpsEvaluator(encoder)
        self.config = config
        self._kinds = kinds

    def batches(self, models: Models) -> list[ModelBatch]:
        """Return what the pipeline generates for every model, in the order of the pictures."""
        return [
            ModelBatch(name, adapters, kind, requests)
            for name, adapters in models.items()
            for kind, prompts in self._kinds.items()
            for requests in request_batches(prompts, self.config)
        ]

    def by_model(self, embedded: Sequence[EmbeddedBatch]) -> dict[str, dict[str, KindPictures]]:
        """Put batches together: model -> kind -> pictures.

        Raises:
            EvaluationInputError: A picture differs in size from the first model's.
        """
        first: dict[str, Pictures] = {}
        models: dict[str, dict[str, KindPictures]] = {}
        for name in dict.fromkeys(item.batch.model for item in embedded):
            models[name] = {}
            for kind, prompts in self._kinds.items():
                own = [item for item in embedded if (item.batch.model, item.batch.kind) == (name, kind)]
                grid = joined(prompts, self.config.seeds, [item.pictures for item in own])
                labelled = Pictures(grid.images, tuple(label for item in own for label in item.batch.labels()))
                check_same_sizes(first.setdefault(kind, labelled), labelled)
                embeddings = torch.cat([item.embeddings for item in own])
                side = Embedded(prompts, len(grid.seeds), embeddings, grid.images, grid.latents)
                models[name][kind] = KindPictures(grid, side)
        return models

    def sampling_settings(self, pipeline: Any) -> dict[str, Any]:
        """Return how pictures are generated and embedded, as JSON types."""
        return {
            "pipeline": type(pipeline).__name__,
            "scheduler": type(pipeline.scheduler).__name__,
            "encoder": self.evaluator.name,
            "sampling": {**asdict(self.config), "seeds": list(self.config.seeds)},
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }


class EvaluationTask(PictureTask):
    """Prompts with the trigger and without it, and the concept's pictures.

    Args:
        pipeline: The pipeline that generates.
        adapters: The adapters by name, for the settings in the result.
        prompts: Prompts with the trigger and without it.
        encoder: Embeds pictures and prompts.
        concept_images: The pictures of the concept.
        config: The sampler settings.

    Attributes:
        settings: What a reader needs to repeat the evaluation, as JSON types.
    """

    def __init__(
        self,
        pipeline: Any,
        adapters: Models,
        prompts: EvaluationPrompts,
        encoder: KpsEvaluator | EncoderSource,
        concept_images: PictureSource,
        config: EvaluationConfig,
    ) -> None:
        super().__init__({"trigger": prompts.trigger, "no_trigger": prompts.no_trigger}, encoder, config)
        self._concept = load_pictures(concept_images)
        has_text = self.evaluator.has_text
        self._references = References(
            concept=self.evaluator.embed_images(self._concept),
            trigger_texts=self.evaluator.embed_texts(prompts.class_captions()) if has_text else None,
            no_trigger_texts=self.evaluator.embed_texts(prompts.no_trigger) if has_text else None,
        )
        self.settings = {
            **self.sampling_settings(pipeline),
            "adapters": {name: _plain(parts) for name, parts in adapters.items()},
            "prompts": {
                "trigger": list(prompts.trigger),
                "no_trigger": list(prompts.no_trigger),
                "trigger_words": list(prompts.trigger_words),
                "class_word": prompts.class_word,
            },
            "concept_images": list(self._concept.names),
        }

    def result(self, embedded: Sequence[EmbeddedBatch]) -> EvaluationResult:
        """Score the batches of the base model and of each adapter.

        Raises:
            EvaluationInputError: A picture differs in size from the base model's.
        """
        pictures, models = {}, {}
        for name, kinds in self.by_model(embedded).items():
            pictures[name] = ModelPictures(**{kind: own.grid for kind, own in kinds.items()})
            models[name] = EmbeddedModel(**{kind: own.embedded for kind, own in kinds.items()})
        base = models[BASE]
        scored = {
            name: score_model(name, model, self._references, None if name == BASE else base)
            for name, model in models.items()
        }
        adapters = [name for name in models if name != BASE]
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


def scaled(adapter: ScaledAdapter | AdapterPath) -> tuple[ScaledAdapter, ...]:
    """Return the adapters of a model that is named by one, or by None."""
    if adapter is None:
        return ()
    return (adapter if isinstance(adapter, ScaledAdapter) else ScaledAdapter(adapter),)


def _plain(adapters: Sequence[ScaledAdapter]) -> Any:
    """Return the adapters of a model as JSON types: nothing, a path, or paths with their scales."""
    parts = [[os.fspath(path), scale] for path, scale in adapters]
    return parts[0][0] if [scale for _, scale in parts] == [1.0] else parts or None
