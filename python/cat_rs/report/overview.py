"""A report as one picture, for places that show no HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from cat_rs.report.charts import draw_front, draw_panel, to_png
from cat_rs.report.contact_sheet import draw_contact_sheet
from cat_rs.report.fonts import font, wrap
from cat_rs.report.report import Report
from cat_rs.report.table import format_table

_MARGIN = 28
_GAP = 24
_WIDTH = 1120
_INK = "#1b1d21"
_PAPER = "#ffffff"
_DPI = 100
# Beyond one evaluation, each shows fewer prompts.
_PROMPTS_OF_ONE = 6
_PROMPTS_OF_MANY = 2


def draw_overview(report: Report) -> bytes:
    """Return a PNG: headline, contact sheets, charts and tables, from top to bottom."""
    title = font(26, bold=True)
    parts = [_text(wrap(report.title, title, _WIDTH - 2 * _MARGIN), title)]
    prompts = _PROMPTS_OF_ONE if len(report.evaluations) == 1 else _PROMPTS_OF_MANY
    for evaluation in report.evaluations:
        if evaluation.result.pictures is not None:
            parts.append(draw_contact_sheet(evaluation.result, max_prompts=prompts))
    charts = [*map(draw_front, report.fronts), *map(draw_panel, report.panels)]
    parts += _rows([Image.open(io.BytesIO(to_png(chart, _DPI))) for chart in charts])
    for evaluation in report.evaluations:
        lines = [evaluation.label, "", *format_table(evaluation.result).splitlines()]
        parts.append(_text(lines, font(14, mono=True)))
    buffer = io.BytesIO()
    _stacked(parts).save(buffer, format="PNG")
    return buffer.getvalue()


def _rows(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Put pictures side by side into rows no wider than the page."""
    rows: list[list[Image.Image]] = []
    for image in images:
        if not rows or sum(other.width + _GAP for other in rows[-1]) + image.width > _WIDTH - _MARGIN:
            rows.append([])
        rows[-1].append(image)
    return [_joined(row) for row in rows]


def _joined(images: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (_WIDTH, max(image.height for image in images)), _PAPER)
    left = _MARGIN
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + _GAP
    return row


def _text(lines: Sequence[str], face: ImageFont.FreeTypeFont) -> Image.Image:
    height = round(1.35 * face.size)
    width = max(round(face.getlength(line)) for line in lines) + 2 * _MARGIN
    image = Image.new("RGB", (max(_WIDTH, width), height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, number * height), line, font=face, fill=_INK)
    return image


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    height = sum(part.height + _GAP for part in parts)
    page = Image.new("RGB", (max(part.width for part in parts), height + _GAP), _PAPER)
    top = _GAP
    for part in parts:
        page.paste(part, (0, top))
        top += part.height + _GAP
    return page
