"""The text in adapter files: training metadata, LoraConfigs, and the fields of kohya's trainers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_rs.adapter_file.layer import Layer
from cat_rs.arguments import shown
from cat_rs.errors import AdapterError, InvalidValueError

# Keys of a safetensors file's metadata: our training metadata, where diffusers looks for LoraConfigs, and the family,
# which the layers of a small model do not tell.
TRAINING_KEY = "cat_rs"
CONFIG_KEY = "lora_adapter_metadata"
FAMILY_KEY = "cat_rs_family"
_OWN_KEYS = (TRAINING_KEY, CONFIG_KEY, FAMILY_KEY, "format", "component")
# Training metadata that kohya's files have a field for.
_KOHYA_FIELDS = {
    "lr": "ss_learning_rate",
    "seed": "ss_seed",
    "steps": "ss_steps",
    "batch_size": "ss_total_batch_size",
    "snr_gamma": "ss_min_snr_gamma",
    "base_model": "ss_sd_model_name",
}
FAMILIES = ("sd", "sdxl", "flux")
_KOHYA_VERSIONS = {"sd_v1": "sd", "sd_v2": "sd", "sdxl_base_v1-0": "sdxl", "flux1": "flux"}


def from_json(text: str, file: Path, what: str) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        AdapterError: It is none; names the file.
    """
    try:
        value = json.loads(text, object_pairs_hook=_with_names_once)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise AdapterError(f"{file}: expected JSON in {what}: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file}: expected a JSON object in {what}, got {type(value).__name__}")
    return value


def _with_names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose readers would else keep one of two values in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {shown(name)} twice")
    return value


def to_json(argument: str, value: Mapping[str, Any]) -> str:
    """The JSON of an argument of `save_lora`.

    Raises:
        InvalidValueError: It holds other things than JSON can.
    """
    try:
        return json.dumps(dict(value), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValueError(f"save_lora: `{argument}` must be JSON, got what is not: {error}") from error


def training_metadata(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What `save_lora` noted in a file; empty for files of other programs."""
    return from_json(metadata.get(TRAINING_KEY, "{}"), file, TRAINING_KEY)


def other_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file that this package has no meaning for."""
    return {name: text for name, text in metadata.items() if name not in _OWN_KEYS}


def family_of_metadata(metadata: Mapping[str, str]) -> str | None:
    """The family, where a trainer or `save_lora` noted it."""
    noted = metadata.get(FAMILY_KEY)
    return noted if noted in FAMILIES else _KOHYA_VERSIONS.get(metadata.get("ss_base_model_version", ""))


def kohya_metadata(
    name: str, layers: list[Layer], family: str | None, training: Mapping[str, Any], before: Mapping[str, str]
) -> dict[str, str]:
    """The fields that web UIs show; those of a kohya file that is written anew are kept where they still hold."""
    ranks = {layer.rank for layer in layers}
    alphas = {layer.scale(rslora=False) * layer.rank for layer in layers}
    version = {"sdxl": "sdxl_base_v1-0", "flux": "flux1"}.get(family or "", "sd_v1")
    # Stable Diffusion 2's text embeddings are 1024 wide.
    if family == "sd" and any(".attn2.to_k" in layer.module and layer.lora_A.shape[1] == 1024 for layer in layers):
        version = "sd_v2"
    fields = {
        "ss_network_module": "networks.lora_flux" if family == "flux" else "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": before.get("ss_base_model_version", version),
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": name,
    }
    fields |= {field: str(training[key]) for key, field in _KOHYA_FIELDS.items() if training.get(key) is not None}
    trigger = training.get("trigger")
    words = [trigger] if isinstance(trigger, str) else list(trigger or ())
    if words:
        fields["ss_tag_frequency"] = json.dumps({name: {str(word): 1 for word in words}})
    return fields
