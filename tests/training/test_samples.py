"""Pictures and trackers during training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cat_rs.options import ConfigError
from cat_rs.training import CheckpointError, TrainConfig, TrainingError, train

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("_one_thread")
tracking = pytest.importorskip("accelerate.tracking")


@pytest.fixture
def configure(short_run: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """Makes the settings of a short run with pictures; arguments override."""
    return functools.partial(
        short_run,
        steps=3,
        checkpoint_every=1,
        sample_every=2,
        sample_prompts=("a sks cat", "a cat"),
        evaluate_seeds=(5,),
        evaluate_inference_steps=1,
    )


def quiet(config: TrainConfig) -> None:
    train(config, progress=False, report=lambda _line: None)


def files_of(config: TrainConfig) -> dict[str, bytes]:
    folder = Path(config.output_dir, "samples")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Tracker(tracking.GeneralTracker):
    """Notes what it is given."""

    name = "wandb"
    requires_logging_directory = main_process_only = False
    tracker = None
    images: list[tuple[int, dict[str, Any]]]

    def __init__(self, _project: str, **_settings: Any) -> None:
        super().__init__()

    def log_images(self, values: dict[str, Any], step: int | None = None, **_more: Any) -> None:
        assert step is not None
        self.images.append((step, values))


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard", "wandb"])
    monkeypatch.setattr(Tracker, "images", [], raising=False)
    return Tracker


def test_pictures_are_files_and_go_to_the_trackers(configure: Callable[..., TrainConfig], tracker: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(tensorboard=True, log_with=("wandb", "tensorboard"))
    quiet(config)
    names = ("000_seed5.png", "001_seed5.png", "metadata.jsonl")
    assert sorted(files_of(config)) == [f"step-{step:06d}/{name}" for step in (2, 3) for name in names]
    pictures = [
        np.asarray(Image.open(Path(config.output_dir, "samples", "step-000003", name)).convert("RGB"))
        for name in names[:2]
    ]
    assert not np.array_equal(*pictures)
    (step, first), (last, values) = tracker.images
    assert (step, last, first.keys(), values.keys()) == (2, 3, {"samples"}, {"samples"})
    assert np.array_equal(values["samples"], pictures)
    log = EventAccumulator(str(Path(config.output_dir, "tensorboard")))
    log.Reload()
    assert [event.step for event in log.Images("samples")] == [2, 3]


def test_a_resumed_training_draws_again_what_is_after_its_checkpoint(configure: Callable[..., TrainConfig]) -> None:
    config = configure(steps=4, keep_checkpoints=9)
    quiet(config)
    whole = files_of(config)
    folder = Path(config.output_dir)
    for step in (3, 4):
        for file in sorted((folder / "checkpoints" / f"step-{step:06d}").rglob("*")):
            file.unlink()
        (folder / "checkpoints" / f"step-{step:06d}").rmdir()
    for file in (folder / "samples" / "step-000002").iterdir():
        file.unlink()
    (folder / "samples" / "step-000002").rmdir()
    stale = folder / "samples" / "step-000003"
    stale.mkdir()
    quiet(replace(config, resume=True))
    assert files_of(config) == whole
    assert not stale.exists()


def test_a_new_training_begins_without_the_earlier_pictures(configure: Callable[..., TrainConfig]) -> None:
    config = configure()
    quiet(config)
    with pytest.raises(ConfigError, match="samples"):
        quiet(config)
    quiet(replace(config, overwrite=True, sample_every=0))
    assert not files_of(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_prompts": ()}, "sample_prompts: expected a prompt or a file of them with sample_every, got none"),
        ({"sample_every": -1}, "sample_every: expected a number >= 0, got -1"),
        ({"sample_prompts": ("prompts.txt",)}, "sample_prompts: expected a prompt or a file .* 'prompts.txt'"),
        ({"sample_prompts": ("<empty>",)}, "sample_prompts: expected at least one prompt in .*, got none"),
        ({"sample_prompts": ("<binary>",)}, "sample_prompts: cannot read .*: expected a text in UTF-8"),
        ({"log_with": ("tensorboard", "wandbb")}, r"log_with: expected trackers .*tensorboard.*, got wandbb$"),
    ],
)
def test_bad_settings_are_found_before_anything_is_written(
    configure: Callable[..., TrainConfig], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    named = {
        name: tuple(str(tmp_path / text[1:-1]) if text[0] == "<" else text for text in value)
        if isinstance(value, tuple)
        else value
        for name, value in settings.items()
    }
    with pytest.raises(ConfigError, match=message):
        quiet(configure(**named))
    assert not (tmp_path / "adapter").exists()


def test_a_tracker_that_cannot_start_is_named_and_the_earlier_run_stays(
    configure: Callable[..., TrainConfig], tracker: type[Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config := configure())
    before = files_of(config)

    def refuse(_self: Any) -> None:
        raise RuntimeError("no account")

    monkeypatch.setattr(tracker, "start", refuse)
    with pytest.raises(TrainingError, match="log_with: wandb cannot start: no account"):
        quiet(configure(log_with=("wandb",), overwrite=True))
    assert before
    assert files_of(config) == before


def test_a_full_disk_is_an_error_that_names_the_step(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cat_rs.training.samples.save_pictures", full)
    with pytest.raises(CheckpointError, match="pictures of step 2"):
        quiet(configure())
