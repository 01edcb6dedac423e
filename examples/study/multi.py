"""Adapters of three concepts: one trained on all three, and three trained apart and added."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cat_rs
import torch
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import ClipEncoder, EvaluationPrompts, EvaluationResult, KpsEvaluator, evaluate
from concepts import CLIP, MODEL, Concept, read_concepts
from methods import METHODS, PLAIN, RECIPE, Method, adapter_file, with_trainer
from safetensors.torch import load_file

TRIO = ("pineapple", "tractor", "panda")
COMPARED = (PLAIN, "CAT 1", "CAT prompts", RECIPE)


def trio() -> list[Concept]:
    """The concepts, whose triggers differ."""
    concepts = read_concepts()
    return [concepts[name] for name in TRIO]


def together(method: Method) -> Method:
    """The same method on the pictures of all three, each trigger with its class word."""
    steps = 2 * method.steps
    # Plain LoRA stops at any of these, to be compared where it draws the asked concepts as often.
    kept = tuple(range(50, steps + 1, 50)) if method.name == PLAIN else (steps,)
    return replace(method, steps=steps, kept=kept, train=partial(_train_together, method))


def together_name(method: str, step: int | None = None) -> str:
    """What results call an adapter that was trained on all three; by default that of the last step."""
    last = step in (None, together(METHODS[method]).steps)
    return f"{method}, together" if last else f"{method}, together @ {step}"


def _train_together(single: Method, method: Method, concept: Concept, seed: int, data: Path, folder: Path) -> None:
    settings = single.train.keywords  # type: ignore[attr-defined]
    triggers = tuple(f"{concept.trigger}={concept.class_word}" for concept in trio())
    with_trainer(method, concept, seed, data, folder, **{**settings, "trigger": triggers})


def added(files: Sequence[Path], target: Path) -> None:
    """The sum of adapters of scale 1 as one file: rows of A and columns of B side by side."""
    states = [load_file(file) for file in files]
    total = {
        name: torch.cat([state[name] for state in states], dim=0 if "lora_A" in name else 1) for name in states[0]
    }
    cat_rs.save_lora(target, total)


def multi_prompts() -> EvaluationPrompts:
    """All prompts of the three concepts."""
    concepts = trio()
    no_trigger = dict.fromkeys(
        prompt for concept in concepts for prompts in concept.kinds.values() for prompt in prompts
    )
    return EvaluationPrompts(
        trigger=tuple(prompt for concept in concepts for prompt in concept.trigger_prompts),
        no_trigger=tuple(no_trigger),
        trigger_words=tuple(concept.trigger for concept in concepts),
    )


def score(adapters: dict[str, Path], pictures: Path, target: Path, **settings: Any) -> None:
    """Score adapters of the three concepts: what `evaluate` scores, and which concepts appear where.

    A concept appears in a picture whose mean cosine to the concept's pictures is above a threshold fixed before any
    training: half way between the base model's pictures for the class prompts and the concept's own pictures, each
    against the others.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    judge = KpsEvaluator(ClipEncoder.from_pretrained(CLIP))
    result = evaluate(pipeline, adapters, multi_prompts(), judge, concept_images=pictures, **settings)
    content = {"evaluation": json.loads(result.to_json()), "appearances": appearances(result, judge)}
    write_bytes(target, (json.dumps(content) + "\n").encode())


