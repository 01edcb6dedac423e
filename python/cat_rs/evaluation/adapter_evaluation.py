"""Evaluate adapters against the base model: generate, embed, score."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cat_rs.evaluation.batches import embedded_batches
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.disk_cache import EvaluationCache
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.errors import EvaluationInputError
from cat_rs.evaluation.generation import ScaledAdapter, check_adapter, require_no_adapter
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.pictures import PictureSource
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationResult
from cat_rs.evaluation.task import AdapterPath, EvaluationTask, Models, scaled
from cat_rs.processes import Processes

# What tables call the base model against itself.
_OTHER_SEED = "other seed"


def evaluate(
    pipeline: Any,
    adapters: Mapping[str, ScaledAdapter | AdapterPath],
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
        adapters: A name for reports, and a safetensors file or the folder that training wrote, or a `ScaledAdapter`.
            None stands for the base model: a control that scores 1.
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
    models = {name: scaled(adapter) for name, adapter in adapters.items()}
    _check_adapters(models, pipeline)
    task = EvaluationTask(pipeline, models, prompts, encoder, concept_images, config)
    kept = None if cache is None else EvaluationCache(cache, pipeline, config)
    processes = Processes.current() if processes is None else processes
    return task.result(embedded_batches(task, {BASE: (), **models}, pipeline, kept, processes, progress))


def _check_adapters(adapters: Models, pipeline: Any) -> None:
    """Fail before the first picture, not after an hour of them."""
    if not adapters:
        raise EvaluationInputError("adapters: expected at least one, got none")
    for name, parts in adapters.items():
        if name in ("", BASE, _OTHER_SEED):
            raise EvaluationInputError(
                f"adapters: expected a name other than {BASE!r} and {_OTHER_SEED!r}, got {name!r}"
            )
        for path, _ in parts:
            check_adapter(pipeline, path)
