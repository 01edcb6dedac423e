"""Adapter files: those of diffusers, PEFT and kohya's trainers, written and read.

========= ============================================= ==================================== ====================
format    is                                            scale stands in                      read by
========= ============================================= ==================================== ====================
diffusers ``pytorch_lora_weights.safetensors``          LoraConfig in the file's metadata    load_lora_weights
peft      folder: ``adapter_model.safetensors``,        ``adapter_config.json``              PeftModel
          ``adapter_config.json``
kohya     one safetensors file                          an ``alpha`` tensor for each layer   web UIs, diffusers
========= ============================================= ==================================== ====================

A PEFT folder holds one model. An adapter of several is written as one folder each, named for the component:
``unet/`` or ``transformer/``, ``text_encoder/``, ``text_encoder_2/``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cat_rs._native import _core
from cat_rs.atomic import write_bytes
from cat_rs.errors import AdapterError, InvalidValueError

__all__ = ["LoraFile", "load_lora", "save_lora"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
SUFFIX = ".safetensors"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
FAMILIES = ("sd", "sdxl", "flux")
FORMATS = ("diffusers", "peft", "kohya")

# Keys of the metadata: ours, and where diffusers looks for the LoraConfig.
_FACTS = "cat_rs"
_CONFIG = "lora_adapter_metadata"
_LISTED = 8
# Parts of a LoraConfig that say how an adapter computes or was trained; the others follow from the tensors, or are
# the initialization, which is over.
_KEPT_SETTINGS = ("lora_dropout", "use_rslora", "use_dora", "lora_bias")
# Facts of training that kohya's files have a field for.
_KOHYA_FACTS = {
    "lr": "ss_learning_rate",
    "seed": "ss_seed",
    "steps": "ss_steps",
    "batch_size": "ss_total_batch_size",
    "snr_gamma": "ss_min_snr_gamma",
    "base_model": "ss_sd_model_name",
}


class _Layer(NamedTuple):
    """One adapted layer, as the Rust side has it; alpha as LoraConfig counts it."""

    component: str
    module: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    alpha: float | None


@dataclass(frozen=True)
class LoraFile:
    """An adapter as read from a file.

    Attributes:
        state: Component -> PEFT's name -> tensor, e.g. ``state["unet"]["mid_block....to_q.lora_A.weight"]``.
        alphas: Component -> module -> ``lora_alpha``; a layer adds ``alpha / r * B A``, with rsLoRA
            ``alpha / sqrt(r) * B A``.
        configs: Component -> the LoraConfig as the file has it; empty for formats without one.
        metadata: What `save_lora` was given, or noted in training: base model, trigger words, cat_factor ...
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
        model = _unwrapped(model)
        component = self._component_for(model) if component is None else component
        if component not in self.state:
            raise AdapterError(f"load_lora: expected layers of {component}, got only {', '.join(self.state)}")
        layers = _layers_for(model, [layer for layer in self._layers() if layer.component == component])
        _check_fit(model, layers)
        config = _exact_config(layers, self.configs.get(component, {}))
        if adapter_name in getattr(model, "peft_config", {}):
            _check_same(model, layers, bool(config["use_rslora"]), adapter_name)
        else:
            _add_adapter(model, config, adapter_name)
        _fill(model, layers, adapter_name)

    def _component_for(self, model: torch.nn.Module) -> str:
        component = _component_of_model(model)
        denoisers = [name for name in self.state if not name.startswith("text_encoder")]
        return component if component == "text_encoder" or not denoisers else denoisers[0]

    def _layers(self) -> Iterator[_Layer]:
        for component, state in self.state.items():
            for module, alpha in self.alphas[component].items():
                yield _Layer(
                    component,
                    module,
                    state[f"{module}.lora_A.weight"],
                    state[f"{module}.lora_B.weight"],
                    state.get(f"{module}.lora_B.bias"),
                    state.get(f"{module}.lora_magnitude_vector"),
                    alpha,
                )


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
        metadata: Facts to note under the key ``cat_rs``, as JSON; those of a `LoraFile` are kept.

    Returns:
        The file, or PEFT's folder.

    Raises:
        AdapterError: There is no such adapter, or the format cannot hold it.
        InvalidValueError: An argument is outside its domain.
        OSError: The file cannot be written; an older one is untouched.
    """
    _check_choice("format", format, FORMATS)
    if family is not None:
        _check_choice("family", family, FAMILIES)
    _check_path(path, format)
    layers, configs, denoiser = [], {}, None
    facts: dict[str, Any] = {}
    file_metadata: dict[str, str] = {}
    if isinstance(model_or_state, LoraFile):
        layers, configs = list(model_or_state._layers()), dict(model_or_state.configs)
        facts, file_metadata = dict(model_or_state.metadata), dict(model_or_state.file_metadata)
        family = family or model_or_state.family
    elif isinstance(model_or_state, torch.nn.Module):
        denoiser = _unwrapped(model_or_state)
    elif model_or_state is not None:
        _, found, layers = _parse(dict(model_or_state), {}, None)
        layers = [_with_alpha(layer, {}) for layer in layers]
        family = family or found
    models = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    if denoiser is not None:
        models = {**models, _component_of_model(denoiser): denoiser}
        family = family or _family_of_model(denoiser)
    for component, model in models.items():
        if model is not None:
            model = _unwrapped(model)
            layers = [layer for layer in layers if layer.component != component]
            layers += _layers_of_model(model, component, adapter_name)
            configs[component] = _reduced_config(model, adapter_name)
    if dtype is not None:
        layers = [_cast(layer, dtype) for layer in layers]
    family = family or _family_of_layers(layers)
    facts |= metadata or {}
    # A hash of the file that was read is not one of the file that is written.
    kept = {name: text for name, text in file_metadata.items() if "hash" not in name}
    common = {**kept, "format": "pt", _FACTS: _json("metadata", facts)}
    if format == "peft":
        return _save_peft(Path(path), layers, configs, common)
    if format == "kohya":
        if family == "sdxl" and denoiser is not None:
            _check_ldm_layout(denoiser)
        layers = [_with_folded_scale(layer, configs) for layer in layers]
        common |= _kohya_metadata(Path(path).stem, layers, family, facts, file_metadata)
    else:
        common[_CONFIG] = _json("configs", _diffusers_config(layers, configs))
    file = Path(path) if _is_file_name(path) else Path(path, DIFFUSERS_FILE)
    tensors = _core.adapter_tensors(layers, format, family)
    file.parent.mkdir(parents=True, exist_ok=True)
    _core.write_safetensors(file, tensors, common)
    return file


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
    given = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    if model is not None:
        given = {**given, _component_of_model(_unwrapped(model)): model}
    models = {component: _unwrapped(each) for component, each in given.items() if each is not None}
    lora = read_lora(path, models)
    for component, each in models.items():
        lora.load_into(each, component, adapter_name)
    return lora


def read_lora(path: str | os.PathLike[str], models: Mapping[str, torch.nn.Module]) -> LoraFile:
    """Read an adapter, its names checked against the models (component -> model), which stay as they are.

    Raises:
        AdapterError: The file is damaged or no LoRA, or does not fit a model.
        OSError: The file cannot be read.
    """
    known = {component: _module_names(model) for component, model in models.items()}
    parts = _peft_parts(Path(path))
    lora = _read_file(_file_of(Path(path)), known) if parts is None else _read_peft(parts)
    for component, model in models.items():
        _check_fit(model, _layers_for(model, [layer for layer in lora._layers() if layer.component == component]))
    return lora


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_lora` noted in an adapter file or folder; empty for files of other programs."""
    parts = _peft_parts(Path(path))
    file = _file_of(Path(path)) if parts is None else next(iter(parts.values())) / PEFT_FILE
    return _facts(_core.read_safetensors(file)[1], file)


