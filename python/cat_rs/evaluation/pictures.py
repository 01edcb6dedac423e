"""Pictures from folders, lists and tensors, as RGB PIL images with a name for error messages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from cat_rs.arguments import check_memory, refusing, shown
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.image_files import IMAGE_SUFFIXES, ImageFileError, image_files, read_image, to_rgb

PictureSource: TypeAlias = str | os.PathLike[str] | Sequence[Image.Image] | torch.Tensor
"""A folder (or one picture file), a list of PIL images, or a tensor [N, 3, H, W] with values in [0, 1]."""


@dataclass(frozen=True)
class Pictures:
    """RGB pictures, each with a name: the file's name, or its number in the list."""

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_pictures(source: PictureSource | Pictures) -> Pictures:
    """Read pictures from any supported source.

    Folders are read in the order of the file names, without sub-folders. Transparent parts are laid on white.
    Tensors are rounded to 8 bits, as diffusers does with what it generates.

    Args:
        source: Where the pictures are, see `PictureSource`.

    Returns:
        At least one picture.

    Raises:
        EvaluationFileError: The folder or a file is missing or broken.
        EvaluationInputError: There is no picture, or a tensor or list holds something else.
    """
    if isinstance(source, Pictures):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source))
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    return _from_list(source)


def check_same_sizes(base: Pictures, adapted: Pictures) -> None:
    """Raise if the two pictures of a pair differ in size; the error names them.

    Raises:
        EvaluationInputError: They do.
    """
    pairs = zip(base.images, base.names, adapted.images, adapted.names, strict=True)
    for base_image, base_name, image, name in pairs:
        if base_image.size != image.size:
            (width, height), (other_width, other_height) = base_image.size, image.size
            raise EvaluationInputError(
                f"pictures: expected the same size in a pair, got {width}x{height} of {base_name} and "
                f"{other_width}x{other_height} of {name}"
            )


def _from_path(path: Path) -> Pictures:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = image_files(path)
    else:
        raise EvaluationFileError(f"pictures: expected a folder or a picture file, got {path}, which does not exist")
    if not files:
        raise EvaluationInputError(
            f"pictures: expected at least one picture ({', '.join(IMAGE_SUFFIXES)}) in {path}, got none"
        )
    try:
        return Pictures(tuple(read_image(file) for file in files), tuple(file.name for file in files))
    except ImageFileError as error:
        raise EvaluationFileError(f"pictures: expected picture files, but {error}") from error


def _from_list(images: Sequence[Image.Image]) -> Pictures:
    if not isinstance(images, Sequence):
        expected = "a folder, a list of PIL images or a tensor"
        raise EvaluationInputError(f"pictures: expected {expected}, got {shown(images)}")
    if not images:
        raise EvaluationInputError("pictures: expected at least one picture, got an empty list")
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise EvaluationInputError(f"pictures: expected PIL images, got {type(image).__name__} at index {index}")
    return Pictures(tuple(to_rgb(image) for image in images), _numbered(len(images)))


def _from_tensor(images: torch.Tensor) -> Pictures:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise EvaluationInputError(f"pictures: expected a tensor [N, 3, H, W], got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise EvaluationInputError(f"pictures: expected a float tensor with values in [0, 1], got {images.dtype}")
    check_memory("pictures", "images", images)
    with refusing("pictures", "images", "a dense tensor", images):
        values = images.detach().to("cpu", torch.float32)
    for index, picture in enumerate(values):
        low, high = picture.min().item(), picture.max().item()
        # Written so that NaN fails too.
        if not (low >= 0.0 and high <= 1.0):
            raise EvaluationInputError(
                f"pictures: expected values in [0, 1], got [{low:g}, {high:g}] in the picture at index {index}"
            )
    pixels = (values.permute(0, 2, 3, 1).numpy() * 255.0).round().astype(np.uint8)
    return Pictures(tuple(Image.fromarray(picture) for picture in pixels), _numbered(len(pixels)))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"at index {index}" for index in range(count))
