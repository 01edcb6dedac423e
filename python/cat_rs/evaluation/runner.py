"""Evaluate adapters against the base model: generate, embed, score."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from cat_rs.evaluation.cache import EvaluationCache
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.errors import EvaluationInputError
from cat_rs.evaluation.generation import adapter_files, require_no_adapter
from cat_rs.evaluation.jobs import AdapterPath, Work, by_model, jobs_of
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.pictures import Pictures, PictureSource, load_pictures
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationPictures, EvaluationResult
from cat_rs.evaluation.scores import References, score_adapter, score_base, score_other_seed, score_prompts
from cat_rs.processes import Processes

BASE = "base"
OTHER_SEED = "other seed"


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

    The base model's pictures are generated once; each adapter is loaded, and generates for the same prompts and
    seeds. The pipeline is left as it was found.

    With a cache, only what it lacks is generated and embedded: another adapter costs its own pictures, and an
    evaluation that was killed goes on where it was. The result is the same with and without a cache, bit for bit, on
    one machine at one number of threads.

    Under torch.distributed, every process calls this with a pipeline of its own; they take batches in turns, and all
    get the result of a single process.

    Args:
        pipeline: A diffusers pipeline without adapters.
        adapters: A name for reports, and a safetensors file or the folder that training wrote. None stands for the
            base model, a control that scores 1.
        prompts: Prompts with the trigger and without it.
        encoder: The judge, see `KpsEvaluator`. Without a text side there is no prompt similarity.
        concept_images: The pictures of the concept that the adapters were trained on.
        config: The sampler settings.
        cache: A folder for pictures and embeddings, see `EvaluationCache`; made if need be, shared by all processes,
            and by other evaluations if wanted. Embeddings of a callable are not kept.
        processes: Those that share the work; if None, those of torch.distributed's default group, or this one alone.
        progress: Whether to show a progress bar that counts pictures.

    Returns:
        Scores with intervals, scores of each prompt, and the pictures.

    Raises:
        EvaluationInputError: An argument cannot be used; names it.
        EvaluationFileError: A file is missing or broken; names it.
    """
    config = config or EvaluationConfig()
    _check_adapters(adapters)
    require_no_adapter(pipeline)
    judge = encoder if isinstance(encoder, KpsEvaluator) else KpsEvaluator(encoder)
    concept = load_pictures(concept_images)
    references = references_of(judge, prompts, concept)

    models = {BASE: None, **adapters}
    jobs = jobs_of(models, prompts, config)
    work = Work(
        pipeline,
        judge,
        config,
        None if cache is None else EvaluationCache(cache, pipeline, config),
        Processes.current() if processes is None else processes,
        progress,
    )
    batches = work.pictures(jobs)
    embeddings = work.embeddings(jobs, batches)
    pictures, embedded = by_model(list(models), prompts, config.seeds, jobs, batches, embeddings)
    base = embedded[BASE]
    return EvaluationResult(
        settings=settings_of(pipeline, adapters, prompts, judge, config, concept),
        base=score_base(base, references),
        other_seed=score_other_seed(base),
        adapters={name: score_adapter(base, embedded[name], references) for name in adapters},
        prompts=tuple(row for name in embedded for row in score_prompts(name, base, embedded[name], references)),
        pictures=EvaluationPictures(concept.images, pictures[BASE], {name: pictures[name] for name in adapters}),
    )


def _check_adapters(adapters: Mapping[str, AdapterPath]) -> None:
    """Fail before the first picture, not after an hour of them."""
    if not adapters:
        raise EvaluationInputError("adapters: expected at least one, got none")
    for name, path in adapters.items():
        if name in ("", BASE, OTHER_SEED):
            raise EvaluationInputError(
                f"adapters: expected a name other than {BASE!r} and {OTHER_SEED!r}, got {name!r}"
            )
        if path is not None:
            adapter_files(path)


def references_of(judge: KpsEvaluator, prompts: EvaluationPrompts, concept: Pictures) -> References:
    """Embed what pictures are compared with."""
    return References(
        concept=judge.embed_images(concept),
        trigger_texts=judge.embed_texts(prompts.class_captions()) if judge.has_text else None,
        no_trigger_texts=judge.embed_texts(prompts.no_trigger) if judge.has_text else None,
    )


def settings_of(
    pipeline: Any,
    adapters: Mapping[str, AdapterPath],
    prompts: EvaluationPrompts,
    judge: KpsEvaluator,
    config: EvaluationConfig,
    concept: Pictures,
) -> dict[str, Any]:
    """Return what a reader needs to repeat the evaluation, as JSON types."""
    return {
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "adapters": {name: None if path is None else os.fspath(path) for name, path in adapters.items()},
        "encoder": judge.name,
        "sampling": {**asdict(config), "seeds": list(config.seeds)},
        "prompts": {
            "trigger": list(prompts.trigger),
            "no_trigger": list(prompts.no_trigger),
            "trigger_words": list(prompts.trigger_words),
            "class_word": prompts.class_word,
        },
        "concept_images": list(concept.names),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
