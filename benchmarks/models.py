"""The models whose sizes are measured: Stable Diffusion's U-Nets from their public configurations, and tiny ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

RANK = 16
TOKENS = 77
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]

SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


# As SDXL's: the sizes of picture and crop beside the prompt's embedding.
TINY_SDXL: dict[str, Any] = {
    **TINY,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


def config(smoke: bool) -> dict[str, Any]:
    """The U-Net's configuration."""
    return TINY if smoke else SD15


def unet(settings: dict[str, Any], device: str = "cpu") -> torch.nn.Module:
    """A frozen U-Net with random weights; on the "meta" device, without any."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return UNet2DConditionModel(**settings).requires_grad_(False)


def share_weights(model: torch.nn.Module, settings: dict[str, Any]) -> torch.nn.Module:
    """Another U-Net over the same weights in memory, to which its own adapter can be added."""
    twin = unet(settings, "meta")
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.requires_grad_(False)


def add_lora(model: torch.nn.Module, seed: int = 0, targets: Sequence[str] = TARGET_MODULES) -> torch.nn.Module:
    """A rank-16 adapter, by default on the attention's linear layers, its values from the seed; B is not zero, so that
    all of its gradients matter from the first step on.
    """
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    for param in adapter(model):
        if param.device.type != "meta":
            with torch.no_grad():
                # Drawn on the CPU: the same values on every device.
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
    return model


def adapter(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trainable parameters, in the model's order."""
    return [param for param in model.parameters() if param.requires_grad]


def scheduler() -> Any:
    """Stable Diffusion 1.5's training schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def conditions(settings: dict[str, Any], batch: int, **options: Any) -> dict[str, Any]:
    """Random keyword arguments of the U-Net for a batch of prompts; ``options`` are of torch.randn."""
    cond: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(batch, TOKENS, settings["cross_attention_dim"], **options)
    }
    if settings.get("addition_embed_type") == "text_time":
        width = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        cond["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, **options),
            "time_ids": torch.randn(batch, 6, **options),
        }
    return cond


def latent_shapes(smoke: bool) -> list[tuple[int, ...]]:
    """Latents at 512 px, batch 1; 1024 px, batch 4; and 1024 px with 16 channels, batch 8."""
    return [(2, 4, 8, 8)] if smoke else [(1, 4, 64, 64), (4, 4, 128, 128), (8, 16, 128, 128)]


@dataclass(frozen=True)
class LinearShape:
    """A linear layer that the adapter is on, as the model calls it.

    Attributes:
        tokens, in_features, out_features: Of the product.
        bias: Whether the layer has one.
        input_grad: Whether the layer's input needs a gradient: not the text, nor what comes before the first adapter.
    """

    tokens: int
    in_features: int
    out_features: int
    bias: bool
    input_grad: bool

    def __str__(self) -> str:
        words = f"{self.tokens}x{self.in_features}->{self.out_features}"
        return words + (" bias" if self.bias else "") + ("" if self.input_grad else " no dx")


def linear_shapes(settings: dict[str, Any]) -> Counter[LinearShape]:
    """The adapted linear layers of the U-Net at its own sample size, and how often each occurs; run without memory."""
    from peft.tuners.lora import LoraLayer

    model = add_lora(unet(settings, "meta"))
    shapes: Counter[LinearShape] = Counter()

    def record(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        base = layer.get_base_layer()
        shapes[
            LinearShape(
                tokens=inputs[0].shape[-2],
                in_features=base.in_features,
                out_features=base.out_features,
                bias=base.bias is not None,
                input_grad=inputs[0].requires_grad,
            )
        ] += 1

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.register_forward_pre_hook(record)
    size = settings["sample_size"]
    latents = torch.empty(1, 4, size, size, device="meta")
    model(latents, torch.zeros(1, dtype=torch.long, device="meta"), **conditions(settings, 1, device="meta"))
    return shapes


def lora_layers(shape: LinearShape, dtype: torch.dtype, count: int) -> Iterator[tuple[torch.nn.Module, Any]]:
    """`count` equal modules with one PEFT LoRA layer each, as (module, layer)."""
    from peft import LoraConfig, inject_adapter_in_model

    for _ in range(count):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(shape.in_features, shape.out_features, bias=shape.bias))
        module.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), module)
        module.to(dtype)
        with torch.no_grad():
            for param in adapter(module):
                param.normal_(0.0, 0.02)
        yield module, module[0]
