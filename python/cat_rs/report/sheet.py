"""All pictures of an evaluation side by side, as one PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from cat_rs.atomic import write_bytes
from cat_rs.evaluation import EvaluationInputError, EvaluationResult, PictureGrid
from cat_rs.evaluation.measures import format_interval, labelled_values
from cat_rs.image_files import png_bytes
from cat_rs.report.picture_files import spread
from cat_rs.report.style import FAINT, INK, PAPER, RULE, font, line_height, wrap
from cat_rs.report.wording import concept_of

_MARGIN = 28
_GAP = 4
_GROUP_GAP = 24
_ROW_GAP = 10
_LABEL_WIDTH = 200
_MIN_WIDTH = 900
_MEANING = (
    "UPS: how much the pictures without the trigger are like the base model's (1: nothing changed); identity: how "
    "much those with it are like the concept; KPS: UPS and the same with the trigger, in one number"
)


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
    models = {"Base model": (result.base, result.pictures.base)}
    models |= {name: (result.adapters[name], pictures) for name, pictures in result.pictures.adapters.items()}
    trigger = [pictures.trigger for _, pictures in models.values()]
    no_trigger = [pictures.no_trigger for _, pictures in models.values()]
    sheet = _Sheet(cell, min(max_seeds, len(trigger[0].seeds)), len(models))
    headline = f"“{concept_of(result)}”: base model against {', '.join(result.adapters)}"
    sheet.title(headline if title is None else title, _notes(result))
    sheet.concept(result.pictures.concept)
    sheet.headings({name: labelled_values(scores, "ups", "kps", "identity") for name, (scores, _) in models.items()})
    prompts = result.settings["prompts"]
    sheet.section("With the trigger", trigger, max_prompts, len(prompts["trigger"]))
    sheet.section("Without the trigger", no_trigger, max_prompts, len(prompts["no_trigger"]))
    return sheet.finished()


class _Sheet:
    """Draws from top to bottom onto a page that grows as needed: a group of columns for each model."""

    def __init__(self, cell: int, seeds: int, groups: int) -> None:
        self._cell = cell
        self._seeds = seeds
        self._group_width = seeds * cell + (seeds - 1) * _GAP
        width = 2 * _MARGIN + _LABEL_WIDTH + groups * self._group_width + (groups - 1) * _GROUP_GAP
        self._image = Image.new("RGB", (max(_MIN_WIDTH, width), 1024), PAPER)
        self._text_width = self._image.width - 2 * _MARGIN
        self._top = _MARGIN

    def title(self, title: str, notes: Sequence[str]) -> None:
        self._top += self._text(_MARGIN, self._top, self._text_width, title, size=22, bold=True) + 4
        for note in notes:
            self._top += self._text(_MARGIN, self._top, self._text_width, note, size=13, colour=FAINT)
        self._top += 20

    def concept(self, images: Sequence[Image.Image]) -> None:
        fitting = (self._text_width - _LABEL_WIDTH + _GAP) // (self._cell + _GAP)
        self._label("The concept", f"{len(images)} training pictures")
        for number, image in enumerate(images[:fitting]):
            self._picture(_MARGIN + _LABEL_WIDTH + number * (self._cell + _GAP), image)
        self._top += self._cell + 24

    def headings(self, notes: Mapping[str, Sequence[str]]) -> None:
        heights = []
        for number, (name, figures) in enumerate(notes.items()):
            left, width = self._left(number), self._group_width
            height = self._text(left, self._top, width, name, size=17, bold=True, max_lines=1)
            height += self._text(left, self._top + height, width, ",  ".join(figures), size=12, colour=FAINT)
            heights.append(height)
        self._top += max(heights) + 12

    def section(self, title: str, grids: Sequence[PictureGrid], max_prompts: int, evaluated: int) -> None:
        self._rule()
        self._top += self._text(_MARGIN, self._top, self._text_width, title, size=15, bold=True) + 8
        prompts = grids[0].prompts
        shown = spread(len(prompts), max_prompts)
        for row in shown:
            self._label(prompts[row])
            for group, grid in enumerate(grids):
                for seed in range(self._seeds):
                    self._picture(self._left(group) + seed * (self._cell + _GAP), grid.picture(row, seed))
            self._top += self._cell + _ROW_GAP
        hidden = evaluated - len(shown)
        if hidden > 0:
            note = f"{hidden} more prompts not shown"
            self._top += self._text(_MARGIN, self._top, self._text_width, note, size=12, colour=FAINT)
        self._top += 14

    def finished(self) -> Image.Image:
        return self._image.crop((0, 0, self._image.width, self._top + _MARGIN - 14))

    def _left(self, group: int) -> int:
        return _MARGIN + _LABEL_WIDTH + group * (self._group_width + _GROUP_GAP)

    def _label(self, text: str, note: str = "") -> None:
        """Write a label left of the row, centred on its height."""
        width = _LABEL_WIDTH - 16
        lines = wrap(text, font(14), width, max_lines=4)
        height = len(lines) * line_height(font(14)) + (line_height(font(12)) if note else 0)
        top = self._top + max(0, (self._cell - height) // 2)
        top += self._text(_MARGIN, top, width, text, size=14, max_lines=4)
        if note:
            self._text(_MARGIN, top, width, note, size=12, colour=FAINT)

    def _picture(self, left: int, image: Image.Image) -> None:
        self._grow(self._top + self._cell)
        scaled = _scaled(image, self._cell)
        # A picture that is not square stands in the middle of its cell.
        offset = [(self._cell - side) // 2 for side in scaled.size]
        self._image.paste(scaled, (left + offset[0], self._top + offset[1]))

    def _rule(self) -> None:
        self._grow(self._top)
        draw = ImageDraw.Draw(self._image)
        draw.line((_MARGIN, self._top, self._image.width - _MARGIN, self._top), fill=RULE)
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
        """Write wrapped text, and return its height."""
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


def _notes(result: EvaluationResult) -> list[str]:
    """Return what the scores mean, and a line of them for each adapter and for the base model against itself."""
    notes = [_MEANING]
    notes += [
        f"{name}: UPS {format_interval(scores.ups)}, identity {format_interval(scores.identity)}"
        for name, scores in result.adapters.items()
    ]
    if result.other_seed is not None:
        notes.append(f"Base against base, other seed: UPS {format_interval(result.other_seed.ups)}")
    return notes


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """Return the picture with its longer side `side` pixels long."""
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    # Lanczos rings around hard edges when it enlarges.
    resample = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((width, height), resample)
