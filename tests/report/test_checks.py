"""The page of a check: sentences, charts, tables, and the base model beside the adapter at every scale."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from cat_rs.adapter_check import (
    AdapterCheck,
    CheckResult,
    Finding,
    LayerUpdate,
    PictureCheck,
    ScaleCheck,
    Stack,
    StackCheck,
    WeightReport,
)
from cat_rs.evaluation import EvaluationFileError, EvaluationInputError, Interval, PictureGrid, Scores
from cat_rs.report import write_report
from cat_rs.report.checks import read_check
from cat_rs.report.picture_files import save_check_pictures

HOSTILE = "<b>a</b>/../x"
PROMPTS = {"trigger": tuple(f"a sks cat {number}" for number in range(4)), "general": ("", "a <i>dog</i>")}
SEEDS = (0, 1)
SCALES = (0.5, 1.0)
DRIFT = Interval(0.04, 0.03, 0.05)
MODELS = ("base", "0.5", "1")


def grids(models: tuple[str, ...]) -> dict[str, dict[str, PictureGrid]]:
    def grid(number: int, prompts: tuple[str, ...]) -> PictureGrid:
        images = tuple(Image.new("RGB", (16, 16), (60 * number, 9, 9)) for _ in range(len(prompts) * len(SEEDS)))
        return PictureGrid(prompts, SEEDS, images, torch.zeros(len(images), 1))

    return {
        name: {kind: grid(number, prompts) for kind, prompts in PROMPTS.items()} for number, name in enumerate(models)
    }


def weights() -> WeightReport:
    layers = tuple(LayerUpdate("unet", f"layer{n}", 4, 4.0, 1.0, 0.1 + n, 0.1 + n, 2.0, 0.5, None) for n in range(5))
    return WeightReport("kohya", "sd", layers, (Finding("spike", ("unet: layer4",), "far above the median"),))


def adapter(trigger: str | None = "sks") -> AdapterCheck:
    scores = Scores(drift=DRIFT, ups=Interval(0.9, float("nan"), float("nan")))
    kinds = dict.fromkeys(PROMPTS, scores)
    effect = DRIFT if trigger else None
    pictures = PictureCheck(
        trigger=trigger,
        class_word=None,
        source="as given",
        prompts=PROMPTS,
        variants=(),
        left_out=(),
        base=dict.fromkeys(PROMPTS, Scores()),
        other_seed={"trigger": scores},
        scales=tuple(ScaleCheck(scale, kinds, DRIFT, "general", effect, scale == 1.0) for scale in SCALES),
        max_drift=0.05,
        safest=0.5,
        rows={},
        grids=grids(MODELS),
    )
    return AdapterCheck(weights(), ("A sentence about <script>.",), pictures)


def result() -> CheckResult:
    names = ("base", HOSTILE, "plain", f"{HOSTILE} + plain")
    stack = StackCheck(
        scales={HOSTILE: 1.0, "plain": 0.5},
        prompts=PROMPTS,
        by_concept=(),
        stacks=(Stack(names[3], (), DRIFT, "plain", DRIFT),),
        findings=("They get along.",),
        grids=grids(names),
    )
    settings = {"encoder": "clip", "sampling": {"seeds": list(SEEDS)}, "adapters": {"plain": "/home/me/plain"}}
    return CheckResult(settings, {HOSTILE: adapter(), "plain": adapter(None), "weights": weights_only()}, stack)


def weights_only() -> AdapterCheck:
    return AdapterCheck(weights(), (), None)


def written(folder: Path, content: CheckResult, *, pictures: bool = True) -> Path:
    folder.mkdir()
    content.save(folder / "check.json")
    if pictures:
        save_check_pictures(content, folder / "pictures")
    return folder


def page_of(run: Path, folder: Path) -> str:
    write_report([run], folder)
    return (folder / "report.html").read_text()


def test_the_page_has_every_part(tmp_path: Path) -> None:
    page = page_of(written(tmp_path / "check", result()), tmp_path / "report")
    assert "<h1>Check of" in page
    assert "A sentence about &lt;script&gt;." in page
    assert "Weights, spike: far above the median (unet: layer4)." in page
    assert "They get along." in page
    # Of the stack over the general prompts alone, and of two adapters at two scales for both kinds.
    assert page.count("<small>drift 0.040</small>") == 1 + 2 * 2 * 2
    assert HOSTILE not in page
    # Three of the trigger's prompts and two general ones: three models of two adapters, four of the stack.
    assert page.count("data:image/webp") == 5 * (3 + 3 + 4)
    assert page.count("<svg") == 5
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "/home/me" not in page


def test_report_json_has_the_check(tmp_path: Path) -> None:
    run = written(tmp_path / "check", result())
    write_report([run], tmp_path / "report")
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["runs"][0]["checks"][0]["check"] == json.loads((run / "check.json").read_text())
    with Image.open(tmp_path / "report" / "report.png") as overview:
        assert overview.height > 1000


def test_the_file_alone_is_enough(tmp_path: Path) -> None:
    run = written(tmp_path / "check", result(), pictures=False)
    page = page_of(run / "check.json", tmp_path / "report")
    assert "data:image/webp" not in page
    assert page.count("<svg") == 5


def test_pictures_are_read_back(tmp_path: Path) -> None:
    found = read_check(written(tmp_path / "check", result()) / "check.json").result
    own = found.adapters[HOSTILE].pictures
    assert own is not None
    assert own.grids is not None
    assert own.grids.keys() == set(MODELS)
    assert own.grids["1"]["trigger"].picture(0, 0).getpixel((0, 0)) == (120, 9, 9)


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "check.json").write_text('{"format": "cat-rs check 2"}')
    with pytest.raises(EvaluationInputError, match=r"check\.json: result: expected the format 'cat-rs check 1'"):
        write_report([tmp_path], tmp_path / "report")
    (tmp_path / "check.json").unlink()
    with pytest.raises(EvaluationFileError, match=r"or check\.json"):
        write_report([tmp_path], tmp_path / "report")
