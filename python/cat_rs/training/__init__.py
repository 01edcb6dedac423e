"""Train a LoRA from a folder of pictures: what `cat-rs train` runs."""

from __future__ import annotations

from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError, DatasetError, TrainingError, TrainingInterrupted
from cat_rs.training.loop import TrainResult, train
from cat_rs.training.rewinding import Rewind, RewindPoint, rewind

__all__ = [
    "CheckpointError",
    "DatasetError",
    "Rewind",
    "RewindPoint",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TrainingInterrupted",
    "rewind",
    "train",
]
