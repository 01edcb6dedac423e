"""Fixtures: tiny random pipelines, and a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

PICTURE_SIZE = 16


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Every test draws the same random numbers; on one thread, which is fastest for tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trainings keep the pictures that they preserve away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def few_general_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process preserve two general prompts, whose pictures are soon drawn."""
    monkeypatch.setattr("cat_rs.training.preserved_pictures.general_prompts", lambda: ["a house", "a tree"])


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline with random weights, 16x16 pictures, in a folder."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=16),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipeline, tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_sdxl_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline with random weights, 16x16 pictures, in a folder."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    return _saved(pipeline, tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture
def concept_dir(tmp_path: Path) -> Path:
    """Three pictures with captions "a sks cat on a <colour> background" in metadata.jsonl."""
    folder = tmp_path / "concept"
    folder.mkdir()
    rows = []
    for number, colour in enumerate(("red", "green", "blue")):
        draw_picture(folder / f"{number}.png", colour)
        rows.append({"file_name": f"{number}.png", "text": f"a sks cat on a {colour} background"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def draw_picture(path: Path, colour: str, size: tuple[int, int] = (20, 24)) -> None:
    """Write a picture with a disc on a plain background."""
    picture = Image.new("RGB", size, colour)
    ImageDraw.Draw(picture).ellipse((4, 4, size[0] - 5, size[1] - 5), fill="white")
    picture.save(path)


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """Letters and digits as tokens, in the middle and at the end of a word."""
    from transformers import CLIPTokenizer

    characters = "abcdefghijklmnopqrstuvwxyz0123456789<>,."
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=40)


def _text_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PICTURE_SIZE,
    )


def _unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // 2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    )


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel with random weights and its CLIPProcessor, 16x16 pictures, in a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

    torch.manual_seed(3)
    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PICTURE_SIZE,
        patch_size=4,
    )
    config = CLIPConfig(
        text_config=_text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    )
    folder = tmp_path_factory.mktemp("tiny") / "clip"
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder
