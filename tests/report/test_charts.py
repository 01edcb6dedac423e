"""The charts of a report: what they show, and that they fit into a page."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from cat_rs.evaluation import Interval
from cat_rs.report.charts import to_png, to_svg
from cat_rs.report.curves import Panel, curve, draw_panel
from cat_rs.report.fronts import Front, FrontPoint, draw_front
from cat_rs.report.style import SERIES

BARE = Interval(0.8, math.nan, math.nan)


def interval(value: float) -> Interval:
    return Interval(value, value - 0.02, value + 0.03)


def point(label: str, identity: float, ups: float, *, step: int | None = None, best: bool = False) -> FrontPoint:
    return FrontPoint(label, 1 if step is not None else 0, interval(identity), interval(ups), step, best)


FRONT = Front(
    "a cat",
    (
        point("LoRA", 0.7, 0.85),
        point("step 20", 0.6, 0.9, step=20, best=True),
        point("step 10", 0.5, 0.95, step=10),
    ),
    interval(0.4),
    interval(0.88),
)


def panel(*values: float, logarithmic: bool = True) -> Panel:
    steps = np.arange(1.0, len(values) + 1)
    return Panel("cat", "CAT", "a note", (curve("run", 2, steps, np.array(values)),), logarithmic)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]


def test_svg_is_one_element_with_its_text() -> None:
    svg = to_svg(draw_front(FRONT), "first")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert {"viewBox"} <= set(root.attrib)
    assert not {"width", "height"} & set(root.attrib)
    assert {"LoRA", "step 10", "step 20", "base model"} <= set(texts(svg))
    assert "<style" not in svg
    assert "<metadata" not in svg


def test_svg_loads_nothing() -> None:
    svg = to_svg(draw_front(FRONT), "first")
    namespaces = set(re.findall(r'xmlns(?::\w+)?="([^"]+)"', svg))
    assert set(re.findall(r"https?://[^\"' )]+", svg)) <= namespaces
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))


def test_ids_of_two_charts_differ() -> None:
    drawings = [
        to_svg(draw_front(FRONT), "one"),
        to_svg(draw_front(FRONT), "two"),
        to_svg(draw_panel(panel(1, 2)), "x"),
    ]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawings]
    assert all(not left & right for left, right in itertools.combinations(ids, 2))
    for svg, own in zip(drawings, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= own


def test_colours_are_the_pages() -> None:
    svg = to_svg(draw_front(FRONT), "first")
    assert "var(--series-0)" in svg
    assert "var(--series-1)" in svg
    assert "var(--ink)" in svg
    assert not re.search(r"(?:fill|stroke): #(?!ffffff|000000)", svg)


def test_the_same_chart_is_the_same_text() -> None:
    assert to_svg(draw_front(FRONT), "first") == to_svg(draw_front(FRONT), "first")


@pytest.mark.parametrize("name", ["$x_1$", "<script>alert(1)</script>", "a & b", "_hidden", "\\frac", "--x"])
def test_names_are_text(name: str) -> None:
    front = Front("t", (FrontPoint(name, 0, BARE, BARE),))
    assert name in texts(to_svg(draw_front(front), "first"))


def test_long_names_keep_both_ends() -> None:
    front = Front("t", (FrontPoint(f"the adapter {'x' * 200} of run 1", 0, BARE, BARE),))
    (label,) = [text for text in texts(to_svg(draw_front(front), "first")) if text.startswith("the")]
    assert len(label) == 30
    assert label.startswith("the adapter xxx…")
    assert label.endswith("xxxx of run 1")


def test_labels_keep_apart_and_inside() -> None:
    points = tuple(point(f"adapter {number}", 0.5 + 0.01 * number, 0.9 - 0.005 * number) for number in range(6))
    figure = draw_front(Front("many", points, interval(0.4), interval(0.88)))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].texts]
    assert len(boxes) == 7
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    overlapping = sum(bool(left.overlaps(right)) for left, right in itertools.combinations(boxes, 2))
    assert overlapping == 0


def test_checkpoints_are_connected_in_order() -> None:
    axes = draw_front(FRONT).axes[0]
    path = next(line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.4)
    np.testing.assert_array_equal(path.get_xdata(), [0.5, 0.6])


def test_points_without_bounds_and_nothing_else() -> None:
    assert "CAT" in texts(to_svg(draw_front(Front("bare", (FrontPoint("CAT", 0, BARE, BARE),))), "first"))


def test_curves_are_thinned_out_by_means() -> None:
    steps = np.arange(1000.0)
    line = curve("run", 0, steps, 2.0 * steps)
    assert len(line.steps) == len(line.values) == len(line.smoothed) == 400
    means = [part.mean() for part in np.array_split(steps, 400)]
    np.testing.assert_allclose(line.steps, means)
    np.testing.assert_allclose(line.values, 2.0 * np.array(means))


def test_curves_join_the_steps_that_have_the_figure() -> None:
    values = np.where(np.arange(1.0, 9.0) % 4 == 0, 0.5, math.nan)
    line = curve("run", 0, np.arange(1.0, 9.0), values)
    np.testing.assert_array_equal(line.steps, [4, 8])
    np.testing.assert_array_equal(line.values, [0.5, 0.5])
    assert len(curve("run", 0, np.arange(3.0), np.full(3, math.nan)).steps) == 3


def test_short_curves_are_whole() -> None:
    line = curve("run", 0, np.array([10.0, 20.0]), np.array([0.3, 0.1]))
    np.testing.assert_array_equal(line.steps, [10, 20])
    np.testing.assert_array_equal(line.values, [0.3, 0.1])


@pytest.mark.parametrize(
    "drawn",
    [
        panel(0.5),
        panel(0.5, math.nan, 0.3),
        panel(1e-9, 0.1, 0.2),
        panel(1.0, 1.0, logarithmic=False),
        panel(math.nan),
    ],
)
def test_every_curve_can_be_drawn(drawn: Panel) -> None:
    svg = to_svg(draw_panel(drawn), "first")
    assert "step" in texts(svg)


def test_png_has_the_light_colours() -> None:
    import io

    image = Image.open(io.BytesIO(to_png(draw_front(FRONT), 100))).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    for series in SERIES[:2]:
        assert tuple(bytes.fromhex(series[1:])) in colours
