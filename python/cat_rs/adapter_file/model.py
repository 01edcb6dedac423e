"""Adapters in models: which layers a model has, and PEFT's adapters taken out and put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cat_rs.adapter_file.layer import Layer, listed, parse
from cat_rs.adapter_file.lora_config import exact_config
from cat_rs.errors import AdapterError


def module_names(model: torch.nn.Module) -> list[str]:
    """The names of the modules that could be adapted."""
    return [name for name, module in _base_modules(model).items() if getattr(module, "weight", None) is not None]


def component_of_model(model: torch.nn.Module) -> str:
    """The component of a pipeline that the model would be; of text encoders, the first."""
    modules = _base_modules(model)
    if any(name.endswith(("encoder.layers", "encoder.block")) for name in modules):
        return "text_encoder"
    return "unet" if "mid_block" in modules else "transformer"


def family_of_model(model: torch.nn.Module) -> str | None:
    """The family, where a denoiser's structure tells."""
    modules = _base_modules(model)
    if "mid_block" in modules:
        embeddings = getattr(getattr(model, "config", None), "addition_embed_type", None)
        return "sdxl" if embeddings == "text_time" else "sd"
    return "flux" if {"single_transformer_blocks", "transformer_blocks"} <= set(modules) else None


def check_ldm_layout(model: torch.nn.Module) -> None:
    """kohya's names of SDXL's layers count two in a block: other models' layers would get each other's names."""
    layers = getattr(getattr(model, "config", None), "layers_per_block", 2)
    if layers != 2 and layers != [2, 2, 2]:
        raise AdapterError(
            f"save_lora: kohya's names for sdxl are those of a U-Net with layers_per_block 2, got {layers}"
        )


def layers_of_model(model: torch.nn.Module, component: str, adapter_name: str) -> list[Layer]:
    """The adapter's tensors as they are in the model.

    Raises:
        AdapterError: The model has no such adapter, or one that is more than LoRA.
    """
    adapters = getattr(model, "peft_config", {})
    if not adapters:
        argument = component if component.startswith("text_encoder") else "model_or_state"
        raise AdapterError(
            f"save_lora: `{argument}` must have an adapter, got a {type(model).__name__} without one: leave it "
            "out, or give it one with add_adapter"
        )
    if adapter_name not in adapters:
        has = ", ".join(map(repr, adapters))
        raise AdapterError(
            f"save_lora: `adapter_name` must be an adapter of the {component}, got {adapter_name!r}: it has {has}"
        )
    from peft import get_peft_model_state_dict

    # With a state dict of our own PEFT does not take a bias of B for a matrix that lost a dimension.
    state = get_peft_model_state_dict(model, model.state_dict(), adapter_name, save_embedding_layers=False)
    alphas = {
        _own_name(name): module.lora_alpha[adapter_name]
        for name, module in model.named_modules()
        if adapter_name in getattr(module, "lora_alpha", ())
    }
    _, _, layers = parse(state, {}, component, saving=True)
    return [layer._replace(component=component, alpha=alphas[layer.module]) for layer in layers]


def base_layers(model: torch.nn.Module, layers: list[Layer]) -> list[tuple[Layer, torch.nn.Module | None]]:
    """The layers under the model's own names, each with the module it adapts; None where the model has none.

    CLIP's `text_model.` is in files, not in every model.
    """
    modules = _base_modules(model)
    found: list[tuple[Layer, torch.nn.Module | None]] = []
    for layer in layers:
        spellings = (layer.module, layer.module.removeprefix("text_model."), f"text_model.{layer.module}")
        name = next((spelling for spelling in spellings if spelling in modules), None)
        found.append((layer, None) if name is None else (layer._replace(module=name), modules[name]))
    return found


