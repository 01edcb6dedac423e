"""The best checkpoint x scale of a run, written as an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cat_rs
from cat_rs.cli import main
from cat_rs.evaluation import Interval
from cat_rs.evaluation.front import choose_best
from cat_rs.options import ConfigError
from cat_rs.training import TrainConfig, rewind, train
from tests.evaluation.conftest import tiny_clip_dir  # noqa: F401

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("_one_thread")

NOTHING = Interval(-1.0, -1.0, -1.0)
SCALES = (0.5, 1.0)


@pytest.fixture
def run(
    short_run: Callable[..., TrainConfig],
    tiny_clip_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> Path:
    """The folder of a run with two evaluations, both on the front."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sks cat on a red background\na photo of a sks cat")
    config = short_run(
        steps=4,
        lr=1e-2,
        evaluate_every=2,
        evaluate_prompts=str(prompts),
        evaluate_encoder=str(tiny_clip_dir),
        evaluate_inference_steps=1,
        evaluate_keep=0.0,
    )
    train(config, progress=False, report=lambda _: None)
    return Path(config.output_dir)


def test_the_best_is_written_with_its_scale(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny model's pictures are noise: any identity counts as beyond the base model's.
    monkeypatch.setattr("cat_rs.training.rewinding.base_identity", lambda _result: NOTHING)
    found = rewind(run, tmp_path / "best.safetensors", scales=SCALES, device="cpu", progress=False)
    kept = sorted((run / "evaluations").glob("step-*/"))
    assert [(point.step, point.scale) for point in found.points] == [
        (int(folder.name.removeprefix("step-")), scale) for folder in kept if folder.is_dir() for scale in SCALES
    ]
    index = choose_best([(point.identity.value, point.ups.value) for point in found.points], NOTHING, 0.0)
    assert index is not None
    assert found.best == found.points[index]
    written = cat_rs.load_lora(tmp_path / "best.safetensors")
    assert written.metadata["rewind"] == {"step": found.best.step, "scale": found.best.scale}
    assert written.metadata["trigger"] == {"sks": "cat"}
    original = cat_rs.load_lora(run / "evaluations" / f"step-{found.best.step:06d}")
    expected = cat_rs.merge_loras([original], [found.best.scale]).lora
    for name, tensor in expected.state["unet"].items():
        torch.testing.assert_close(written.state["unet"][name], tensor)


def test_what_learned_nothing_is_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_rs.training.rewinding.base_identity", lambda _result: Interval(1.0, 1.0, 1.0))
    found = rewind(run, tmp_path / "best.safetensors", scales=(1.0,), device="cpu", progress=False)
    assert (found.best, found.file) == (None, None)
    assert not (tmp_path / "best.safetensors").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder of a training with evaluate_every"):
        rewind(tmp_path, tmp_path / "best.safetensors")


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "best.safetensors"
    arguments = ["check", str(run), "--rewind", str(output), "--scales", "0.5", "1", "--device", "cpu"]
    assert main([*arguments, "--output-dir", str(tmp_path / "check")]) == 0
    text = capsys.readouterr().out
    assert "x 0.5: identity" in text
    assert ("\nwritten: " in text) == output.exists()
    output.touch()
    assert main(arguments) == 2
    assert main(["check", str(run), str(run), "--rewind", str(output)]) == 2
