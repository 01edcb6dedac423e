"""Adapters written to files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cat_rs._native import _core
from cat_rs.adapter_file import metadata as text
from cat_rs.adapter_file.disk import write_safetensors
from cat_rs.adapter_file.layer import Layer, check_finite, family_of_layers, parse
from cat_rs.adapter_file.lora_config import configs_for, joined_configs, model_config, with_alphas, with_folded_scale
from cat_rs.adapter_file.lora_file import LoraFile, layers_of
from cat_rs.adapter_file.model import (
    check_ldm_layout,
    component_of_model,
    family_of_model,
    layers_of_model,
)
from cat_rs.adapter_file.paths import COMPONENTS, DIFFUSERS_FILE, PEFT_CONFIG_FILE, PEFT_FILE
from cat_rs.arguments import check, check_module, check_path, refusing
from cat_rs.atomic import write_bytes
from cat_rs.errors import AdapterError, InvalidValueError
from cat_rs.text_files import is_unicode
from cat_rs.unwrap import unwrap_model

FORMATS = ("diffusers", "peft", "kohya")
SUFFIX = ".safetensors"


def save_lora(
    path: str | os.PathLike[str],
    model_or_state: torch.nn.Module | LoraFile | Mapping[str, torch.Tensor] | None,
    *,
    format: str = "diffusers",
    text_encoder: torch.nn.Module | None = None,
    text_encoder_2: torch.nn.Module | None = None,
    adapter_name: str = "default",
    family: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter. An older file stays until the new one is whole.

    Sharded parameters (FSDP2's DTensors) are gathered, for which every rank must call this.

    kohya's format has one number for each layer's scale and no more: rsLoRA is folded into it, DoRA and biases are
    refused. In FLUX files query, key and value are one layer there, written block-diagonal with the sum of the ranks,
    as kohya's own converter does; `load_lora` takes it apart again. Web UIs and `load_lora` read what is written;
    diffusers' reader of kohya files mistakes alphas that differ among attention layers, and leaves out FLUX's layers
    outside the blocks.

    Args:
        path: For "peft" a folder. Else a ``.safetensors`` file; with "diffusers" also a folder, in which
            ``pytorch_lora_weights.safetensors`` is written.
        model_or_state: The denoiser with its PEFT adapter, or the one text encoder that has one; what `load_lora`
            returned; or tensors by their names in one of the formats, scaled by 1 where no ``alpha`` is among them.
            None where only the text encoders below have an adapter.
        format: "diffusers", "peft" or "kohya".
        text_encoder: The first text encoder, where it has an adapter too.
        text_encoder_2: The second.
        adapter_name: PEFT's name of the adapter in the models.
        family: "sd", "sdxl" or "flux", which "kohya" needs; found from the model or the layers where they tell.
        dtype: Of the written tensors; as they are if None.
        metadata: Training metadata to store under the key ``cat_rs``, as JSON; that of a `LoraFile` is kept.

    Returns:
        The file, or PEFT's folder.

    Raises:
        AdapterError: There is no such adapter, or the format cannot hold it.
        InvalidValueError: An argument is outside its domain.
        OSError: The file cannot be written; an older one is untouched.
    """
    _check_arguments(path, format, family, dtype)
    check("save_lora", "adapter_name", adapter_name, "a text", lambda name: type(name) is str)
    layers, configs, denoiser = [], {}, None
    training: dict[str, Any] = {}
    file_metadata: dict[str, str] = {}
    if isinstance(model_or_state, LoraFile):
        layers, configs = list(layers_of(model_or_state)), dict(model_or_state.configs)
        training, file_metadata = dict(model_or_state.metadata), dict(model_or_state.file_metadata)
        family = family or model_or_state.family
    elif isinstance(model_or_state, torch.nn.Module):
        denoiser = unwrap_model(model_or_state)
    elif model_or_state is not None:
        with refusing("save_lora", "model_or_state", "a module, a LoraFile or tensors by name", model_or_state):
            given = dict(model_or_state)
        if not given:
            raise AdapterError("save_lora: `model_or_state` must have tensors of a LoRA, got none")
        for name in given:
            check("save_lora", "model_or_state", name, "tensors by names in Unicode", is_unicode)
        with refusing("save_lora", "model_or_state", "tensors by name", model_or_state):
            _, found, layers = parse(given, {}, None, saving=True)
            layers = with_alphas(layers, {})
        family = family or found
    models = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    if denoiser is not None:
        models = {**models, component_of_model(denoiser): denoiser}
        family = family or family_of_model(denoiser)
    for component, model in models.items():
        if model is not None:
            check_module("save_lora", component, model)
            model = unwrap_model(model)
            layers = [layer for layer in layers if layer.component != component]
            layers += layers_of_model(model, component, adapter_name)
            configs[component] = model_config(model, adapter_name)
    if dtype is not None:
        layers = [layer.to(dtype) for layer in layers]
        # A smaller dtype may end before the values do.
        check_finite("save_lora", layers)
    family = family or family_of_layers(layers)
    with refusing("save_lora", "metadata", "a mapping", metadata):
        training |= dict(metadata or {})
    # A hash of the file that was read is not one of the file that is written.
    kept = {name: value for name, value in file_metadata.items() if "hash" not in name}
    common = {**kept, "format": "pt", text.TRAINING_KEY: text.to_json("metadata", training)}
    if family is not None:
        common[text.FAMILY_KEY] = family
    if format == "peft":
        return _save_peft(Path(path), layers, configs, common)
    if format == "kohya":
        if family == "sdxl" and denoiser is not None:
            check_ldm_layout(denoiser)
        layers = [with_folded_scale(layer, configs.get(layer.component, {})) for layer in layers]
        common |= text.kohya_metadata(Path(path).stem, layers, family, training, file_metadata)
    else:
        common[text.CONFIG_KEY] = text.to_json("configs", joined_configs(configs_for(layers, configs)))
    (file,) = files_to_write(path, format)
    tensors = _core.adapter_tensors(layers, format, family)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, dict(tensors), common)
    return file


