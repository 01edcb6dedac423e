"""A report: what it gathers, and that its JSON is what was read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cat_rs.evaluation import EvaluationInputError, Interval
from cat_rs.report import write_report
from cat_rs.report.content import read_report, report_json

from .conftest import ResultMaker, scored, write_evaluation, write_front, write_training
from .test_sources import write_demo


def test_json_is_what_was_read(make_result: ResultMaker, tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "evaluation", scored(make_result("LoRA", "CAT")))
    training = write_training(tmp_path / "CAT", cat=0.5, steps=7)
    write_front(training, scored(make_result("x", pictures=False)), [0.5, 0.6], best=20)
    content = json.loads(report_json(read_report([evaluation, training], title="both")))
    assert (content["format"], content["title"]) == ("cat-rs report 1", "both")
    first, second = content["runs"]
    assert first["path"] == str(evaluation)
    assert first["evaluations"][0]["evaluation"] == json.loads((evaluation / "results.json").read_text())
    steps = [json.loads((training / "evaluations" / f"step-0000{step}.json").read_text()) for step in (10, 20)]
    assert second["evaluations"][0]["evaluation"]["steps"] == steps
    assert second["trainings"] == [
        {
            "name": "CAT",
            "folder": str(training),
            "settings": {"model": "m", "cat_factor": 0.5, "trigger": ["sks"], "tensorboard": True},
        }
    ]
    curves = {curve["key"]: curve["lines"] for curve in content["curves"]}
    assert set(curves) == {"diffusion", "cat", "grad_norm", "cat_factor"}
    (line,) = curves["cat"]
    assert line["steps"] == list(range(1, 8))
    np.testing.assert_allclose(line["values"], [0.5 / step for step in range(1, 8)])
    results = json.loads((evaluation / "results.json").read_text())
    points = {point["label"]: point for front in content["fronts"] for point in front["points"]}
    assert points["LoRA"]["ups"] == results["adapters"]["LoRA"]["ups"]
    assert points["CAT"]["identity"] == results["adapters"]["CAT"]["identity"]


def test_json_of_a_demo_keeps_its_summary(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = write_demo(tmp_path / "demo", make_result)
    (run,) = json.loads(report_json(read_report([folder])))["runs"]
    results = json.loads((folder / "results.json").read_text())
    assert run["summary"] == results["summary"]
    assert run["settings"] == results["training"]
    assert [each["evaluation"] for each in run["evaluations"]] == [each["evaluation"] for each in results["runs"]]


def test_unknown_numbers_are_null(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT", pictures=False)
    write_evaluation(tmp_path, replace(result, other_seed=None, base=replace(result.base, identity=None)))
    report = read_report([tmp_path])
    (front,) = json.loads(report_json(report))["fronts"]
    assert front["base"] is None
    assert "NaN" not in report_json(report)


def test_what_was_evaluated_alike_shares_a_chart(make_result: ResultMaker, tmp_path: Path) -> None:
    result = make_result("CAT", pictures=False)
    other_concept = replace(result, base=replace(result.base, identity=Interval(0.3, 0.2, 0.4)))
    other_encoder = replace(result, settings={**result.settings, "encoder": "dino"})
    folders = [
        write_evaluation(tmp_path / name, each)
        for name, each in [("a", result), ("b", result), ("c", other_concept), ("d", other_encoder)]
    ]
    report = read_report(folders)
    assert [len(front.points) for front in report.fronts] == [2, 1, 1]
    labels = [point.label for point in report.fronts[0].points]
    assert labels == [f"CAT: sks cat ({folder.name})" for folder in folders[:2]]


def test_checkpoints_stand_beside_a_finished_adapter(make_result: ResultMaker, tmp_path: Path) -> None:
    result = scored(make_result("LoRA", pictures=False))
    training = write_training(tmp_path / "CAT")
    write_front(training, result, [0.5, 0.6, 0.65, 0.62], best=30)
    report = read_report([write_evaluation(tmp_path / "evaluation", result), training])
    (front,) = report.fronts
    assert [(point.label, point.step, point.best) for point in front.points] == [
        ("LoRA", None, False),
        ("CAT, step 10", 10, False),
        ("", 20, False),
        ("CAT, step 30", 30, True),
        ("CAT, step 40", 40, False),
    ]
    assert {point.series for point in front.points[1:]} == {report.series["CAT"]}


def test_one_name_has_one_colour(make_result: ResultMaker, tmp_path: Path) -> None:
    report = read_report([write_demo(tmp_path / "demo", make_result)])
    assert report.series == {"LoRA": 0, "CAT": 1}
    assert {line.name: line.series for panel in report.panels for line in panel.curves} == {"LoRA": 0, "CAT": 1}


def test_a_run_without_preservation_has_no_curve_of_it(tmp_path: Path) -> None:
    report = read_report([write_training(tmp_path / "plain", cat=0.0), write_training(tmp_path / "cat")])
    names = {panel.key: [line.name for line in panel.curves] for panel in report.panels}
    assert names["cat"] == ["cat"]
    assert names["diffusion"] == names["cat_factor"] == ["plain", "cat"]


def test_titles(make_result: ResultMaker, tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "evaluation", make_result("LoRA", "CAT", pictures=False))
    training = write_training(tmp_path / "dog")
    assert read_report([evaluation]).title == "“sks cat”: base model against LoRA and CAT"
    assert read_report([training]).title == "Training of dog"
    assert read_report([training], title="Mine").title == "Mine"
    many = write_evaluation(tmp_path / "many", make_result(*"abcdef", pictures=False))
    assert read_report([many]).title.endswith("against a, b, c and 3 more")


def test_three_files_are_written(make_result: ResultMaker, tmp_path: Path) -> None:
    evaluation = write_evaluation(tmp_path / "evaluation", scored(make_result("CAT")))
    write_report([evaluation], tmp_path / "deep" / "report")
    names = sorted(path.name for path in (tmp_path / "deep" / "report").iterdir())
    assert names == ["report.html", "report.json", "report.png"]


def test_nothing_is_written_before_all_is_read(make_result: ResultMaker, tmp_path: Path) -> None:
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.html").write_text("the one before")
    evaluation = write_evaluation(tmp_path / "evaluation", scored(make_result("CAT")))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(EvaluationInputError, match=re.escape(str(tmp_path / "broken.json"))):
        write_report([evaluation, tmp_path / "broken.json"], output)
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("report.html", "the one before")]


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="runs: expected at least one, got none"):
        write_report([], tmp_path)
