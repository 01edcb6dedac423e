"""The cached base predictions of a training: `teacher_draws`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cat_rs.processes import Processes
from cat_rs.run_folder import BANK_FILE
from cat_rs.step.teacher_bank import TeacherBank
from cat_rs.training.config import TrainConfig
from cat_rs.training.encoded_dataset import EncodedDataset
from cat_rs.training.errors import CheckpointError


def open_bank(
    config: TrainConfig, unet: Any, scheduler: Any, dataset: EncodedDataset, processes: Processes, progress: bool
) -> TeacherBank | None:
    """Build or find the bank in the output folder, where it stays until the training ends.

    None without draws, and where a preservation set has them.

    Rank 0 builds, all ranks read its file.

    Raises:
        CheckpointError: The bank cannot be written.
    """
    preserve, _, draws = config.preserved()
    if not draws or preserve == "set":
        return None
    mean, std, cond_no_trigger = dataset.all_views()
    latents, latents_std = (values.to("cpu", getattr(torch, config.dtype)) for values in (mean, std))

    def build() -> Path:
        path = Path(config.output_dir, BANK_FILE)
        if config.resume and path.exists():
            return path
        try:
            TeacherBank.build(
                unet,
                scheduler,
                latents,
                cond_no_trigger,
                draws=draws,
                latents_std=latents_std,
                # A generator of its own, so that a resumed training whose bank is gone builds the same one.
                generator=torch.Generator().manual_seed(config.seed),
                path=path,
                progress=progress,
            )
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        return path

    return TeacherBank.load(processes.on_main(build), latents=latents)
