"""Pictures from a diffusers pipeline: batched, and each from noise of its own."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from cat_rs.atomic import write_bytes
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.files import DIFFUSERS_FILE


@dataclass(frozen=True)
class PictureGrid:
    """The pictures of one model for P prompts and S seeds, in the order prompt 0 seed 0, prompt 0 seed 1, ...

    Attributes:
        prompts: The P prompts.
        seeds: The S seeds.
        images: P * S pictures.
        latents: [P * S, ...], what the last denoising step returned, float32 on the CPU.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: tuple[Image.Image, ...]
    latents: torch.Tensor

    def picture(self, prompt: int, seed: int) -> Image.Image:
        """Return the picture of the prompt and the seed with these numbers."""
        return self.images[prompt * len(self.seeds) + seed]


def picture_generator(prompt_index: int, seed: int) -> torch.Generator:
    """Return the CPU generator of one picture.

    It depends on nothing but the prompt's index and the seed, so a picture is the same in any batch and on any
    device, and prompt i with the trigger starts from the same noise as prompt i without it.
    """
    state = np.random.SeedSequence((prompt_index, seed)).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def generate_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    config: EvaluationConfig,
    *,
    adapter: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PictureGrid:
    """Generate one picture for each prompt and seed.

    Args:
        pipeline: A diffusers pipeline that takes `prompt`, `generator` and `callback_on_step_end`.
        prompts: The prompts.
        config: The sampler settings.
        adapter: A LoRA to load for these pictures, see `adapter_loaded`.
        progress: Whether to show a progress bar.
    """
    total = len(prompts) * len(config.seeds)
    with (
        adapter_loaded(pipeline, adapter),
        tqdm(total=total, unit="picture", disable=not progress, desc="generate") as bar,
    ):
        return generate_grid(pipeline, prompts, config, bar)


def generate_grid(pipeline: Any, prompts: Sequence[str], config: EvaluationConfig, bar: Any) -> PictureGrid:
    """Generate with the pipeline as it is, and counts the pictures on a progress bar."""
    if not prompts:
        raise EvaluationInputError("prompts: expected at least one, got none")
    requests = [(index, seed) for index in range(len(prompts)) for seed in config.seeds]
    images: list[Image.Image] = []
    latents: list[torch.Tensor] = []
    with _own_progress_bar_hidden(pipeline):
        for start in range(0, len(requests), config.batch_size):
            batch = requests[start : start + config.batch_size]
            batch_images, batch_latents = _generate_batch(pipeline, prompts, batch, config)
            images += batch_images
            latents.append(batch_latents)
            bar.update(len(batch))
    return PictureGrid(tuple(prompts), config.seeds, tuple(images), torch.cat(latents))


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """Return the safetensors file of an adapter given as a file, or as the folder that training wrote.

    Raises:
        EvaluationFileError: There is no such file.
    """
    given = Path(path)
    file = given / DIFFUSERS_FILE if given.is_dir() else given
    if not file.is_file():
        raise EvaluationFileError(
            f"adapter: expected a safetensors file or a folder with {DIFFUSERS_FILE}, got {given}"
        )
    return file


@contextmanager
def adapter_loaded(pipeline: Any, path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Load a LoRA into the pipeline for the length of a block; None leaves the base model.

    Args:
        pipeline: A diffusers pipeline without adapters.
        path: A safetensors file, or a folder with `pytorch_lora_weights.safetensors`.

    Raises:
        EvaluationInputError: The pipeline carries an adapter already, or the file does not fit the model.
        EvaluationFileError: There is no such file, or it cannot be read.
    """
    require_no_adapter(pipeline)
    if path is None:
        yield
        return
    file = adapter_file(path)
    try:
        _load_adapter(pipeline, file)
        yield
    finally:
        pipeline.unload_lora_weights()


def require_no_adapter(pipeline: Any) -> None:
    """Raise if the pipeline carries an adapter: it would pass for the base model."""
    loaded = _adapter_names(pipeline)
    if loaded:
        raise EvaluationInputError(
            f"pipeline: expected the base model, got one with the adapters {loaded}; call unload_lora_weights() first"
        )


def save_pictures(grid: PictureGrid, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the pictures as PNG files, and `metadata.jsonl` with the prompt and seed of each.

    Returns:
        The paths of the pictures.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files, rows = [], []
    requests = [(index, seed) for index in range(len(grid.prompts)) for seed in grid.seeds]
    for (index, seed), image in zip(requests, grid.images, strict=True):
        file = target / f"{index:03d}_seed{seed}.png"
        write_bytes(file, _png(image))
        files.append(file)
        rows.append({"file_name": file.name, "text": grid.prompts[index], "seed": seed})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(target / "metadata.jsonl", lines.encode())
    return files


def _generate_batch(
    pipeline: Any, prompts: Sequence[str], batch: Sequence[tuple[int, int]], config: EvaluationConfig
) -> tuple[list[Image.Image], torch.Tensor]:
    last: dict[str, torch.Tensor] = {}

    def keep_latents(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        last["latents"] = values["latents"]
        return {}

    output = pipeline(
        prompt=[prompts[index] for index, _ in batch],
        generator=[picture_generator(index, seed) for index, seed in batch],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        height=config.height,
        width=config.width,
        callback_on_step_end=keep_latents,
        output_type="pil",
    )
    return list(output.images), last["latents"].detach().to("cpu", torch.float32)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _load_adapter(pipeline: Any, file: Path) -> None:
    try:
        with _notes_on_absent_parts_hidden():
            # use_safetensors keeps diffusers from trying the file as a pickle.
            pipeline.load_lora_weights(file.parent, weight_name=file.name, use_safetensors=True)
    except Exception as error:
        # safetensors, diffusers and PEFT each have errors of their own for a file that does not fit.
        reason = str(error).partition("\n")[0]
        raise EvaluationFileError(f"adapter: {file} cannot be loaded: {reason}") from error
    if not _adapter_names(pipeline):
        # diffusers only warns, and the base model would score a perfect KPS.
        raise EvaluationInputError(f"adapter: expected a LoRA for {type(pipeline).__name__} in {file}, got none")


def _adapter_names(pipeline: Any) -> list[str]:
    return sorted({name for names in pipeline.get_list_adapters().values() for name in names})


@contextmanager
def _notes_on_absent_parts_hidden() -> Iterator[None]:
    """Hide diffusers' note that an adapter has no weights for the text encoder, which is the usual case."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextmanager
def _own_progress_bar_hidden(pipeline: Any) -> Iterator[None]:
    """Hide the pipeline's bar of denoising steps: one bar counts the pictures."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
