"""Adapters in diffusers pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cat_rs.adapter_file.lora_file import LoraFile, check_fit
from cat_rs.adapter_file.paths import COMPONENTS
from cat_rs.errors import AdapterError
from cat_rs.unwrap import unwrap_model


def pipeline_models(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The models of a pipeline that can have an adapter, by component."""
    parts = {name: pipeline.components.get(name) for name in COMPONENTS}
    return {name: unwrap_model(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def adapter_names(pipeline: Any) -> list[str]:
    """PEFT's names of the adapters that a pipeline has."""
    return sorted({name for names in pipeline.get_list_adapters().values() for name in names})


def check_fits(pipeline: Any, lora: LoraFile) -> dict[str, torch.nn.Module]:
    """The models of a pipeline that get a part of the adapter, by component.

    Raises:
        AdapterError: The adapter does not fit them.
    """
    models = pipeline_models(pipeline)
    absent = [component for component in lora.state if component not in models]
    if absent:
        raise AdapterError(
            f"expected a LoRA for {type(pipeline).__name__}, which has {', '.join(models)}, got one with layers of "
            f"{', '.join(absent)}"
        )
    models = {component: models[component] for component in lora.state}
    try:
        check_fit(lora, models)
    except AdapterError as error:
        family = f", got one for {lora.family}" if lora.family else ""
        raise AdapterError(f"expected a LoRA for {type(pipeline).__name__}{family}: {error}") from error
    return models


@contextmanager
def adapter_in(pipeline: Any, lora: LoraFile, scale: float = 1.0) -> Iterator[None]:
    """Give a pipeline without adapters one, for the length of a block; then it is as it was.

    Its update is multiplied by ``scale``.

    Raises:
        AdapterError: The adapter does not fit the pipeline's models.
    """
    models = check_fits(pipeline, lora)
    trained = {id(model): _trained(model) for model in models.values()}
    try:
        # PEFT draws initial weights, and freezes the model.
        with _not_offloaded(pipeline), torch.random.fork_rng(devices=[]):
            for component, model in models.items():
                lora.load_into(model, component)
                layer: Any
                for layer in model.modules():
                    if isinstance(base := getattr(layer, "base_layer", None), torch.nn.Module):
                        # PEFT adds layers in training mode: their dropout would change pictures at random.
                        layer.train(base.training)
                        layer.scale_layer(scale)
        yield
    finally:
        with _not_offloaded(pipeline):
            for model in models.values():
                _remove(model)
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name in trained[id(model)])


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _remove(model: Any) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False


@contextmanager
def _not_offloaded(pipeline: Any) -> Iterator[None]:
    """Take off what offloads the pipeline's weights, and set it again: it knows the layers that were there then."""
    whole_models, single_layers, *groups = pipeline._optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if whole_models:
            pipeline.enable_model_cpu_offload()
        elif single_layers:
            pipeline.enable_sequential_cpu_offload()
        elif any(groups):
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            for model in pipeline_models(pipeline).values():
                _maybe_remove_and_reapply_group_offloading(model)
