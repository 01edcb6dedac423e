"""Training a tiny model: what is written, resumed, refused and survived."""

from __future__ import annotations

import errno
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cat_rs
from cat_rs import TeacherBank, atomic
from cat_rs.options import ConfigError
from cat_rs.training import (
    CheckpointError,
    DatasetError,
    TrainConfig,
    TrainingError,
    TrainingInterrupted,
    train,
)
from cat_rs.training.checkpoint import load_state
from cat_rs.training.log import TrainingLog
from cat_rs.training.trainer import Trainer
from tests.cuda.simulation import NoWaiting, SimulatedGraphs, simulate_gpu

pytest.importorskip("diffusers")

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(short_run: Configure) -> Configure:
    """Makes the settings of a short run; arguments override."""
    return functools.partial(short_run, steps=4, lr=1e-2, checkpoint_every=2)


def quiet(config: TrainConfig) -> Any:
    """Train without bars and news."""
    return train(config, progress=False, report=lambda _line: None)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "pytorch_lora_weights.safetensors"))


def assert_same_weights(a: str | Path, b: str | Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def draw(model: str, adapter: str | Path | None = None, prompt: str = "a sks cat") -> np.ndarray:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, output_type="np", generator=generator).images


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call `act` in the middle of a step."""
    advance = Trainer.advance

    def advance_and_act(run: Trainer) -> torch.Tensor:
        figures = advance(run)
        if run.steps_done == step:
            act()
        return figures

    monkeypatch.setattr(Trainer, "advance", advance_and_act)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"cat_factor": 2.0, "cat_factor_end": 0.5}, [2.0, 1.5, 1.0, 0.5]),
        ({"cat_factor": 0.0, "cat_factor_end": 3.0}, [0.0, 1.0, 2.0, 3.0]),
        ({"cat_factor": 1.0, "cat_factor_end": 0.0, "cat_factor_shape": "cosine"}, [1.0, 0.75, 0.25, 0.0]),
        ({"cat_factor": 7.0, "cat_ratio": 0.1}, None),
        # The first term is zero, and the steps too few to come to this drift.
        ({"cat_factor": 7.0, "cat_drift": 1e6}, [7.0, 7.0 * 0.95, 7.0 * 0.95**2, 7.0 * 0.95**3]),
    ],
    ids=["down", "up", "cosine", "ratio", "target"],
)
def test_cat_factor_changes_as_told(
    configure: Configure, settings: dict[str, Any], factors: list[float] | None
) -> None:
    result = quiet(configure(**settings))
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    if factors is None:
        assert rows[0]["cat_factor"] == 7.0
        assert all(0 < row["cat_factor"] <= 7.0 for row in rows)
    else:
        assert [row["cat_factor"] for row in rows] == pytest.approx(factors)


def test_several_triggers_train_with_their_own_class_words(configure: Configure, concept_dir: Path) -> None:
    captions = ["a sks cat on red", "a zwx dog on green", "a sks cat beside a zwx dog"]
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(captions)]
    (concept_dir / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[str] = []
    result = train(configure(trigger=("sks=cat", "zwx=dog")), progress=False, report=seen.append)
    assert result.captions_changed == 3
    assert any("'a sks cat on red' -> 'a cat on red'" in line for line in seen)
    assert cat_rs.load_lora(result.output_dir).metadata["trigger"] == {"sks": "cat", "zwx": "dog"}


def test_more_prompts_and_noise_offset_resume_bit_for_bit(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na red car\n")
    settings: dict[str, Any] = {"preserve_prompts": str(prompts), "noise_offset": 0.1, "cat_ratio": 0.3}
    whole = quiet(configure(**settings, output_dir=str(tmp_path / "whole")))
    parts = configure(**settings, output_dir=str(tmp_path / "parts"))
    stop_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        quiet(parts)
    monkeypatch.undo()
    resumed = quiet(replace(parts, resume=True))
    assert_same_weights(whole.output_dir, resumed.output_dir)
    prompts.write_text("a dog\na blue car\n")
    with pytest.raises(ConfigError, match="expected the pictures and captions"):
        quiet(replace(parts, resume=True, steps=6))


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_alpha": 8.0, "rank": 4}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}],
    ids=["default", "alpha", "bfloat16", "gradient_checkpointing"],
)
def test_adapter_loads_and_changes_the_picture(configure: Configure, settings: dict[str, Any]) -> None:
    config = configure(**settings)
    result = quiet(config)
    assert result.captions_changed == 3
    base, adapted = draw(config.model), draw(config.model, result.output_dir)
    assert np.abs(base - adapted).max() > 1e-3
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.output_dir).values())


def test_checkpoint_loads_as_an_adapter(configure: Configure) -> None:
    config = configure()
    quiet(config)
    checkpoint = Path(config.output_dir, "checkpoints", "step-000004")
    assert_same_weights(checkpoint, config.output_dir)
    assert np.array_equal(draw(config.model, checkpoint), draw(config.model, config.output_dir))


def test_sdxl_trains_and_loads(configure: Configure, tiny_sdxl_pipeline_dir: Path) -> None:
    config = configure(model=str(tiny_sdxl_pipeline_dir), crop="random", crops=2, flip=True)
    quiet(config)
    assert np.abs(draw(config.model) - draw(config.model, config.output_dir)).max() > 1e-3


def test_adapter_file_tells_how_it_was_made(configure: Configure) -> None:
    result = quiet(configure(cat_factor=2.0, snr_gamma=5.0))
    facts = cat_rs.load_lora(result.adapter).metadata
    assert facts["trigger"] == {"sks": "cat"}
    assert (facts["cat_factor"], facts["snr_gamma"], facts["steps"], facts["rank"]) == (2.0, 5.0, 4, 2)
    assert facts["base_model"] == "pipeline"


def test_gradients_can_go_unclipped(configure: Configure, tmp_path: Path) -> None:
    quiet(configure(max_grad_norm=1e-3))
    quiet(configure(max_grad_norm=0.0, output_dir=str(tmp_path / "unclipped")))
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "adapter", tmp_path / "unclipped")


def test_metrics_have_a_line_for_each_step(configure: Configure) -> None:
    result = quiet(configure(steps=5, log_every=2, lr_scheduler="linear", checkpoint_every=0))
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert set(rows[0]) == {"step", "loss", "diffusion", "cat", "grad_norm", "cat_factor", "lr", "seconds"}
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * share for share in (1, 0.8, 0.6, 0.4, 0.2)])
    assert rows[0]["cat"] < 1e-8 * rows[0]["diffusion"]
    assert rows[-1]["cat"] > 0
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["diffusion"] + rows[-1]["cat"])


def test_logged_figures_are_means_over_the_batches_of_a_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []

    class Noting(cat_rs.CatStep):
        def __call__(self, *arguments: Any, **settings: Any) -> Any:
            measured.append(super().__call__(*arguments, **settings))
            return measured[-1]

    monkeypatch.setattr("cat_rs.training.trainer.CatStep", Noting)
    result = quiet(configure(accumulate=3, steps=2, cat_factor_end=3.0))
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    for number, row in enumerate(rows):
        of_step = measured[3 * number : 3 * number + 3]
        for name in ("loss", "diffusion", "cat", "cat_factor"):
            values = [float(getattr(one, name)) for one in of_step]
            assert row[name] == pytest.approx(sum(values) / 3), name
            assert name in ("cat", "cat_factor") or row[name] != pytest.approx(values[-1])
        # The gradient is whole with the last.
        assert row["grad_norm"] == pytest.approx(float(of_step[-1].grad_norm))


def test_steps_without_a_term_are_logged_as_such(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix", lambda bar, figures: shown.append(figures.copy()))
    result = quiet(configure(preserve_every=2, cat_factor=3.0))
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [row["cat"] is None for row in rows] == [True, False, True, False]
    assert [row["cat_factor"] for row in rows] == [3.0] * 4
    assert rows[2]["loss"] == rows[2]["diffusion"]
    assert rows[3]["loss"] == pytest.approx(rows[3]["diffusion"] + 2 * 3.0 * rows[3]["cat"])
    assert "cat" not in shown[0]
    assert [figures["cat"] for figures in shown[1:]] == [f"{rows[n]['cat']:.4g}" for n in (1, 1, 3)]
    assert [figures["loss"] for figures in shown] == [f"{row['loss']:.4g}" for row in rows]


def test_plain_lora_has_no_preservation_term(configure: Configure) -> None:
    result = quiet(configure(cat_factor=0.0, trigger=()))
    assert all(json.loads(line)["cat"] == 0 for line in result.metrics.read_text().splitlines())


def test_same_seed_gives_the_same_adapter(configure: Configure, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(1)
        quiet(configure(output_dir=str(tmp_path / name), seed=seed))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_callers_random_state_is_untouched(configure: Configure) -> None:
    before = torch.get_rng_state()
    quiet(configure())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "batch_size": 1},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"lora_dropout": 0.5, "crop": "random", "flip": True},
        {"cat_factor": 0.0},
        {"teacher_draws": 3, "crop": "random", "crops": 2, "flip": True},
        {"dtype": "float16"},
        {"preserve_every": 2, "accumulate": 2, "cat_ratio": 0.3},
        {"cat_drift": 1e-3},
        {"preservation": "dco", "cat_factor": 100.0},
        {"preservation": "l2"},
        {"preservation": "layers", "preserve": "blank"},
    ],
    ids=[
        *("default", "accumulate", "cosine", "dropout", "plain", "teacher_draws", "float16", "every-second", "target"),
        *("dco", "l2", "layers"),
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = configure(output_dir=str(tmp_path / "whole"), steps=5, **settings)
    quiet(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    with monkeypatch.context() as patch:
        # Step 3 is lost: the latest checkpoint is that of step 2.
        stop_at(patch, 3, _fail)
        with pytest.raises(ArithmeticError):
            quiet(parted)
    quiet(replace(parted, resume=True))
    assert_same_weights(whole.output_dir, parted.output_dir)
    steps = [json.loads(line)["step"] for line in Path(parted.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_model_is_called_only_to_fill_the_bank(
    configure: Configure, tiny_sdxl_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch, sdxl: bool, dtype: str
) -> None:
    from diffusers import UNet2DConditionModel

    sizes: list[int] = []
    forward = UNet2DConditionModel.forward

    @functools.wraps(forward)
    def counted(unet: Any, sample: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        sizes.append(len(sample))
        return forward(unet, sample, *arguments, **settings)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    model = {"model": str(tiny_sdxl_pipeline_dir)} if sdxl else {}
    result = quiet(configure(**model, teacher_draws=3, flip=True, dtype=dtype))
    # 3 pictures, 2 views each, 3 draws a view, 8 at once; then 4 steps at twice the batch of 2.
    assert sizes == [8, 8, 2, 4, 4, 4, 4]
    assert not (result.output_dir / "teacher_bank.safetensors").exists()
    assert cat_rs.load_lora(result.adapter).metadata["teacher_draws"] == 3
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    # Predictions are stored in bfloat16: that is how far the untrained model is from them.
    assert 0 <= rows[0]["cat"] < 1e-4 * rows[0]["diffusion"]
    assert rows[-1]["cat"] > 0


def test_resumed_run_reads_the_bank_it_left(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Path(configure().output_dir, "teacher_bank.safetensors")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, _fail)
        with pytest.raises(ArithmeticError):
            quiet(configure(teacher_draws=3))
    assert bank.exists()
    with monkeypatch.context() as patch:
        patch.setattr(TeacherBank, "build", lambda *_, **__: pytest.fail("built anew"))
        quiet(configure(teacher_draws=3, resume=True))
    assert not bank.exists()


def test_resumed_run_without_its_bank_builds_the_same(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(configure(teacher_draws=3, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, 3, _fail)
        with pytest.raises(ArithmeticError):
            quiet(configure(teacher_draws=3))
    Path(configure().output_dir, "teacher_bank.safetensors").unlink()
    quiet(configure(teacher_draws=3, resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "adapter")


def test_bank_that_cannot_be_written_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TeacherBank, "build", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*teacher_bank.safetensors: .*No space left"):
        quiet(configure(teacher_draws=3))


def test_finished_run_can_be_lengthened(configure: Configure, tmp_path: Path) -> None:
    quiet(configure(steps=2))
    quiet(configure(steps=4, resume=True))
    quiet(configure(steps=4, output_dir=str(tmp_path / "whole")))
    assert_same_weights(tmp_path / "whole", tmp_path / "adapter")


def test_resume_needs_the_same_settings_and_data(configure: Configure, concept_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume: expected a checkpoint in .*, got none"):
        quiet(configure(resume=True))
    quiet(configure())
    with pytest.raises(ConfigError, match=r"lr was 0.01, is 0.02"):
        quiet(configure(resume=True, lr=0.02))
    (concept_dir / "0.png").write_bytes((concept_dir / "1.png").read_bytes())
    with pytest.raises(ConfigError, match="expected the pictures and captions of"):
        quiet(configure(resume=True))


def test_earlier_run_is_not_overwritten_unasked(configure: Configure, tmp_path: Path) -> None:
    quiet(configure())
    with pytest.raises(ConfigError, match="output_dir: expected a folder without a run"):
        quiet(configure())
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    quiet(configure(overwrite=True, steps=1, checkpoint_every=0))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "metrics.jsonl",
        "notes.txt",
        "pytorch_lora_weights.safetensors",
        "train_config.yaml",
    ]


def test_interrupt_finishes_the_step_and_saves(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted, match="stopped after step 3; continue with --resume") as stopped:
            quiet(configure())
    assert stopped.value.signal_number == signal.SIGINT
    assert stopped.value.checkpoint.name == "step-000003"
    assert quiet(configure(resume=True)).steps == 4


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda run: advance(run) * (float("nan") if run.steps_done == 3 else 1.0))
    with pytest.raises(TrainingError, match=r"loss of step 3 is not finite.*the last checkpoint is .*step-000002"):
        quiet(configure())
    last_line = Path(configure().output_dir, "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_line)["loss"] is None


def test_full_disk_keeps_the_earlier_checkpoint(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk() -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(atomic.os, "fsync", full)

    with monkeypatch.context() as patch:
        stop_at(patch, 3, fill_disk)
        with pytest.raises(CheckpointError, match=r"No space left on device.*step-000002 is whole"):
            quiet(configure())
    monkeypatch.undo()
    quiet(configure(resume=True))
    quiet(configure(output_dir=str(tmp_path / "whole")))
    assert_same_weights(tmp_path / "whole", tmp_path / "adapter")


def test_captions_without_trigger_are_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected 'zwx' in the captions.*a sks cat on a red background"):
        quiet(configure(trigger=("zwx",)))
    assert not (tmp_path / "adapter").exists()


def test_broken_picture_is_named(configure: Configure, concept_dir: Path, tmp_path: Path) -> None:
    (concept_dir / "1.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"1.png: expected a picture"):
        quiet(configure())
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "/absent"}, TrainingError, "model: expected a diffusers model, cannot load /absent"),
        ({"target_modules": ("absent",)}, TrainingError, "target_modules: expected names of layers"),
        ({"resolution": 15}, DatasetError, "resolution: expected a multiple of 2, got 15"),
        ({"device": "abacus"}, ConfigError, "device: expected auto, cpu, cuda or cuda:N"),
    ],
    ids=["model", "target_modules", "resolution", "device"],
)
def test_unusable_setting_is_refused(
    configure: Configure, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quiet(configure(**settings))


def test_recorded_steps_train_as_steps_do(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_gpu(monkeypatch)
    quiet(configure(steps=7, lr_scheduler="linear", output_dir=str(tmp_path / "eager")))
    before = SimulatedGraphs.made
    quiet(configure(steps=7, lr_scheduler="linear", capture=True))
    assert SimulatedGraphs.made == before + 1
    assert_same_weights(tmp_path / "adapter", tmp_path / "eager")


def test_what_needs_another_device_is_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^capture: expected a GPU to record on, got device cpu"):
        quiet(configure(capture=True))
    simulate_gpu(monkeypatch)
    monkeypatch.setattr("cat_rs.step.cuda_graphs.RECORDS_CHECKPOINTING", False)
    with pytest.raises(
        ConfigError, match=r"^capture, gradient_checkpointing: expected one of them before PyTorch 2.10"
    ):
        quiet(configure(capture=True, gradient_checkpointing=True))


def test_a_gpus_figures_are_read_in_batches(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch)
    monkeypatch.setattr("cat_rs.training.loop.READ_EVERY", 3)
    waiting: list[int] = []
    flush = TrainingLog.flush
    monkeypatch.setattr(TrainingLog, "flush", lambda log: waiting.append(len(log._waiting)) or flush(log))
    result = quiet(configure(steps=8, checkpoint_every=4, teacher_draws=2))
    # Steps 3, 4 with its checkpoint, 6 and 8, with its own and as the last.
    assert waiting == [3, 1, 2, 2]
    assert [json.loads(line)["step"] for line in result.metrics.read_text().splitlines()] == list(range(1, 9))


@pytest.mark.parametrize(
    "settings", [{}, {"cat_ratio": 0.3, "snr_gamma": 5.0, "accumulate": 2}], ids=["plain", "ratio"]
)
def test_a_step_of_a_training_waits_for_nothing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    simulate_gpu(monkeypatch)
    advance = Trainer.advance

    def strictly(trainer: Trainer) -> torch.Tensor:
        with NoWaiting(strict=True):
            return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", strictly)
    quiet(configure(**settings))


def test_float16_trains_with_a_scaled_loss(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    result = quiet(configure(dtype="float16", steps=3, checkpoint_every=3))
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert rows[-1]["cat"] > 0
    state = load_state(result.output_dir / "checkpoints" / "step-000003")
    assert state["run"]["step"]["grad_scaler"]["_growth_tracker"] + result.skipped_steps == 3


def test_broken_model_file_is_named(configure: Configure, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny_pipeline_dir, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"cannot load .*broken"):
        quiet(configure(model=str(broken)))


def test_tensorboard_log_is_written(configure: Configure, tmp_path: Path) -> None:
    quiet(configure(tensorboard=True, steps=1))
    assert list((tmp_path / "adapter" / "tensorboard").iterdir())


def _fail() -> None:
    raise ArithmeticError("the machine fails here")


def test_a_second_training_in_the_folder_is_refused(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    hold = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(folder / ".training.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="expected a folder without a running training"):
            train(replace(config, overwrite=True), progress=False, report=lambda _: None)
        assert [path.name for path in folder.iterdir()] == [".training.lock"]
        other.stdin.close()
    train(config, progress=False, report=lambda _: None)
    assert not (folder / ".training.lock").exists()
