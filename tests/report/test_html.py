"""The page of a report as text: escaping, pictures, tables. `test_page.py` looks at it in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cat_rs.evaluation import EvaluationResult
from cat_rs.report.content import read_report
from cat_rs.report.html import render_html

from .conftest import (
    NO_TRIGGER,
    SEEDS,
    TRIGGER,
    ResultMaker,
    colour_of,
    scored,
    write_evaluation,
    write_front,
    write_training,
)
from .test_sources import write_demo

HOSTILE = '"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = self._raw and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile(result: EvaluationResult) -> EvaluationResult:
    """The result with a prompt, a class word and an encoder that try to become markup."""
    prompts = result.settings["prompts"]
    settings = {
        **result.settings,
        "prompts": {**prompts, "class_word": HOSTILE},
        "encoder": f"</style>{HOSTILE}",
        "pipeline": HOSTILE,
    }
    rows = tuple(replace(row, prompt=HOSTILE) if row.prompt == TRIGGER[0] else row for row in result.prompts)
    return replace(result, settings=settings, prompts=rows)


def page_of(*runs: Path, title: str | None = None) -> str:
    return render_html(read_report(runs, title=title))


def test_what_comes_from_files_is_text(make_result: ResultMaker, tmp_path: Path) -> None:
    result = hostile(scored(make_result(HOSTILE, "CAT")))
    evaluation = write_evaluation(tmp_path / "evaluation", result)
    training = write_training(tmp_path / "<i>dog & cat")
    page = Elements(page_of(evaluation, training, title=f"</title>{HOSTILE}"))
    assert len(page.named("script")) == 1
    assert "i" not in {name for name, attributes in page.elements if not attributes}
    assert all(str(attributes["src"]).startswith("data:image/") for attributes in page.named("img"))
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count(HOSTILE) >= 5
    assert "<i>dog & cat" in page.text


def test_only_the_pages_own_script_may_run(make_result: ResultMaker, tmp_path: Path) -> None:
    page = page_of(write_evaluation(tmp_path, scored(make_result("CAT"))))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [str(each["content"]) for each in Elements(page).named("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_pictures_are_in_the_page_without_loss(make_result: ResultMaker, tmp_path: Path) -> None:
    page = Elements(page_of(write_evaluation(tmp_path, scored(make_result("LoRA", "CAT")))))
    found = {}
    for attributes in page.named("img"):
        kind, data = str(attributes["src"]).split(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert (attributes["width"], attributes["height"]) == ("16", "16")
            found[attributes["alt"]] = picture.convert("RGB").getpixel((8, 8))
    assert len(found) == 2 + 3 * len(SEEDS) * (len(TRIGGER) + len(NO_TRIGGER))
    for number, model in enumerate(("base", "LoRA", "CAT")):
        for trigger, prompts in ((True, TRIGGER), (False, NO_TRIGGER)):
            for prompt, text in enumerate(prompts):
                for seed in SEEDS:
                    assert found[f"{model}: {text}, seed {seed}"] == colour_of(number, trigger, prompt, seed)


def test_large_pictures_are_scaled_down(make_result: ResultMaker, tmp_path: Path) -> None:
    page = Elements(page_of(write_evaluation(tmp_path, make_result("CAT", size=(400, 200)))))
    assert {(each["width"], each["height"]) for each in page.named("img")} == {("256", "128")}


def test_a_page_without_pictures_says_so(make_result: ResultMaker, tmp_path: Path) -> None:
    page = Elements(page_of(write_evaluation(tmp_path, scored(make_result("CAT", pictures=False)))))
    assert page.named("img") == []
    assert "No pictures lie beside the results of sks cat" in page.text


def test_a_training_alone_has_curves_and_settings(tmp_path: Path) -> None:
    page = Elements(page_of(write_training(tmp_path / "dog")))
    assert {each.get("id") for each in page.named("section")} == {"curves", "settings"}
    assert len(page.named("svg")) == 4
    assert "tensorboard" in page.text


def test_figures_have_their_bounds(make_result: ResultMaker, tmp_path: Path) -> None:
    page = page_of(write_evaluation(tmp_path, scored(make_result("CAT", pictures=False))))
    assert '<td class="number" data-value="0.1">0.100<small>0.090 to 0.120</small></td>' in page
    # An interval without bounds, and a measure that does not apply.
    assert '<td class="number" data-value="0.8">0.800</td>' in page
    assert '<td class="number" data-value=""><span class="absent">–</span></td>' in page


def test_what_changed_most_comes_first(make_result: ResultMaker, tmp_path: Path) -> None:
    page = page_of(write_evaluation(tmp_path, scored(make_result("LoRA", "CAT", pictures=False))))
    table = page[page.index('id="prompts"') :]
    prompts = re.findall(r'<tr><th scope="row" class="text" data-value="([^"]+)">', table)
    assert prompts == [*reversed(NO_TRIGGER), *reversed(TRIGGER)]
    lowest = [float(value) for value in re.findall(r'tinted" data-value="([^"]+)"', table)]
    assert lowest[::3] == sorted(lowest[::3])
    assert lowest[:3] == pytest.approx([0.7285, 0.7585, 0.7285])


def test_comparisons_are_paired_and_signed(make_result: ResultMaker, tmp_path: Path) -> None:
    page = Elements(page_of(write_evaluation(tmp_path, scored(make_result("LoRA", "CAT", pictures=False)))))
    assert "sks cat: difference to LoRA" in page.text
    assert "+0.010+0.010 to +0.010" in page.text
    assert "−0.030−0.030 to −0.030" in page.text


def test_settings_are_said_once(make_result: ResultMaker, tmp_path: Path) -> None:
    page = Elements(page_of(write_demo(tmp_path / "demo", make_result)))
    settings = page.text[page.text.index("Settings and versions") :]
    assert settings.count("tensorboard") == 1
    assert settings.count("cat_factor") == 4
    assert "means over 2 trainings of each" in page.text


def test_ids_are_unique(make_result: ResultMaker, tmp_path: Path) -> None:
    page = Elements(page_of(write_demo(tmp_path / "demo", make_result)))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_runs_give_the_same_page(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = write_demo(tmp_path / "demo", make_result)
    assert page_of(folder) == page_of(folder)


def test_no_absolute_path_is_on_the_page(make_result: ResultMaker, tmp_path: Path) -> None:
    """Also where two evaluations of one concept are told apart by their folders."""
    result = scored(make_result("CAT"))
    result = replace(
        result,
        settings={**result.settings, "adapters": {"CAT": str(tmp_path / "runs" / "dog")}, "encoder": str(tmp_path)},
    )
    evaluations = [write_evaluation(tmp_path / part / "evaluation", result) for part in ("first", "second")]
    training = write_training(tmp_path / "training")
    write_front(training, result, [0.5, 0.6], best=10)
    page = render_html(read_report([*evaluations, training, write_demo(tmp_path / "demo", make_result)]))
    assert str(tmp_path) not in page
    assert "first/evaluation" in page
    assert "second/evaluation" in page


def test_relative_paths_stay_as_they_were_given(
    make_result: ResultMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_training(tmp_path / "runs" / "dog")
    monkeypatch.chdir(tmp_path)
    assert "runs/dog" in render_html(read_report(["runs/dog"]))