# ---- reading


def _file_of(path: Path) -> Path:
    """The safetensors file that is meant; a missing one is left for the reader to report."""
    return path / DIFFUSERS_FILE if path.is_dir() else path


def _peft_parts(path: Path) -> dict[str, Path] | None:
    """Component, empty if unknown, to PEFT folder; None if `path` is no PEFT adapter."""
    if path.name == PEFT_FILE:
        return {"": path.parent}
    if not path.is_dir() or (path / DIFFUSERS_FILE).exists():
        return None
    if (path / PEFT_FILE).exists():
        return {path.name if path.name in COMPONENTS else "": path}
    parts = {name: path / name for name in COMPONENTS if (path / name / PEFT_FILE).exists()}
    return parts or None


def _read_file(file: Path, known: Mapping[str, list[str]]) -> LoraFile:
    tensors, metadata = _core.read_safetensors(file)
    facts = _facts(metadata, file)
    stored = _loads(metadata.get(_CONFIG, "{}"), file, _CONFIG)
    with _named(file):
        format, family, layers = _parse(dict(tensors), known, None)
        if format == "peft" and "lora_alpha" not in stored:
            raise AdapterError(
                f"load_lora: expected {PEFT_CONFIG_FILE} beside tensors of PEFT, which do not tell their scale"
            )
        # diffusers' model.save_lora_adapter writes one model's names, and its LoraConfig, without a prefix.
        whole = {layers[0].component: stored}
        configs = whole if format == "peft" else _configs_of(stored, {layer.component for layer in layers})
    layers = [_with_alpha(layer, configs.get(layer.component, {})) for layer in layers]
    return _lora_file(layers, configs, metadata, facts, format, family)


