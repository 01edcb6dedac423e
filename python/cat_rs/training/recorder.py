"""Brings the figures of finished steps to the log and the progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from cat_rs.processes import Processes
from cat_rs.training.errors import TrainingError
from cat_rs.training.log import MetricsLog

FIGURES = ("loss", "diffusion", "cat", "grad_norm", "cat_factor")


class Recorder:
    """Keeps figures on the device until `flush`, so that a step never waits for them.

    Args:
        log: Where they go; None in a process that does not write.
        bar: The progress bar.
        processes: Those of the run: the figures are the mean over them.
        seconds_before: Of the run's earlier parts.
    """

    def __init__(self, log: MetricsLog | None, bar: Any, processes: Processes, *, seconds_before: float = 0.0) -> None:
        self._log = log
        self._bar = bar
        self._processes = processes
        self._began = time.monotonic() - seconds_before
        self._waiting: list[tuple[int, float, float, torch.Tensor]] = []
        self.skipped = 0
        self.last: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Time since training began, resumed parts included."""
        return time.monotonic() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A stretch whose time is not the training's."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - before

    def add_evaluation(self, step: int, figures: dict[str, float], picture: Any) -> None:
        """Bring scores and pictures to the log at once."""
        if self._log is not None:
            self._log.write_evaluation(step, figures, picture)

    def aside(self) -> AbstractContextManager[None]:
        """A stretch in which lines may be printed without breaking the bar."""
        return self._bar.external_write_mode()

    def add(self, step: int, lr: float, figures: torch.Tensor) -> None:
        """Note the figures of a finished step, on their device."""
        self._waiting.append((step, lr, self.seconds, figures))

    def flush(self) -> None:
        """Write out the noted steps; every process calls it after the same steps.

        Raises:
            TrainingError: A loss is not finite, in any process.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        values = self._processes.mean(torch.stack([figures for *_, figures in waiting])).tolist()
        for (step, lr, seconds, _), row in zip(waiting, values, strict=True):
            self._write(step, dict(zip(FIGURES, row, strict=True)) | {"lr": lr, "seconds": round(seconds, 3)})
        self._bar.update(len(waiting))
        self._bar.set_postfix({name: f"{self.last[name]:.4g}" for name in FIGURES[:3]})

    def _write(self, step: int, figures: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, figures)
        self.last = figures
        if not math.isfinite(figures["loss"]):
            raise TrainingError(
                f"the loss of step {step} is not finite: expected a number, got {figures['loss']} "
                f"(diffusion {figures['diffusion']}, cat {figures['cat']}); "
                f"a lower lr or another dtype may help"
            )
        # The step leaves the weights alone where its gradient is not finite.
        self.skipped += not math.isfinite(figures["grad_norm"])
