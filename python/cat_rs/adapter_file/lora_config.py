"""PEFT's LoraConfig in files: what it says of layers, and what is written of it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import compress, groupby
from typing import Any

from cat_rs._native import _core
from cat_rs.adapter_file.layer import Layer
from cat_rs.arguments import shown
from cat_rs.errors import AdapterError

# Parts of a LoraConfig that say how an adapter computes or was trained; the others follow from the tensors, or are
# the initialization, which is over.
_KEPT_SETTINGS = ("lora_dropout", "use_rslora", "use_dora", "lora_bias")


def with_alphas(layers: Iterable[Layer], configs: Mapping[str, Mapping[str, Any]]) -> list[Layer]:
    """The layers with the alphas of their component's LoraConfig; r, so that the scale is 1, where there is none.

    Raises:
        AdapterError: A setting has another type, or a pattern of ``alpha_pattern`` is no regular expression.
    """
    found = []
    for component, group in groupby(layers, lambda layer: layer.component):
        config, part = configs.get(component, {}), list(group)
        _check_settings(config)
        patterns = _alphas_by_pattern(config, [layer.module for layer in part])
        for layer in part:
            alpha = layer.alpha
            if alpha is None:
                alpha = _number(layer, patterns.get(layer.module, config.get("lora_alpha", layer.rank)))
            found.append(layer._replace(alpha=alpha))
    return found


def _check_settings(config: Mapping[str, Any]) -> None:
    """Refuses settings that PEFT would take, and fail with."""
    for name in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(config.get(name, False), bool):
            raise AdapterError(f"load_lora: {name} must be true or false, got {shown(config[name])}")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise AdapterError(f"load_lora: lora_dropout must be in [0, 1], got {shown(dropout)}")


def _alphas_by_pattern(config: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """Module -> alpha. As PEFT matches: the first pattern that fits the end of the name."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"load_lora: alpha_pattern must be an object, got {shown(patterns)}")
    alphas: dict[str, Any] = {}
    for pattern, alpha in patterns.items():
        for module in compress(modules, _core.names_that_fit(pattern, modules)):
            alphas.setdefault(module, alpha)
    return alphas


def _number(layer: Layer, alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise AdapterError(f"load_lora: lora_alpha of {layer.module} must be a finite number, got {shown(alpha)}")
    return alpha


def with_folded_scale(layer: Layer, config: Mapping[str, Any]) -> Layer:
    """The layer with an alpha that gives its scale as alpha / r."""
    if layer.alpha is None or not config.get("use_rslora"):
        return layer
    return layer._replace(alpha=layer.scale(rslora=True) * layer.rank)


def model_config(model: Any, adapter_name: str) -> dict[str, Any]:
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


def exact_config(layers: list[Layer], source: Mapping[str, Any]) -> dict[str, Any]:
    """A LoraConfig that names each layer, with their ranks and alphas."""
    ranks = {layer.module: layer.rank for layer in layers}
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


def configs_for(layers: list[Layer], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each component's LoraConfig: the one it was made with, or one made from its layers."""
    found: dict[str, Mapping[str, Any]] = {}
    for component in dict.fromkeys(layer.component for layer in layers):
        # Names without CLIP's `text_model.` fit with and without it: PEFT compares the ends.
        own = [
            layer._replace(module=layer.module.removeprefix("text_model."))
            for layer in layers
            if layer.component == component
        ]
        found[component] = configs.get(component) or exact_config(own, {})
    return found


def joined_configs(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The LoraConfigs of all components in one object, as diffusers keeps them: under names that start with theirs."""
    return {f"{component}.{name}": value for component, config in configs.items() for name, value in config.items()}


def split_configs(joined: Mapping[str, Any], components: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The way back."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in joined.items():
        component, _, name = key.partition(".")
        if component in components:
            configs.setdefault(component, {})[name] = value
    return configs


def _pattern(layer: Layer) -> str:
    """PEFT's pattern for this layer: it fits the ends of names, unless anchored."""
    name = re.escape(layer.module)
    return name if layer.component.startswith("text_encoder") else f"^{name}"


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(number: float | None) -> float | int | None:
    return int(number) if isinstance(number, float) and number.is_integer() else number
