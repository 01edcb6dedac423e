"""A concept trained and scored as `cat-rs demo` does it: trigger "sks", learning rate 2e-4, 16 denoising steps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cat_rs.evaluation import ClipEncoder, EvaluationConfig, EvaluationPrompts, EvaluationResult, evaluate
from cat_rs.training import TrainConfig, TrainResult, train
from concepts import CLIP, EMOJI_MODEL, MODEL

ENTRIES = {entry["name"]: entry for entry in json.loads((EMOJI_MODEL / "prompts.json").read_text())["concepts"]}
TRIGGER = "sks"


def train_adapter(concept: str, seed: int, output: Path, **settings: Any) -> TrainResult:
    """Train one adapter, from its latest checkpoint if there is one.

    Args:
        concept: The concept's name.
        seed: The training seed.
        output: The run's folder.
        settings: The settings of `TrainConfig` that differ from the demo's.
    """
    resume = any((output / "checkpoints").glob("step-*"))
    fixed = {"rank": 16, "batch_size": 4, "lr": 2e-4, "checkpoint_every": 50, "keep_checkpoints": 1}
    config = TrainConfig(
        model=str(MODEL),
        data=str(EMOJI_MODEL / ENTRIES[concept]["folder"]),
        output_dir=str(output),
        trigger=(TRIGGER,),
        class_word=ENTRIES[concept]["class_word"],
        seed=seed,
        tensorboard=False,
        resume=resume,
        overwrite=not resume,
        **{**fixed, **settings},
    )
    return train(config, progress=False, report=lambda _line: None)


def score_adapters(
    concept: str, adapters: Mapping[str, Path], picture_seeds: Sequence[int], cache: str | os.PathLike[str]
) -> EvaluationResult:
    """Score adapters on the concept's prompts, each with all picture seeds; the cache keeps what is done."""
    from diffusers import StableDiffusionPipeline

    entry = ENTRIES[concept]
    prompts = EvaluationPrompts(
        trigger=tuple(entry["trigger_prompts"]),
        no_trigger=(*entry["class_prompts"], *entry["neighbour_prompts"], *entry["other_class_prompts"]),
        trigger_words=(TRIGGER,),
        class_word=entry["class_word"],
    )
    return evaluate(
        StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32),
        {name: str(file) for name, file in adapters.items()},
        prompts,
        ClipEncoder.from_pretrained(CLIP),
        concept_images=str(EMOJI_MODEL / entry["folder"]),
        config=EvaluationConfig(seeds=tuple(picture_seeds)),
        cache=cache,
        progress=False,
    )
