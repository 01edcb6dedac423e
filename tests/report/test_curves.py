"""Training curves: reading the log, smoothing, and what is on the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_rs.evaluation import EvaluationFileError, EvaluationInputError
from cat_rs.report import training_curves
from cat_rs.report.curves import read_log, smoothed

PLAIN, CAT = (0xC2, 0x41, 0x0C), (0x1D, 0x4E, 0xD8)


def write_log(folder: Path, *, cat: float, steps: int = 20, every: int = 1) -> Path:
    folder.mkdir()
    rows = [
        {"step": step, "loss": 0.2, "diffusion": 0.1 + 0.1 / step, "cat": cat * step, "grad_norm": 0.5, "lr": 1e-4}
        | ({} if step % every == 0 else {"cat": None})
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pixels_of(picture: Path, colour: Sequence[int], panel: int) -> int:
    """How many pixels of one third of the picture have about this colour; the legend is cut off."""
    image = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    height, width = image.shape[:2]
    part = image[: int(0.85 * height), panel * width // 3 : (panel + 1) * width // 3]
    return int((np.abs(part - np.array(colour)).max(axis=2) < 24).sum())


def test_each_run_is_drawn_where_it_has_values(tmp_path: Path) -> None:
    runs = {"plain": write_log(tmp_path / "a", cat=0.0), "CAT": write_log(tmp_path / "b", cat=1e-3) / "metrics.jsonl"}
    picture = tmp_path / "curves.png"
    training_curves(runs, picture)
    with Image.open(picture) as image:
        assert min(image.size) > 300
    assert pixels_of(picture, CAT, panel=0) > 200
    assert pixels_of(picture, CAT, panel=1) > 200
    assert pixels_of(picture, PLAIN, panel=1) == 0, "a run without the term has no line"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "curves.png"]


def test_a_term_of_every_fourth_step_is_a_line(tmp_path: Path) -> None:
    training_curves({"CAT": write_log(tmp_path / "a", cat=1e-3, every=4)}, tmp_path / "curves.png")
    assert pixels_of(tmp_path / "curves.png", PLAIN, panel=1) > 200


def test_runs_without_preservation_and_of_one_step_are_drawn(tmp_path: Path) -> None:
    training_curves({"plain": write_log(tmp_path / "a", cat=0.0, steps=1)}, tmp_path / "curves.png")
    assert pixels_of(tmp_path / "curves.png", PLAIN, panel=1) == 0


def test_log_is_read_by_column(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n\n{"step": 2, "loss": NaN, "lr": 0.1}\n')
    log = read_log(file)
    assert np.array_equal(log["step"], [1, 2])
    assert np.array_equal(log["loss"], [0.5, np.nan], equal_nan=True)
    assert np.array_equal(log["lr"], [np.nan, 0.1], equal_nan=True)


def test_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert np.array_equal(read_log(file)["step"], [1])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "expected at least one logged step"),
        ('{"step": 1}\nnonsense\n{"step": 3}\n', "line 2 of .* is not valid JSON"),
        ('{"loss": 1}\n', "expected an object with a step in line 1"),
    ],
)
def test_unusable_log_is_named(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(EvaluationInputError, match=text):
        training_curves({"run": tmp_path}, tmp_path / "curves.png")


def test_missing_log_and_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationFileError, match=r"absent\.jsonl cannot be read"):
        training_curves({"run": tmp_path / "absent.jsonl"}, tmp_path / "curves.png")
    with pytest.raises(EvaluationInputError, match="runs: expected at least one"):
        training_curves({}, tmp_path / "curves.png")


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_smoothing_is_a_mean_over_a_window(window: int) -> None:
    values = np.random.default_rng(0).random(20)
    values[7] = np.nan
    before = window - 1 - (window - 1) // 2
    expected = []
    for index in range(len(values)):
        part = values[max(0, index - before) : index - before + window]
        expected.append(np.nanmean(part) if np.isfinite(part).any() else np.nan)
    np.testing.assert_allclose(smoothed(values, window), expected, rtol=1e-12)
