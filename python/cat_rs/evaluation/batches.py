"""The batches of all models: generated and embedded by all ranks, and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from tqdm.auto import tqdm

from cat_rs.evaluation.disk_cache import EvaluationCache
from cat_rs.evaluation.distributed import compute_missing
from cat_rs.evaluation.generation import PictureBatch, adapters_loaded, generate_batch
from cat_rs.evaluation.pictures import Pictures
from cat_rs.evaluation.task import EmbeddedBatch, ModelBatch, Models, PictureTask
from cat_rs.processes import Processes


def embedded_batches(
    task: PictureTask,
    models: Models,
    pipeline: Any,
    cache: EvaluationCache | None,
    processes: Processes,
    progress: bool,
) -> list[EmbeddedBatch]:
    """Return the pictures of all models and their embeddings: from the cache, or new.

    Args:
        task: What is generated.
        models: The models.
        pipeline: A diffusers pipeline without adapters.
        cache: Where to look up and keep pictures and embeddings.
        processes: The processes that share the work; each gets all batches.
        progress: Whether to show a progress bar that counts pictures.
    """
    return _Batches(task, task.batches(models), pipeline, cache, processes, progress).embedded()


class _Batches:
    """Batches that all ranks generate and embed, kept in the cache if there is one."""

    def __init__(
        self,
        task: PictureTask,
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
            str(number) if cache is None else cache.picture_key(batch.adapters, batch.requests)
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
                    with adapters_loaded(self._pipeline, self._batches[own[0]].adapters):
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
