"""What can go wrong in training."""

from __future__ import annotations

from pathlib import Path

from cat_rs.errors import CatRsError


class DatasetError(CatRsError, ValueError):
    """The folder of pictures cannot be used: a picture, a caption, or the folder itself."""


class CheckpointError(CatRsError, OSError):
    """A checkpoint or the adapter file cannot be written or read."""


class TrainingError(CatRsError, RuntimeError):
    """Training cannot start or go on."""


class TrainingInterrupted(CatRsError):
    """A signal stopped the training after a whole step; `checkpoint` continues it."""

    def __init__(self, step: int, checkpoint: Path, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}; continue with --resume (checkpoint {checkpoint})")
        self.step = step
        self.checkpoint = checkpoint
        self.signal_number = signal_number
