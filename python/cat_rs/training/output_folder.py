"""The output folder of a training: settings, checkpoints and the adapter."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_rs import run_folder
from cat_rs.adapter_file.paths import DIFFUSERS_FILE
from cat_rs.options import ConfigError
from cat_rs.training.checkpoint import CheckpointFolder, load_state
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError
from cat_rs.training.log import drop_lines_after
from cat_rs.training.model_card import is_own_card, write_card
from cat_rs.training.trainer import Trainer

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_CONTENT = (
    run_folder.CHECKPOINT_FOLDER,
    run_folder.METRICS_FILE,
    run_folder.TENSORBOARD_FOLDER,
    DIFFUSERS_FILE,
    run_folder.CONFIG_FILE,
    run_folder.BANK_FILE,
    run_folder.EVALUATION_FOLDER,
    run_folder.BEST_FOLDER,
    run_folder.SAMPLE_FOLDER,
)


class OutputFolder:
    """The output folder of one training; only rank 0 looks into it and writes.

    Attributes:
        path: The folder.
        checkpoints: The checkpoints in it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.path = Path(config.output_dir)
        self._locked = False
        self.checkpoints = CheckpointFolder(self.path / run_folder.CHECKPOINT_FOLDER, config.keep_checkpoints)

    def check(self) -> None:
        """Keep another training in the folder from being mixed with this one.

        Raises:
            ConfigError: One is running there; or there is an earlier one without `resume` or `overwrite`.
        """
        if self.path.is_dir():
            self._lock_folder()
        earlier = [name for name in _CONTENT if (self.path / name).exists()]
        if earlier and not (self._config.resume or self._config.overwrite):
            raise ConfigError(
                f"output_dir: expected a folder without a run, got {self.path} with {', '.join(earlier)}; "
                f"give --resume, --overwrite or another --output-dir"
            )

    def resume_state(self, data: str, world_size: int) -> dict[str, Any] | None:
        """Read the state to continue from; None without `resume`.

        Args:
            data: The fingerprint of the pictures and captions.
            world_size: The number of ranks.

        Raises:
            ConfigError: There is none, or it has other settings, data or another number of ranks.
            CheckpointError: It cannot be read.
        """
        if not self._config.resume:
            return None
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            raise ConfigError(
                f"resume: expected a checkpoint in {self.path / run_folder.CHECKPOINT_FOLDER}, got none; "
                "start the training without resume"
            )
        state = load_state(checkpoint)
        self._config.check_continues(state["config"])
        if state["data"] != data:
            raise ConfigError(f"resume: expected the pictures and captions of {checkpoint}, got others")
        # A checkpoint of version 0.1 is one process's.
        before = 1 + len(state.get("other_processes", ()))
        if before != world_size:
            raise ConfigError(f"resume: expected as many processes as wrote {checkpoint}, {before}, got {world_size}")
        return state

    def claim(self) -> None:
        """Make the folder, and keep other trainings out of it from here on.

        Raises:
            ConfigError: Another training is running in the folder.
            CheckpointError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
        except OSError as error:
            raise self._not_written(error) from error

    def open(self, after_step: int) -> None:
        """Make the folder, write the settings, and remove what the training will write anew.

        Args:
            after_step: The step from which the training continues; 0 for a new one.

        Raises:
            ConfigError: Another training is running in the folder.
            CheckpointError: The folder cannot be written, or the log in it is broken.
        """
        self.claim()
        try:
            if self._config.overwrite:
                self._clear()
            self._config.save(self.path / run_folder.CONFIG_FILE)
        except OSError as error:
            raise self._not_written(error) from error
        drop_lines_after(self.path, after_step)

    def save_checkpoint(self, trainer: Trainer, others: list[dict[str, Any]], data: str, seconds: float) -> Path:
        """Write a checkpoint of the trainer after its last finished step.

        Args:
            trainer: The trainer.
            others: The random states of the other ranks; all other state is the same on every rank.
            data: The fingerprint of the pictures and captions.
            seconds: The time that training has taken.

        Raises:
            CheckpointError: It cannot be written; the earlier ones are untouched.
        """
        state = {
            "run": trainer.state_dict(),
            "other_processes": others,
            "config": self._config.effective(),
            "data": data,
            "seconds": seconds,
        }
        return self.checkpoints.save(trainer.steps_done, state, trainer.save_adapter)

    def finish(self, trainer: Trainer, card: ModelCard, report: Callable[[str], object]) -> Path:
        """Write the adapter and its card, and remove what only a continuation would need.

        Raises:
            CheckpointError: One of them cannot be written.
        """
        try:
            adapter = trainer.save_adapter(self.path)
            if not write_card(self.path, card):
                report(f"{self.path / run_folder.CARD_FILE} stays: cat-rs did not write it")
        except OSError as error:
            latest = self.checkpoints.latest()
            kept = f"; the checkpoint {latest} is whole" if latest else ""
            raise CheckpointError(
                f"cannot write {DIFFUSERS_FILE} and {run_folder.CARD_FILE} in {self.path}: {error}{kept}"
            ) from error
        for name in (run_folder.BANK_FILE, run_folder.LOCK_FILE):
            (self.path / name).unlink(missing_ok=True)
        return adapter

    def _not_written(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write to the output folder {self.path}: {error}")

    def _lock_folder(self) -> None:
        """Keep other processes out of the folder as long as this object lives."""
        if self._locked:
            return
        lock = os.open(self.path / run_folder.LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                # A file system without locks.
                return
            raise ConfigError(
                f"output_dir: expected a folder without a running training, got {self.path}, where another one writes"
            ) from error
        self._locked = True

    def _clear(self) -> None:
        if is_own_card(self.path / run_folder.CARD_FILE):
            (self.path / run_folder.CARD_FILE).unlink()
        for path in map(self.path.joinpath, _CONTENT):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
