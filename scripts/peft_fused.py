"""A pytest plugin that gives every LoRA model PEFT builds the fused layers, and runs without a model hub."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch

TINY_PIPELINE = "hf-internal-testing/tiny-sd-pipe"


def pytest_configure(config: pytest.Config) -> None:
    """Patches PEFT where a LoRA is put into a model."""
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: of PEFT's tests")
    _replace_tiny_pipeline()
    if os.environ.get("CAT_RS_FUSED") == "1":
        _patch_every_lora()


def _patch_every_lora() -> None:
    from peft.tuners.lora import LoraModel

    import cat_rs

    inject = LoraModel.inject_adapter

    def inject_and_patch(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        with contextlib.suppress(cat_rs.errors.AdapterError):  # a model without LoRA layers
            cat_rs.patch_peft(model)
        return result

    LoraModel.inject_adapter = inject_and_patch


def _replace_tiny_pipeline() -> None:
    """The tiny Stable Diffusion pipeline of PEFT's tests, from configs with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    original = StableDiffusionPipeline.from_pretrained

    def from_pretrained(name: str, *args: Any, **kwargs: Any) -> Any:
        if name != TINY_PIPELINE:
            return original(name, *args, **kwargs)
        torch.manual_seed(0)
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = CLIPTokenizer(
            vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77
        )
        text = CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=32,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        )
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    StableDiffusionPipeline.from_pretrained = from_pretrained
