"""Adapters read from files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cat_rs._native import _core
from cat_rs.adapter_file import metadata as text
from cat_rs.adapter_file.layer import Layer, check_finite, family_of_layers, parse
from cat_rs.adapter_file.lora_config import split_configs, with_alphas
from cat_rs.adapter_file.lora_file import LoraFile, assembled, check_fit
from cat_rs.adapter_file.model import component_of_model, module_names
from cat_rs.adapter_file.paths import PEFT_CONFIG_FILE, PEFT_FILE, locate
from cat_rs.arguments import ABOUT_VALUES, check_module, check_path
from cat_rs.errors import AdapterError
from cat_rs.text_files import TextFileError, read_text
from cat_rs.unwrap import unwrap_model


def load_lora(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    text_encoder: torch.nn.Module | None = None,
    text_encoder_2: torch.nn.Module | None = None,
    adapter_name: str = "default",
) -> LoraFile:
    """Read an adapter of any of the formats, and give it to the models that are given.

    kohya's names are paths with ``_`` for ``.``, which are resolved against the layers of Stable Diffusion, SDXL and
    FLUX, and against the module names of the models given here. A name that fits none, or several, is an error.
    ComfyUI's ``diffusion_model.`` stands for the denoiser; of names that diffusers changes, only FLUX's and SDXL's
    are known. A file may name its layers in several ways at once.

    Args:
        path: A safetensors file; or a folder with ``pytorch_lora_weights.safetensors``, with PEFT's
            ``adapter_model.safetensors`` or with folders of these named for the components.
        model: The denoiser that is to have the adapter, see `LoraFile.load_into`.
        text_encoder: The first text encoder that is to have it.
        text_encoder_2: The second.
        adapter_name: PEFT's name of the adapter in the models.

    Raises:
        AdapterError: The file is damaged or no LoRA, or does not fit a model.
        OSError: The file cannot be read; FileNotFoundError if there is none.
    """
    check_path("load_lora", "path", path)
    for name, each in (("model", model), ("text_encoder", text_encoder), ("text_encoder_2", text_encoder_2)):
        if each is not None:
            check_module("load_lora", name, each)
    given = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    if model is not None:
        given = {**given, component_of_model(unwrap_model(model)): model}
    models = {component: unwrap_model(each) for component, each in given.items() if each is not None}
    lora = read_lora(path, models)
    check_fit(lora, models)
    for component, each in models.items():
        lora.load_into(each, component, adapter_name)
    return lora


def read_lora(path: str | os.PathLike[str], models: Mapping[str, torch.nn.Module], *, finite: bool = True) -> LoraFile:
    """Read an adapter; kohya's names are resolved against the models (component -> model), which stay as they are.

    Args:
        path: As for `load_lora`.
        models: Component -> model.
        finite: Whether NaN and infinity are an error.

    Raises:
        AdapterError: The file is damaged or no LoRA.
        OSError: The file cannot be read.
    """
    known = {component: module_names(model) for component, model in models.items()}
    found = locate(path)
    if isinstance(found, Path):
        return _read_file(found, known, None, finite)
    bare = [(name, folder) for name, folder in found.items() if not (folder / PEFT_CONFIG_FILE).exists()]
    if len(found) == len(bare) == 1:
        # Some name their file as PEFT does, whatever is in it.
        name, folder = bare[0]
        return _read_file(folder / PEFT_FILE, known, name or None, finite)
    return _read_peft(found, finite)


def _read_file(file: Path, known: Mapping[str, list[str]], component: str | None, finite: bool) -> LoraFile:
    tensors, metadata = _core.read_safetensors(file)
    training = text.training_metadata(metadata, file)
    stored = text.from_json(metadata.get(text.CONFIG_KEY, "{}"), file, text.CONFIG_KEY)
    with _named(file):
        format, family, layers = parse(dict(tensors), known, component)
        if format == "peft" and "lora_alpha" not in stored and any(layer.alpha is None for layer in layers):
            raise AdapterError(
                f"load_lora: expected {PEFT_CONFIG_FILE} beside {PEFT_FILE}, whose tensors do not tell their scale: "
                'PEFT\'s LoraConfig as JSON, with "peft_type": "LORA" and "lora_alpha"'
            )
        # diffusers' model.save_lora_adapter writes one model's names, and its LoraConfig, without a prefix.
        whole = {layers[0].component: stored}
        configs = whole if format == "peft" else split_configs(stored, {layer.component for layer in layers})
        layers = with_alphas(layers, configs)
        if finite:
            check_finite("load_lora", layers)
    return _lora_file(layers, configs, metadata, training, format, family)


def _read_peft(folders: Mapping[str, Path], finite: bool) -> LoraFile:
    layers: list[Layer] = []
    configs: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    training: dict[str, Any] = {}
    for name, folder in folders.items():
        config_file = folder / PEFT_CONFIG_FILE
        with _named(config_file):
            config_text = read_text(config_file)
        config = text.from_json(config_text, config_file, "the file")
        if config.get("peft_type") != "LORA":
            raise AdapterError(f"{config_file}: expected peft_type LORA, got {config.get('peft_type')!r}")
        tensors, stored = _core.read_safetensors(folder / PEFT_FILE)
        metadata |= stored
        training |= text.training_metadata(stored, folder / PEFT_FILE)
        with _named(folder):
            _, _, found = parse(dict(tensors), {}, name or stored.get("component"))
            found = with_alphas(found, {found[0].component: config})
            if finite:
                check_finite("load_lora", found)
        layers += found
        configs[found[0].component] = config
    return _lora_file(layers, configs, metadata, training, "peft", None)


def _lora_file(
    layers: list[Layer],
    configs: dict[str, dict[str, Any]],
    metadata: Mapping[str, str],
    training: dict[str, Any],
    format: str,
    family: str | None,
) -> LoraFile:
    others = text.other_metadata(metadata)
    family = family or text.family_of_metadata(metadata) or family_of_layers(layers)
    return assembled(layers, configs, training, others, format, family)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to errors about its content."""
    try:
        yield
    except (AdapterError, TextFileError) as error:
        raise AdapterError(f"{path}: {error}") from error
    except ABOUT_VALUES as error:
        got = f"{type(error).__name__}: {error}"
        raise AdapterError(f"{path}: expected an adapter, got what fails with {got}") from error
