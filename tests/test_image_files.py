"""Image files: which are found in a folder, and how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cat_rs.image_files import IMAGE_SUFFIXES, ImageFileError, image_files, read_image
from tests.conftest import draw_picture


def test_files_come_in_the_order_of_their_names_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.gif", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.gif", "b.PNG"]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_read_as_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    draw_picture(path, "red")
    image = read_image(path)
    assert image.mode == "RGB"
    assert image_files(tmp_path) == [path]


def test_transparent_parts_lie_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_picture_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 8), "red")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (8, 4)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_missing_and_broken_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageFileError, match=r"a\.png cannot be read as a picture: "):
        read_image(tmp_path / "a.png")


def test_picture_cut_short_is_named(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red", (200, 200))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageFileError, match=r"a\.png"):
        read_image(tmp_path / "a.png")
