"""Fixtures: a tiny random CLIP, the tiny pipeline in memory, and adapters for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cat_rs.evaluation import EvaluationConfig, EvaluationPrompts

CLIP_SIZE = 24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run many times faster on one thread, above all beside other programs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_clip_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel with random weights and its processor, in a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(3)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": CLIP_SIZE, "patch_size": 8},
        projection_dim=12,
    )
    size = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=size)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(tiny_pipeline_dir: Path) -> Any:
    """The tiny pipeline, without an adapter."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)


@pytest.fixture
def counting(pipeline: Any) -> CountingPipeline:
    """The same, with its calls counted."""
    return CountingPipeline(pipeline)


@pytest.fixture(scope="session")
def adapter_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that changes the pictures, as training writes it."""
    return write_adapter(tiny_pipeline_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def prompts() -> EvaluationPrompts:
    """Two prompts with the trigger, and the two without it that follow from them."""
    return EvaluationPrompts.from_trigger_prompts(
        ["a sks cat on a red background", "a photo of a sks cat"], ["sks"], "cat"
    )


@pytest.fixture
def config() -> EvaluationConfig:
    """Few steps, three seeds, and batches that do not divide the number of pictures."""
    return EvaluationConfig(num_inference_steps=2, guidance_scale=2.0, seeds=(0, 1, 5), batch_size=4)


@pytest.fixture
def concept_images() -> list[Image.Image]:
    """Three pictures of random colours."""
    return [noise_picture(seed) for seed in range(3)]


class Stopped(BaseException):
    """Stands for a kill."""


class CountingPipeline:
    """Passes everything on to a pipeline and counts the pictures it is asked for.

    Attributes:
        pictures: The adapters and the number of pictures of each call.
        stop_at: The number of the call that stops the program instead.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.pictures: list[tuple[tuple[str, ...], int]] = []
        self.stop_at: int | None = None

    def __call__(self, **arguments: Any) -> Any:
        if len(self.pictures) == self.stop_at:
            raise Stopped
        self.pictures.append((tuple(self._pipeline.get_list_adapters()), len(arguments["prompt"])))
        return self._pipeline(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


def write_adapter(pipeline_dir: Path, folder: Path, seed: int = 4) -> Path:
    """Write a LoRA with random weights on both sides."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in get_peft_model_state_dict(pipeline.unet).items()
    }
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def noise_picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A picture of random colours."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
