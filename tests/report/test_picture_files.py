"""The pictures of an evaluation as files: where they are, and that they come back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_rs.evaluation import EvaluationFileError, EvaluationInputError, EvaluationResult
from cat_rs.report import save_all_pictures
from cat_rs.report.picture_files import folder_name, read_pictures, scaled_down, spread

from .conftest import NO_TRIGGER, SEEDS, TRIGGER, ResultMaker, colour_of

LIMITS = {"max_prompts": 24, "max_seeds": 4, "max_side": 256}


def saved(result: EvaluationResult, folder: Path) -> Path:
    save_all_pictures(result, folder)
    return folder


def test_layout(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = saved(make_result("LoRA", "CAT"), tmp_path / "pictures")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for model in ("base", "LoRA", "CAT"):
        for kind, prompts in (("trigger", TRIGGER), ("no_trigger", NO_TRIGGER)):
            place = f"{model}/{kind}"
            assert f"{place}/metadata.jsonl" in names
            assert sum(name.startswith(place) and name.endswith(".png") for name in names) == len(prompts) * len(SEEDS)
    assert {"concept/000.png", "concept/001.png"} <= names
    row = json.loads((folder / "CAT" / "no_trigger" / "metadata.jsonl").read_text().splitlines()[5])
    assert (row["text"], row["seed"]) == (NO_TRIGGER[1], SEEDS[1])
    with Image.open(folder / "CAT" / "no_trigger" / row["file_name"]) as picture:
        assert picture.getpixel((3, 3)) == colour_of(2, False, 1, 1)


NAMES = ("LoRA", "../up", "a/b", ".hidden", "..", "concept", "100 %", "<b>", "größer")


def test_names_stay_inside_the_folder_and_apart() -> None:
    folders = [folder_name(name) for name in NAMES]
    assert len(set(folders)) == len(NAMES)
    assert not any("/" in name or name.startswith(".") for name in folders)


def test_pictures_come_back(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result(*NAMES)
    read = read_pictures(result, saved(result, tmp_path / "pictures"), **LIMITS)
    assert list(read.adapters) == list(NAMES)
    assert len(read.concept) == 2
    for number, model in enumerate([read.base, *read.adapters.values()]):
        for trigger, grid, prompts in ((True, model.trigger, TRIGGER), (False, model.no_trigger, NO_TRIGGER)):
            assert (grid.prompts, grid.seeds) == (prompts, SEEDS)
            for prompt in range(len(prompts)):
                for seed in range(len(SEEDS)):
                    assert grid.picture(prompt, seed).getpixel((0, 0)) == tuple(
                        min(value, 255) for value in colour_of(number, trigger, prompt, seed)
                    )


def test_a_part_is_read(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT", size=(64, 32))
    folder = saved(result, tmp_path / "pictures")
    grid = read_pictures(result, folder, max_prompts=2, max_seeds=3, max_side=16).adapters["CAT"].trigger
    assert grid.prompts == (TRIGGER[0], TRIGGER[2])
    assert grid.seeds == SEEDS[:3]
    assert grid.picture(1, 2).size == (16, 8)
    assert grid.picture(1, 2).getpixel((8, 4)) == colour_of(1, True, 2, 2)


def test_a_folder_is_replaced_as_a_whole(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = saved(make_result("LoRA"), tmp_path / "pictures")
    saved(make_result("CAT"), folder)
    assert {path.name for path in folder.iterdir()} == {"base", "CAT", "concept"}
    # No file system takes so long a name: the new folder cannot be finished.
    with pytest.raises(OSError, match="too long"):
        saved(make_result("x" * 300), folder)
    assert {path.name for path in folder.iterdir()} == {"base", "CAT", "concept"}
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_large_concept_pictures_are_scaled_down(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT")
    assert result.pictures is not None
    large = replace(result.pictures, concept=(Image.new("RGB", (1024, 600), "red"),))
    folder = saved(replace(result, pictures=large), tmp_path / "pictures")
    with Image.open(folder / "concept" / "000.png") as picture:
        assert picture.size == (512, 300)


def test_result_without_pictures_is_refused(make_result: ResultMaker, tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="expected a result with pictures"):
        save_all_pictures(make_result("CAT", pictures=False), tmp_path / "pictures")


def test_pictures_of_another_evaluation_are_refused(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT")
    folder = saved(result, tmp_path / "pictures")
    other = replace(result, settings={**result.settings, "sampling": {"seeds": [0, 1]}})
    with pytest.raises(EvaluationInputError, match=r"3 prompts and 2 seeds in .*trigger, got others"):
        read_pictures(other, folder, **LIMITS)


def test_missing_and_broken_files_are_named(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT")
    folder = saved(result, tmp_path / "pictures")
    metadata = folder / "CAT" / "trigger" / "metadata.jsonl"
    picture = folder / "CAT" / "trigger" / "000_seed0.png"

    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(EvaluationFileError, match=r"000_seed0\.png cannot be read as a picture"):
        read_pictures(result, folder, **LIMITS)
    picture.unlink()
    with pytest.raises(EvaluationFileError, match=r"000_seed0\.png, which does not exist"):
        read_pictures(result, folder, **LIMITS)
    lines = metadata.read_text().replace("000_seed0.png", "../../concept/000.png")
    metadata.write_text(lines)
    with pytest.raises(EvaluationInputError, match=r"name of a file beside it in .*metadata\.jsonl"):
        read_pictures(result, folder, **LIMITS)
    metadata.write_text("[]\n")
    with pytest.raises(EvaluationInputError, match=r"one JSON object a line in .*metadata\.jsonl"):
        read_pictures(result, folder, **LIMITS)
    metadata.write_text("{")
    with pytest.raises(EvaluationFileError, match=r"metadata\.jsonl cannot be read"):
        read_pictures(result, folder, **LIMITS)
    metadata.unlink()
    with pytest.raises(EvaluationFileError, match=r"metadata\.jsonl cannot be read"):
        read_pictures(result, folder, **LIMITS)


def test_scaled_down_never_enlarges() -> None:
    small = Image.new("RGB", (10, 20))
    assert scaled_down(small, 20) is small
    assert scaled_down(Image.new("RGB", (10, 3000)), 100).size == (1, 100)


@pytest.mark.parametrize(("count", "shown"), [(1, 4), (4, 4), (5, 2), (24, 4), (200, 24)])
def test_spread_reaches_both_ends(count: int, shown: int) -> None:
    numbers = spread(count, shown)
    assert len(numbers) == min(count, shown)
    assert (numbers[0], numbers[-1]) == (0, count - 1)
    assert np.all(np.diff(numbers) > 0)