def _read_peft(parts: Mapping[str, Path]) -> LoraFile:
    layers: list[_Layer] = []
    configs: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for name, folder in parts.items():
        config_file = folder / PEFT_CONFIG_FILE
        config = _loads(config_file.read_text(encoding="utf-8"), config_file, "the file")
        if config.get("peft_type") != "LORA":
            raise AdapterError(f"{config_file}: expected peft_type LORA, got {config.get('peft_type')!r}")
        tensors, noted = _core.read_safetensors(folder / PEFT_FILE)
        component = name or noted.pop("component", "")
        metadata |= noted
        facts |= _facts(noted, folder / PEFT_FILE)
        with _named(folder):
            _, _, found = _parse(dict(tensors), {}, component or None)
        component = found[0].component
        configs[component] = config
        layers += [_with_alpha(layer, config) for layer in found]
    metadata.pop("component", None)
    return _lora_file(layers, configs, metadata, facts, "peft", None)


def _lora_file(
    layers: list[_Layer],
    configs: dict[str, dict[str, Any]],
    metadata: Mapping[str, str],
    facts: dict[str, Any],
    format: str,
    family: str | None,
) -> LoraFile:
    state: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for layer in layers:
        state.setdefault(layer.component, {}).update(_peft_state(layer))
        alphas.setdefault(layer.component, {})[layer.module] = layer.alpha or 0.0
    others = {name: text for name, text in metadata.items() if name not in (_FACTS, _CONFIG, "format")}
    family = family or _KOHYA_VERSIONS.get(others.get("ss_base_model_version", "")) or _family_of_layers(layers)
    return LoraFile(state, alphas, configs, facts, others, format, family)


def _parse(
    tensors: Mapping[str, torch.Tensor], known: Mapping[str, list[str]], component: str | None
) -> tuple[str, str | None, list[_Layer]]:
    """Format, family and layers of tensors by name; `component` is whose they are where the names do not tell."""
    named = [(name, _plain(tensor)) for name, tensor in tensors.items()]
    format, family, found = _core.adapter_layers(named, known)
    layers = [_Layer(*each) for each in found]
    if any(not layer.component for layer in layers):
        component = component or _component_of_names([layer.module for layer in layers])
        layers = [layer._replace(component=component) for layer in layers]
    return format, family, layers


