"""The layers of an adapter, in PEFT's words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from cat_rs._native import _core
from cat_rs.adapter_file.paths import COMPONENTS
from cat_rs.errors import AdapterError

_LISTED = 8


class Layer(NamedTuple):
    """One adapted layer, as the Rust side has it; alpha as LoraConfig counts it."""

    component: str
    module: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    alpha: float | None

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return int(self.lora_A.shape[0])

    def scale(self, rslora: bool) -> float:
        """What B A is multiplied by; 1 where there is no alpha."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if rslora else self.rank)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors by PEFT's names."""
        named = {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B,
            "lora_B.bias": self.bias,
            "lora_magnitude_vector": self.magnitude,
        }
        return {f"{self.module}.{name}": tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Layer:
        """The layer with its tensors in another dtype."""
        return self._replace(
            lora_A=self.lora_A.to(dtype),
            lora_B=self.lora_B.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
            magnitude=None if self.magnitude is None else self.magnitude.to(dtype),
        )


def parse(
    tensors: Mapping[str, torch.Tensor], known: Mapping[str, list[str]], component: str | None, *, saving: bool = False
) -> tuple[str, str | None, list[Layer]]:
    """Format, family and layers of tensors by name; `component` is whose they are where the names do not tell.

    Raises:
        AdapterError: The tensors are no LoRA; of save_lora or of load_lora, as `saving` says.
    """
    named = [(name, _whole(tensor).detach().to("cpu")) for name, tensor in tensors.items()]
    format, family, found = _core.adapter_layers(named, known, saving)
    layers = [Layer(*each) for each in found]
    if any(not layer.component for layer in layers):
        modules = [layer.module for layer in layers]
        component = component or _component_of_models(modules, known) or _component_of_names(modules)
        layers = [layer._replace(component=component) for layer in layers]
    return format, family, layers


def check_finite(op: str, layers: Iterable[Layer]) -> None:
    """Refuses layers with NaN or infinity.

    Raises:
        AdapterError: Names the tensor.
    """
    for layer in layers:
        for name, tensor in layer.state().items():
            if not tensor.isfinite().all():
                raise AdapterError(f"{op}: `{name}` must have finite values, got NaN or infinity in {tensor.dtype}")


def _component_of_models(modules: list[str], known: Mapping[str, list[str]]) -> str | None:
    """The one model that is at hand and has these modules."""
    fitting = [component for component, names in known.items() if {*modules} <= {*names}]
    return fitting[0] if len(fitting) == 1 else None


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; where it is sharded (a DTensor), gathered, for which every rank must be here."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _component_of_names(modules: list[str]) -> str:
    """Whose layers these are, by the structure of diffusers' models."""
    starts = {
        "unet": ("down_blocks.", "up_blocks.", "mid_block."),
        "transformer": ("transformer_blocks.", "single_transformer_blocks."),
        "text_encoder": ("text_model.", "encoder.layers.", "encoder.block."),
    }
    fitting = [name for name, start in starts.items() if any(module.startswith(start) for module in modules)]
    if len(fitting) != 1:
        raise AdapterError(
            f"expected layers of a known denoiser or text encoder, got {listed(modules)}: give load_lora the model, "
            "or put adapter_model.safetensors and adapter_config.json into a folder named "
            f"{', '.join(COMPONENTS[:-1])} or {COMPONENTS[-1]}"
        )
    return fitting[0]


def family_of_layers(layers: Iterable[Layer]) -> str | None:
    """The family, where the layers tell: by names that others do not have, and the width of text embeddings."""
    layers = list(layers)
    components = {layer.component for layer in layers}
    if any(layer.module.startswith("single_transformer_blocks.") for layer in layers):
        return "flux"
    if "unet" not in components:
        return None
    if "text_encoder_2" in components or any(
        re.search(r"\.transformer_blocks\.[1-9]", layer.module) for layer in layers
    ):
        return "sdxl"
    widths = {layer.lora_A.shape[1] for layer in layers if layer.module.endswith((".attn2.to_k", ".attn2.to_v"))}
    return {768: "sd", 1024: "sd", 2048: "sdxl"}.get(widths.pop()) if len(widths) == 1 else None


def listed(names: list[str]) -> str:
    """The first names of a list, for an error."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
