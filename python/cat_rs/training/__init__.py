"""Train a LoRA from a folder of pictures: what `cat-rs train` runs."""

from __future__ import annotations

from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError, DatasetError, TrainingError, TrainingInterrupted
from cat_rs.training.loop import TrainResult, train

__all__ = [
    "CheckpointError",
    "DatasetError",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TrainingInterrupted",
    "train",
]
