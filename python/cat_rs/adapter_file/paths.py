"""Which files an adapter consists of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")


def locate(path: str | os.PathLike[str]) -> Path | dict[str, Path]:
    """The safetensors file of an adapter; or PEFT's folders by component, which is empty where nothing tells.

    Args:
        path: A safetensors file; or a folder with ``pytorch_lora_weights.safetensors``, with PEFT's
            ``adapter_model.safetensors`` or with folders of these named for the components.

    Raises:
        FileNotFoundError: There is no adapter.
    """
    path = Path(path)
    if path.name == PEFT_FILE:
        return {"": path.parent}
    if path.is_dir() and not (path / DIFFUSERS_FILE).exists():
        if (path / PEFT_FILE).exists():
            return {path.name if path.name in COMPONENTS else "": path}
        folders = {name: path / name for name in COMPONENTS if (path / name / PEFT_FILE).exists()}
        if folders:
            return folders
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    if not file.exists():
        expected = f"expected a safetensors file or a folder with {DIFFUSERS_FILE} or {PEFT_FILE}"
        raise FileNotFoundError(errno.ENOENT, f"No adapter, {expected}", os.fspath(path))
    return file


def adapter_files(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Every file of an adapter, by a name that does not depend on where the adapter is.

    Raises:
        FileNotFoundError: There is no adapter, or a file of it is missing.
    """
    found = locate(path)
    if isinstance(found, Path):
        return {DIFFUSERS_FILE: found}
    names = (PEFT_FILE, PEFT_CONFIG_FILE)
    files = {f"{component}/{name}": folder / name for component, folder in found.items() for name in names}
    for folder in found.values():
        (folder / PEFT_FILE).stat()
    return {name: file for name, file in files.items() if file.exists()}
