"""Pictures from folders, lists and tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cat_rs.evaluation import EvaluationFileError, EvaluationInputError, load_pictures

from .conftest import noise_picture


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    noise_picture(0).save(tmp_path / "b.png")
    noise_picture(1).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures = load_pictures(tmp_path)
    assert pictures.names == ("a.png", "b.png")
    assert np.array_equal(pictures.images[1], noise_picture(0))


def test_single_file_is_read(tmp_path: Path) -> None:
    noise_picture(0).save(tmp_path / "b.png")
    assert load_pictures(tmp_path / "b.png").names == ("b.png",)


def test_transparent_parts_are_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_pictures([clear]).images[0].getpixel((1, 1)) == (255, 255, 255)


def test_grey_becomes_rgb() -> None:
    assert load_pictures([Image.new("L", (4, 4), 7)]).images[0].getpixel((0, 0)) == (7, 7, 7)


def test_tensor_is_rounded_to_eight_bits() -> None:
    values = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    pictures = load_pictures(values)
    expected = np.round(values.numpy().transpose(0, 2, 3, 1) * 255)
    assert [image.size for image in pictures.images] == [(4, 5), (4, 5)]
    assert np.array_equal(np.stack([np.asarray(image) for image in pictures.images]), expected)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        pytest.param([], "empty list", id="empty list"),
        pytest.param(["a.png"], "got str at index 0", id="list of paths"),
        pytest.param(torch.rand(3, 8, 8), r"got shape \[3, 8, 8\]", id="one picture without batch"),
        pytest.param(torch.rand(2, 1, 8, 8), r"got shape \[2, 1, 8, 8\]", id="one channel"),
        pytest.param(torch.zeros(0, 3, 8, 8), r"got shape \[0, 3, 8, 8\]", id="empty batch"),
        pytest.param(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8", id="integers"),
        pytest.param(torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), -1.0)]), "index 1", id="range [-1, 1]"),
        pytest.param(torch.full((1, 3, 2, 2), float("nan")), "index 0", id="NaN"),
    ],
)
def test_unusable_pictures_are_refused(source: object, text: str) -> None:
    with pytest.raises(EvaluationInputError, match=text):
        load_pictures(source)  # type: ignore[arg-type]


def test_broken_missing_and_empty_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="got none"):
        load_pictures(tmp_path)
    with pytest.raises(EvaluationFileError, match="absent, which does not exist"):
        load_pictures(tmp_path / "absent")
    noise_picture(0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(EvaluationFileError, match=r"cut\.png cannot be read as a picture"):
        load_pictures(tmp_path)
