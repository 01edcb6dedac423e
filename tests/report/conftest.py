"""Fixtures: a result with pictures of plain colours, so that a test can find them on a sheet; folders of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cat_rs.evaluation import (
    EvaluationPictures,
    EvaluationResult,
    Interval,
    ModelPictures,
    PictureGrid,
    PromptScores,
    Scores,
)
from cat_rs.report import PICTURES_FOLDER, save_all_pictures

SEEDS = (0, 1, 2, 3)
TRIGGER = tuple(f"a sks cat on background {number}" for number in range(3))
NO_TRIGGER = tuple(f"a cat on background {number}" for number in range(2))

ResultMaker = Callable[..., EvaluationResult]


def colour_of(model: int, trigger: bool, prompt: int, seed: int) -> tuple[int, int, int]:
    """The colour of one picture, different for each."""
    return (60 + 60 * model, 20 + 40 * prompt, (0 if trigger else 128) + 30 * seed)


def _grid(model: int, trigger: bool, prompts: tuple[str, ...], size: tuple[int, int]) -> PictureGrid:
    images = tuple(
        Image.new("RGB", size, colour_of(model, trigger, prompt, seed))
        for prompt in range(len(prompts))
        for seed in range(len(SEEDS))
    )
    return PictureGrid(prompts, SEEDS, images, torch.zeros(len(images), 1))


def _model(number: int, trigger: tuple[str, ...], size: tuple[int, int]) -> ModelPictures:
    return ModelPictures(_grid(number, True, trigger, size), _grid(number, False, NO_TRIGGER, size))


def _scores(value: float) -> Scores:
    interval = Interval(value, value - 0.01, value + 0.02)
    return Scores(**dict.fromkeys(Scores.__dataclass_fields__, interval))


def make_evaluation(
    *names: str, size: tuple[int, int] = (16, 16), pictures: bool = True, trigger: tuple[str, ...] = TRIGGER
) -> EvaluationResult:
    """A result for adapters of these names."""
    settings: dict[str, Any] = {
        "prompts": {
            "trigger": list(trigger),
            "no_trigger": list(NO_TRIGGER),
            "trigger_words": ["sks"],
            "class_word": "cat",
        },
        "sampling": {"seeds": list(SEEDS)},
        "encoder": "clip",
    }
    shown = EvaluationPictures(
        tuple(Image.new("RGB", size, (255, 0, 10 * number)) for number in range(2)),
        _model(0, trigger, size),
        {name: _model(number, trigger, size) for number, name in enumerate(names, start=1)},
    )
    return EvaluationResult(
        settings=settings,
        base=Scores(identity=Interval(0.5, 0.4, 0.6)),
        other_seed=Scores(ups=Interval(0.8, float("nan"), float("nan"))),
        adapters={name: _scores(0.1 * number) for number, name in enumerate(names, start=1)},
        prompts=(),
        pictures=shown if pictures else None,
    )


@pytest.fixture
def make_result() -> ResultMaker:
    """Return `make_evaluation`, a function from adapter names to a result."""
    return make_evaluation


def scored(result: EvaluationResult) -> EvaluationResult:
    """The result with figures for each prompt; similarity falls from prompt to prompt and from adapter to adapter."""
    rows = []
    of_kind = result.settings["prompts"]
    prompts = [(prompt, kind == "trigger") for kind in ("trigger", "no_trigger") for prompt in of_kind[kind]]
    for number, name in enumerate(["base", *result.adapters]):
        for place, (prompt, trigger) in enumerate(prompts):
            similarity = [0.99 - 0.05 * place - 0.03 * number - 0.001 * seed for seed in SEEDS]
            rows.append(
                PromptScores(
                    name,
                    prompt,
                    trigger,
                    similarity=tuple(similarity if number else ()),
                    identity=tuple([0.5 + 0.01 * number] * len(SEEDS) if trigger else ()),
                    diversity=0.1 * place + 0.01 * number,
                )
            )
    return replace(result, prompts=tuple(rows))


def write_evaluation(folder: Path, result: EvaluationResult) -> Path:
    """Write what `cat-rs evaluate` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    result.save(folder / "results.json")
    if result.pictures is not None:
        save_all_pictures(result, folder / PICTURES_FOLDER)
    return folder


def write_training(folder: Path, *, cat: float = 1.0, steps: int = 20) -> Path:
    """Write what `cat-rs train` writes, without the adapter."""
    folder.mkdir(parents=True)
    (folder / "train_config.yaml").write_text(f"model: m\ncat_factor: {cat}\ntrigger:\n- sks\ntensorboard: true\n")
    rows = [
        {"step": step, "diffusion": 0.1 + 0.1 / step, "cat": cat / step, "grad_norm": 0.5, "cat_factor": cat}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_front(folder: Path, result: EvaluationResult, identities: Sequence[float], best: int) -> None:
    """Write what `cat-rs train --evaluate-every 10` adds to a training: one checkpoint for each identity.

    The result's adapter stands for each of them.
    """
    (folder / "evaluations").mkdir()
    rows = []
    (adapter,) = result.adapters
    for number, identity in enumerate(identities, start=1):
        step = 10 * number
        name = f"step {step}"
        scores = replace(result.adapters[adapter], identity=Interval(identity, identity - 0.05, identity + 0.05))
        prompts = tuple(replace(row, model=name) if row.model == adapter else row for row in result.prompts)
        replace(result, adapters={name: scores}, prompts=prompts).save(
            folder / "evaluations" / f"step-{step:06d}.json"
        )
        rows.append({"step": step, "scores": {}, "on_front": True, "best": step == best, "adapter": None})
    front = {"format": "cat-rs front 1", "rule": "the highest of all", "base": {}, "checkpoints": rows}
    (folder / "evaluations" / "front.json").write_text(json.dumps(front))
