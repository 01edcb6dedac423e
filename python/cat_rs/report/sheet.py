"""All pictures of an evaluation side by side, as one PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from cat_rs.atomic import write_bytes
from cat_rs.evaluation import EvaluationInputError, EvaluationPictures, EvaluationResult, PictureGrid, Scores
from cat_rs.evaluation.measures import labelled_values
from cat_rs.image_files import png_bytes
from cat_rs.report.picture_files import spread
from cat_rs.report.style import FAINT, INK, PAPER, RULE, font, line_height, wrap
from cat_rs.report.table import format_interval
from cat_rs.report.wording import concept_of

_MARGIN = 28
_GAP = 4
_GROUP_GAP = 24
_ROW_GAP = 10
_LABEL_WIDTH = 200
_MIN_TITLE_WIDTH = 900


@dataclass(frozen=True)
class _Group:
    """The pictures of one model: a group of columns."""

    name: str
    note: str
    trigger: PictureGrid
    no_trigger: PictureGrid


@dataclass(frozen=True)
class _Layout:
    """Where things are, in pixels."""

    cell: int
    seeds: int
    groups: int

    @property
    def group_width(self) -> int:
        return self.seeds * self.cell + (self.seeds - 1) * _GAP

    @property
    def width(self) -> int:
        groups = self.groups * self.group_width + (self.groups - 1) * _GROUP_GAP
        return max(_MIN_TITLE_WIDTH, 2 * _MARGIN + _LABEL_WIDTH + groups)

    def group_left(self, group: int) -> int:
        return _MARGIN + _LABEL_WIDTH + group * (self.group_width + _GROUP_GAP)

    def cell_left(self, group: int, seed: int) -> int:
        return self.group_left(group) + seed * (self.cell + _GAP)


def contact_sheet(
    result: EvaluationResult,
    path: str | os.PathLike[str],
    *,
    cell: int = 128,
    max_seeds: int = 3,
    max_prompts: int = 6,
) -> None:
    """Write a PNG: the concept on top, then a row a prompt and a group of columns a model, the same seeds in each.

    Args:
        result: A result with its pictures (`evaluate` returns them; a loaded result has none).
        path: The file to write.
        cell: The side of a picture on the sheet, in pixels.
        max_seeds: How many seeds to show of each prompt.
        max_prompts: How many prompts to show with the trigger, and as many without, spread over the list.

    Raises:
        EvaluationInputError: The result has no pictures.
    """
    sheet = draw_contact_sheet(result, cell=cell, max_seeds=max_seeds, max_prompts=max_prompts)
    write_bytes(path, png_bytes(sheet))


def draw_contact_sheet(
    result: EvaluationResult, *, cell: int = 128, max_seeds: int = 3, max_prompts: int = 6, title: str | None = None
) -> Image.Image:
    """Return the sheet that `contact_sheet` writes; `title` stands in for its headline."""
    if result.pictures is None:
        raise EvaluationInputError("contact_sheet: expected a result with pictures, got one that was read from a file")
    groups = _groups(result, result.pictures)
    seeds = min(max_seeds, len(groups[0].trigger.seeds))
    sheet = _Sheet(_Layout(cell, seeds, len(groups)))
    headline, notes = _title(result)
    sheet.title(headline if title is None else title, notes)
    sheet.concept(result.pictures.concept)
    sheet.headings(groups)
    prompts = result.settings["prompts"]
    sheet.section("With the trigger", [group.trigger for group in groups], max_prompts, len(prompts["trigger"]))
    sheet.section(
        "Without the trigger", [group.no_trigger for group in groups], max_prompts, len(prompts["no_trigger"])
    )
    return sheet.finished()


class _Sheet:
    """Draw from top to bottom onto a page that grows as needed."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self._image = Image.new("RGB", (layout.width, 1024), PAPER)
        self._top = _MARGIN

    def title(self, title: str, notes: Sequence[str]) -> None:
        width = self._layout.width - 2 * _MARGIN
        self._top += self._text(_MARGIN, self._top, width, title, size=22, bold=True) + 4
        for note in notes:
            self._top += self._text(_MARGIN, self._top, width, note, size=13, colour=FAINT)
        self._top += 20

    def concept(self, images: Sequence[Image.Image]) -> None:
        layout = self._layout
        fitting = (layout.width - 2 * _MARGIN - _LABEL_WIDTH + _GAP) // (layout.cell + _GAP)
        self._label("The concept", f"{len(images)} training pictures")
        for number, image in enumerate(images[:fitting]):
            self._picture(_MARGIN + _LABEL_WIDTH + number * (layout.cell + _GAP), image)
        self._top += layout.cell + 24

    def headings(self, groups: Sequence[_Group]) -> None:
        layout = self._layout
        heights = []
        for number, group in enumerate(groups):
            left = layout.group_left(number)
            height = self._text(left, self._top, layout.group_width, group.name, size=17, bold=True, max_lines=1)
            height += self._text(left, self._top + height, layout.group_width, group.note, size=12, colour=FAINT)
            heights.append(height)
        self._top += max(heights) + 12

    def section(self, title: str, grids: Sequence[PictureGrid], max_prompts: int, evaluated: int) -> None:
        layout = self._layout
        self._rule()
        self._top += self._text(_MARGIN, self._top, layout.width - 2 * _MARGIN, title, size=15, bold=True) + 8
        prompts = grids[0].prompts
        shown = spread(len(prompts), max_prompts)
        for row in shown:
            self._label(prompts[row])
            for group, grid in enumerate(grids):
                for seed in range(layout.seeds):
                    self._picture(layout.cell_left(group, seed), grid.picture(row, seed))
            self._top += layout.cell + _ROW_GAP
        hidden = evaluated - len(shown)
        if hidden > 0:
            self._top += self._text(
                _MARGIN, self._top, layout.width, f"{hidden} more prompts not shown", 12, colour=FAINT
            )
        self._top += 14

    def finished(self) -> Image.Image:
        return self._image.crop((0, 0, self._layout.width, self._top + _MARGIN - 14))

    def _label(self, text: str, note: str = "") -> None:
        """Write a label left of the row, centred on its height."""
        width = _LABEL_WIDTH - 16
        lines = wrap(text, font(14), width, max_lines=4)
        height = len(lines) * line_height(font(14)) + (line_height(font(12)) if note else 0)
        top = self._top + max(0, (self._layout.cell - height) // 2)
        top += self._text(_MARGIN, top, width, text, size=14, max_lines=4)
        if note:
            self._text(_MARGIN, top, width, note, size=12, colour=FAINT)

    def _picture(self, left: int, image: Image.Image) -> None:
        self._grow(self._top + self._layout.cell)
        scaled = _scaled(image, self._layout.cell)
        # A picture that is not square stands in the middle of its cell.
        offset = [(self._layout.cell - side) // 2 for side in scaled.size]
        self._image.paste(scaled, (left + offset[0], self._top + offset[1]))

    def _rule(self) -> None:
        self._grow(self._top)
        draw = ImageDraw.Draw(self._image)
        draw.line((_MARGIN, self._top, self._layout.width - _MARGIN, self._top), fill=RULE)
        self._top += 10

    def _text(
        self,
        left: int,
        top: int,
        width: int,
        text: str,
        size: int,
        *,
        bold: bool = False,
        colour: str = INK,
        max_lines: int | None = None,
    ) -> int:
        """Write wrapped text and returns its height."""
        face = font(size, bold=bold)
        lines = wrap(text, face, width, max_lines=max_lines)
        height = len(lines) * line_height(face)
        self._grow(top + height)
        draw = ImageDraw.Draw(self._image)
        for number, line in enumerate(lines):
            draw.text((left, top + number * line_height(face)), line, font=face, fill=colour)
        return height

    def _grow(self, bottom: int) -> None:
        """Make the page at least so high, with room for the margin."""
        width, height = self._image.size
        if bottom + _MARGIN <= height:
            return
        taller = Image.new("RGB", (width, max(2 * height, bottom + _MARGIN)), PAPER)
        taller.paste(self._image)
        self._image = taller


def _groups(result: EvaluationResult, pictures: EvaluationPictures) -> list[_Group]:
    base = _Group("Base model", _note(result.base), pictures.base.trigger, pictures.base.no_trigger)
    adapters = [
        _Group(name, _note(result.adapters[name]), model.trigger, model.no_trigger)
        for name, model in pictures.adapters.items()
    ]
    return [base, *adapters]


def _note(scores: Scores) -> str:
    """Return the scores that stand under a model's name."""
    return ",  ".join(labelled_values(scores, "ups", "kps", "identity"))


def _title(result: EvaluationResult) -> tuple[str, list[str]]:
    """Return the title, and a line of scores for each adapter and the reference."""
    notes = [
        f"{name}: UPS {format_interval(scores.ups)}, identity {format_interval(scores.identity)}"
        for name, scores in result.adapters.items()
    ]
    if result.other_seed is not None:
        notes.append(f"Base against base, other seed: UPS {format_interval(result.other_seed.ups)}")
    return f"“{concept_of(result)}”: base model against {', '.join(result.adapters)}", notes


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """Return the picture with its longer side `side` pixels long."""
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    # Lanczos rings around hard edges when it enlarges.
    resample = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((width, height), resample)
