"""A report as one picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cat_rs.report.content import read_report
from cat_rs.report.overview import draw_overview
from cat_rs.report.style import SERIES

from .conftest import ResultMaker, colour_of, scored, write_evaluation, write_training
from .test_sources import write_demo


def overview(*runs: Path) -> Image.Image:
    return Image.open(io.BytesIO(draw_overview(read_report(runs)))).convert("RGB")


def rows_of(image: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    return np.nonzero((np.asarray(image) == colour).all(axis=2).any(axis=1))[0].tolist()


def test_sheet_chart_and_table_follow_each_other(make_result: ResultMaker, tmp_path: Path) -> None:
    image = overview(write_evaluation(tmp_path, scored(make_result("CAT"))))
    sheet = rows_of(image, colour_of(1, False, 1, 0))
    front = rows_of(image, tuple(bytes.fromhex(SERIES[0][1:])))  # type: ignore[arg-type]
    assert sheet
    assert front
    assert sheet[-1] < front[0]
    ink = np.asarray(image.convert("L")) < 100
    assert ink[front[-1] + 60 :].any(), "table"


def test_every_evaluation_is_on_it(make_result: ResultMaker, tmp_path: Path) -> None:
    image = overview(write_demo(tmp_path / "demo", make_result))
    rows = rows_of(image, colour_of(0, True, 0, 0))
    assert np.sum(np.diff(rows) > 1) == 1


def test_a_training_alone(tmp_path: Path) -> None:
    image = overview(write_training(tmp_path / "dog"))
    assert rows_of(image, tuple(bytes.fromhex(SERIES[0][1:])))  # type: ignore[arg-type]
