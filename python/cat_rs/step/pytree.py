"""Nested mappings and sequences of tensors, such as the conditions of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["map_tensors", "named_tensors", "rebuild", "tensors"]


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in the value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    for _, child in _children(value):
        yield from tensors(child)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the value, in order, each with the subscripts that find it, such as ``['text'][0]``."""
    if isinstance(value, torch.Tensor):
        yield name, value
    for key, child in _children(value):
        yield from named_tensors(child, f"{name}[{key!r}]")


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The value with ``function(tensor)`` in the place of each tensor; mappings become dictionaries."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return rebuild(value, [map_tensors(function, child) for child in value])
    return value


def rebuild(sequence: Any, items: list[Any]) -> Any:
    """The items as a list, tuple or named tuple, as the sequence is."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)
