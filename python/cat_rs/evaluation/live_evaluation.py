"""Scores of the adapter that is in a pipeline, while it is being trained."""

from __future__ import annotations

from typing import Any

from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.generation import generate_batch, undisturbed
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.pictures import Pictures, PictureSource
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationResult
from cat_rs.evaluation.task import EmbeddedBatch, EvaluationTask


class LiveEvaluation:
    """Scores a pipeline's adapter as it is at the moment, against the same pipeline with the adapter off.

    No second model is made and nothing is loaded. The base model's pictures are made at the first score and kept.
    Torch's random state and the denoiser's training mode are as before afterwards, so a training goes on as if it had
    not been interrupted.

    Args:
        pipeline: A diffusers pipeline whose `unet` has a PEFT adapter.
        prompts: Prompts with the trigger and without it.
        encoder: The encoder that embeds pictures and prompts, see `KpsEvaluator`.
        concept_images: The pictures of the concept.
        config: The sampler settings.

    Attributes:
        settings: What is compared, and how; as in an `EvaluationResult`.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: EvaluationPrompts,
        encoder: KpsEvaluator | EncoderSource,
        *,
        concept_images: PictureSource,
        config: EvaluationConfig,
    ) -> None:
        self._pipeline = pipeline
        self._task = EvaluationTask(pipeline, {}, prompts, encoder, concept_images, config)
        self._base: list[EmbeddedBatch] = []
        self.settings = self._task.settings

    def score(self, name: str) -> EvaluationResult:
        """Return the scores of the adapter, called `name` in the result."""
        from cat_rs.peft import adapter_disabled

        with undisturbed(self._pipeline):
            if not self._base:
                with adapter_disabled(self._pipeline.unet):
                    self._base = self._embedded(BASE)
            adapted = self._embedded(name)
        return self._task.result([*self._base, *adapted])

    def _embedded(self, name: str) -> list[EmbeddedBatch]:
        """Generate and embed with the pipeline as it is."""
        batches = self._task.batches({name: ()})
        pictures = [generate_batch(self._pipeline, batch.requests, self._task.config) for batch in batches]
        return [
            EmbeddedBatch(batch, made, self._task.evaluator.embed_images(Pictures(made.images, batch.labels())))
            for batch, made in zip(batches, pictures, strict=True)
        ]
