"""Fixtures: pipelines for adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for a newer PEFT than a text encoder's LoRA needs, and than may be installed."""
    from transformers.integrations import peft

    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "0.15.0")


@pytest.fixture(scope="session")
def sdxl_dir(tiny_sdxl_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL pipeline with SDXL's own layout of blocks, after which kohya's names count."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_pipeline_dir)
    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_config(
        pipeline.unet.config,
        block_out_channels=(4, 8, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("files") / "sdxl"
    StableDiffusionXLPipeline(**{**pipeline.components, "unet": unet}, add_watermarker=False).save_pretrained(folder)
    return folder
