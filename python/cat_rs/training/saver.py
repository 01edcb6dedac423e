"""What a run writes: checkpoints, and the adapter with the facts of its making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cat_rs.adapter_file import save_lora
from cat_rs.adapter_file.paths import DIFFUSERS_FILE
from cat_rs.processes import Processes
from cat_rs.training.checkpoint import CheckpointFolder
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError
from cat_rs.training.run import TrainingRun


class Saver:
    """Writes one run's checkpoints and adapter, in the main process; every process calls its methods.

    Args:
        config: The run's settings.
        checkpoints: Its checkpoint folder.
        data: The fingerprint of its pictures and captions.
        processes: Those of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: CheckpointFolder,
        data: str,
        processes: Processes,
    ) -> None:
        self._config = config
        self._checkpoints = checkpoints
        self._data = data
        self._processes = processes

    def save_checkpoint(self, run: TrainingRun, seconds: float) -> Path:
        """Write a checkpoint of the run after its last finished step.

        Raises:
            CheckpointError: It cannot be written; the earlier ones are untouched.
        """
        # The state of the main process is everyone's, but for what the others draw.
        others = self._processes.gathered(run.draws_state_dict())[1:]

        def write() -> Path:
            state = {
                "run": run.state_dict(),
                "other_processes": others,
                "config": self._config.to_dict(),
                "data": self._data,
                "seconds": seconds,
            }
            return self._checkpoints.save(run.steps_done, state, lambda folder: self.write_adapter(run, folder))

        return self._processes.on_main(write)

    def save_adapter(self, run: TrainingRun) -> Path:
        """Write the adapter into the output folder.

        Raises:
            CheckpointError: It cannot be written.
        """
        return self._processes.on_main(lambda: self._save_adapter(run))

    def write_adapter(self, run: TrainingRun, folder: Path) -> Path:
        """Write the adapter as it is now into a folder; in one process."""
        return save_lora(folder, run.unet, metadata=self._facts(run))

    def _save_adapter(self, run: TrainingRun) -> Path:
        output = Path(self._config.output_dir)
        try:
            return self.write_adapter(run, output)
        except OSError as error:
            latest = self._checkpoints.latest()
            kept = f"; the checkpoint {latest} is whole" if latest else ""
            raise CheckpointError(f"cannot write {output / DIFFUSERS_FILE}: {error}{kept}") from error

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
            "cat_factor_end": config.cat_factor_end,
            "cat_ratio": config.cat_ratio,
            "snr_gamma": config.snr_gamma,
            "teacher_draws": config.teacher_draws,
            "rank": config.rank,
            "lr": config.lr,
            "batch_size": config.batch_size * config.accumulate * self._processes.count,
            "seed": config.seed,
            "steps": run.steps_done,
        }
