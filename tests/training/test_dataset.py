"""The folder of pictures: captions, crops, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("size", [(16, 18), (18, 16)])
def test_random_crops_reach_both_edges(size: tuple[int, int]) -> None:
    picture, generator = Image.new("RGB", size), torch.Generator().manual_seed(0)
    places = {crop_square(picture, 16, generator).top_left for _ in range(60)}
    assert places == {(place, 0) if size[1] > size[0] else (0, place) for place in range(3)}


def test_fingerprint_sees_captions_and_bytes(concept_dir: Path) -> None:
    before = fingerprint(read_folder(concept_dir))
    assert before == fingerprint(read_folder(concept_dir))
    draw_picture(concept_dir / "0.png", "yellow")
    assert before != fingerprint(read_folder(concept_dir))


def rows(folder: Path, *pairs: tuple[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in pairs]
    (folder / "metadata.jsonl").write_text("".join(lines))


def found(folder: Path | str, caption: str | None = None) -> list[tuple[str, str]]:
    return [(str(example.path), example.caption) for example in read_folder(folder, caption=caption)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder d with the picture 0.png, and link, which leads to it; the working directory is above them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "d"
    folder.mkdir()
    draw_picture(folder / "0.png", "red")
    (tmp_path / "link").symlink_to(folder)
    return folder


@pytest.mark.parametrize("template", [None, "TEMPLATE"])
@pytest.mark.parametrize("folder", ["d", "./d", "link", "ABOVE/d", "ABOVE/link", "link/../d"])
@pytest.mark.parametrize("name", ["0.png", "./0.png", "../d/0.png", "ABOVE/d/0.png", "ABOVE/link/0.png", "x/../0.png"])
def test_a_row_names_its_picture_by_any_path(data: Path, name: str, folder: str, template: str | None) -> None:
    above = str(data.parent)
    (data / "x").mkdir()
    rows(data, (name.replace("ABOVE", above), "a sks dog"))
    folder = folder.replace("ABOVE", above)
    [(path, caption)] = found(folder, template)
    assert caption == "a sks dog"
    assert os.path.samefile(path, data / "0.png")


def test_rows_and_pictures_may_be_links(data: Path) -> None:
    outside = data.parent / "elsewhere.png"
    draw_picture(outside, "blue")
    (data / "1.png").symlink_to(outside)
    (data / "more").symlink_to(data.parent / "store")
    (data.parent / "store").mkdir()
    draw_picture(data.parent / "store" / "2.png", "green")
    rows(data, ("0.png", "zero"), ("1.png", "one"), ("more/2.png", "two"))
    names = [str(data / name) for name in ("0.png", "1.png", "more/2.png")]
    assert found(data) == list(zip(names, ("zero", "one", "two"), strict=True))


def test_one_file_is_one_picture(data: Path) -> None:
    (data / "1.png").symlink_to("0.png")
    assert found(data, "a sks dog") == [(str(data / "0.png"), "a sks dog")]
    rows(data, ("1.png", "a sks cat"), ("0.png", "a sks cat"), ("../link/0.png", "a sks cat"))
    assert found(data) == [(str(data / "0.png"), "a sks cat")]


def test_two_captions_of_one_picture_are_refused(data: Path) -> None:
    rows(data, ("0.png", "a sks dog"), ("../d/0.png", "a sks cat"))
    with pytest.raises(
        DatasetError, match=r"line 2: expected one caption for each picture, got 'a sks cat' for .*0.png"
    ):
        read_folder(data)
    (data / "metadata.jsonl").unlink()
    (data / "1.png").symlink_to("0.png")
    (data / "0.txt").write_text("a sks dog")
    (data / "1.txt").write_text("a sks cat")
    with pytest.raises(DatasetError, match=r"1.png: expected one caption for each picture"):
        read_folder(data)


@pytest.mark.parametrize(
    "name", ["../private.png", "ABOVE/private.png", "more/../../private.png", "../d2/private.png"]
)
def test_a_row_cannot_name_files_outside_of_the_folder(data: Path, name: str) -> None:
    (data / "more").mkdir()
    (data.parent / "d2").mkdir()
    for folder in (data.parent, data.parent / "d2"):
        draw_picture(folder / "private.png", "red")
    rows(data, ("0.png", "a sks dog"), (name.replace("ABOVE", str(data.parent)), "a sks dog"))
    with pytest.raises(DatasetError, match=r"line 2: expected a picture in .*, got .*private.png, which is outside"):
        read_folder(data)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("other", ["NFC", "NFD"])
def test_names_are_equal_in_every_unicode_form(tmp_path: Path, form: str, other: str) -> None:
    def named(name: str, form: str) -> str:
        return unicodedata.normalize(form, name)  # type: ignore[arg-type]

    (tmp_path / named("Größe", form)).mkdir()
    for name in ("zoé.png", "ガ.png", "Größe/é.png"):
        draw_picture(tmp_path / named(name, form), "red")
    (tmp_path / named("ガ.txt", other)).write_text("beside")
    rows(tmp_path, (named("zoé.png", other), "a"), (named("Größe/é.png", other), "b"))
    expected = {"zoé.png": "a", "ガ.png": "beside", "é.png": "b"}
    got = {named(example.path.name, "NFC"): example.caption for example in read_folder(tmp_path, caption="TEMPLATE")}
    assert got == expected


def test_rows_of_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    draw_picture(tmp_path / "more" / "0.png", "red")
    rows(tmp_path, ("more\\0.png", "a sks dog"))
    assert found(tmp_path) == [(str(tmp_path / "more/0.png"), "a sks dog")]


@pytest.mark.parametrize("template", [None, "TEMPLATE"])
def test_an_empty_caption_is_a_caption(tmp_path: Path, template: str | None) -> None:
    for index in range(3):
        draw_picture(tmp_path / f"{index}.png", "red")
    (tmp_path / "0.txt").write_text("")
    (tmp_path / "1.txt").write_text("\ufeff \n", encoding="utf-8")
    (tmp_path / "2.txt").write_text("not read")
    rows(tmp_path, ("2.png", ""))
    assert [caption for _, caption in found(tmp_path, template)] == ["", "", ""]


def test_hidden_and_skipped_pictures_need_no_caption(tmp_path: Path) -> None:
    draw_picture(tmp_path / "0.png", "red")
    (tmp_path / "0.txt").write_text("a sks dog")
    for name in ("._0.png", ".DS_Store", "._0.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert found(tmp_path) == [(str(tmp_path / "0.png"), "a sks dog")]
    for name in ("1.heic", "2.jxl"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"skipped 1\.heic, 2\.jxl"):
        assert len(read_folder(tmp_path)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"file_name": "0.png", "text": "\\ud83d"}',
            "line 1: expected a caption in Unicode, got half of a surrogate",
        ),
        ("[" * 100_000, "line 1: expected a JSON object"),
        ('{"file_name": "a\\u0000.png", "text": "a"}', "line 1: expected the picture"),
        ('{"file_name": "\\ud83d.png", "text": "a"}', "line 1: expected the picture"),
        ('{"file_name": "", "text": "a"}', "line 1: expected the picture"),
        ('{"file_name": ".", "text": "a"}', "line 1: expected the picture"),
    ],
)
def test_rows_that_hurt_are_refused(tmp_path: Path, line: str, message: str) -> None:
    draw_picture(tmp_path / "0.png", "red")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(DatasetError, match=message):
        read_folder(tmp_path)


def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red")
    try:
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    [example] = read_folder(tmp_path, caption="{name}")
    assert load_picture(example.path).size
    assert fingerprint([example])


@pytest.mark.parametrize("size", [(20, 40), (33, 77), (100, 50), (64, 64), (7, 300)])
@pytest.mark.parametrize("side", [16, 64])
def test_a_crop_is_what_scaling_the_whole_picture_gives(size: tuple[int, int], side: int) -> None:
    y, x, channel = np.ogrid[: size[1], : size[0], :3]
    picture = Image.fromarray((127 + 100 * np.sin(x / 7 + y / 9 + channel)).astype(np.uint8))
    crop = crop_square(picture, side, torch.Generator().manual_seed(3))
    scale = side / min(size)
    whole = picture.resize(
        (max(side, round(size[0] * scale)), max(side, round(size[1] * scale))), Image.Resampling.LANCZOS
    )
    top, left = crop.top_left
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), dtype=np.float32)
    assert np.abs((crop.pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 2.01


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_a_thin_picture_does_not_fill_the_memory(size: tuple[int, int]) -> None:
    code = (
        "import resource, torch\n"
        "from PIL import Image\n"
        "from cat_rs.training.dataset import crop_square\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = used()\n"
        f"picture = Image.new('RGB', {size}, 'red')\n"
        "for generator in (None, torch.Generator()):\n"
        "    assert crop_square(picture, 512, generator).pixels.shape == (3, 512, 512)\n"
        "print(used() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 200
