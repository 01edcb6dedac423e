"""The one writer of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from cat_rs._native import _core
from cat_rs.atomic import new_file


@dataclass(frozen=True)
class TensorParts:
    """A tensor that comes in parts, each a piece of its memory: they need not fit into memory together."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterator[torch.Tensor]


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor | TensorParts], metadata: Mapping[str, str]
) -> None:
    """Write CPU tensors to a file; an older file stays until the new one is whole.

    The same tensors and metadata give the same bytes.

    Raises:
        AdapterError: There is no tensor, or one of a dtype that is not written, or parts do not make up their tensor.
        OSError: The file cannot be written; an older one is untouched.
    """
    with new_file(path) as file:
        sources = [(name, _source(tensor)) for name, tensor in tensors.items()]
        _core.write_safetensors(file.fileno(), path, sources, metadata)


def _source(tensor: torch.Tensor | TensorParts) -> torch.Tensor | tuple[str, tuple[int, ...], Iterator[torch.Tensor]]:
    if isinstance(tensor, torch.Tensor):
        return tensor
    return str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.parts
