"""The log of a training: metrics.jsonl, trackers such as TensorBoard, and the progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cat_rs.atomic import write_bytes
from cat_rs.processes import Processes
from cat_rs.run_folder import METRICS_FILE, MetricsError, metrics_rows
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError, TrainingError
from cat_rs.training.trackers import open_tensorboard

FIGURES = ("loss", "diffusion", "cat", "grad_norm", "cat_factor")


class TrainingLog:
    """Logs the steps of a training; rank 0 writes the means over the ranks.

    Figures stay on the device until `flush`, so that a step never waits for them. One that is not finite, as `cat` is
    in a step without a preservation term, is null in metrics.jsonl, because JSON has no other word for it; trackers do
    not get it, and the bar keeps the one before.

    Args:
        config: The settings.
        processes: The ranks that train together.
        trackers: Those that get the log beside TensorBoard; the log finishes them.
        bar: The progress bar.
        after_step: The step from which the training continues.
        seconds_before: The time that its earlier parts took.

    Attributes:
        skipped: The number of steps whose gradient was not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        trackers: Sequence[Any],
        bar: Any,
        *,
        after_step: int,
        seconds_before: float,
    ) -> None:
        self._processes = processes
        self._bar = bar
        self._file = None
        self._trackers = list(trackers)
        if processes.is_main:
            self._trackers += open_tensorboard(config, after_step)
            path = Path(config.output_dir, METRICS_FILE)
            # A line is written at once: a reader never sees half of one.
            self._file = path.open("a", encoding="utf-8", buffering=1)
        self._began = time.monotonic() - seconds_before
        self._waiting: list[tuple[int, float, float, torch.Tensor]] = []
        self._shown: dict[str, str] = {}
        self.skipped = 0

    @property
    def seconds(self) -> float:
        """The time since training began, resumed parts included, pauses not."""
        return time.monotonic() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the training's."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - before

    def add(self, step: int, lr: float, figures: torch.Tensor) -> None:
        """Note the figures of a finished step, which stay on their device."""
        self._waiting.append((step, lr, self.seconds, figures))

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Give the scores of a step to the trackers; the evaluation has its own files beside it."""
        for tracker in self._trackers:
            tracker.log({f"evaluation/{name}": value for name, value in figures.items()}, step=step)

    def add_pictures(self, name: str, step: int, pictures: NDArray[np.uint8]) -> None:
        """Give pictures [N, H, W, 3] of a step to the trackers that take pictures."""
        for tracker in self._trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: pictures}, step=step)

    def flush(self) -> None:
        """Write the noted steps; every rank calls it after the same steps.

        Raises:
            TrainingError: A loss is not finite on some rank.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        values = self._processes.all_reduce_mean(torch.stack([figures for *_, figures in waiting])).tolist()
        for (step, lr, seconds, _), row in zip(waiting, values, strict=True):
            self._write(step, dict(zip(FIGURES, row, strict=True)) | {"lr": lr, "seconds": round(seconds, 3)})
            self._shown |= {
                name: f"{value:.4g}" for name, value in zip(FIGURES[:3], row, strict=False) if math.isfinite(value)
            }
        self._bar.update(len(waiting))
        self._bar.set_postfix(self._shown)

    def close(self) -> None:
        """Write what is buffered, and end the bar."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        if self._file is not None:
            line = {"step": step} | {name: known.get(name) for name in figures}
            self._file.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.log({f"train/{name}": value for name, value in known.items()}, step=step)
        if not math.isfinite(figures["loss"]):
            raise TrainingError(
                f"the loss of step {step} is not finite: expected a number, got {figures['loss']} (diffusion "
                f"{figures['diffusion']}, cat {figures['cat']}); a lower lr or another dtype may help"
            )
        # The step leaves the weights alone where its gradient is not finite.
        self.skipped += not math.isfinite(figures["grad_norm"])


def drop_lines_after(folder: Path, step: int) -> None:
    """Cut metrics.jsonl to the steps up to a checkpoint, from which the training continues.

    Raises:
        CheckpointError: A line before the last is broken; the file is as before.
    """
    file = folder / METRICS_FILE
    if not file.exists():
        return
    try:
        rows = [row for row in metrics_rows(file) if row["step"] <= step]
    except MetricsError as error:
        raise CheckpointError(f"cannot continue the log: {error}; mend or remove the line") from error
    write_bytes(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
