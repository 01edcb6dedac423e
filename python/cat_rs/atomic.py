"""Files and folders that are there whole or not at all, also after a crash or on a full disk.

What is not finished stands beside its place, in a folder with a name of its own that its writer locks. What nobody
locks was left by a killed process; the next writer beside it removes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["TEMPORARY_PREFIX", "locked_folder", "new_file", "new_folder", "write_bytes"]

TEMPORARY_PREFIX = ".unfinished-"
_REPLACED_PREFIX = ".replaced-"
_TOKEN_BYTES = 8


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as `new_file` does.

    Raises:
        OSError: The file cannot be written; nothing is left behind, an old file is untouched.
    """
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a file to write, and rename it to `path` when the block ends without an error.

    An old file stays until the new one is whole, which then has its permissions. Others may write the same path.

    Raises:
        OSError: The file cannot be written; nothing is left behind, an old file is untouched.
    """
    path = _file_name(path)
    with _unfinished(path.parent) as place, open(place / path.name, "xb") as file:
        yield file
        file.flush()
        with suppress(FileNotFoundError):
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        os.fsync(file.fileno())
        os.replace(place / path.name, path)
    _sync_folder(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder to fill, and rename it to `path` when the block ends without an error.

    A folder that stands at `path` is replaced: it stands aside until the new one is in its place. If the process is
    killed between the two, the next call puts it back.

    Raises:
        OSError: The folder cannot be written; nothing is left behind, an old folder is untouched.
    """
    path = _file_name(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _settle_replaced(path)
    with _unfinished(path.parent) as place:
        unfinished = place / path.name
        unfinished.mkdir()
        yield unfinished
        _sync_folder(unfinished)
        _replace_folder(path, unfinished)
    _sync_folder(path.parent)
    _settle_replaced(path)


@contextmanager
def locked_folder(path: str | os.PathLike[str], waits: Callable[[], object] | None = None) -> Iterator[None]:
    """Make a folder, and wait until no other process is in such a block with it.

    Who waited may find that the other has removed the folder.

    Args:
        path: The folder.
        waits: Called before waiting for another process.

    Raises:
        OSError: The folder cannot be made.
    """
    lock = None
    while lock is None:
        os.makedirs(path, exist_ok=True)
        # Another process may remove it before it is locked.
        with suppress(FileNotFoundError):
            lock = _lock(Path(path), waits=waits)
    try:
        yield
    finally:
        os.close(lock)


def _file_name(path: str | os.PathLike[str]) -> Path:
    """The path, unless it is a text that no file can have as its name, such as half of a surrogate pair."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OSError(errno.EINVAL, "No name of a file", ascii(os.fspath(path)))
    return Path(path)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` that no other writer uses; it is removed at the end."""
    _remove_left_over(folder)
    place, lock = _own_place(folder)
    try:
        yield place
    except OSError as error:
        # What was asked for is named, not what stands for it.
        if error.errno is not None and str(error.filename).startswith(str(place)):
            name = str(error.filename).replace(str(place), str(folder), 1)
            raise OSError(error.errno, error.strerror, name) from error
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _remove_left_over(folder: Path) -> None:
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY_PREFIX):
            # Where this fails a writer is at work, or it is another user's.
            with suppress(OSError):
                lock = _lock(folder / name, fcntl.LOCK_NB)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.close(lock)


def _own_place(folder: Path) -> tuple[Path, int]:
    """A new folder, and the handle that locks it."""
    while True:
        place = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(_TOKEN_BYTES)}"
        place.mkdir(mode=0o700)
        # Until it is locked, another writer may remove it.
        with suppress(FileNotFoundError):
            lock = _lock(place)
            if place.exists():
                return place, lock
            os.close(lock)


def _lock(folder: Path, flags: int = 0, waits: Callable[[], object] | None = None) -> int:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waits is not None:
                waits()
            fcntl.flock(handle, fcntl.LOCK_EX | flags)
    except OSError:
        # Some file systems have no locks: there, nothing is ever taken for left over.
        if flags & fcntl.LOCK_NB:
            os.close(handle)
            raise
    return handle


def _replace_folder(path: Path, new: Path) -> None:
    while True:
        try:
            os.rename(new, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Another writer may have been faster, at this and at the next rename.
        with suppress(FileNotFoundError):
            os.rename(path, path.with_name(f"{_REPLACED_PREFIX}{secrets.token_hex(_TOKEN_BYTES)}-{path.name}"))


def _settle_replaced(path: Path) -> None:
    """Put a folder that stands aside back where none has replaced it; else remove it."""
    pattern = f"{_REPLACED_PREFIX}{'?' * 2 * _TOKEN_BYTES}-{glob.escape(path.name)}"
    for replaced in path.parent.glob(pattern):
        with suppress(OSError):
            if path.exists():
                shutil.rmtree(replaced)
            else:
                os.rename(replaced, path)


def _sync_folder(path: Path) -> None:
    """Bring a rename inside the folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