def files_to_write(path: str | os.PathLike[str], format: str) -> list[Path]:
    """Where `save_lora` writes: one file, for PEFT one or several of these."""
    if format == "peft":
        return [Path(path, part, PEFT_FILE) for part in ("", *COMPONENTS)]
    return [Path(path) if os.fspath(path).endswith(SUFFIX) else Path(path, DIFFUSERS_FILE)]


def _save_peft(
    folder: Path, layers: list[Layer], configs: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]
) -> Path:
    found = configs_for(layers, configs)
    written = {
        component: _core.adapter_tensors([layer for layer in layers if layer.component == component], "peft", None)
        for component in found
    }
    if not written:
        _core.adapter_tensors([], "peft", None)
    for component, tensors in written.items():
        part = folder / component if len(written) > 1 else folder
        part.mkdir(parents=True, exist_ok=True)
        write_safetensors(part / PEFT_FILE, dict(tensors), {**metadata, "component": component})
        config = {"peft_type": "LORA", **found[component]}
        write_bytes(part / PEFT_CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def _check_arguments(path: str | os.PathLike[str], format: str, family: str | None, dtype: torch.dtype | None) -> None:
    check_path("save_lora", "path", path)
    for name, value, choices in (("format", format, FORMATS), ("family", family, (*text.FAMILIES, None))):
        known = ", ".join(filter(None, choices))
        check("save_lora", name, value, known, set(choices).__contains__)
    is_file = os.fspath(path).endswith(SUFFIX)
    if format == "peft" and is_file:
        raise InvalidValueError(f"save_lora: `path` must be a folder for format peft, got {os.fspath(path)}")
    if format == "kohya" and not is_file:
        raise InvalidValueError(f"save_lora: `path` must end with {SUFFIX} for format kohya, got {os.fspath(path)}")
    if not is_file and os.path.isfile(path):
        expected = f"end with {SUFFIX} or be a folder"
        raise InvalidValueError(f"save_lora: `path` must {expected}, got the file {os.fspath(path)}")
    if dtype is not None:
        check("save_lora", "dtype", dtype, "a floating dtype or None", lambda it: it.is_floating_point is True)
