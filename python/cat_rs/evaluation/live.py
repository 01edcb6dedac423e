"""Scores of the adapter that is in a pipeline, while it is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.generation import generate_batch
from cat_rs.evaluation.jobs import by_model, jobs_of
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.pictures import Pictures, PictureSource, load_pictures
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationPictures, EvaluationResult, ModelPictures
from cat_rs.evaluation.runner import BASE, references_of, settings_of
from cat_rs.evaluation.scores import EmbeddedModel, score_adapter, score_base, score_other_seed, score_prompts


class LiveEvaluation:
    """Scores a pipeline's adapter as it is at the moment, against the same pipeline with the adapter off.

    No second model is made and nothing is loaded. The base model's pictures are made at the first score and kept.
    Torch's random state and the denoiser's training mode are as before afterwards, so a training goes on as if it had
    not been interrupted.

    Args:
        pipeline: A diffusers pipeline whose `unet` has a PEFT adapter.
        prompts: Prompts with the trigger and without it.
        encoder: The judge, see `KpsEvaluator`.
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
        self._prompts = prompts
        self._judge = encoder if isinstance(encoder, KpsEvaluator) else KpsEvaluator(encoder)
        self._config = config
        self._concept = load_pictures(concept_images)
        self._references = references_of(self._judge, prompts, self._concept)
        self._base: tuple[ModelPictures, EmbeddedModel] | None = None
        self.settings = settings_of(pipeline, {}, prompts, self._judge, config, self._concept)

    def score(self, name: str) -> EvaluationResult:
        """Return the scores of the adapter, called `name` in the result."""
        from cat_rs.peft import adapter_disabled

        with self._undisturbed():
            if self._base is None:
                with adapter_disabled(self._pipeline.unet):
                    self._base = self._make(BASE)
            pictures, embedded = self._make(name)
        base_pictures, base = self._base
        models = {BASE: base, name: embedded}
        return EvaluationResult(
            settings=self.settings,
            base=score_base(base, self._references),
            other_seed=score_other_seed(base),
            adapters={name: score_adapter(base, embedded, self._references)},
            prompts=tuple(
                row for model, own in models.items() for row in score_prompts(model, base, own, self._references)
            ),
            pictures=EvaluationPictures(self._concept.images, base_pictures, {name: pictures}),
        )

    def _make(self, name: str) -> tuple[ModelPictures, EmbeddedModel]:
        jobs = jobs_of({name: None}, self._prompts, self._config)
        batches = [generate_batch(self._pipeline, job.requests, self._config) for job in jobs]
        embeddings = [
            self._judge.embed_images(Pictures(batch.images, job.labels()))
            for job, batch in zip(jobs, batches, strict=True)
        ]
        pictures, embedded = by_model([name], self._prompts, self._config.seeds, jobs, batches, embeddings)
        return pictures[name], embedded[name]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        unet = self._pipeline.unet
        training = [module for module in unet.modules() if module.training]
        devices = [unet.device] if unet.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            unet.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True
