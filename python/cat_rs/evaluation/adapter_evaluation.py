"""Evaluate adapters against the base model: generate, embed, score."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from tqdm.auto import tqdm

from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.disk_cache import EvaluationCache
from cat_rs.evaluation.distributed import compute_missing
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.errors import EvaluationInputError
from cat_rs.evaluation.generation import (
    PictureBatch,
    adapter_loaded,
    check_adapter,
    generate_batch,
    require_no_adapter,
)
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.pictures import Pictures, PictureSource
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationResult
from cat_rs.evaluation.task import AdapterPath, EmbeddedBatch, EvaluationTask, ModelBatch
from cat_rs.processes import Processes

# What tables call the base model against itself.
_OTHER_SEED = "other seed"


def evaluate(
    pipeline: Any,
    adapters: Mapping[str, AdapterPath],
    prompts: EvaluationPrompts,
    encoder: KpsEvaluator | EncoderSource,
    *,
    concept_images: PictureSource,
    config: EvaluationConfig | None = None,
    cache: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Compare adapters with the base model, on prompts with and without the trigger.

    The base model's pictures are generated once; each adapter is loaded in turn and generates for the same prompts
    and seeds. The pipeline is left as it was found.

    With a cache, evaluate generates and embeds only what is missing: another adapter costs only its own pictures, and
    an evaluation that was killed continues where it stopped. On one machine at one number of threads, the result with
    a cache is bit for bit the result without it.

    Under torch.distributed, every rank calls this with a pipeline of its own; the ranks take batches in turns, and all
    get the result of a single process.

    Args:
        pipeline: A diffusers pipeline without adapters.
        adapters: A name for reports, and a safetensors file or the folder that training wrote. None stands for the
            base model: a control that scores 1.
        prompts: Prompts with the trigger and without it.
        encoder: The encoder that embeds pictures and prompts, see `KpsEvaluator`. Without a text side there is no
            prompt similarity.
        concept_images: The pictures of the concept that the adapters were trained on.
        config: The sampler settings.
        cache: A folder for pictures and embeddings, see `EvaluationCache`; created if it does not exist, shared by all
            ranks, and by other evaluations if you like. The cache keeps no embeddings of a callable.
        processes: The processes that share the work; if None, those of torch.distributed's default group, or this one
            alone.
        progress: Whether to show a progress bar that counts pictures.

    Returns:
        Scores with intervals, scores of each prompt, and the pictures.

    Raises:
        EvaluationInputError: An argument cannot be used; names it.
        EvaluationFileError: A file is missing or broken; names it.
    """
    config = config or EvaluationConfig()
    require_no_adapter(pipeline)
    _check_adapters(adapters, pipeline)
    task = EvaluationTask(pipeline, adapters, prompts, encoder, concept_images, config)
    batches = _Batches(
        task,
        task.batches({BASE: None, **adapters}),
        pipeline,
        None if cache is None else EvaluationCache(cache, pipeline, config),
        Processes.current() if processes is None else processes,
        progress,
    )
    return task.result(batches.embedded())


def _check_adapters(adapters: Mapping[str, AdapterPath], pipeline: Any) -> None:
    """Fail before the first picture, not after an hour of them."""
    if not adapters:
        raise EvaluationInputError("adapters: expected at least one, got none")
    for name, path in adapters.items():
        if name in ("", BASE, _OTHER_SEED):
            raise EvaluationInputError(
                f"adapters: expected a name other than {BASE!r} and {_OTHER_SEED!r}, got {name!r}"
            )
        if path is not None:
            check_adapter(pipeline, path)


class _Batches:
    """Batches that all ranks generate and embed, kept in the cache if there is one."""

    def __init__(
        self,
        task: EvaluationTask,
        batches: Sequence[ModelBatch],
        pipeline: Any,
        cache: EvaluationCache | None,
        processes: Processes,
        progress: bool,
    ) -> None:
        self._task = task
        self._batches = batches
        self._pipeline = pipeline
        self._cache = cache
        self._processes = processes
        self._progress = progress and processes.is_main
        self._keys = [
            str(number) if cache is None else cache.picture_key(batch.adapter, batch.requests)
            for number, batch in enumerate(batches)
        ]

    def embedded(self) -> list[EmbeddedBatch]:
        pictures = self._pictures()
        embeddings = self._embeddings(pictures)
        return [EmbeddedBatch(*parts) for parts in zip(self._batches, pictures, embeddings, strict=True)]

    def _pictures(self) -> list[PictureBatch]:
        """Generate what the cache lacks; an adapter is loaded only if one of its pictures is missing."""

        def generate(numbers: Sequence[int], add: Callable[[int, PictureBatch], None]) -> None:
            with self._bar(numbers) as bar:
                for name, of_model in groupby(numbers, lambda number: self._batches[number].model):
                    bar.set_description(f"generate {name}")
                    own = list(of_model)
                    with adapter_loaded(self._pipeline, self._batches[own[0]].adapter):
                        for number in own:
                            requests = self._batches[number].requests
                            add(number, generate_batch(self._pipeline, requests, self._task.config))
                            bar.update(len(requests))

        store = None if self._cache is None else self._cache.pictures
        return compute_missing(self._keys, generate, store, self._processes)

    def _embeddings(self, pictures: Sequence[PictureBatch]) -> list[torch.Tensor]:
        """Embed each batch by itself: embeddings differ by rounding with the others in their call."""
        evaluator = self._task.evaluator

        def embed(numbers: Sequence[int], add: Callable[[int, torch.Tensor], None]) -> None:
            with self._bar(numbers) as bar:
                bar.set_description("embed")
                for number in numbers:
                    labelled = Pictures(pictures[number].images, self._batches[number].labels())
                    add(number, evaluator.embed_images(labelled))
                    bar.update(len(labelled))

        encoder = None if self._cache is None else evaluator.fingerprint()
        if self._cache is None or encoder is None:
            return compute_missing([str(number) for number in range(len(pictures))], embed, None, self._processes)
        keys = [
            self._cache.embedding_key(key, encoder, min(evaluator.batch_size, len(batch.requests)))
            for key, batch in zip(self._keys, self._batches, strict=True)
        ]
        return compute_missing(keys, embed, self._cache.embeddings, self._processes)

    def _bar(self, numbers: Sequence[int]) -> Any:
        total = sum(len(self._batches[number].requests) for number in numbers)
        return tqdm(total=total, unit="picture", disable=not self._progress or total == 0)
