"""Trainings with a preservation set: built once for each model, found again, and continued bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cat_rs
from cat_rs.errors import CatRsError
from cat_rs.options import ConfigError
from cat_rs.training import CheckpointError, DatasetError, TrainConfig, TrainResult, loop, train
from cat_rs.training.model import load_pipeline
from cat_rs.training.preservation_set import PreservationSet
from cat_rs.training.trainer import Trainer
from tests.cuda.simulation import NoWaiting, SimulatedGraphs, simulate_gpu

pytest.importorskip("diffusers")

Configure = Callable[..., TrainConfig]
OTHERS = ["a house", "a tree", "a car"]
DEFAULT = {"preserve": None, "preserve_every": None, "teacher_draws": None}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sets, which are small."""
    monkeypatch.setattr("cat_rs.training.preserved_pictures.CAPTION_PICTURES", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cat_rs.training.preserved_pictures.general_prompts", lambda: ["a house", "a sks", "a tree"])
    return tmp_path / "cache" / "cat-rs" / "preservation-sets"


@pytest.fixture
def configure(short_run: Configure) -> Configure:
    """Settings that preserve a set in every step, without stored draws."""
    every_step = {"preserve": "set", "preserve_every": 1, "teacher_draws": 0}

    def make(**settings: Any) -> TrainConfig:
        return short_run(**{**every_step, "steps": 4, "lr": 1e-2, "checkpoint_every": 2, **settings})

    return make


def quiet(config: TrainConfig) -> TrainResult:
    return train(config, progress=False, report=lambda _line: None)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def watch_sets(monkeypatch: pytest.MonkeyPatch) -> list[PreservationSet]:
    """The sets that trainings train with."""
    seen: list[PreservationSet] = []
    open_set = loop.open_set
    monkeypatch.setattr(loop, "open_set", lambda *given: seen.append(open_set(*given)) or seen[-1])
    return seen


def test_half_is_drawn_for_the_captions_and_half_for_general_prompts(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_sets(monkeypatch)
    lines: list[str] = []
    result = train(configure(), progress=False, report=lines.append)
    captions = {f"a cat on a {colour} background" for colour in ("red", "green", "blue")}
    # No prompt with the trigger; as many pictures of each of three captions as make five or more.
    assert set(seen[0].prompts) == captions | {"a house", "a tree"}
    assert len(seen[0]) == 3 * 2 + 2
    pictures = seen[0].draw(4000, torch.Generator().manual_seed(0)).pictures
    assert 0.47 < (pictures < 6).float().mean() < 0.53
    assert any(line.startswith("8 pictures that the base model draws are preserved;") for line in lines)
    assert cat_rs.load_lora(result.adapter).metadata["preserve"] == "set"
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert 0 <= rows[0]["cat"] < 1e-6 * rows[0]["diffusion"]
    assert rows[-1]["cat"] > 0


def test_by_default_a_set_with_stored_draws_is_preserved_in_every_fourth_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_sets(monkeypatch)
    result = quiet(configure(**DEFAULT, steps=8))
    assert (seen[0].draws, len(seen[0])) == (8, 8)
    metadata = cat_rs.load_lora(result.adapter).metadata
    assert [metadata[name] for name in DEFAULT] == ["set", 4, 8]
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["cat"] is not None] == [4, 8]
    assert rows[-1]["cat"] > 0


def test_the_share_and_the_prompts_are_those_of_the_settings(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_sets(monkeypatch)
    (tmp_path / "prompts.txt").write_text("a dog\na red car\n")
    quiet(configure(preserve_prompts=str(tmp_path / "prompts.txt"), preserve_share=0.75))
    assert set(seen[0].prompts[-2:]) == {"a dog", "a red car"}
    pictures = seen[0].draw(4000, torch.Generator().manual_seed(0)).pictures
    assert 0.22 < (pictures < 6).float().mean() < 0.28
    quiet(configure(preserve_share=1.0, overwrite=True))
    assert seen[1].prompts == ("a house", "a tree")


def test_trainings_on_a_model_share_what_does_not_depend_on_the_concept(
    configure: Configure, concept_dir: Path, cache: Path, tmp_path: Path
) -> None:
    quiet(configure())
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 2
    quiet(configure(output_dir=str(tmp_path / "again"), seed=1))
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    rows = [{"file_name": f"{number}.png", "text": f"a sks dog {number}"} for number in range(3)]
    (concept_dir / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet(configure(output_dir=str(tmp_path / "other"), class_word="dog"))
    after = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_building_a_set_changes_nothing_else(configure: Configure, tmp_path: Path) -> None:
    for name in ("built", "found"):
        quiet(configure(output_dir=str(tmp_path / name), lora_dropout=0.5))
    assert_same_weights(tmp_path / "built", tmp_path / "found")


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULT,
        {},
        {"accumulate": 2, "preserve_batch": 3, "preserve_every": 2},
        {"teacher_draws": 2, "cat_drift": 0.1},
        {"dtype": "bfloat16", "crop": "random", "preservation": "layers"},
        {"preservation": "prior"},
    ],
    ids=["default", "every step", "accumulate", "teacher_draws", "layers", "prior"],
)
def test_resumed_run_equals_uninterrupted_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], cache: Path
) -> None:
    whole = configure(output_dir=str(tmp_path / "whole"), steps=5, **settings)
    quiet(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    advance = Trainer.advance

    def advance_and_fail(trainer: Trainer) -> torch.Tensor:
        figures = advance(trainer)
        if trainer.steps_done == 3:
            raise ArithmeticError
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_and_fail)
        with pytest.raises(ArithmeticError):
            quiet(parted)
    # What is lost is built anew.
    for file in cache.iterdir():
        file.unlink()
    quiet(replace(parted, resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "parted")


def test_a_step_with_stored_draws_does_without_the_base_model(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(configure(teacher_draws=2))
    sizes: list[int] = []
    advance = Trainer.advance

    def noting(trainer: Trainer) -> torch.Tensor:
        hook = trainer.unet.conv_in.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        figures = advance(trainer)
        hook.remove()
        return figures

    monkeypatch.setattr(Trainer, "advance", noting)
    quiet(configure(teacher_draws=2, preserve_batch=3, steps=2, overwrite=True))
    assert sizes == [5, 5]
    quiet(configure(preserve_batch=3, steps=2, overwrite=True))
    assert sizes[2:] == [3, 5] * 2


@pytest.mark.parametrize("settings", [{}, {"teacher_draws": 2, "preserve_batch": 3}], ids=["fresh", "stored"])
def test_a_step_with_a_set_waits_for_no_gpu(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    simulate_gpu(monkeypatch)
    advance = Trainer.advance

    def strictly(trainer: Trainer) -> torch.Tensor:
        with NoWaiting(strict=True):
            return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", strictly)
    quiet(configure(**settings))


@pytest.mark.parametrize("settings", [{}, {"teacher_draws": 2, "preserve_batch": 3}], ids=["fresh", "stored"])
def test_a_captured_step_with_a_set_is_the_eager_one(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    simulate_gpu(monkeypatch)
    recorded = SimulatedGraphs.made
    for name in ("eager", "captured"):
        quiet(configure(output_dir=str(tmp_path / name), steps=7, capture=name == "captured", **settings))
    assert SimulatedGraphs.made == recorded + 1
    assert_same_weights(tmp_path / "eager", tmp_path / "captured")


@pytest.mark.parametrize(("preservation", "stored"), [("cat", True), ("prior", False), ("layers", False)])
def test_only_cats_term_takes_stored_draws(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preservation: str, stored: bool
) -> None:
    pipeline = load_pipeline(configure().model, torch.float32, torch.device("cpu"))
    PreservationSet.build(pipeline, OTHERS, tmp_path / "set", draws=3, progress=False)
    seen, step = [], Trainer._advance_batch

    def watched(trainer: Trainer) -> torch.Tensor:
        call = trainer._step

        def noting(*given: Any, preserve: Any) -> Any:
            seen.append([getattr(preserve, name) is not None for name in ("noise", "timesteps", "base_pred")])
            return call(*given, preserve=preserve)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_step", noting)
            patch.setattr(noting, "preserves_next", True, raising=False)
            return step(trainer)

    monkeypatch.setattr(Trainer, "_advance_batch", watched)
    result = quiet(configure(preservation=preservation, preserve_set=(str(tmp_path / "set"),), checkpoint_every=0))
    assert seen == [[stored] * 3] * 4
    assert cat_rs.load_lora(result.adapter).metadata["teacher_draws"] == 3 * stored


def test_of_many_captions_some_are_drawn(
    configure: Configure, concept_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cat_rs.training.preserved_pictures.MOST_CAPTIONS", 2)
    seen = watch_sets(monkeypatch)
    quiet(configure())
    of_captions = [prompt for prompt in dict.fromkeys(seen[0].prompts) if prompt.startswith("a cat")]
    assert of_captions == ["a cat on a red background", "a cat on a blue background"]


def test_a_training_too_short_for_the_term_says_so(configure: Configure) -> None:
    lines: list[str] = []
    train(configure(**DEFAULT, steps=3), progress=False, report=lines.append)
    assert "no step has the preservation term, which is in one of 4 steps: steps is 3" in lines
    lines.clear()
    train(configure(**DEFAULT, steps=4, overwrite=True), progress=False, report=lines.append)
    assert not any("no step" in line for line in lines)


def write_set(config: TrainConfig, path: Path, prompts: list[str]) -> Path:
    pipeline = load_pipeline(config.model, torch.float32, torch.device("cpu"))
    PreservationSet.build(pipeline, prompts, path, progress=False)
    return path


def test_given_sets_have_equal_shares(
    configure: Configure, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_sets(monkeypatch)
    files = [write_set(configure(), tmp_path / f"{len(prompts)}", prompts) for prompts in (["a dog"], OTHERS)]
    quiet(configure(preserve_set=tuple(map(str, files))))
    assert seen[0].prompts == ("a dog", *OTHERS)
    pictures = seen[0].draw(4000, torch.Generator().manual_seed(0)).pictures
    assert 0.47 < (pictures == 0).float().mean() < 0.53
    assert not cache.exists()


def test_another_set_does_not_continue_a_training(configure: Configure, tmp_path: Path) -> None:
    path = write_set(configure(), tmp_path / "set", ["a dog"])
    quiet(configure(preserve_set=(str(path),)))
    write_set(configure(), path, ["a house"])
    with pytest.raises(ConfigError, match="resume: expected the preservation set of the checkpoint, got another"):
        quiet(configure(preserve_set=(str(path),), resume=True, steps=6))


def test_sets_that_cannot_be_used_are_refused(
    configure: Configure, tiny_sdxl_pipeline_dir: Path, tmp_path: Path
) -> None:
    other = write_set(configure(model=str(tiny_sdxl_pipeline_dir)), tmp_path / "other", ["a dog"])
    with pytest.raises(CatRsError, match=r"`path`, .*other, must be of this base model"):
        quiet(configure(preserve_set=(str(other),)))
    trigger = write_set(configure(), tmp_path / "trigger", ["a dog", "a SKS house"])
    with pytest.raises(DatasetError, match="preserve_set: expected prompts without a trigger, got 'a SKS house'"):
        quiet(configure(preserve_set=(str(trigger),)))
    with pytest.raises(ConfigError, match=r"preserve_set: cannot read .*absent: "):
        quiet(configure(preserve_set=(str(tmp_path / "absent"),)))
    one = write_set(configure(), tmp_path / "one", ["a dog"])
    with pytest.raises(ConfigError, match=r"preserve_set: expected pictures of 32x32 pixels in .*one, got \d+x\d+"):
        quiet(configure(preserve_set=(str(one),), resolution=32))
    assert not Path(configure().output_dir).exists()


def test_a_cache_that_cannot_be_made_is_named(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"preserve: expected a cache that can be written, got .*XDG_CACHE_HOME"):
        quiet(configure())


def test_the_output_folder_is_claimed_before_anything_is_drawn(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draws(config: TrainConfig, *_given: Any) -> None:
        assert (Path(config.output_dir) / ".training.lock").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "open_set", draws)
    with pytest.raises(KeyboardInterrupt):
        quiet(configure())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write to the output folder .*file/run"):
        quiet(configure(output_dir=str(tmp_path / "file" / "run")))


def test_what_an_interrupted_drawing_keeps_is_said(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: Any, **_settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreservationSet, "build", interrupted)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(configure(), progress=False, report=lines.append)
    assert "the pictures drawn so far are kept" in lines[-1]
    with pytest.raises(ConfigError, match=r"resume: expected a checkpoint .* start the training without resume"):
        quiet(configure(resume=True))


def test_sdxl_trains_with_a_set(configure: Configure, tiny_sdxl_pipeline_dir: Path) -> None:
    result = quiet(configure(model=str(tiny_sdxl_pipeline_dir), teacher_draws=1))
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert rows[-1]["cat"] > 0
