"""The methods that the study compares: each is a setting of `cat-rs train`, and leaves its adapter at several steps.

All share model, rank, learning rate and batch size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cat_rs
import torch
from cat_rs.evaluation import EvaluationConfig, ScaledAdapter
from cat_rs.training import TrainConfig, train
from concepts import MODEL, PRESERVE_PROMPTS, Concept
from diffusers import StableDiffusionPipeline

STEPS = 400
BATCH = 4
RANK = 16
LR = 4e-4
CLASS_PICTURES = 40  # for each concept, as many prompts as captions
PLAIN, RECIPE = "LoRA", "base pictures, every 4th"
# Plain LoRA learns fastest; what learns slower trains longer.
EARLY = (50, 100, 150, 200, 300, 400)
LONG, LONGEST = tuple(range(200, 2 * STEPS + 1, 200)), tuple(range(200, 3 * STEPS + 1, 200))
SCALES = (0.5, 0.7, 0.85, 1.0)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: In tables.
        what: What it is, in a line.
        train: Writes ``step-000400.safetensors`` and so on for the concept, seed and data folder into a folder.
        kept: The steps whose adapters are kept and scored, multiples of the first.
        steps: How long it trains.
        scales: At which the adapters are scored.
    """

    name: str
    what: str
    train: Callable[[Method, Concept, int, Path, Path], None]
    kept: tuple[int, ...] = (STEPS // 2, STEPS)
    steps: int = STEPS
    scales: tuple[float, ...] = (1.0,)

    def adapters_at_full_scale(self) -> list[str]:
        """Their names, in the order of the steps."""
        return [adapter_name(self.name, step) for step in self.kept]

    def adapters(self, folder: Path) -> dict[str, ScaledAdapter]:
        """Name -> the adapter of a step in the folder, at a scale."""
        return {
            adapter_name(self.name, step, scale): ScaledAdapter(adapter_file(folder, step), scale)
            for step in self.kept
            for scale in self.scales
        }


def adapter_name(method: str, step: int, scale: float = 1.0) -> str:
    """What results call an adapter."""
    return f"{method} @ {step}" if scale == 1.0 else f"{method} @ {step} x {scale:g}"


def adapter_file(folder: Path, step: int) -> Path:
    """Where a method leaves the adapter of a step."""
    return folder / f"step-{step:06d}.safetensors"


def with_trainer(method: Method, concept: Concept, seed: int, data: Path, folder: Path, **settings: Any) -> None:
    """What `cat-rs train` does."""
    every = method.kept[0]
    work = folder / "run"
    train(
        TrainConfig(
            model=str(MODEL),
            data=str(data),
            output_dir=str(work),
            rank=RANK,
            target_modules=TARGETS,
            steps=method.steps,
            batch_size=BATCH,
            lr=LR,
            seed=seed,
            checkpoint_every=every,
            keep_checkpoints=method.steps // every,
            tensorboard=False,
            overwrite=True,
            **{"trigger": (f"{concept.trigger}={concept.class_word}",), **settings},
        ),
        progress=False,
        report=lambda _line: None,
    )
    for step in method.kept:
        checkpoint = work / "checkpoints" / f"step-{step:06d}"
        (checkpoint / "pytorch_lora_weights.safetensors").replace(adapter_file(folder, step))
    (work / "metrics.jsonl").replace(folder / "metrics.jsonl")
    shutil.rmtree(work)


def with_class_pictures(
    method: Method, concept: Concept, seed: int, data: Path, folder: Path, **settings: Any
) -> None:
    """What `cat-rs train` does with pictures that the base model drew for the captions without the trigger."""
    file = data.with_suffix(".class.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    prompts = concept.captions_no_trigger
    sampling = EvaluationConfig(seeds=tuple(range(CLASS_PICTURES // len(prompts))))
    cat_rs.PreservationSet.build(pipeline, prompts, file, sampling=sampling, progress=False)
    settings = {"preserve": "set", "preserve_set": (str(file),), "preserve_every": 1, **settings}
    with_trainer(method, concept, seed, data, folder, **settings)


def _methods() -> dict[str, Method]:
    def cat(name: str, what: str, **settings: Any) -> Method:
        return Method(name, what, partial(with_trainer, **settings))

    def base_pictures(name: str, what: str, kept: tuple[int, ...], **settings: Any) -> Method:
        """At pictures of the captions without the trigger and of the bundled general prompts, half and half."""
        train = partial(with_trainer, preserve="set", **settings)
        return Method(name, f"CAT on {CLASS_PICTURES} + 203 base pictures, {what}", train, kept, kept[-1])

    methods = (
        Method(PLAIN, "plain LoRA", partial(with_trainer, cat_factor=0.0), EARLY, scales=SCALES),
        Method(
            "prior preservation",
            f"DreamBooth: {CLASS_PICTURES} class pictures of the base model are learned beside the concept's",
            partial(with_class_pictures, preservation="prior"),
        ),
        Method(
            "class pictures",
            "as in kohya's scripts: base predictions kept on those class pictures, noise and timesteps drawn apart",
            with_class_pictures,
        ),
        cat("blank prompt", "as in ai-toolkit: CAT for the empty prompt, factor 1", preserve="blank"),
        # From single trainings on pineapple with DCO's 10 and 100, L2's 0.001 and 0.01, the layers' 1 and 10.
        cat("DCO", "Direct Consistency Optimization, beta 30", preservation="dco", cat_factor=30.0),
        cat("L2", "the norm of the weights' change, factor 0.005", preservation="l2", cat_factor=0.005),
        cat("layers", "the change of each layer's output, factor 10", preservation="layers", cat_factor=10.0),
        cat("CAT 1", "CAT, cat_factor 1, the captions without the trigger preserved", preserve="captions"),
        cat(
            "CAT prompts",
            "CAT, cat_factor 1, 206 more prompts preserved in half of the samples",
            preserve="captions",
            preserve_prompts=str(PRESERVE_PROMPTS),
        ),
        base_pictures("base pictures", "factor 1", LONG, preserve_every=1, teacher_draws=0),
        base_pictures(RECIPE, "factor 1, 8 stored draws each, in every 4th step: the default", LONGEST),
    )
    return {method.name: method for method in methods}


METHODS = _methods()
