"""A folder of pictures with captions."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from cat_rs.image_files import IMAGE_SUFFIXES, ImageFileError, image_files, read_image
from cat_rs.text_files import is_unicode, json_lines, read_text
from cat_rs.training.errors import DatasetError

METADATA_FILE = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Example:
    """One picture file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Crop:
    """A square of a picture, ready for the VAE.

    Attributes:
        pixels: [3, S, S] float32 in [-1, 1].
        original_size: Height and width of the picture file.
        top_left: Where the square begins in the scaled picture.
    """

    pixels: torch.Tensor
    original_size: tuple[int, int]
    top_left: tuple[int, int]


def read_folder(folder: str | os.PathLike[str], *, caption: str | None = None) -> list[Example]:
    """Find the pictures of a folder and their captions.

    The caption of a picture comes from its row in `metadata.jsonl` (`{"file_name": "0.png", "text": "..."}`), else
    from the text file beside it (`0.txt`), else from `caption`. An empty caption is a caption.

    A row may name its picture by any path into the folder: relative, absolute, or through links. A path that leads
    out of the folder is refused, so that a dataset from elsewhere cannot take your other pictures; links that lie in
    the folder are followed.

    Args:
        folder: The folder; folders in it are used only where metadata.jsonl names their files.
        caption: The caption of pictures that have none, with `{name}` for the file's name without suffix.

    Returns:
        The examples, ordered by path; each file once, whatever paths lead to it.

    Raises:
        DatasetError: There is no folder, no picture, or a picture without a caption or with two; a row of
            metadata.jsonl is broken, or names a file that is not there or outside of the folder.

    Warns:
        UserWarning: Pictures are skipped because nothing here reads their format; it names them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"data: expected a folder of pictures, got {folder}, which is not a folder")
    find = _Finder()
    rows = _read_metadata(folder, find)
    found: dict[str, Example] = {}
    bare = []
    for path in image_files(folder):
        file = os.path.realpath(path)
        text = rows[file].caption if file in rows else _caption_beside(path, find)
        text = _fill(caption, path) if text is None else text
        if text is None:
            bare.append(path.name)
        else:
            _add(found, file, Example(path, text), str(path))
    if bare:
        raise DatasetError(
            f"data: expected a caption for each picture, got none for {', '.join(bare[:5])}"
            f"{' ...' if len(bare) > 5 else ''} in {folder}; "
            f"write {METADATA_FILE}, a .txt beside each picture, or give --caption"
        )
    found = rows | found
    if not found:
        raise DatasetError(f"data: expected pictures ({' '.join(IMAGE_SUFFIXES)}) in {folder}, got none")
    return sorted(found.values(), key=lambda example: example.path)


def fingerprint(examples: Sequence[Example], prompts: Sequence[str] = ()) -> str:
    """Hash captions, pictures and other prompts, to tell whether a training continues on the same data."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode())
    for example in examples:
        digest.update(json.dumps([example.path.name, example.caption]).encode())
        digest.update(example.path.read_bytes())
    return digest.hexdigest()


def load_picture(path: Path) -> Image.Image:
    """Read a picture as RGB, turned upright as its camera says, transparent parts on white.

    Raises:
        DatasetError: The file is missing or is not a whole picture.
    """
    try:
        return read_image(path)
    except ImageFileError as error:
        if isinstance(error.reason, UnidentifiedImageError):
            raise DatasetError(f"{path}: expected a picture, got a file that Pillow does not recognize") from error
        raise DatasetError(f"{path}: expected a whole picture, got: {error.reason}") from error


def crop_square(picture: Image.Image, size: int, generator: torch.Generator | None = None) -> Crop:
    """Scale the picture's shorter side to `size` and cut a square.

    Args:
        picture: An RGB picture.
        size: Side of the square in pixels.
        generator: Draws the position of the square; None takes the center.
    """
    width, height = picture.size
    scale = size / min(width, height)
    scaled = (max(size, round(width * scale)), max(size, round(height * scale)))
    left, top = (_offset(side - size, generator) for side in scaled)
    # Only the square is scaled: the whole of a long and thin picture could fill the memory.
    across, down = width / scaled[0], height / scaled[1]
    box = (left * across, top * down, min(width, (left + size) * across), min(height, (top + size) * down))
    square = np.array(picture.resize((size, size), Image.Resampling.LANCZOS, box=box), dtype=np.float32)
    pixels = torch.from_numpy(square).permute(2, 0, 1).contiguous() / 127.5 - 1.0
    return Crop(pixels, (height, width), (top, left))


def _offset(slack: int, generator: torch.Generator | None) -> int:
    if generator is None:
        return slack // 2
    return int(torch.randint(slack + 1, (), generator=generator))


class _Finder:
    """Finds files by names in any Unicode form: file systems keep the form in which a name was first written."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, Path]] = {}

    def __call__(self, path: Path) -> Path | None:
        """Return the file of this path, or None if there is none."""
        entry = self._entry(path)
        return entry if entry.is_file() else None

    def _entry(self, path: Path) -> Path:
        if path.exists() or path == path.parent:
            return path
        folder = self._entry(path.parent)
        if folder not in self._listings:
            entries = folder.iterdir() if folder.is_dir() else ()
            self._listings[folder] = {_composed(entry.name): entry for entry in entries}
        return self._listings[folder].get(_composed(path.name), path)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _read_metadata(folder: Path, find: _Finder) -> dict[str, Example]:
    """Read the rows of metadata.jsonl, if there is one: by the file that each path leads to."""
    file = folder / METADATA_FILE
    if not file.exists():
        return {}
    try:
        lines = json_lines(file)
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read: {error}") from error
    rows: dict[str, Example] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            row = _read_row(folder, find, line, where)
            _add(rows, os.path.realpath(row.path), row, where)
    return rows


def _add(examples: dict[str, Example], file: str, example: Example, where: str) -> None:
    """Add an example, unless its file is there already."""
    earlier = examples.setdefault(file, example)
    if earlier.caption != example.caption:
        raise DatasetError(
            f"{where}: expected one caption for each picture, got {example.caption!r} for {example.path}, which has "
            f"{earlier.caption!r} as {earlier.path}"
        )


def _read_row(folder: Path, find: _Finder, line: str, where: str) -> Example:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{where}: expected a JSON object, got: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DatasetError(f'{where}: expected an object with "file_name", got {line[:80]}')
    caption = next((row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str)), None)
    if caption is None:
        raise DatasetError(f'{where}: expected a caption as "text", got {line[:80]}')
    if not is_unicode(caption):
        raise DatasetError(f"{where}: expected a caption in Unicode, got half of a surrogate pair in {caption!r}")
    name = row["file_name"]
    # Windows writes the second.
    path = find(folder / name) or find(folder / name.replace("\\", "/"))
    if path is None:
        raise DatasetError(f"{where}: expected the picture {folder / name}, which is not there")
    if not _leads_into(folder, path):
        raise DatasetError(f"{where}: expected a picture in {folder}, got {name}, which is outside; link or copy it")
    return Example(path, caption.strip())


def _leads_into(folder: Path, path: Path) -> bool:
    """Whether a path stays in the folder: as it is written, or where it ends."""
    goes_down = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
    return goes_down or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _caption_beside(picture: Path, find: _Finder) -> str | None:
    file = find(picture.with_suffix(".txt"))
    if file is None:
        return None
    try:
        return read_text(file).strip()
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read as a caption: {error}") from error


def _fill(caption: str | None, picture: Path) -> str | None:
    return None if caption is None else caption.replace("{name}", picture.stem)
