"""Pictures of the adapter during training, in the run's folder: samples/step-000100/000_seed0.png, and so on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cat_rs.atomic import new_folder
from cat_rs.evaluation import EvaluationConfig, PictureGrid, save_pictures
from cat_rs.evaluation.generation import generate_batch, joined, request_batches, undisturbed
from cat_rs.options import ConfigError
from cat_rs.run_folder import SAMPLE_FOLDER, step_name, step_paths
from cat_rs.text_files import read_prompts
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError


class Samples:
    """Draws the prompts of a training on rank 0; does nothing if not asked to.

    Raises:
        ConfigError: A file of prompts cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._folder = Path(config.output_dir, SAMPLE_FOLDER)
        self._prompts = [prompt for text in config.sample_prompts for prompt in _prompts(text)]
        self._sampling = evaluation_config(config)

    def open(self, pipeline: Any) -> None:
        """Take the pipeline with the adapter in its U-Net."""
        if self._config.sample_every:
            self._pipeline = pipeline
            restore_dtype(pipeline, self._config)

    def is_due(self, step: int) -> bool:
        """Return whether pictures are drawn after this step: every so many, and the last."""
        every = self._config.sample_every
        return every > 0 and step > 0 and (step % every == 0 or step == self._config.steps)

    def resume(self, step: int) -> bool:
        """Remove the pictures after this step, and return whether the step's own are due and missing."""
        for later, folder in step_paths(self._folder).items():
            if later > step:
                shutil.rmtree(folder)
        return self.is_due(step) and not (self._folder / step_name(step)).exists()

    def draw(self, step: int) -> PictureGrid:
        """Draw the prompts with the adapter as it is now, and write the pictures.

        Raises:
            CheckpointError: They cannot be written.
        """
        with undisturbed(self._pipeline):
            batches = request_batches(self._prompts, self._sampling)
            made = [generate_batch(self._pipeline, requests, self._sampling) for requests in batches]
        grid = joined(self._prompts, self._sampling.seeds, made)
        try:
            with new_folder(self._folder / step_name(step)) as folder:
                save_pictures(grid, folder)
        except OSError as error:
            raise CheckpointError(f"cannot write the pictures of step {step} in {self._folder}: {error}") from error
        return grid


def evaluation_config(config: TrainConfig) -> EvaluationConfig:
    """Return how a training draws pictures."""
    return EvaluationConfig(
        num_inference_steps=config.evaluate_inference_steps,
        guidance_scale=config.evaluate_guidance,
        seeds=config.evaluate_seeds,
        height=config.resolution,
        width=config.resolution,
        batch_size=config.evaluate_batch,
    )


def restore_dtype(pipeline: Any, config: TrainConfig) -> None:
    """Bring the VAE back to the settings' dtype: encoding the pictures took it to float32."""
    dtype = getattr(torch, config.dtype)
    if pipeline.vae.dtype != dtype:
        pipeline.vae.to(dtype)


def _prompts(text: str) -> list[str]:
    """Return the prompts of a file, or the text itself."""
    if not Path(text).is_file():
        if Path(text).suffix and " " not in text:
            raise ConfigError(
                f"sample_prompts: expected a prompt or a file of prompts, got {text!r}, which is no file"
            )
        return [text]
    try:
        prompts = read_prompts(text)
    except OSError as error:
        raise ConfigError(f"sample_prompts: cannot read {text}: {error}") from error
    if not prompts:
        raise ConfigError(f"sample_prompts: expected at least one prompt in {text}, got none")
    return prompts
