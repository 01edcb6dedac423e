"""What a report is made from: every kind of run is read, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_rs.errors import CatRsError
from cat_rs.evaluation import EvaluationFileError, EvaluationInputError
from cat_rs.report.sources import read_run

from .conftest import ResultMaker, scored, write_evaluation, write_front, write_training

ROOT = Path(__file__).parents[2]


def write_demo(folder: Path, make_result: ResultMaker) -> Path:
    """Write what `cat-rs demo` writes, for two seeds."""
    runs = []
    for seed in (0, 1):
        result = scored(make_result("LoRA", "CAT"))
        place = write_evaluation(folder / "runs" / f"tabby-seed{seed}", result)
        write_training(place / "LoRA", cat=0.0)
        write_training(place / "CAT")
        evaluation = json.loads((place / "results.json").read_text())
        runs.append({"concept": "tabby", "seed": seed, "folder": place.relative_to(folder).as_posix()})
        runs[-1] |= {"training_seconds": {}, "evaluation": evaluation}
    difference = {"value": 0.1, "low": 0.0, "high": 0.2}
    summary = {"ups": {"LoRA": 0.8, "CAT": 0.9, "difference": difference}}
    content = {"format": "cat-rs demo 1", "training": {"steps": 20}, "summary": summary, "runs": runs}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_evaluation_and_its_pictures(make_result: ResultMaker, tmp_path: Path) -> None:
    result = scored(make_result("LoRA", "CAT"))
    folder = write_evaluation(tmp_path / "evaluation", result)
    for path in (folder, folder / "results.json"):
        (evaluation,) = read_run(path).evaluations
        assert evaluation.label == "sks cat"
        assert evaluation.result.adapters == result.adapters
        assert evaluation.result.prompts == result.prompts
        assert evaluation.result.pictures is not None
        assert evaluation.content == json.loads((folder / "results.json").read_text())
        (comparison,) = evaluation.comparisons
        assert (comparison.a, comparison.b) == ("LoRA", "CAT")
        assert comparison.identity is not None
        assert comparison.identity.value == pytest.approx(0.01)


def test_evaluation_without_pictures(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, make_result("CAT", pictures=False))
    assert read_run(folder).evaluations[0].result.pictures is None


def test_demo(make_result: ResultMaker, tmp_path: Path) -> None:
    run = read_run(write_demo(tmp_path / "demo", make_result))
    assert [evaluation.label for evaluation in run.evaluations] == ["tabby, seed 0", "tabby, seed 1"]
    assert all(evaluation.result.pictures is not None for evaluation in run.evaluations)
    assert [training.name for training in run.trainings] == ["LoRA", "CAT"] * 2
    assert run.settings == {"steps": 20}
    assert run.summary is not None
    assert run.summary["ups"]["CAT"] == 0.9


def test_demo_of_an_earlier_version() -> None:
    run = read_run(ROOT / "docs" / "demo" / "results.json")
    assert list(run.evaluations[0].result.adapters) == ["LoRA", "CAT"]
    assert run.evaluations[0].result.pictures is None
    assert run.trainings == ()


def test_training(tmp_path: Path) -> None:
    (training,) = read_run(write_training(tmp_path / "dog", cat=0.5, steps=3)).trainings
    assert training.name == "dog"
    assert training.settings == {"model": "m", "cat_factor": 0.5, "trigger": ["sks"], "tensorboard": True}
    np.testing.assert_array_equal(training.metrics["step"], [1, 2, 3])
    np.testing.assert_array_equal(training.metrics["cat"], [0.5, 0.25, 0.5 / 3])


def test_training_with_evaluations(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = write_training(tmp_path / "dog")
    write_front(folder, scored(make_result("x", pictures=False)), [0.5, 0.6, 0.55], best=20)
    (evaluation,) = read_run(folder).evaluations
    assert evaluation.checkpoints is not None
    assert dict(evaluation.checkpoints.steps) == {"step 10": 10, "step 20": 20, "step 30": 30}
    assert (evaluation.checkpoints.training, evaluation.checkpoints.best) == ("dog", "step 20")
    identities = [scores.identity.value for scores in evaluation.result.adapters.values() if scores.identity]
    assert identities == [0.5, 0.6, 0.55]
    assert sorted({row.model for row in evaluation.result.prompts}) == ["base", "step 10", "step 20", "step 30"]
    assert len(evaluation.result.prompts) == 4 * 5
    (folder / "evaluations" / "step-000020.json").unlink()
    with pytest.raises(EvaluationFileError, match=r"step-000020\.json cannot be read"):
        read_run(folder)


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set what lies under keys joined by dots."""
    *keys, last = path.split(".")
    place = content
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "cat-rs evaluation 99", "expected the format"),
        ("adapters", {}, "at least one of adapters"),
        ("adapters", [], "an object as adapters"),
        ("adapters.CAT.ups.value", "0.9", r"a number as adapters\.CAT\.ups\.value"),
        ("adapters.CAT.ups.value", float("nan"), "numbers as the scores of CAT"),
        ("adapters.CAT.ups.low", None, "numbers as the scores of CAT"),
        ("base.identity.value", True, r"a number as base\.identity\.value"),
        ("settings", None, "an object as settings"),
        ("settings.prompts.trigger", "a sks cat", r"at least one text in settings\.prompts\.trigger"),
        ("settings.prompts.trigger_words", [], r"at least one text in settings\.prompts\.trigger_words"),
        ("settings.prompts.class_word", 3, r"settings\.prompts\.class_word"),
        ("settings.sampling", {}, r"at least one number in settings\.sampling\.seeds"),
        ("settings.encoder", None, r"a name as settings\.encoder"),
        ("prompts.0.prompt", 5, r"a text as prompts\.0\.prompt"),
        ("prompts.9.similarity", ["0.5"] * 4, r"a number as prompts\.9\.similarity\.0"),
        ("prompts.9.similarity", [None] * 4, "numbers in row 9 of prompts"),
        ("prompts.9.similarity", "0.5", r"a list as prompts\.9\.similarity"),
        ("prompts.9.similarity", [0.5], "expected as many values"),
        ("prompts.9.prompt", "another", "expected the same prompts"),
    ],
)
def test_broken_results_are_named(
    path: str, value: object, message: str, make_result: ResultMaker, tmp_path: Path
) -> None:
    folder = write_evaluation(tmp_path, scored(make_result("LoRA", "CAT", pictures=False)))
    file = folder / "results.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(EvaluationInputError, match=f"runs: {file}: .*{message}"):
        read_run(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("runs", None),
        ("runs", [1]),
        ("runs.0.evaluation", []),
        ("runs.0.folder", 7),
        ("training", 1),
        ("summary", [[1]]),
        ("summary.ups", 0.1),
        ("summary.ups.LoRA", "high"),
        ("summary.ups.difference", {"value": 0.1}),
    ],
)
def test_broken_demos_are_named(path: str, value: object, make_result: ResultMaker, tmp_path: Path) -> None:
    file = write_demo(tmp_path, make_result) / "results.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(EvaluationInputError, match=str(file)):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [("format", "other"), ("checkpoints", []), ("checkpoints", 5), ("checkpoints.0.step", "x"), ("checkpoints", [{}])],
)
def test_broken_fronts_are_named(path: str, value: object, make_result: ResultMaker, tmp_path: Path) -> None:
    folder = write_training(tmp_path / "dog")
    write_front(folder, scored(make_result("x", pictures=False)), [0.5], best=10)
    file = folder / "evaluations" / "front.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(EvaluationInputError, match=str(file)):
        read_run(folder)


