"""What a run writes: checkpoints, and the adapter with the facts of its making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cat_rs.training.checkpoint import CheckpointFolder
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError
from cat_rs.training.model import ADAPTER_FILE, save_adapter
from cat_rs.training.run import TrainingRun


class Saver:
    """Writes one run's checkpoints and adapter.

    Args:
        config: The run's settings.
        checkpoints: Its checkpoint folder.
        data: The fingerprint of its pictures and captions.
        pipeline_class: The diffusers pipeline that is to load the adapter.
    """

    def __init__(self, config: TrainConfig, checkpoints: CheckpointFolder, data: str, pipeline_class: Any) -> None:
        self._config = config
        self._checkpoints = checkpoints
        self._data = data
        self._pipeline_class = pipeline_class

    def save_checkpoint(self, run: TrainingRun, seconds: float) -> Path:
        """Write a checkpoint of the run after its last finished step.

        Raises:
            CheckpointError: It cannot be written; the earlier ones are untouched.
        """
        state = {"run": run.state_dict(), "config": self._config.to_dict(), "data": self._data, "seconds": seconds}
        return self._checkpoints.save(run.steps_done, state, lambda folder: self._write_adapter(run, folder))

    def save_adapter(self, run: TrainingRun) -> Path:
        """Write the adapter into the output folder.

        Raises:
            CheckpointError: It cannot be written.
        """
        output = Path(self._config.output_dir)
        try:
            return self._write_adapter(run, output)
        except OSError as error:
            latest = self._checkpoints.latest()
            kept = f"; the checkpoint {latest} is whole" if latest else ""
            raise CheckpointError(f"cannot write {output / ADAPTER_FILE}: {error}{kept}") from error

    def _write_adapter(self, run: TrainingRun, folder: Path) -> Path:
        return save_adapter(run.unet, self._pipeline_class, folder, self._facts(run))

    def _facts(self, run: TrainingRun) -> dict[str, Any]:
        """What an adapter file tells of its making; of a local model only the folder's name."""
        import cat_rs

        config = self._config
        model = Path(config.model)
        return {
            "version": cat_rs.__version__,
            "base_model": model.resolve().name if model.is_dir() else config.model,
            "trigger": config.class_words(),
            "cat_factor": config.cat_factor,
            "snr_gamma": config.snr_gamma,
            "teacher_draws": config.teacher_draws,
            "rank": config.rank,
            "lr": config.lr,
            "batch_size": config.batch_size * config.accumulate,
            "seed": config.seed,
            "steps": run.steps_done,
        }
