"""Files and folders that are there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["TEMPORARY_PREFIX", "new_file", "new_folder", "write_bytes"]

TEMPORARY_PREFIX = ".unfinished-"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name beside `path`, then rename it; an old file stays until the new one is whole.

    Raises:
        OSError: The file cannot be written; nothing is left behind, an old file is untouched.
    """
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a file under a temporary name beside `path` to write, and rename it when the block ends without an error.

    Raises:
        OSError: The file cannot be written; nothing is left behind, an old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill, and rename it to `path` when the block ends without an error.

    A folder that stands at `path` already is replaced. What a killed process left behind has the prefix
    `TEMPORARY_PREFIX` and is removed when the next folder is made beside it.

    Raises:
        OSError: The folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    """Bring a rename inside the folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
