"""Image files and folders of them, read alike by training and evaluation."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from pathlib import Path
from typing import cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from cat_rs.errors import CatRsError

# What is read wherever Pillow can: it depends on its version and on plugins, such as pillow-heif.
_PICTURES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
_NEVER_READ = (
    *(".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".hif", ".ico", ".j2k", ".jpx", ".nef", ".orf", ".pef", ".psd"),
    *(".raf", ".rw2", ".svg", ".xcf"),
)
IMAGE_SUFFIXES = tuple(suffix for suffix in _PICTURES if suffix in Image.registered_extensions())

_LARGEST_FLOAT_OF_ONE = 16.0
# The modes in which Pillow can hold the colours that an ICC profile describes.
_MODES_OF_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# Adobe RGB (1998): its gamma, and what turns its linear light into that of sRGB.
_ADOBE_GAMMA = 563 / 256
_ADOBE_TO_SRGB = np.array([[1.398361, -0.398361, 0], [0, 1, 0], [0, -0.042930, 1.042930]])
# Two steps of 255: what a profile that means sRGB differs by.
_SRGB_TOLERANCE = 2


class ImageFileError(CatRsError, OSError):
    """A file is missing, or is not a whole image.

    Attributes:
        reason: What Pillow or the operating system says.
    """

    def __init__(self, path: Path, reason: Exception) -> None:
        super().__init__(f"{path} cannot be read as a picture: {reason}")
        self.reason = reason


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, without its sub-folders' files, in the order of their names.

    Hidden files, such as those that macOS keeps beside each picture, are no pictures.

    Warns:
        UserWarning: Pictures are skipped because nothing here reads their format; it names them.
    """
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    unread = {*_PICTURES, *_NEVER_READ} - {*IMAGE_SUFFIXES}
    skipped = [path.name for path in files if path.suffix.lower() in unread]
    if skipped:
        warnings.warn(
            f"{folder}: skipped {', '.join(skipped)}; nothing here reads this format: save as PNG or JPEG",
            stacklevel=2,
        )
    return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def read_image(path: Path) -> Image.Image:
    """Read an image file as `to_rgb` returns it; of an animation, the first frame.

    Raises:
        ImageFileError: The file is missing, or is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:
        # Pillow's decoders and colour profiles report a broken file by errors of every kind.
        raise ImageFileError(path, error) from error


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in 8-bit sRGB, turned upright as its camera says, transparent parts on white.

    The tones of 16-bit, 32-bit and float images are scaled to 8 bits. Colours follow an embedded ICC profile; a broken
    one counts as none, as in other viewers. Without one, EXIF may name Adobe RGB.

    Raises:
        ValueError: A float image has values that are not finite, or beyond 65535.
    """
    profile = image.info.get("icc_profile")
    is_adobe = not profile and _is_adobe_rgb(image)
    upright = _in_eight_bits(ImageOps.exif_transpose(image))
    if is_adobe and upright.mode == "RGB":
        return _adobe_in_srgb(upright)
    if not upright.has_transparency_data:
        return _in_srgb(upright, profile)
    layer = upright.convert("LA" if upright.mode in ("1", "L", "LA", "La") else "RGBA")
    alpha = layer.getchannel("A")
    colours = _in_srgb(layer.convert(layer.mode.removesuffix("A")), profile)
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), colours).convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scale the tones of a grey image that has more than 8 bits; Pillow clips them at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    white = _white(image, values)
    grey = Image.fromarray(np.round(values.clip(0, white) * (255 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _white(image: Image.Image, values: np.ndarray) -> float:
    """The value that stands for white: what a mode says or, where it says nothing, what the largest value tells."""
    if image.mode.startswith("I;16"):
        return 65535
    largest = float(values.max(initial=0))
    if not np.isfinite(values).all() or (image.mode == "F" and largest > 65535):
        raise ValueError(f"expected finite values up to 65535, got {image.mode} values up to {largest:g}")
    if image.mode == "F" and largest <= _LARGEST_FLOAT_OF_ONE:
        # Highlights of a float image may go beyond its white, which is 1.
        return 1
    return next(white for white in (255, 65535, 2**32 - 1) if largest <= white)


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Return an image without transparency in RGB, its colours as its ICC profile means them."""
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    transform = _transform_to_srgb(profile, image.mode) if isinstance(profile, bytes) else None
    if transform is None and image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")
    return image.convert("RGB") if transform is None else _transformed(image, transform)


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF says Adobe RGB, as cameras do that write no profile: 2, or uncalibrated with index R03."""
    with contextlib.suppress(Exception):  # of a broken EXIF, which counts as none
        exif = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        return space == 2 or (space == 0xFFFF and exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03")
    return False


def _adobe_in_srgb(image: Image.Image) -> Image.Image:
    """Return an image in Adobe RGB (1998), which differs from sRGB in its green and in its gamma, in sRGB."""
    linear = (np.arange(256) / 255) ** _ADOBE_GAMMA
    light = (linear[np.asarray(image)] @ _ADOBE_TO_SRGB.T).clip(0, 1)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.round(255 * values).astype(np.uint8))


@functools.lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None where it is sRGB, broken, or a profile of other colours."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODES_OF_SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode != "RGB":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    moved = np.asarray(_transformed(Image.fromarray(colours), transform)).astype(int) - colours
    return None if np.abs(moved).max() <= _SRGB_TOLERANCE else transform


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    # applyTransform returns None only where it works in place.
    return cast(Image.Image, ImageCms.applyTransform(image, transform))


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
