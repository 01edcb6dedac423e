"""Evaluation during training: what is scored and kept, and that training does not notice."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cat_rs.evaluation import (
    ClipEncoder,
    EvaluationConfig,
    EvaluationFileError,
    EvaluationPrompts,
    EvaluationResult,
    Interval,
    evaluate,
)
from cat_rs.evaluation.front import choose_best, on_front
from cat_rs.options import ConfigError
from cat_rs.training import CheckpointError, TrainConfig, TrainingInterrupted, train
from cat_rs.training.evaluation import CheckpointEvaluations
from tests.evaluation.conftest import tiny_clip_dir  # noqa: F401

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("_one_thread")

PROMPTS = ("a sks cat on a red background", "a photo of a sks cat")


@pytest.fixture
def configure(
    short_run: Callable[..., TrainConfig],
    tiny_clip_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> Callable[..., TrainConfig]:
    """Makes the settings of a short run that is evaluated twice; arguments override."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return functools.partial(
        short_run,
        steps=4,
        lr=1e-2,
        lora_dropout=0.1,
        checkpoint_every=2,
        evaluate_every=2,
        evaluate_prompts=str(prompts),
        evaluate_encoder=str(tiny_clip_dir),
        evaluate_inference_steps=2,
    )


@pytest.fixture
def every_step_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's pictures are noise: any identity counts as beyond the base model's."""
    monkeypatch.setattr("cat_rs.training.evaluation.base_identity", lambda _result: Interval(-1.0, -1.0, -1.0))


def quiet(config: TrainConfig) -> list[str]:
    """Train without bars; returns the news."""
    lines: list[str] = []
    train(config, progress=False, report=lines.append)
    return lines


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def front_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluations" / "front.json").read_text())


def files_of(folder: Path) -> dict[str, bytes]:
    """All that evaluations leave."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for part in ("evaluations", "best")
        for file in sorted((folder / part).rglob("*"))
        if file.is_file()
    }


def test_training_learns_the_same_with_and_without(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    quiet(configure(output_dir=str(tmp_path / "with")))
    quiet(configure(output_dir=str(tmp_path / "without"), evaluate_every=0))
    assert same(adapter(tmp_path / "with"), adapter(tmp_path / "without"))
    with_lines, without_lines = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    )
    assert [line["loss"] for line in with_lines] == [line["loss"] for line in without_lines]
    assert not (tmp_path / "without" / "evaluations").exists()


