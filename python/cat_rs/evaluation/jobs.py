"""The calls of the pipeline and of the encoder that an evaluation is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from tqdm.auto import tqdm

from cat_rs.evaluation.cache import EvaluationCache
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.generation import (
    PictureBatch,
    PictureRequest,
    adapter_loaded,
    generate_batch,
    joined,
    request_batches,
)
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.pictures import Pictures, check_same_sizes
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import ModelPictures
from cat_rs.evaluation.scores import Embedded, EmbeddedModel
from cat_rs.evaluation.shards import completed
from cat_rs.processes import Processes

AdapterPath = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Job:
    """The pictures of one model that one call of the pipeline generates."""

    model: str
    adapter: AdapterPath
    trigger: bool
    requests: tuple[PictureRequest, ...]

    def labels(self) -> tuple[str, ...]:
        """Return what errors call the pictures."""
        return tuple(f"{request.prompt!r} (seed {request.seed}, {self.model})" for request in self.requests)


def jobs_of(
    models: Mapping[str, AdapterPath], prompts: EvaluationPrompts, config: EvaluationConfig
) -> tuple[Job, ...]:
    """Return the work for every model, in the order of its pictures."""
    return tuple(
        Job(name, path, trigger, requests)
        for name, path in models.items()
        for trigger, texts in ((True, prompts.trigger), (False, prompts.no_trigger))
        for requests in request_batches(texts, config)
    )


class Work:
    """The pictures of all jobs and their embeddings: made by all processes, kept in the cache if there is one."""

    def __init__(
        self,
        pipeline: Any,
        judge: KpsEvaluator,
        config: EvaluationConfig,
        cache: EvaluationCache | None,
        processes: Processes,
        progress: bool,
    ) -> None:
        self._pipeline = pipeline
        self._judge = judge
        self._config = config
        self._cache = cache
        self._processes = processes
        self._progress = progress and processes.is_main

    def pictures(self, jobs: Sequence[Job]) -> list[PictureBatch]:
        """Generate what the cache lacks; an adapter is loaded only if one of its pictures is missing."""

        def generate(numbers: Sequence[int], keep: Callable[[int, PictureBatch], None]) -> None:
            with self._bar([jobs[number] for number in numbers]) as bar:
                for name, of_model in groupby(numbers, lambda number: jobs[number].model):
                    bar.set_description(f"generate {name}")
                    mine = list(of_model)
                    with adapter_loaded(self._pipeline, jobs[mine[0]].adapter):
                        for number in mine:
                            keep(number, generate_batch(self._pipeline, jobs[number].requests, self._config))
                            bar.update(len(jobs[number].requests))

        store = None if self._cache is None else self._cache.pictures
        return completed(self._picture_keys(jobs), generate, store, self._processes)

    def embeddings(self, jobs: Sequence[Job], batches: Sequence[PictureBatch]) -> list[torch.Tensor]:
        """Embed the pictures of each job by themselves: they differ by rounding with the others in their call."""

        def embed(numbers: Sequence[int], keep: Callable[[int, torch.Tensor], None]) -> None:
            with self._bar([jobs[number] for number in numbers]) as bar:
                bar.set_description("embed")
                for number in numbers:
                    pictures = Pictures(batches[number].images, jobs[number].labels())
                    keep(number, self._judge.embed_images(pictures))
                    bar.update(len(pictures))

        encoder = None if self._cache is None else self._judge.fingerprint()
        if self._cache is None or encoder is None:
            return completed([str(number) for number in range(len(jobs))], embed, None, self._processes)
        keys = [
            self._cache.embedding_key(key, encoder, min(self._judge.batch_size, len(job.requests)))
            for key, job in zip(self._picture_keys(jobs), jobs, strict=True)
        ]
        return completed(keys, embed, self._cache.embeddings, self._processes)

    def _picture_keys(self, jobs: Sequence[Job]) -> list[str]:
        if self._cache is None:
            return [str(number) for number in range(len(jobs))]
        return [self._cache.picture_key(job.adapter, job.requests) for job in jobs]

    def _bar(self, jobs: Sequence[Job]) -> Any:
        total = sum(len(job.requests) for job in jobs)
        return tqdm(total=total, unit="picture", disable=not self._progress or total == 0)


def by_model(
    models: Sequence[str],
    prompts: EvaluationPrompts,
    seeds: Sequence[int],
    jobs: Sequence[Job],
    batches: Sequence[PictureBatch],
    embeddings: Sequence[torch.Tensor],
) -> tuple[dict[str, ModelPictures], dict[str, EmbeddedModel]]:
    """Put the pictures and embeddings of all jobs together again.

    Raises:
        EvaluationInputError: A picture differs in size from that of the first model.
    """
    pictures, embedded = {}, {}
    first: dict[bool, Pictures] = {}
    for name in models:
        grids, sides = [], []
        for trigger, texts in ((True, prompts.trigger), (False, prompts.no_trigger)):
            mine = [number for number, job in enumerate(jobs) if (job.model, job.trigger) == (name, trigger)]
            grid = joined(texts, seeds, [batches[number] for number in mine])
            labelled = Pictures(grid.images, tuple(label for number in mine for label in jobs[number].labels()))
            check_same_sizes(first.setdefault(trigger, labelled), labelled)
            vectors = torch.cat([embeddings[number] for number in mine])
            grids.append(grid)
            sides.append(Embedded(grid.prompts, len(grid.seeds), vectors, grid.images, grid.latents))
        pictures[name], embedded[name] = ModelPictures(*grids), EmbeddedModel(*sides)
    return pictures, embedded