class _named:
    """Adds the file's name to errors about its content."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, AdapterError):
            raise AdapterError(f"{self._path}: {error}") from error


def _facts(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    return _loads(metadata.get(_FACTS, "{}"), file, _FACTS)


def _loads(text: str, file: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{file}: expected JSON in {what}: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file}: expected a JSON object in {what}, got {type(value).__name__}")
    return value


def _configs_of(stored: Mapping[str, Any], components: set[str]) -> dict[str, dict[str, Any]]:
    """The LoraConfigs that diffusers keeps in one object, under names that start with the component's."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in stored.items():
        component, _, name = key.partition(".")
        if component in components:
            configs.setdefault(component, {})[name] = value
    return configs


def _with_alpha(layer: _Layer, config: Mapping[str, Any]) -> _Layer:
    """The layer with the alpha of a LoraConfig; r, so that the scale is 1, where there is neither."""
    if layer.alpha is not None:
        return layer
    alpha: Any = layer.lora_A.shape[0]
    if "lora_alpha" in config:
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            # As PEFT matches: the first pattern that fits the end of the name.
            if re.match(rf"(.*\.)?({pattern})$", layer.module):
                alpha = value
                break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"load_lora: lora_alpha of {layer.module} must be a number, got {alpha!r}")
    return layer._replace(alpha=alpha)


# ---- models


def _base_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's own modules by the names they had before PEFT."""
    modules = {}
    for name, module in model.named_modules():
        if ".lora_" not in name and ".base_layer" not in name:
            modules[name.removeprefix("base_model.model.")] = getattr(module, "base_layer", module)
    return modules


def _module_names(model: torch.nn.Module) -> list[str]:
    return [name for name, module in _base_modules(model).items() if getattr(module, "weight", None) is not None]


def _is_text_encoder(model: torch.nn.Module) -> bool:
    return any(name.endswith(("encoder.layers", "encoder.block")) for name in _base_modules(model))


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without what torch.compile and data parallelism put around it, and before its layers' names."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _component_of_model(model: torch.nn.Module) -> str:
    if _is_text_encoder(model):
        return "text_encoder"
    return "unet" if "mid_block" in _base_modules(model) else "transformer"


def _family_of_model(model: torch.nn.Module) -> str | None:
    config = getattr(model, "config", None)
    modules = _base_modules(model)
    if "mid_block" in modules:
        return "sdxl" if getattr(config, "addition_embed_type", None) == "text_time" else "sd"
    return "flux" if {"single_transformer_blocks", "transformer_blocks"} <= set(modules) else None


def _check_ldm_layout(model: torch.nn.Module) -> None:
    """kohya's names of SDXL's layers count two in a block: other models' layers would get each other's names."""
    layers = getattr(getattr(model, "config", None), "layers_per_block", 2)
    if layers != 2 and layers != [2, 2, 2]:
        raise AdapterError(
            f"save_lora: kohya's names for sdxl are those of a U-Net with layers_per_block 2, got {layers}"
        )


def _layers_of_model(model: torch.nn.Module, component: str, adapter_name: str) -> list[_Layer]:
    """The adapter's tensors as they are in the model.

    Raises:
        AdapterError: The model has no such adapter, or one that is more than LoRA.
    """
    adapters = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        has = ", ".join(map(repr, adapters)) or "none"
        raise AdapterError(
            f"save_lora: `adapter_name` must be an adapter of the {component}, got {adapter_name!r}: it has {has}"
        )
    from peft import get_peft_model_state_dict

    # With a state dict of our own PEFT does not take a bias of B for a matrix that lost a dimension.
    state = get_peft_model_state_dict(model, model.state_dict(), adapter_name, save_embedding_layers=False)
    alphas = {
        name.removeprefix("base_model.model."): module.lora_alpha[adapter_name]
        for name, module in model.named_modules()
        if adapter_name in getattr(module, "lora_alpha", ())
    }
    _, _, layers = _parse(state, {}, component)
    return [layer._replace(component=component, alpha=alphas[layer.module]) for layer in layers]