def test_the_scores_are_those_of_evaluate(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    config = configure()
    lines = quiet(config)
    output = Path(config.output_dir)
    mine = EvaluationResult.load(output / "evaluations" / "step-000004.json")
    theirs = evaluate(
        DiffusionPipeline.from_pretrained(config.model),
        {"step 4": output},
        EvaluationPrompts.from_trigger_prompts(PROMPTS, ["sks"], "cat"),
        ClipEncoder.from_pretrained(config.evaluate_encoder),
        concept_images=config.data,
        config=EvaluationConfig(num_inference_steps=2, seeds=(0, 1)),
        progress=False,
    )
    # Fused layers round differently, which can move a colour by 1 of 255.
    for name, score in vars(theirs.adapters["step 4"]).items():
        assert getattr(mine.adapters["step 4"], name).value == pytest.approx(score.value, abs=3e-3, rel=1e-2), name
    for name, score in vars(theirs.base).items():
        if score is not None:
            assert getattr(mine.base, name).value == pytest.approx(score.value, abs=3e-3, rel=1e-2), name
    assert {key: mine.settings[key] for key in ("prompts", "sampling", "encoder", "concept_images")} == {
        key: json.loads(json.dumps(theirs.settings[key]))
        for key in ("prompts", "sampling", "encoder", "concept_images")
    }
    news = [line for line in lines if line.startswith("step")]
    assert len(news) == 2
    assert f"UPS {mine.adapters['step 4'].ups.value:.3f}" in news[1]


@pytest.mark.usefixtures("every_step_learns")
def test_front_and_best(configure: Callable[..., TrainConfig]) -> None:
    config = configure(steps=6, evaluate_keep=0.5)
    quiet(config)
    output = Path(config.output_dir)
    front = front_of(output)
    assert front["format"] == "cat-rs front 1"
    rows = front["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    points = [(row["scores"]["identity"]["value"], row["scores"]["ups"]["value"]) for row in rows]
    assert [row["on_front"] for row in rows] == on_front(points)
    best = choose_best(points, Interval(-1.0, -1.0, -1.0), 0.5)
    assert best is not None
    assert [row["best"] for row in rows] == [index == best for index in range(3)]
    assert "50%" in front["rule"]
    for row in rows:
        folder = output / "evaluations" / f"step-{row['step']:06d}"
        assert folder.exists() == row["on_front"]
        if row["on_front"]:
            assert output / row["adapter"] == folder / "pytorch_lora_weights.safetensors"
    best_folder = output / "evaluations" / f"step-{rows[best]['step']:06d}"
    assert same(adapter(output / "best"), adapter(best_folder))


def test_no_best_while_no_identity_is_beyond_the_base_models(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Interval(0.5, 0.4, 1.0)
    monkeypatch.setattr("cat_rs.training.evaluation.base_identity", lambda _result: base)
    config = configure()
    news = [line for line in quiet(config) if line.startswith("step")]
    assert all(line.endswith("; base: identity 0.500 [0.400, 1.000]; no step is beyond the base yet") for line in news)
    assert not Path(config.output_dir, "best").exists()
    front = front_of(Path(config.output_dir))
    assert "beyond the base model's interval" in front["rule"]
    assert [row["best"] for row in front["checkpoints"]] == [False, False]


def test_the_last_step_is_evaluated_too(configure: Callable[..., TrainConfig]) -> None:
    config = configure(steps=3, evaluate_every=2)
    quiet(config)
    assert [row["step"] for row in front_of(Path(config.output_dir))["checkpoints"]] == [2, 3]


def test_the_best_is_measured_from_the_base_models_identity(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[tuple[float, float]], float, float]] = []

    def noting(points: list[tuple[float, float]], base: Interval, keep: float) -> int | None:
        seen.append((points, base.value, keep))
        return choose_best(points, base, keep)

    monkeypatch.setattr("cat_rs.training.evaluation.choose_best", noting)
    config = configure(evaluate_keep=0.5)
    quiet(config)
    front = front_of(Path(config.output_dir))
    scores = [row["scores"] for row in front["checkpoints"]]
    points = [(one["identity"]["value"], one["ups"]["value"]) for one in scores]
    assert seen[-1] == (points, front["base"]["identity"]["value"], 0.5)


@pytest.mark.usefixtures("every_step_learns")
def test_a_run_killed_at_any_moment_ends_with_the_same_files(
    configure: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """As a kill: no handler of the package sees it."""

    quiet(configure(output_dir=str(tmp_path / "whole"), steps=6))
    expected = files_of(tmp_path / "whole")
    assert "best/pytorch_lora_weights.safetensors" in expected
    original = CheckpointEvaluations._write_front
    for number, (step, before) in enumerate([(2, True), (2, False), (4, True), (6, False)]):

        def killing(self: CheckpointEvaluations, step: int = step, before: bool = before) -> Any:
            due = f"step-{step:06d}.json" in {path.name for path in self._folder.glob("*.json")}
            if due and before:
                raise KilledError
            outcome = original(self)
            if due:
                raise KilledError
            return outcome

        config = configure(output_dir=str(tmp_path / f"killed{number}"), steps=6)
        monkeypatch.setattr(CheckpointEvaluations, "_write_front", killing)
        with pytest.raises(KilledError):
            quiet(config)
        monkeypatch.setattr(CheckpointEvaluations, "_write_front", original)
        quiet(replace(config, resume=True))
        assert files_of(tmp_path / f"killed{number}") == expected
        assert same(adapter(tmp_path / f"killed{number}"), adapter(tmp_path / "whole"))


def test_an_interrupted_run_catches_up(
    configure: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the step of an evaluation leaves it to the continuation."""
    from cat_rs.training.interrupt import InterruptGuard

    quiet(configure(output_dir=str(tmp_path / "whole")))
    config = configure()
    enter = InterruptGuard.__enter__

    def signalled(guard: InterruptGuard) -> InterruptGuard:
        enter(guard)
        guard.received = 2
        return guard

    with monkeypatch.context() as patch:
        patch.setattr(InterruptGuard, "__enter__", signalled)
        with pytest.raises(TrainingInterrupted):
            quiet(replace(config, evaluate_every=1))
    assert not (Path(config.output_dir) / "evaluations").exists()
    lines = quiet(replace(config, evaluate_every=1, resume=True))
    assert [row["step"] for row in front_of(Path(config.output_dir))["checkpoints"]] == [1, 2, 3, 4]
    assert sum(line.startswith("step") for line in lines) == 4


def test_other_prompts_begin_no_mixed_front(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = configure(steps=2)
    quiet(config)
    other = tmp_path / "other.txt"
    other.write_text("a sks cat")
    with pytest.raises(ConfigError, match="expected the prompts of the evaluations in"):
        quiet(replace(config, steps=4, resume=True, evaluate_prompts=str(other)))
    with pytest.raises(ConfigError, match="sampling"):
        quiet(replace(config, steps=4, resume=True, evaluate_seeds=(3,)))


def test_a_later_run_may_begin_to_evaluate(configure: Callable[..., TrainConfig]) -> None:
    config = configure(steps=2, evaluate_every=0)
    quiet(config)
    quiet(replace(config, steps=4, evaluate_every=2, resume=True))
    assert [row["step"] for row in front_of(Path(config.output_dir))["checkpoints"]] == [2, 4]


def test_tensorboard_has_scores_and_pictures(configure: Callable[..., TrainConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(tensorboard=True)
    quiet(config)
    log = EventAccumulator(str(Path(config.output_dir, "tensorboard")))
    log.Reload()
    front = front_of(Path(config.output_dir))["checkpoints"]
    for name in ("ups", "identity", "kps"):
        logged = [(event.step, event.value) for event in log.Scalars(f"evaluation/{name}")]
        assert logged == [(row["step"], pytest.approx(row["scores"][name]["value"])) for row in front]
    assert [event.step for event in log.Images("evaluation/pictures")] == [2, 4]


def test_a_new_run_in_the_folder_starts_over(configure: Callable[..., TrainConfig]) -> None:
    config = configure()
    quiet(config)
    with pytest.raises(ConfigError, match="evaluations"):
        quiet(config)
    quiet(replace(config, overwrite=True, steps=2))
    assert [row["step"] for row in front_of(Path(config.output_dir))["checkpoints"]] == [2]


def test_an_encoder_that_cannot_be_loaded_costs_no_earlier_run(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = configure(steps=1, evaluate_every=0)
    quiet(config)
    absent = str(tmp_path / "absent")
    with pytest.raises(EvaluationFileError, match=r"encoder: expected a CLIP.*no such folder"):
        quiet(replace(config, evaluate_every=1, evaluate_encoder=absent, overwrite=True))
    assert adapter(Path(config.output_dir))


def test_a_full_disk_is_an_error_that_names_the_step(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EvaluationResult, "save", full)
    with pytest.raises(CheckpointError, match="evaluation of step 2"):
        quiet(configure())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate_prompts": None}, "evaluate_prompts: expected a file"),
        ({"evaluate_every": -1}, "evaluate_every: expected a number >= 0"),
        ({"evaluate_keep": 1.5}, r"evaluate_keep: expected a number in \[0, 1\]"),
        ({"evaluate_inference_steps": 0}, "evaluate_inference_steps"),
        (
            {"lr_warmup_steps": 5},
            "lr_warmup_steps: expected 0 with lr_scheduler constant.*got 5; constant_with_warmup",
        ),
    ],
)
def test_bad_settings(configure: Callable[..., TrainConfig], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**settings)