def appearances(result: EvaluationResult, judge: KpsEvaluator) -> dict[str, Any]:
    """Cosines of every picture to every concept, and the thresholds."""
    concepts = trio()
    own = {concept.name: judge.embed_images([_open(file) for file in concept.pictures]) for concept in concepts}
    pictures = result.pictures
    assert pictures is not None
    models = {"base": pictures.base, **pictures.adapters}
    rows = []
    for name, model in models.items():
        for grid in (model.trigger, model.no_trigger):
            embeddings = judge.embed_images(grid.images)
            cosines = {
                concept: 2.0 * cat_rs.cross_similarity(embeddings, reference, reduce="mean") - 1.0
                for concept, reference in own.items()
            }
            for index in range(len(grid.images)):
                prompt = grid.prompts[index // len(grid.seeds)]
                values = {concept: round(float(values[index]), 6) for concept, values in cosines.items()}
                rows.append({"model": name, "prompt": prompt, "cosines": values})
    thresholds = {concept.name: (_among(own[concept.name]) + _base_mean(rows, concept)) / 2.0 for concept in concepts}
    return {"thresholds": thresholds, "pictures": rows}


def _among(embeddings: torch.Tensor) -> float:
    """Mean cosine of each picture to the others."""
    count = len(embeddings)
    mean = float((2.0 * cat_rs.cross_similarity(embeddings, embeddings, reduce="mean") - 1.0).mean())
    return (count * mean - 1.0) / (count - 1)


def _base_mean(rows: list[dict[str, Any]], concept: Concept) -> float:
    """Mean cosine of the base model's class pictures to the concept."""
    values = [
        row["cosines"][concept.name]
        for row in rows
        if row["model"] == "base" and row["prompt"] in concept.kinds["class"]
    ]
    return sum(values) / len(values)


def asked(prompt: str) -> str | None:
    """The concept that a prompt asks for."""
    words = prompt.split()
    return next((concept.name for concept in trio() if concept.trigger in words), None)


def wrong_rates(appearances: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each model, how often a concept appears that was not asked for, and how often the asked one does.

    Returns:
        model -> "wrong" over all prompts; "wrong with trigger": another concept than the one asked for; "wrong without
        trigger": any concept; "right": the asked concept, over the prompts with a trigger.
    """
    thresholds = appearances["thresholds"]
    flags: dict[str, dict[str, list[bool]]] = {}
    for row in appearances["pictures"]:
        seen = {name for name, cosine in row["cosines"].items() if cosine > thresholds[name]}
        wanted = asked(row["prompt"])
        wrong = bool(seen - {wanted})
        found = flags.setdefault(
            row["model"], {"wrong": [], "wrong with trigger": [], "wrong without trigger": [], "right": []}
        )
        found["wrong"].append(wrong)
        found["wrong with trigger" if wanted else "wrong without trigger"].append(wrong)
        if wanted:
            found["right"].append(wanted in seen)
    return {
        model: {kind: sum(values) / len(values) for kind, values in found.items()} for model, found in flags.items()
    }


def wrong_at_equal_right(rates: Sequence[Mapping[str, Mapping[str, float]]], name: str) -> dict[str, float]:
    """A method's rate of wrong concepts beside that of plain LoRA, stopped where it draws as many that were asked for.

    Args:
        rates: What `wrong_rates` returns, of each seed.
        name: The method.

    Returns:
        "wrong" and "right" of the method; "plain wrong" and "plain right" of plain LoRA's first checkpoint with at
        least the method's "right", the last one where there is none; its "step"; all means over the seeds.
    """

    def mean(model: str, kind: str) -> float:
        return sum(rate[model][kind] for rate in rates) / len(rates)

    right = mean(together_name(name), "right")
    steps = together(METHODS[PLAIN]).kept
    # Equal rates may differ in their last bit.
    step = next((step for step in steps if mean(together_name(PLAIN, step), "right") >= right - 1e-9), steps[-1])
    plain = together_name(PLAIN, step)
    return {
        "wrong": mean(together_name(name), "wrong"),
        "right": right,
        "plain wrong": mean(plain, "wrong"),
        "plain right": mean(plain, "right"),
        "step": step,
    }


def _open(file: Path) -> Any:
    from PIL import Image

    return Image.open(file)


def adapters_of(units: Path, seed: int, folder: Path) -> dict[str, Path]:
    """The trained-together adapters of a seed, and the sums of the single ones, which are written where missing."""
    found = {}
    for name in COMPARED:
        stem = name.replace(" ", "_")
        for step in together(METHODS[name]).kept:
            found[together_name(name, step)] = adapter_file(folder / stem, step)
        singles = [units / f"{concept}-seed{seed}" / stem for concept in TRIO]
        total = folder / f"{stem}-added.safetensors"
        if not total.exists():
            added([adapter_file(single, METHODS[name].steps) for single in singles], total)
        found[f"{name}, added"] = total
    return found