def _nothing(folder: Path) -> Path:
    return folder / "absent"


def _empty(folder: Path) -> Path:
    return folder


def _no_json(folder: Path) -> Path:
    (folder / "results.json").write_text("{")
    return folder / "results.json"


def _list(folder: Path) -> Path:
    (folder / "results.json").write_text("[]")
    return folder / "results.json"


def _binary(folder: Path) -> Path:
    (folder / "results.json").write_bytes(b"\xff\xfe\x00")
    return folder / "results.json"


def _no_yaml(folder: Path) -> Path:
    write_training(folder / "run")
    (folder / "run" / "train_config.yaml").write_text("a: [")
    return folder / "run"


def _no_log(folder: Path) -> Path:
    write_training(folder / "run")
    (folder / "run" / "metrics.jsonl").unlink()
    return folder / "run"


@pytest.mark.parametrize("make", [_nothing, _empty, _no_json, _list, _binary, _no_yaml, _no_log])
def test_what_cannot_be_read_is_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(CatRsError, match=str(path)):
        read_run(path)


def test_incomplete_pictures_are_named(make_result: ResultMaker, tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, make_result("CAT"))
    shutil.rmtree(folder / "pictures" / "CAT")
    with pytest.raises(EvaluationFileError, match=r"pictures/CAT/trigger/metadata\.jsonl cannot be read"):
        read_run(folder)
