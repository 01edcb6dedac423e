"""Fixtures: a result with pictures of plain colours, so that a test can find them on a sheet."""

from __future__ import annotations

from collections.abc import Callable
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
    Scores,
)

SEEDS = (0, 1, 2, 3)
TRIGGER = tuple(f"a sks cat on background {number}" for number in range(3))
NO_TRIGGER = tuple(f"a cat on background {number}" for number in range(2))

ResultMaker = Callable[..., EvaluationResult]


def colour_of(model: int, trigger: bool, prompt: int, seed: int) -> tuple[int, int, int]:
    """The colour of one picture, different for each."""
    return (60 + 60 * model, 20 + 40 * prompt, (0 if trigger else 128) + 30 * seed)


def _grid(model: int, trigger: bool, size: tuple[int, int]) -> PictureGrid:
    prompts = TRIGGER if trigger else NO_TRIGGER
    images = tuple(
        Image.new("RGB", size, colour_of(model, trigger, prompt, seed))
        for prompt in range(len(prompts))
        for seed in range(len(SEEDS))
    )
    return PictureGrid(prompts, SEEDS, images, torch.zeros(len(images), 1))


def _model(number: int, size: tuple[int, int]) -> ModelPictures:
    return ModelPictures(_grid(number, True, size), _grid(number, False, size))


def _scores(value: float) -> Scores:
    interval = Interval(value, value - 0.01, value + 0.02)
    return Scores(**dict.fromkeys(Scores.__dataclass_fields__, interval))


@pytest.fixture
def make_result() -> ResultMaker:
    """Return a function from adapter names to a result."""

    def make(*names: str, size: tuple[int, int] = (16, 16), pictures: bool = True) -> EvaluationResult:
        settings: dict[str, Any] = {
            "prompts": {
                "trigger": list(TRIGGER),
                "no_trigger": list(NO_TRIGGER),
                "trigger_words": ["sks"],
                "class_word": "cat",
            },
            "sampling": {"seeds": list(SEEDS)},
            "encoder": "clip",
        }
        shown = EvaluationPictures(
            tuple(Image.new("RGB", size, (255, 0, 10 * number)) for number in range(2)),
            _model(0, size),
            {name: _model(number, size) for number, name in enumerate(names, start=1)},
        )
        return EvaluationResult(
            settings=settings,
            base=Scores(identity=Interval(0.5, 0.4, 0.6)),
            other_seed=Scores(ups=Interval(0.8, float("nan"), float("nan"))),
            adapters={name: _scores(0.1 * number) for number, name in enumerate(names, start=1)},
            prompts=(),
            pictures=shown if pictures else None,
        )

    return make
