"""Files of teacher banks: safetensors, written while the predictions are computed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cat_rs.atomic import new_file
from cat_rs.errors import InvalidValueError

__all__ = ["FORMAT", "read_bank", "write_bank"]

FORMAT = "cat-rs teacher bank 1"
# safetensors' names of the dtypes that a bank holds.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def read_bank(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a bank, mapped into memory, and its metadata.

    Raises:
        InvalidValueError: The file is no bank of this format.
        OSError: The file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    # safe_open's own error does not tell a missing file from a folder.
    with open(path, "rb"):
        pass
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InvalidValueError(
                    f"TeacherBank.load: `path` must be a file of format {FORMAT!r}, got {path} of format "
                    f"{metadata.get('format')!r}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise InvalidValueError(f"TeacherBank.load: `path` must be a teacher bank, got {path}: {error}") from error


def write_bank(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    predictions: Iterable[torch.Tensor],
) -> None:
    """Writes a bank whose predictions need not fit into memory.

    Args:
        path: An older file there stays until the new one is whole.
        tensors: All of the bank's; of the predictions, ``base``, only shape and dtype are read.
        metadata: The bank's.
        predictions: ``base`` in pieces, in order, each written as it comes.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    # The widest first, as safetensors does, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in predictions if name == "base" else (tensors[name],):
                file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
