"""The folder of pictures: captions, crops, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cat_rs.training.dataset import crop_square, fingerprint, load_picture, read_folder
from cat_rs.training.errors import DatasetError
from tests.conftest import draw_picture


def test_captions_come_from_metadata(concept_dir: Path) -> None:
    examples = read_folder(concept_dir)
    assert [example.path.name for example in examples] == ["0.png", "1.png", "2.png"]
    assert examples[1].caption == "a sks cat on a green background"


def test_metadata_wins_over_text_file_wins_over_template(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.PNG"):
        draw_picture(tmp_path / name, "red")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "from metadata"}))
    (tmp_path / "a.txt").write_text("from text")
    (tmp_path / "b.txt").write_text("from text\n")
    captions = [example.caption for example in read_folder(tmp_path, caption="a photo of {name}")]
    assert captions == ["from metadata", "from text", "a photo of c"]


def test_metadata_may_name_files_in_folders(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    draw_picture(tmp_path / "more" / "a.png", "red")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "more/a.png", "text": "a sks"}\n\n')
    assert [example.path for example in read_folder(tmp_path)] == [tmp_path / "more" / "a.png"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("not json", "line 1: expected a JSON object"),
        ('{"text": "a"}', 'line 1: expected an object with "file_name"'),
        ('{"file_name": "a.png"}', 'line 1: expected a caption as "text"'),
        ('{"file_name": "b.png", "text": "a"}', "line 1: expected the picture .*b.png, which is not there"),
    ],
)
def test_broken_metadata_is_refused_with_its_line(tmp_path: Path, metadata: str, message: str) -> None:
    draw_picture(tmp_path / "a.png", "red")
    (tmp_path / "metadata.jsonl").write_text(metadata)
    with pytest.raises(DatasetError, match=message):
        read_folder(tmp_path)


def test_pictures_without_caption_are_named(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red")
    with pytest.raises(DatasetError, match=r"expected a caption for each picture, got none for a.png"):
        read_folder(tmp_path)


def test_a_gif_is_a_picture_as_in_an_evaluation(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.gif", "red")
    assert [example.path.name for example in read_folder(tmp_path, caption="a cat")] == ["a.gif"]


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected pictures"):
        read_folder(tmp_path)
    with pytest.raises(DatasetError, match="expected a folder of pictures"):
        read_folder(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a.png: expected a (whole )?picture, got"):
        load_picture(tmp_path / "a.png")


def test_picture_cut_short_is_named(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red", (200, 200))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"a.png: expected a whole picture, got"):
        load_picture(tmp_path / "a.png")


def test_transparent_picture_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_picture_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 8), "red")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load_picture(tmp_path / "a.jpg").size == (8, 4)


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (7, 9), (16, 16)])
def test_center_crop_is_square_and_in_range(size: tuple[int, int]) -> None:
    crop = crop_square(Image.new("RGB", size, (255, 0, 0)), 16)
    assert crop.pixels.shape == (3, 16, 16)
    assert crop.original_size == (size[1], size[0])
    torch.testing.assert_close(crop.pixels[0], torch.ones(16, 16))
    torch.testing.assert_close(crop.pixels[1], -torch.ones(16, 16))


def test_random_crops_follow_the_generator() -> None:
    picture = Image.new("RGB", (16, 64))
    places = [crop_square(picture, 16, torch.Generator().manual_seed(seed)).top_left for seed in (0, 0, 1, 2, 3)]
    assert places[0] == places[1]
    assert len(set(places)) > 2
    assert all(0 <= top <= 48 and left == 0 for top, left in places)


def test_fingerprint_sees_captions_and_bytes(concept_dir: Path) -> None:
    before = fingerprint(read_folder(concept_dir))
    assert before == fingerprint(read_folder(concept_dir))
    draw_picture(concept_dir / "0.png", "yellow")
    assert before != fingerprint(read_folder(concept_dir))
