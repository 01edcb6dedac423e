"""Nested mappings and sequences with tensors in them, as the conditions of a model are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["map_tensors", "tensors"]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in the value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The value with ``function(tensor)`` in the place of each tensor; mappings become dictionaries."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
