"""Tiny random denoisers with LoRA adapters, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

CROSS = 16
"""Width of the text embeddings."""
VOCABULARY, WORDS = 50, 6
"""Of the text encoder."""
LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]


def tiny_unet(seed: int = 1, **settings: Any) -> torch.nn.Module:
    """A UNet2DConditionModel with random weights for 4x8x8 latents."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": CROSS,
            **settings,
        }
    ).requires_grad_(False)


def tiny_transformer(seed: int = 1) -> torch.nn.Module:
    """An SD3Transformer2DModel, as flow-matching models have, with random weights for 4x8x8 latents."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CROSS,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    return model.requires_grad_(False)


def tiny_text_encoder(seed: int = 3, width: int = CROSS) -> torch.nn.Module:
    """A CLIPTextModel with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WORDS,
        bos_token_id=0,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).requires_grad_(False)


def add_lora(model: torch.nn.Module, *, seed: int = 2, start: bool = False, **settings: Any) -> torch.nn.Module:
    """Adds a LoRA adapter; with ``start`` B is zero, as when training begins, else random."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **settings}
    model.add_adapter(LoraConfig(**options), adapter_name=settings.pop("adapter_name", "default"))
    if not start:
        randomize_b(model)
    return model


def randomize_b(model: torch.nn.Module) -> None:
    """Makes every adapter count: B is zero at the start."""
    for name, param in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(param, std=0.1)


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the adapter's parameters by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters() if "lora_" in name}


def batch(number: int, size: int = 2, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Latents, conditions, noise and timesteps of a step."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "latents": draw(size, 4, 8, 8),
        "cond": draw(size, 5, CROSS),
        "cond_no_trigger": draw(size, 5, CROSS),
        "noise": draw(size, 4, 8, 8),
        "timesteps": torch.randint(1000, (size,), generator=generator),
    }
