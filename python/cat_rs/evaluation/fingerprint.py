"""Fingerprints of models: hashes of their weights and settings, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from cat_rs.evaluation.errors import EvaluationInputError


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal digits, of the parts of a model.

    The hash covers the class, the settings, and the name, shape, dtype and bytes of every parameter and buffer of a
    module; the vocabulary and rules of a tokenizer; the settings of a scheduler or an image processor. It does not
    depend on where files were or which version wrote them, and it misses attention processors and hooks.

    Args:
        parts: Name -> module, tokenizer, scheduler, image processor, plain value, list of them, or None.

    Raises:
        EvaluationInputError: A part is something else, or has weights that are not loaded.
    """
    return text_hash({name: _content(name, part) for name, part in parts.items()})


def pipeline_fingerprint(pipeline: Any) -> str:
    """Return the fingerprint of a diffusers pipeline with the weights that it has now."""
    return fingerprint({"": [type(pipeline).__name__, _plain({**pipeline.config})], **pipeline.components})


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors."""
    return text_hash({name: _tensor_hash(name, tensor) for name, tensor in tensors.items()})


def text_hash(content: Any) -> str:
    """Return the SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(canonical_json(content).encode(errors="backslashreplace")).hexdigest()


def canonical_json(content: Any) -> str:
    """Return plain values as JSON with sorted keys; values that JSON lacks, such as dtypes, become text."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the versions of packages that change pictures or embeddings; of PyTorch only the minor version."""
    return {"torch": ".".join(torch.__version__.split(".")[:2]), **{name: version(name) for name in packages}}


def _content(name: str, part: Any) -> Any:
    if part is None or isinstance(part, (bool, int, float, str, list)):
        return part
    content: dict[str, Any] = {"class": type(part).__name__}
    if isinstance(part, torch.nn.Module):
        content["settings"] = _settings(part)
        content["weights"] = {
            key: _tensor_hash(f"{name}.{key}", tensor)
            for tensors in (part.named_parameters(), part.named_buffers())
            for key, tensor in tensors
        }
    elif hasattr(part, "get_vocab"):
        content["vocabulary"] = text_hash(_tokenizer_rules(part))
        content["length"] = part.model_max_length
    else:
        content["settings"] = _settings(part)
        if content["settings"] is None:
            raise EvaluationInputError(
                f"cache: expected modules, tokenizers, schedulers and image processors, got {type(part).__name__} "
                f"as {name}; evaluate without a cache"
            )
    return content


def _settings(part: Any) -> Any:
    """Return the settings of a part of diffusers or transformers, None if it has none."""
    config = getattr(part, "config", part)
    if isinstance(config, Mapping):
        return _plain(config)
    return _plain(config.to_dict()) if hasattr(config, "to_dict") else None


def _plain(value: Any) -> Any:
    """Return settings without the names of files and versions, which are not content."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: _plain(item)
        for key, item in value.items()
        if not str(key).startswith("_") and key not in ("name_or_path", "transformers_version")
    }


def _tokenizer_rules(tokenizer: Any) -> Any:
    if not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.get_vocab()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are what the last call asked for.
    return {key: value for key, value in rules.items() if key not in ("truncation", "padding")}


def _tensor_hash(name: str, tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        raise EvaluationInputError(
            f"cache: expected weights that are loaded, got {name} on the device meta, where sequential offload leaves "
            f"them; evaluate without a cache"
        )
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