def _layers_for(model: torch.nn.Module, layers: list[_Layer]) -> list[_Layer]:
    """The layers under the model's own names: CLIP's `text_model.` is in files, not in every model."""
    names = _base_modules(model)

    def own_name(name: str) -> str:
        spellings = (name, name.removeprefix("text_model."), f"text_model.{name}")
        return next((spelling for spelling in spellings if spelling in names), name)

    return [layer._replace(module=own_name(layer.module)) for layer in layers]


def _check_fit(model: torch.nn.Module, layers: list[_Layer]) -> None:
    modules = _base_modules(model)
    absent = [layer.module for layer in layers if layer.module not in modules]
    if absent:
        raise AdapterError(
            f"load_lora: expected layers of {type(model).__name__}, which does not have {_listed(absent)}"
        )
    for layer in layers:
        base = modules[layer.module]
        if not isinstance(base, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        expected = base.weight.shape
        if layer.lora_A.shape[1:] != expected[1:] or layer.lora_B.shape[0] != expected[0]:
            raise AdapterError(
                f"load_lora: {layer.module} has weight {list(expected)}, which A {list(layer.lora_A.shape)} and "
                f"B {list(layer.lora_B.shape)} do not fit"
            )


def _check_same(model: torch.nn.Module, layers: list[_Layer], rslora: bool, adapter_name: str) -> None:
    """Whether the model's adapter has the layers, ranks and scales of the file's."""
    has = {
        name.removeprefix("base_model.model."): (module.r[adapter_name], module.scaling[adapter_name])
        for name, module in model.named_modules()
        if adapter_name in getattr(module, "scaling", ())
    }
    file = {layer.module: (layer.lora_A.shape[0], _scale(layer, rslora)) for layer in layers}
    different = sorted(name for name in has.keys() | file.keys() if has.get(name) != file.get(name))
    if different:
        raise AdapterError(
            f"load_lora: the model's adapter {adapter_name!r} must have the layers, ranks and scales of the file, got "
            f"others at {_listed(different)}: delete it first, or give another adapter_name"
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


def _fill(model: torch.nn.Module, layers: list[_Layer], adapter_name: str) -> None:
    from peft import PeftModel, set_peft_model_state_dict

    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    state = {f"{prefix}{name}": tensor for layer in layers for name, tensor in _peft_state(layer).items()}
    result = set_peft_model_state_dict(model, state, adapter_name)
    missing = [name for name in result.missing_keys if ".lora_" in name and f".{adapter_name}." in name]
    if missing or result.unexpected_keys:
        raise AdapterError(
            f"load_lora: PEFT did not take the whole adapter: {_listed([*missing, *result.unexpected_keys])}"
        )


# ---- LoraConfig


def _reduced_config(model: Any, adapter_name: str) -> dict[str, Any]:
    """A model's LoraConfig as JSON without defaults: other versions of PEFT do not know every field."""
    from peft import LoraConfig

    config = model.peft_config[adapter_name].to_dict()
    defaults = LoraConfig().to_dict()
    kept = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", *_KEPT_SETTINGS)
    reduced: dict[str, Any] = {}
    for name, value in config.items():
        # The initialization may need the base model, and is over.
        if name in ("peft_version", "init_lora_weights", "auto_mapping", "inference_mode", "revision"):
            continue
        if name in kept or value != defaults.get(name):
            reduced[name] = sorted(value) if isinstance(value, set) else value
    return reduced


def _exact_config(layers: list[_Layer], source: Mapping[str, Any]) -> dict[str, Any]:
    """A LoraConfig that names each layer, with their ranks and alphas."""
    ranks = {layer.module: int(layer.lora_A.shape[0]) for layer in layers}
    alphas = {layer.module: _whole(layer.alpha) for layer in layers}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = {name: source[name] for name in _KEPT_SETTINGS if name in source}
    config.setdefault("use_rslora", False)
    return config | {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {_pattern(layer): ranks[layer.module] for layer in layers if ranks[layer.module] != rank},
        "alpha_pattern": {_pattern(layer): alphas[layer.module] for layer in layers if alphas[layer.module] != alpha},
        "use_dora": any(layer.magnitude is not None for layer in layers),
        "lora_bias": any(layer.bias is not None for layer in layers),
    }


def _diffusers_config(layers: list[_Layer], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    packed = {}
    for component, config in _configs_for(layers, configs).items():
        packed.update({f"{component}.{name}": value for name, value in config.items()})
    return packed


def _configs_for(layers: list[_Layer], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each component's LoraConfig: the one it was made with, or one made from its layers."""
    found: dict[str, Mapping[str, Any]] = {}
    for component in dict.fromkeys(layer.component for layer in layers):
        own = [_without_text_model(layer) for layer in layers if layer.component == component]
        found[component] = configs.get(component) or _exact_config(own, {})
    return found


def _without_text_model(layer: _Layer) -> _Layer:
    """The layer under the end of its name that fits with and without CLIP's `text_model.` before it."""
    return layer._replace(module=layer.module.removeprefix("text_model."))


def _pattern(layer: _Layer) -> str:
    """PEFT's pattern for this layer: it fits the ends of names, unless anchored."""
    name = re.escape(layer.module)
    return name if layer.component.startswith("text_encoder") else f"^{name}"


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(number: float | None) -> float | int | None:
    return int(number) if isinstance(number, float) and number.is_integer() else number


# ---- writing


def _save_peft(
    folder: Path, layers: list[_Layer], configs: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]
) -> Path:
    found = _configs_for(layers, configs)
    written = {
        component: _core.adapter_tensors([layer for layer in layers if layer.component == component], "peft", None)
        for component in found
    }
    if not written:
        _core.adapter_tensors([], "peft", None)
    for component, tensors in written.items():
        part = folder / component if len(written) > 1 else folder
        part.mkdir(parents=True, exist_ok=True)
        _core.write_safetensors(part / PEFT_FILE, tensors, {**metadata, "component": component})
        config = {"peft_type": "LORA", **found[component]}
        write_bytes(part / PEFT_CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def _with_folded_scale(layer: _Layer, configs: Mapping[str, Mapping[str, Any]]) -> _Layer:
    """The layer with an alpha that gives its scale as alpha / r."""
    if layer.alpha is None or not configs.get(layer.component, {}).get("use_rslora"):
        return layer
    return layer._replace(alpha=_scale(layer, True) * layer.lora_A.shape[0])


def _scale(layer: _Layer, rslora: bool) -> float:
    rank = layer.lora_A.shape[0]
    return (rank if layer.alpha is None else layer.alpha) / (math.sqrt(rank) if rslora else rank)


_KOHYA_VERSIONS = {"sd_v1": "sd", "sd_v2": "sd", "sdxl_base_v1-0": "sdxl", "flux1": "flux"}


def _kohya_metadata(
    name: str,
    layers: list[_Layer],
    family: str | None,
    facts: Mapping[str, Any],
    before: Mapping[str, str],
) -> dict[str, str]:
    """The fields that web UIs show; those of a kohya file that is written anew are kept where they still hold."""
    ranks = {layer.lora_A.shape[0] for layer in layers}
    alphas = {_scale(layer, False) * layer.lora_A.shape[0] for layer in layers}
    version = {"sdxl": "sdxl_base_v1-0", "flux": "flux1"}.get(family or "", "sd_v1")
    # Stable Diffusion 2's text embeddings are 1024 wide.
    if family == "sd" and any(".attn2.to_k" in each.module and each.lora_A.shape[1] == 1024 for each in layers):
        version = "sd_v2"
    fields = {
        "ss_network_module": "networks.lora_flux" if family == "flux" else "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": before.get("ss_base_model_version", version),
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": name,
    }
    fields |= {field: str(facts[fact]) for fact, field in _KOHYA_FACTS.items() if facts.get(fact) is not None}
    trigger = facts.get("trigger")
    words = [trigger] if isinstance(trigger, str) else list(trigger or ())
    if words:
        fields["ss_tag_frequency"] = json.dumps({name: {str(word): 1 for word in words}})
    return fields


def _check_path(path: str | os.PathLike[str], format: str) -> None:
    if format == "peft" and _is_file_name(path):
        raise InvalidValueError(f"save_lora: `path` must be a folder for format peft, got {os.fspath(path)}")
    if format == "kohya" and not _is_file_name(path):
        raise InvalidValueError(f"save_lora: `path` must end with {SUFFIX} for format kohya, got {os.fspath(path)}")


def _is_file_name(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).endswith(SUFFIX)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidValueError(f"save_lora: `{name}` must be {', '.join(choices)}, got {value!r}")


def _json(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(value), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"save_lora: `{name}` must be JSON: {error}") from error


# ---- layers


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu")


def _cast(layer: _Layer, dtype: torch.dtype) -> _Layer:
    if not dtype.is_floating_point:
        raise InvalidValueError(f"save_lora: `dtype` must be a floating dtype, got {dtype}")
    return layer._replace(
        lora_A=layer.lora_A.to(dtype),
        lora_B=layer.lora_B.to(dtype),
        bias=None if layer.bias is None else layer.bias.to(dtype),
        magnitude=None if layer.magnitude is None else layer.magnitude.to(dtype),
    )


def _peft_state(layer: _Layer) -> dict[str, torch.Tensor]:
    named = {
        "lora_A.weight": layer.lora_A,
        "lora_B.weight": layer.lora_B,
        "lora_B.bias": layer.bias,
        "lora_magnitude_vector": layer.magnitude,
    }
    return {f"{layer.module}.{name}": tensor for name, tensor in named.items() if tensor is not None}


def _component_of_names(modules: list[str]) -> str:
    """Whose layers these are, by the structure of diffusers' models.

    Raises:
        AdapterError: They could be anybody's.
    """
    starts = {
        "unet": ("down_blocks.", "up_blocks.", "mid_block."),
        "transformer": ("transformer_blocks.", "single_transformer_blocks."),
        "text_encoder": ("text_model.", "encoder.layers.", "encoder.block."),
    }
    fitting = [name for name, start in starts.items() if any(module.startswith(start) for module in modules)]
    if len(fitting) != 1:
        raise AdapterError(
            f"expected layers of a known denoiser or text encoder, got {_listed(modules)}: put the PEFT files into a "
            f"folder named {', '.join(COMPONENTS[:-1])} or {COMPONENTS[-1]}"
        )
    return fitting[0]


def _family_of_layers(layers: list[_Layer]) -> str | None:
    """The family, where the layers tell: by names that others do not have, and the width of text embeddings."""
    names = {layer.component for layer in layers}
    if any(layer.module.startswith("single_transformer_blocks.") for layer in layers):
        return "flux"
    if "unet" not in names:
        return None
    if "text_encoder_2" in names or any(re.search(r"\.transformer_blocks\.[1-9]", each.module) for each in layers):
        return "sdxl"
    widths = {each.lora_A.shape[1] for each in layers if each.module.endswith((".attn2.to_k", ".attn2.to_v"))}
    return {768: "sd", 1024: "sd", 2048: "sdxl"}.get(widths.pop()) if len(widths) == 1 else None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