def size_error(layer: Layer, base: torch.nn.Module) -> str | None:
    """What is wrong with the layer's sizes, beside the module it adapts; None if they fit."""
    if not isinstance(base, (torch.nn.Linear, torch.nn.Conv2d)):
        return None
    expected = base.weight.shape
    if layer.lora_A.shape[1:] == expected[1:] and layer.lora_B.shape[0] == expected[0]:
        return None
    return (
        f"{layer.module} has weight {list(expected)}, which A {list(layer.lora_A.shape)} and "
        f"B {list(layer.lora_B.shape)} do not fit"
    )


def fitting(model: torch.nn.Module, layers: list[Layer]) -> list[Layer]:
    """The layers under the model's own names.

    Raises:
        AdapterError: The model does not have one of them, or has it in another size.
    """
    found = base_layers(model, layers)
    absent = [layer.module for layer, base in found if base is None]
    if absent:
        raise AdapterError(
            f"load_lora: `model` must have the file's layers, got a {type(model).__name__} without {listed(absent)}"
        )
    for layer, base in found:
        error = None if base is None else size_error(layer, base)
        if error is not None:
            raise AdapterError(f"load_lora: {error}")
    return [layer for layer, _ in found]


def put_in(model: torch.nn.Module, layers: list[Layer], config: Mapping[str, Any], adapter_name: str) -> None:
    """Give a model the layers that fit it, under the settings of a LoraConfig.

    Raises:
        AdapterError: The model has an adapter of that name with other layers.
    """
    exact = exact_config(layers, config)
    if adapter_name in getattr(model, "peft_config", {}):
        _check_same(model, layers, bool(exact["use_rslora"]), adapter_name)
    else:
        _add_adapter(model, exact, adapter_name)
    _fill(model, layers, adapter_name)


def _check_same(model: torch.nn.Module, layers: list[Layer], rslora: bool, adapter_name: str) -> None:
    """Whether the model's adapter has the layers, ranks and scales of the file's."""
    has = {
        _own_name(name): (module.r[adapter_name], module.scaling[adapter_name])
        for name, module in model.named_modules()
        if adapter_name in getattr(module, "scaling", ())
    }
    file = {layer.module: (layer.rank, layer.scale(rslora)) for layer in layers}
    different = sorted(name for name in has.keys() | file.keys() if has.get(name) != file.get(name))
    if different:
        raise AdapterError(
            f"load_lora: the model's adapter {adapter_name!r} must have the layers, ranks and scales of the file, got "
            f"others at {listed(different)}: delete it first, or give another adapter_name"
        )


def _add_adapter(model: Any, config: Mapping[str, Any], adapter_name: str) -> None:
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    # A name in the list also stands for longer names that end with it.
    targets = set(config["target_modules"])
    also = [
        name
        for name in _base_modules(model)
        if name not in targets and any(name.endswith(f".{target}") for target in targets)
    ]
    lora = LoraConfig(**{**config, "exclude_modules": also or None})
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, lora)
        model.set_adapter(adapter_name)
        return
    # What add_adapter of diffusers and transformers does, where the latter asks for a newer PEFT than this needs.
    inject_adapter_in_model(lora, model, adapter_name)
    for layer in model.modules():
        if adapter_name in getattr(layer, "lora_A", ()):
            layer.set_adapter(adapter_name)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True


def _fill(model: torch.nn.Module, layers: list[Layer], adapter_name: str) -> None:
    from peft import PeftModel, set_peft_model_state_dict

    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    state = {f"{prefix}{name}": tensor for layer in layers for name, tensor in layer.state().items()}
    result = set_peft_model_state_dict(model, state, adapter_name)
    missing = [name for name in result.missing_keys if ".lora_" in name and f".{adapter_name}." in name]
    if missing or result.unexpected_keys:
        raise AdapterError(
            f"load_lora: PEFT did not take the whole adapter: {listed([*missing, *result.unexpected_keys])}"
        )


def _base_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's own modules by the names they had before PEFT."""
    return {
        _own_name(name): getattr(module, "base_layer", module)
        for name, module in model.named_modules()
        if ".lora_" not in name and ".base_layer" not in name
    }


def _own_name(name: str) -> str:
    return name.removeprefix("base_model.model.")
