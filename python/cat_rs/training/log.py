"""The record of a run: metrics.jsonl, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from cat_rs.atomic import write_bytes
from cat_rs.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, MetricsError, metrics_rows
from cat_rs.training.errors import CheckpointError


class MetricsLog:
    """Appends one JSON object a logged step to `metrics.jsonl`, and the same figures to TensorBoard.

    A figure that is not finite is written as null, which JSON can hold.
    """

    def __init__(self, folder: str | os.PathLike[str], *, after_step: int = 0, tensorboard: bool = True) -> None:
        """Open the record.

        Args:
            folder: The run's output folder.
            after_step: The step from which the run continues; later lines of an earlier try are dropped.
            tensorboard: Also write a TensorBoard log.

        Raises:
            CheckpointError: The log of the earlier part is broken before its last line.
        """
        path = Path(folder, METRICS_FILE)
        _drop_lines_after(path, after_step)
        # One line is written at once: a reader never sees half of one.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = _open_tensorboard(Path(folder, TENSORBOARD_FOLDER), after_step) if tensorboard else None

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Add the figures of one step."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def write_evaluation(self, step: int, figures: dict[str, float], picture: Any) -> None:
        """Add the scores of one step, and pictures [H, W, 3], to TensorBoard; they have files of their own beside."""
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"evaluation/{name}", value, step)
            self._board.add_image("evaluation/pictures", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _drop_lines_after(path: Path, step: int) -> None:
    if path.exists():
        try:
            rows = [row for row in metrics_rows(path) if row["step"] <= step]
        except MetricsError as error:
            raise CheckpointError(f"cannot continue the log: {error}; mend or remove the line") from error
        write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _open_tensorboard(folder: Path, after_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)
