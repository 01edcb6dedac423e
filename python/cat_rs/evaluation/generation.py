"""Pictures from a diffusers pipeline: batched, each from its own noise."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from cat_rs.adapter_file import paths
from cat_rs.adapter_file.merge import merge_loras
from cat_rs.adapter_file.pipeline import adapter_in, adapter_names, check_fits, pipeline_models
from cat_rs.adapter_file.read import read_lora
from cat_rs.atomic import write_bytes
from cat_rs.errors import AdapterError, CatRsError
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.image_files import png_bytes


class ScaledAdapter(NamedTuple):
    """An adapter, and how much of it a model gets.

    Attributes:
        path: A file or folder as `cat_rs.load_lora` reads it.
        scale: What its update is multiplied by.
    """

    path: str | os.PathLike[str]
    scale: float = 1.0


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


@dataclass(frozen=True)
class PictureRequest:
    """One picture to generate: its prompt, the prompt's index among those of its kind, and the seed."""

    prompt: str
    prompt_index: int
    seed: int


@dataclass(frozen=True)
class PictureBatch:
    """The B pictures of one call of the pipeline, and their latents [B, ...], float32 on the CPU."""

    images: tuple[Image.Image, ...]
    latents: torch.Tensor


def picture_generator(prompt_index: int, seed: int) -> torch.Generator:
    """Return the CPU generator of one picture.

    It depends only on the prompt's index and the seed. So a picture is the same in any batch and on any device, and
    prompt i with the trigger starts from the same noise as prompt i without it.
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
    made = []
    with (
        adapter_loaded(pipeline, adapter),
        tqdm(total=len(prompts) * len(config.seeds), unit="picture", disable=not progress, desc="generate") as bar,
    ):
        for requests in request_batches(prompts, config):
            made.append(generate_batch(pipeline, requests, config))
            bar.update(len(requests))
    return joined(prompts, config.seeds, made)


def request_batches(prompts: Sequence[str], config: EvaluationConfig) -> list[tuple[PictureRequest, ...]]:
    """Return the requests of each call of the pipeline: fixed slices of the P * S pictures.

    The other pictures in its call change a picture by rounding, so the slices depend on nothing else.

    Raises:
        EvaluationInputError: There is no prompt.
    """
    if not prompts:
        raise EvaluationInputError("prompts: expected at least one, got none")
    requests = [PictureRequest(prompt, index, seed) for index, prompt in enumerate(prompts) for seed in config.seeds]
    size = config.batch_size
    return [tuple(requests[start : start + size]) for start in range(0, len(requests), size)]


def generate_batch(pipeline: Any, requests: Sequence[PictureRequest], config: EvaluationConfig) -> PictureBatch:
    """Generate in one call, with the pipeline as it is.

    Raises:
        EvaluationInputError: The pipeline's safety checker blacked out a picture.
    """
    output, latents = _generate(pipeline, requests, config, "pil")
    flags = getattr(output, "nsfw_content_detected", None) or ()
    for request, flagged in zip(requests, flags, strict=False):
        if flagged:
            # Black pictures of both models would be alike, and score 1.
            raise EvaluationInputError(
                "pipeline: expected pictures, got one that the safety checker blacked out for "
                f"{request.prompt!r}, seed {request.seed}; set pipeline.safety_checker = None to evaluate"
            )
    return PictureBatch(tuple(output.images), latents)


def generate_latents(pipeline: Any, requests: Sequence[PictureRequest], config: EvaluationConfig) -> torch.Tensor:
    """Generate in one call without decoding; the latents, [B, ...], float32 on the CPU."""
    return _generate(pipeline, requests, config, "latent")[1]


def _generate(
    pipeline: Any, requests: Sequence[PictureRequest], config: EvaluationConfig, output_type: str
) -> tuple[Any, torch.Tensor]:
    """What the pipeline returns, and what its last denoising step did.

    Raises:
        EvaluationInputError: The pipeline refuses the settings, or one side of the pictures is missing.
    """
    last: dict[str, torch.Tensor] = {}

    def keep_latents(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        last["latents"] = values["latents"]
        return {}

    if (config.height is None) != (config.width is None):
        # Stable Diffusion's pipeline would take its own size for both.
        raise EvaluationInputError(
            f"height, width: expected both or none, got height {config.height} and width {config.width}"
        )
    with _own_progress_bar_hidden(pipeline):
        try:
            output = pipeline(
                prompt=[request.prompt for request in requests],
                generator=[picture_generator(request.prompt_index, request.seed) for request in requests],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                height=config.height,
                width=config.width,
                callback_on_step_end=keep_latents,
                output_type=output_type,
            )
        except CatRsError:
            raise
        except ValueError as error:
            # Such as a height that is no multiple of 8.
            raise EvaluationInputError(f"pipeline: expected settings that it can draw with, got: {error}") from error
    return output, last["latents"].detach().to("cpu", torch.float32)


@contextmanager
def undisturbed(pipeline: Any) -> Iterator[None]:
    """Draw pictures inside a training: torch's random state and the denoiser's mode are as before afterwards."""
    unet = pipeline.unet
    training = [module for module in unet.modules() if module.training]
    with torch.random.fork_rng([unet.device] if unet.device.type == "cuda" else []):
        unet.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def joined(prompts: Sequence[str], seeds: Sequence[int], batches: Sequence[PictureBatch]) -> PictureGrid:
    """Return the pictures of all batches of `request_batches`, in their order."""
    images = tuple(image for batch in batches for image in batch.images)
    return PictureGrid(tuple(prompts), tuple(seeds), images, torch.cat([batch.latents for batch in batches]))


def adapter_files(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the files of an adapter, by names that do not depend on where it is.

    Raises:
        EvaluationFileError: There is no adapter.
    """
    with _file_errors(path):
        return paths.adapter_files(path)


