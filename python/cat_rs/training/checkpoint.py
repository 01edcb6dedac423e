"""Checkpoints: a folder a step, whole or absent."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cat_rs.atomic import new_folder, write_bytes
from cat_rs.run_folder import step_name, step_paths
from cat_rs.training.errors import CheckpointError

STATE_FILE = "state.pt"


class CheckpointFolder:
    """The checkpoints of one training, `step-000100` and so on, of which the latest `keep` stay.

    Each is written under another name and renamed when it is whole, so that neither a kill nor a full disk leaves a
    broken one. Older ones are removed only then.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self._folder = Path(folder)
        self._keep = keep

    def latest(self) -> Path | None:
        """Return the checkpoint of the highest step."""
        return next(reversed(step_paths(self._folder).values()), None)

    def save(self, step: int, state: dict[str, Any], save_adapter: Callable[[Path], object]) -> Path:
        """Write the checkpoint of a step and remove those that are too old.

        Args:
            step: The number of finished steps.
            state: What continues the training: tensors and plain values.
            save_adapter: Writes the adapter file into a folder, so that a checkpoint can be used as it is.

        Raises:
            CheckpointError: It cannot be written; the earlier ones are untouched.
        """
        path = self._folder / step_name(step)
        try:
            with new_folder(path) as unfinished:
                write_bytes(unfinished / STATE_FILE, _pickled(state))
                save_adapter(unfinished)
        except OSError as error:
            latest = self.latest()
            kept = f"; the earlier checkpoint {latest} is whole" if latest else ""
            raise CheckpointError(f"cannot write the checkpoint {path}: {error}{kept}") from error
        for old in list(step_paths(self._folder).values())[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path


def load_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the state of a checkpoint folder; tensors come to the CPU.

    Raises:
        CheckpointError: It cannot be read.
    """
    file = Path(checkpoint, STATE_FILE)
    try:
        if not file.is_file():
            raise FileNotFoundError("there is no such file")
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        # torch.save does not compress: what does may take any amount of memory.
        if size > file.stat().st_size:
            raise ValueError(f"expected parts that torch.save wrote, got some that expand to {size} bytes")
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file makes the unpickler fail in any way: KeyError, IndexError, RuntimeError ...
        raise CheckpointError(
            f"cannot read the checkpoint {file}: {error}; delete its folder to continue from the one before"
        ) from error
    return state


def _pickled(state: dict[str, Any]) -> bytes:
    """Return the bytes of torch.save: in memory first, because torch reports a full disk without saying so."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
