"""The model that is trained: loading, conditioning and adding the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cat_rs import hub
from cat_rs.adapter_file.pipeline import pipeline_models
from cat_rs.options import ConfigError
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import TrainingError

_SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

# Keyword arguments of the denoiser, as tensors or dicts of tensors with a leading batch dimension.
Conditioning = dict[str, Any]


def choose_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is a GPU if there is one.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device: expected a device of this machine, got {name!r}")
    return device


def load_pipeline(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a Stable Diffusion or SDXL pipeline from a folder or the hub, its weights frozen.

    Raises:
        TrainingError: There is no such model, a file of it is broken, or it is of another family.
    """
    from diffusers import DiffusionPipeline

    refusal = hub.refusal(model)
    from_cache = {"local_files_only": refusal is not None}
    try:
        parts = DiffusionPipeline.load_config(model, **from_cache)
        unused = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype, **from_cache, **unused)
    except Exception as error:
        # Each loader below diffusers has errors of its own kind: OSError, ValueError, SafetensorError, KeyError ...
        reason = refusal or hub.first_line(error)
        raise TrainingError(f"model: expected a diffusers model, cannot load {model}: {reason}") from error
    name = type(pipeline).__name__
    if name not in _SUPPORTED:
        raise TrainingError(f"model: expected {' or '.join(_SUPPORTED)}, got {name} from {model}")
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(device)
    return pipeline


def load_model_parts(model: str | None) -> dict[str, torch.nn.Module]:
    """Return the parts of a pipeline that can have an adapter, by component, in float32 on the CPU; none for None."""
    return {} if model is None else pipeline_models(load_pipeline(model, torch.float32, torch.device("cpu")))


def default_resolution(pipeline: Any) -> int:
    """Return the side in pixels that the model was made for."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


@torch.no_grad()
def encode_caption(pipeline: Any, caption: str) -> Conditioning:
    """Encode one caption as arguments of the denoiser, without batch dimension."""
    embeddings = pipeline.encode_prompt(
        prompt=caption, device=pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    conditioning: Conditioning = {"encoder_hidden_states": embeddings[0][0]}
    if type(pipeline).__name__ == "StableDiffusionXLPipeline":
        conditioning["added_cond_kwargs"] = {"text_embeds": embeddings[2][0]}
    return conditioning


@torch.no_grad()
def encode_pixels(pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the scaled latents of one picture [3, S, S]; each [C, H, W] float32.

    The VAE runs in float32: those of several models overflow in float16.
    """
    vae = pipeline.vae
    if vae.dtype != torch.float32:
        vae.to(torch.float32)
    posterior = vae.encode(pixels[None].to(vae.device)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    return (posterior.mean[0] - shift) * scale, posterior.std[0] * scale


def add_adapter(unet: torch.nn.Module, config: TrainConfig) -> None:
    """Add a trainable float32 LoRA to the U-Net; A is drawn from torch's global generator, B is 0.

    Raises:
        TrainingError: No layer has one of the names in `target_modules`.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
    )
    try:
        unet.add_adapter(lora)  # type: ignore[operator]
    except ValueError as error:
        raise TrainingError(
            f"target_modules: expected names of layers that can have a LoRA, got {list(config.target_modules)}: "
            f"{hub.first_line(error)}"
        ) from error
    cast_training_params(unet, dtype=torch.float32)
    unet.train()


def stack(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Stack the conditionings of several captions into one batch."""
    first = conditionings[0]
    return {
        name: stack([each[name] for each in conditionings])
        if isinstance(first[name], dict)
        else torch.stack([each[name] for each in conditionings])
        for name in first
    }
