"""A folder of pictures with captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from cat_rs.image_files import IMAGE_SUFFIXES, ImageFileError, image_files, read_image
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
    from the text file beside it (`0.txt`), else from `caption`.

    Args:
        folder: The folder; folders in it are used only where metadata.jsonl names their files.
        caption: The caption of pictures that have none, with `{name}` for the file's name without suffix.

    Returns:
        The examples, ordered by path.

    Raises:
        DatasetError: There is no folder, no picture, or a picture without a caption; a row of metadata.jsonl is broken
            or names a file that is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"data: expected a folder of pictures, got {folder}, which is not a folder")
    captions = _read_metadata(folder)
    pictures = {*image_files(folder), *captions}
    if not pictures:
        raise DatasetError(f"data: expected pictures ({' '.join(IMAGE_SUFFIXES)}) in {folder}, got none")
    found = {path: captions.get(path) or _caption_beside(path) or _fill(caption, path) for path in sorted(pictures)}
    bare = [path.name for path, text in found.items() if text is None]
    if bare:
        raise DatasetError(
            f"data: expected a caption for each picture, got none for {', '.join(bare[:5])}"
            f"{' ...' if len(bare) > 5 else ''} in {folder}; "
            f"write {METADATA_FILE}, a .txt beside each picture, or give --caption"
        )
    return [Example(path, text) for path, text in found.items() if text is not None]


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
    scaled = picture.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (_offset(side - size, generator) for side in scaled.size)
    square = np.array(scaled.crop((left, top, left + size, top + size)), dtype=np.float32)
    pixels = torch.from_numpy(square).permute(2, 0, 1).contiguous() / 127.5 - 1.0
    return Crop(pixels, (height, width), (top, left))


def _offset(slack: int, generator: torch.Generator | None) -> int:
    if generator is None:
        return slack // 2
    return int(torch.randint(slack + 1, (), generator=generator))


def _read_metadata(folder: Path) -> dict[Path, str]:
    """Read picture -> caption from metadata.jsonl, if there is one."""
    file = folder / METADATA_FILE
    if not file.exists():
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: expected JSON lines in UTF-8, got: {error}") from error
    captions = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            path, caption = _read_row(folder, line, f"{file}, line {number}")
            captions[path] = caption
    return captions


def _read_row(folder: Path, line: str, where: str) -> tuple[Path, str]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: expected a JSON object, got: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DatasetError(f'{where}: expected an object with "file_name", got {line[:80]}')
    caption = next((row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str)), None)
    if caption is None:
        raise DatasetError(f'{where}: expected a caption as "text", got {line[:80]}')
    path = folder / row["file_name"]
    if not path.is_file():
        raise DatasetError(f"{where}: expected the picture {path}, which is not there")
    return path, caption.strip()


def _caption_beside(picture: Path) -> str | None:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: expected a caption in UTF-8, got: {error}") from error


def _fill(caption: str | None, picture: Path) -> str | None:
    return None if caption is None else caption.replace("{name}", picture.stem)
