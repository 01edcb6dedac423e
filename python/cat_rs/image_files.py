"""Image files and folders of them, read alike by training and evaluation."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from cat_rs.errors import CatRsError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ImageFileError(CatRsError, OSError):
    """A file is missing, or is not a whole image.

    Attributes:
        reason: What Pillow or the operating system says.
    """

    def __init__(self, path: Path, reason: Exception) -> None:
        super().__init__(f"{path} cannot be read as a picture: {reason}")
        self.reason = reason


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, without its sub-folders' files, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def read_image(path: Path) -> Image.Image:
    """Read an image file as `to_rgb` returns it; of an animation, the first frame.

    Raises:
        ImageFileError: The file is missing, or is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports a broken file as any of these.
        raise ImageFileError(path, error) from error


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in RGB, turned upright as its camera says, transparent parts on white."""
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
