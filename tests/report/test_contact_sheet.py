"""The contact sheet: every picture where it belongs, text where there is room for it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cat_rs.evaluation import EvaluationInputError
from cat_rs.report import contact_sheet, draw_contact_sheet
from cat_rs.report import sheet as sheet_module
from cat_rs.report.style import font, wrap

from .conftest import NO_TRIGGER, TRIGGER, ResultMaker, colour_of

CELL = 96


def places(sheet: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Where the sheet has exactly this colour."""
    return np.asarray((np.asarray(sheet) == colour).all(axis=2))


def corner(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int]:
    """The row and column of the top left pixel of this colour."""
    rows, columns = np.nonzero(places(sheet, colour))
    return int(rows.min()), int(columns.min())


def test_every_shown_picture_fills_its_cell(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("plain LoRA", "CAT"), cell=CELL, max_seeds=3)
    for model, seed in itertools.product(range(3), range(3)):
        for trigger, prompts in ((True, TRIGGER), (False, NO_TRIGGER)):
            for prompt in range(len(prompts)):
                assert places(sheet, colour_of(model, trigger, prompt, seed)).sum() == CELL * CELL


def test_pictures_are_ordered_by_prompt_model_and_seed(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("plain LoRA", "CAT"), cell=CELL, max_seeds=2)
    first_row = [corner(sheet, colour_of(model, True, 0, seed)) for model in range(3) for seed in range(2)]
    assert len({row for row, _ in first_row}) == 1
    columns = [column for _, column in first_row]
    assert columns == sorted(columns)
    keys = [(True, prompt) for prompt in range(len(TRIGGER))] + [(False, prompt) for prompt in range(len(NO_TRIGGER))]
    rows = [corner(sheet, colour_of(1, trigger, prompt, 0))[0] for trigger, prompt in keys]
    assert all(below - above >= CELL for above, below in itertools.pairwise(rows))


def test_concept_stands_above_everything(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("CAT"), cell=CELL)
    concept_row, _ = corner(sheet, (255, 0, 10))
    assert concept_row + CELL < corner(sheet, colour_of(0, True, 0, 0))[0]


def test_labels_title_and_headings_are_drawn(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("CAT"), cell=CELL)
    ink = np.asarray(sheet.convert("L")) < 100
    row, column = corner(sheet, colour_of(0, True, 0, 0))
    assert ink[row : row + CELL, : column - 4].any(), "prompt"
    concept_row, _ = corner(sheet, (255, 0, 10))
    assert ink[concept_row + CELL : row, column : column + CELL].any(), "heading"
    assert ink[:60].any(), "title"
    assert not np.hstack([ink[:, :8], ink[:, -8:]]).any(), "margins"


def test_one_line_says_what_the_scores_are(make_result: ResultMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    text = sheet_module._Sheet._text

    def noting(self: sheet_module._Sheet, left: int, top: int, width: int, words: str, **style: Any) -> int:
        drawn.append(words)
        return text(self, left, top, width, words, **style)

    monkeypatch.setattr(sheet_module._Sheet, "_text", noting)
    draw_contact_sheet(make_result("CAT"), cell=CELL)
    (line,) = (words for words in drawn if words.startswith("UPS: "))
    assert {"UPS:", "identity:", "KPS:"} <= set(line.split())


def test_hidden_prompts_and_seeds_are_left_out(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("CAT"), cell=CELL, max_seeds=1, max_prompts=1)
    assert not places(sheet, colour_of(0, True, 0, 1)).any()
    assert not places(sheet, colour_of(0, True, 1, 0)).any()
    assert places(sheet, colour_of(0, False, 0, 0)).any()


def test_shown_prompts_are_spread_over_the_list(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("CAT"), cell=CELL, max_prompts=2)
    shown = [places(sheet, colour_of(0, True, prompt, 0)).any() for prompt in range(len(TRIGGER))]
    assert shown == [True, False, True]


def test_wide_pictures_keep_their_shape(make_result: ResultMaker) -> None:
    sheet = draw_contact_sheet(make_result("CAT", size=(32, 16)), cell=CELL)
    rows, columns = np.nonzero(places(sheet, colour_of(1, True, 0, 0)))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (CELL, CELL // 2)


def test_long_names_and_prompts_stay_in_their_columns(make_result: ResultMaker) -> None:
    narrow = draw_contact_sheet(make_result("CAT"), cell=CELL, max_seeds=1)
    long = draw_contact_sheet(make_result("an adapter with a very long name " * 4), cell=CELL, max_seeds=1)
    assert long.width == narrow.width


def test_file_is_written_as_a_whole(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT")
    contact_sheet(result, tmp_path / "sheet.png", cell=CELL)
    assert np.array_equal(Image.open(tmp_path / "sheet.png"), draw_contact_sheet(result, cell=CELL))
    assert list(tmp_path.iterdir()) == [tmp_path / "sheet.png"]


def test_result_without_pictures_is_refused(make_result: ResultMaker, tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="expected a result with pictures"):
        contact_sheet(make_result("CAT", pictures=False), tmp_path / "sheet.png")


def test_wrapped_lines_fit() -> None:
    face = font(14)
    lines = wrap("some words and averyveryverylongwordindeed and then some more words", face, 120, max_lines=3)
    assert len(lines) == 3
    assert all(face.getlength(line) <= 120 for line in lines)
    assert lines[-1].endswith("…")
    assert wrap("short", face, 120) == ["short"]
