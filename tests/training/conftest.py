"""Settings of short trainings, and one thread for those that are compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs.training import TrainConfig


@pytest.fixture
def short_run(tiny_pipeline_dir: Path, concept_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes the settings of a short run, which draws no pictures of the base model; arguments override."""

    def make(**settings: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": str(tiny_pipeline_dir),
            "data": str(concept_dir),
            "output_dir": str(tmp_path / "adapter"),
            "trigger": ("sks",),
            "class_word": "cat",
            "preserve": "captions",
            "rank": 2,
            "batch_size": 2,
            "tensorboard": False,
            "device": "cpu",
        }
        return TrainConfig(**defaults | settings)

    return make


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
