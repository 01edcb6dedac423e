"""An adapter as read from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cat_rs.adapter_file.layer import Layer
from cat_rs.adapter_file.model import component_of_model, fitting, put_in
from cat_rs.arguments import check, check_module
from cat_rs.errors import AdapterError
from cat_rs.unwrap import unwrap_model


@dataclass(frozen=True)
class LoraFile:
    """An adapter as read from a file.

    Attributes:
        state: Component -> PEFT's name -> tensor, e.g. ``state["unet"]["mid_block....to_q.lora_A.weight"]``.
        alphas: Component -> module -> ``lora_alpha``; a layer adds ``alpha / r * B A``, with rsLoRA
            ``alpha / sqrt(r) * B A``.
        configs: Component -> the LoraConfig as the file has it; empty for formats without one.
        metadata: The training metadata: what `save_lora` was given; base model, trigger words, cat_factor ...
        file_metadata: The other metadata of the file, e.g. kohya's ``ss_`` fields.
        format: "diffusers", "peft" or "kohya".
        family: "sd", "sdxl" or "flux"; None where nothing tells.
    """

    state: dict[str, dict[str, torch.Tensor]]
    alphas: dict[str, dict[str, float]]
    configs: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
    file_metadata: dict[str, str] = field(repr=False)
    format: str
    family: str | None

    def __repr__(self) -> str:
        layers = ", ".join(f"{name}: {len(alphas)} layers" for name, alphas in self.alphas.items())
        return f"LoraFile(format={self.format!r}, family={self.family!r}, {layers}, metadata={self.metadata!r})"

    def load_into(self, model: torch.nn.Module, component: str | None = None, adapter_name: str = "default") -> None:
        """Give a model this adapter.

        The adapter is added through PEFT, trainable and active, where the model has none of that name; else the one
        it has is filled, and must have the same layers, ranks and scales.

        Args:
            model: A denoiser or a text encoder, with or without PEFT layers; or a PeftModel.
            component: Which part of the file; if None the denoiser, or for a text encoder the first text encoder.
            adapter_name: PEFT's name of the adapter in the model.

        Raises:
            AdapterError: The file has no such part, or a layer does not fit the model; the model is unchanged.
        """
        check_module("load_lora", "model", model)
        check("load_lora", "adapter_name", adapter_name, "a text without a dot", re.compile(r"[^.]+").fullmatch)
        check("load_lora", "component", component, "a text or None", lambda it: it is None or type(it) is str)
        model = unwrap_model(model)
        component = self._component_for(model) if component is None else component
        if component not in self.state:
            got = f"got only {', '.join(self.state)}"
            raise AdapterError(f"load_lora: `model` or `component`: expected layers of {component}, {got}")
        layers = fitting(model, list(layers_of(self, component)))
        put_in(model, layers, self.configs.get(component, {}), adapter_name)

    def _component_for(self, model: torch.nn.Module) -> str:
        component = component_of_model(model)
        denoisers = [name for name in self.state if not name.startswith("text_encoder")]
        return component if component == "text_encoder" or not denoisers else denoisers[0]


def layers_of(lora: LoraFile, *components: str) -> Iterator[Layer]:
    """The layers of some components; of all if none is named."""
    for component in components or lora.state:
        state = lora.state.get(component, {})
        for module, alpha in lora.alphas.get(component, {}).items():
            yield Layer(
                component,
                module,
                state[f"{module}.lora_A.weight"],
                state[f"{module}.lora_B.weight"],
                state.get(f"{module}.lora_B.bias"),
                state.get(f"{module}.lora_magnitude_vector"),
                alpha,
            )


def assembled(
    layers: Iterable[Layer],
    configs: dict[str, dict[str, Any]],
    metadata: dict[str, Any],
    file_metadata: dict[str, str],
    format: str,
    family: str | None,
) -> LoraFile:
    """An adapter of these layers."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for layer in layers:
        state.setdefault(layer.component, {}).update(layer.state())
        alphas.setdefault(layer.component, {})[layer.module] = layer.alpha or 0.0
    return LoraFile(state, alphas, configs, metadata, file_metadata, format, family)


def check_fit(lora: LoraFile, models: Mapping[str, torch.nn.Module]) -> None:
    """Look every layer up in the models (component -> model) that are there.

    Raises:
        AdapterError: A model does not have one, or has it in another size.
    """
    for component, model in models.items():
        fitting(model, list(layers_of(lora, component)))