def check_adapter(pipeline: Any, path: str | os.PathLike[str]) -> None:
    """Read an adapter and look its layers up in the pipeline, which stays as it is.

    Raises:
        EvaluationInputError: The file does not fit the model.
        EvaluationFileError: There is no such file, or it cannot be read.
    """
    with _file_errors(path):
        lora = read_lora(path, pipeline_models(pipeline))
    try:
        check_fits(pipeline, lora)
    except AdapterError as error:
        raise EvaluationInputError(f"adapter: {os.fspath(path)}: {error}") from error


@contextmanager
def adapter_loaded(pipeline: Any, path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Load a LoRA into the pipeline for the length of a block; None leaves the base model.

    Args:
        pipeline: A diffusers pipeline without adapters.
        path: An adapter file or folder as `cat_rs.load_lora` reads it.

    Raises:
        EvaluationInputError: The pipeline carries an adapter already, or the file does not fit the model.
        EvaluationFileError: There is no such file, or it cannot be read.
    """
    with adapters_loaded(pipeline, () if path is None else (ScaledAdapter(path),)):
        yield


@contextmanager
def adapters_loaded(pipeline: Any, adapters: Sequence[ScaledAdapter]) -> Iterator[None]:
    """Load the sum of some LoRAs, each at its scale; none leaves the base model. Errors are `adapter_loaded`'s."""
    require_no_adapter(pipeline)
    if not adapters:
        yield
        return
    loras = []
    for path, _ in adapters:
        with _file_errors(path):
            loras.append(read_lora(path, pipeline_models(pipeline)))
    with ExitStack() as stack:
        try:
            if len(loras) == 1:
                stack.enter_context(adapter_in(pipeline, loras[0], adapters[0].scale))
            else:
                merged = merge_loras(loras, [each.scale for each in adapters])
                stack.enter_context(adapter_in(pipeline, merged.lora))
        except Exception as error:
            # PEFT has errors of its own for settings in a file that it cannot use.
            named = " and ".join(os.fspath(path) for path, _ in adapters)
            raise EvaluationInputError(f"adapter: {named}: {error}") from error
        yield


def require_no_adapter(pipeline: Any) -> None:
    """Raise if the pipeline carries an adapter: it would pass for the base model."""
    loaded = adapter_names(pipeline)
    if loaded:
        raise EvaluationInputError(
            f"pipeline: expected the base model, got one with the adapters {loaded}; call unload_lora_weights() first"
        )


def picture_files(folder: str | os.PathLike[str], prompts: int, seeds: Sequence[int]) -> list[Path]:
    """The files that `save_pictures` writes: the pictures in their order, and last `metadata.jsonl`."""
    names = [f"{index:03d}_seed{seed}.png" for index in range(prompts) for seed in seeds]
    return [Path(folder, name) for name in (*names, "metadata.jsonl")]


def save_pictures(grid: PictureGrid, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the pictures as PNG files, and `metadata.jsonl` with the prompt and seed of each.

    Returns:
        The paths of the pictures.
    """
    *files, metadata = picture_files(folder, len(grid.prompts), grid.seeds)
    metadata.parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(files, grid.images, strict=True):
        write_bytes(file, png_bytes(image))
    drawn = [(prompt, seed) for prompt in grid.prompts for seed in grid.seeds]
    rows = [
        {"file_name": file.name, "text": prompt, "seed": seed}
        for file, (prompt, seed) in zip(files, drawn, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(metadata, lines.encode(errors="backslashreplace"))
    return files


@contextmanager
def _file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the reader into ours."""
    try:
        yield
    except (AdapterError, OSError) as error:
        raise EvaluationFileError(f"adapter: {os.fspath(path)} cannot be loaded: {error}") from error


@contextmanager
def _own_progress_bar_hidden(pipeline: Any) -> Iterator[None]:
    """Hide the pipeline's bar of denoising steps: one bar counts the pictures."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
