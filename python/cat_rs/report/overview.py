"""A report as one picture, for places that show no HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from cat_rs.adapter_check import CheckResult
from cat_rs.image_files import png_bytes
from cat_rs.report.charts import to_png
from cat_rs.report.check_charts import draw_layers, draw_strength
from cat_rs.report.content import Report
from cat_rs.report.curves import draw_panel
from cat_rs.report.fronts import draw_front
from cat_rs.report.sheet import draw_contact_sheet
from cat_rs.report.style import INK, PAPER, SERIES, font, line_height, wrap
from cat_rs.report.table import format_table

_MARGIN = 28
_GAP = 24
_WIDTH = 1120
_DPI = 100
# Beyond one evaluation, each shows fewer prompts.
_PROMPTS_OF_ONE = 6
_PROMPTS_OF_MANY = 2


def draw_overview(report: Report) -> bytes:
    """Return a PNG: contact sheets, charts and tables, from top to bottom."""
    drawn = [evaluation for evaluation in report.evaluations if evaluation.result.pictures is not None]
    if len(drawn) == 1 and not report.checks:
        parts = [draw_contact_sheet(drawn[0].result, max_prompts=_PROMPTS_OF_ONE, title=report.title)]
    else:
        heading = font(26, bold=True)
        parts = [_text(wrap(report.title, heading, _WIDTH - 2 * _MARGIN), heading)]
        parts += [draw_contact_sheet(each.result, max_prompts=_PROMPTS_OF_MANY, title=each.label) for each in drawn]
    for each in report.checks:
        parts += _check(report, each.result)
    parts += _rows([_picture(to_png(draw_front(front), _DPI), front.title) for front in report.fronts])
    if report.panels:
        parts.append(_legend(report))
        parts += _rows([_picture(to_png(draw_panel(panel), _DPI), panel.title) for panel in report.panels])
    for evaluation in report.evaluations:
        lines = [evaluation.label, "", *format_table(evaluation.result).splitlines()]
        parts.append(_text(lines, font(14, mono=True)))
    return png_bytes(_stacked(parts))


def _check(report: Report, result: CheckResult) -> list[Image.Image]:
    """Draw the sentences and charts of a check."""
    parts, face = [], font(14)
    for name, own in result.adapters.items():
        number = report.series[name]
        figures = [(draw_layers(own.weights, number), f"{name}: layers")]
        if own.pictures is not None:
            figures.insert(0, (draw_strength(own.pictures, number), f"{name}: effect and damage"))
        parts.append(_text(wrap(name, font(18, bold=True), _WIDTH - 2 * _MARGIN), font(18, bold=True)))
        parts.append(_sentences(own.findings, face))
        parts += _rows([_picture(to_png(figure, _DPI), title) for figure, title in figures])
    return parts if result.stack is None else [*parts, _sentences(result.stack.findings, face)]


def _sentences(sentences: Sequence[str], face: ImageFont.FreeTypeFont) -> Image.Image:
    return _text([line for each in sentences for line in wrap(each, face, _WIDTH - 2 * _MARGIN)], face)


def _picture(png: bytes, title: str) -> Image.Image:
    """Put a title above a chart."""
    chart = Image.open(io.BytesIO(png))
    face = font(15, bold=True)
    image = Image.new("RGB", (chart.width, chart.height + 2 * line_height(face)), PAPER)
    lines = wrap(title, face, chart.width, max_lines=1)
    ImageDraw.Draw(image).text((0, 0), "".join(lines), font=face, fill=INK)
    image.paste(chart, (0, round(1.5 * line_height(face))))
    return image


def _legend(report: Report) -> Image.Image:
    """Name the colours of the curves, one a line."""
    names = list(dict.fromkeys(training.name for training in report.trainings))
    face = font(14)
    image = _text([f"    {name}" for name in names], face)
    draw = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        middle = (number + 0.5) * line_height(face)
        draw.ellipse((_MARGIN, middle - 5, _MARGIN + 10, middle + 5), fill=SERIES[report.series[name]])
    return image


def _rows(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Put pictures side by side into rows no wider than the page."""
    rows: list[list[Image.Image]] = []
    for image in images:
        if not rows or sum(other.width + _GAP for other in rows[-1]) + image.width > _WIDTH - _MARGIN:
            rows.append([])
        rows[-1].append(image)
    pages = []
    for row in rows:
        pages.append(Image.new("RGB", (_WIDTH, max(image.height for image in row)), PAPER))
        left = _MARGIN
        for image in row:
            pages[-1].paste(image, (left, 0))
            left += image.width + _GAP
    return pages


def _text(lines: Sequence[str], face: ImageFont.FreeTypeFont) -> Image.Image:
    width = max((round(face.getlength(line)) for line in lines), default=0) + 2 * _MARGIN
    image = Image.new("RGB", (max(_WIDTH, width), max(1, len(lines)) * line_height(face)), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, number * line_height(face)), line, font=face, fill=INK)
    return image


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    page = Image.new(
        "RGB", (max(part.width for part in parts), sum(part.height + _GAP for part in parts) + _GAP), PAPER
    )
    top = _GAP
    for part in parts:
        page.paste(part, (0, top))
        top += part.height + _GAP
    return page
