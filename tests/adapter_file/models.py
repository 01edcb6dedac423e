"""Models with adapters, and how they are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import randomize_b

UNET_LAYERS = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
    "time_embedding.linear_1",
]
CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FLUX_LAYERS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "norm1.linear",
    "x_embedder",
]
SINGLE_LAYERS = ["proj_mlp", "norm.linear", r"single_transformer_blocks\.\d+\.proj_out"]
FORMATS = ["diffusers", "kohya", "peft"]
PATHS = {"diffusers": "a.safetensors", "kohya": "a.safetensors", "peft": "a"}


def add_text_lora(encoder: Any, *, seed: int, **settings: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    encoder.add_adapter(LoraConfig(target_modules=CLIP_LAYERS, **settings), "default")
    randomize_b(encoder)


def encoders_of(pipeline: Any) -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def assert_same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left_state, right_state = state_of(left), state_of(right)
    assert left_state.keys() == right_state.keys()
    for name, tensor in left_state.items():
        assert torch.equal(tensor, right_state[name]), name


def assert_same_scales(left: torch.nn.Module, right: torch.nn.Module) -> None:
    def scales(model: torch.nn.Module) -> dict[str, float]:
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}
        return {name: layer.scaling["default"] for name, layer in layers.items()}

    assert scales(left) == pytest.approx(scales(right))


def assert_same_output(left: Any, right: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    prompt = torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        expected = right(latents, 7, prompt).sample
        torch.testing.assert_close(left(latents, 7, prompt).sample, expected, atol=1e-5, rtol=1e-5)


def flux_transformer(seed: int = 6, **settings: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    options = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**options | settings).requires_grad_(False)


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(8)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).requires_grad_(False).eval()


def kohya_state(*, alpha: float | None = 2.0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A file as kohya's documentation describes it."""
    layers = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": ((4, 16), (16, 4)),
        "lora_unet_down_blocks_1_attentions_0_proj_in": ((4, 16, 1, 1), (16, 4, 1, 1)),
        "lora_unet_mid_block_resnets_0_conv1": ((2, 16, 3, 3), (16, 2, 1, 1)),
    }
    state = {}
    for name, (down, up) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.randn(down, dtype=dtype)
        state[f"{name}.lora_up.weight"] = torch.randn(up, dtype=dtype)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return state
