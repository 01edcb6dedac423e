"""Every option of a training changes what it should, and nothing that it should not."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from safetensors.torch import load_file

import cat_rs
from cat_rs.cli import main
from cat_rs.errors import CatRsError
from cat_rs.evaluation import EvaluationConfig, EvaluationResult, Interval, Scores
from cat_rs.step.teacher_bank import TeacherBank
from cat_rs.training import TrainConfig, encoded_dataset, evaluation, loop, preserved_pictures, trainer
from cat_rs.training.encoded_dataset import EncodedDataset
from cat_rs.training.log import TrainingLog
from tests.conftest import draw_picture
from tests.option_cases import Case, Seen, check_case, check_table

pytest.importorskip("diffusers")

# What all runs have; <names> are paths that `places` makes.
BASIS: dict[str, Any] = {
    "model": "<model>",
    "data": "<data>",
    "output_dir": "<output>",
    "trigger": ("sks",),
    "class_word": "cat",
    "preserve": "captions",
    "rank": 2,
    "steps": 2,
    "batch_size": 2,
    "lr": 1e-2,
    "checkpoint_every": 0,
    "tensorboard": False,
    "device": "cpu",
}
EVALUATED = {"evaluate_every": 1, "evaluate_prompts": "<prompts>", "evaluate_encoder": "encoder"}
SAMPLED = {"sample_every": 1, "sample_prompts": ("a sks cat",), "evaluate_inference_steps": 1}
CONTINUED = {"output_dir": "<earlier>"}
EARLIER = "output_dir: expected a folder without a run"
COLOURS = ("red", "green", "blue")


def sampling(**changed: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"num_inference_steps": 16, "guidance_scale": 3.0, "seeds": (0, 1), **changed})


OPTIONS: dict[str, Case] = {
    "model": Case("<sdxl>", {"pipeline": "StableDiffusionXLPipeline", "metadata.base_model": "sdxl"}),
    "data": Case("<two>", {"pictures": 2}),
    "output_dir": Case("<other>", {"folder": "other"}),
    "caption": Case(
        "a {trigger} {class_word} called {name}",
        {"captions": ("a sks cat called 0", "a sks cat called 1")},
        {"data": "<bare>"},
    ),
    "trigger": Case(
        ("sks", "zwx=dog"),
        {"captions_no_trigger": ("a cat beside a dog",) * 2, "metadata.trigger": {"sks": "cat", "zwx": "dog"}},
        {"data": "<bare>", "caption": "a sks beside a zwx"},
    ),
    "class_word": Case(
        "dog",
        {"captions_no_trigger": ("a dog outdoors",) * 2, "metadata.trigger": {"sks": "dog"}},
        {"data": "<bare>", "caption": "a sks outdoors"},
    ),
    "cat_factor": Case(2.5, {"step.cat_factor": 2.5, "row.cat_factor": [2.5, 2.5], "metadata.cat_factor": 2.5}),
    "cat_factor_end": Case(0.5, {"row.cat_factor": [1.0, 0.5], "metadata.cat_factor_end": 0.5}),
    "cat_factor_shape": Case(
        "cosine", {"row.cat_factor": [1.0, 0.75, 0.25, 0.0]}, {"cat_factor_end": 0.0, "steps": 4}
    ),
    "cat_ratio": Case(0.1, {"step.cat_ratio": (0.1, 1e6), "metadata.cat_ratio": 0.1}, {"cat_factor": 1e6, "steps": 3}),
    "cat_drift": Case(
        0.1, {"step.cat_drift": (0.1, 2.0, 0.2, 200.0), "metadata.cat_drift": 0.1}, {"cat_factor": 2.0, "steps": 3}
    ),
    "preserve_every": Case(2, {"step.preserve_every": 2, "metadata.preserve_every": 2, "row.with_cat": [2]}),
    "preservation": Case("l2", {"step.preservation": "l2", "metadata.preservation": "l2"}),
    "preserve": Case(
        "set",
        {"preserved.latents": [(2, 4, 8, 8)], "preserved.draws": 8, "metadata.preserve": "set", "row.with_cat": [4]},
        {"steps": 4},
    ),
    "preserve_set": Case(("<set>",), {"set": {"a dog", "a red car"}}, {"preserve": "set", "steps": 4}),
    "preserve_batch": Case(
        3, {"preserved.latents": [(3, 4, 8, 8)] * 2}, {"preserve": "set", "preserve_every": 1, "teacher_draws": 0}
    ),
    "preserve_prompts": Case("<preserve>", {"preserved": ("a dog", "a red car")}),
    "preserve_share": Case(1.0, {"preserve_share": 1.0}, {"preserve_prompts": "<preserve>"}),
    "snr_gamma": Case(0.05, {"step.snr_gamma": 0.05, "metadata.snr_gamma": 0.05}),
    "teacher_draws": Case(3, {"bank": (3, 3), "metadata.teacher_draws": 3}),
    "rank": Case(3, {"lora.r": 3, "lora.lora_alpha": 3, "metadata.rank": 3}),
    "lora_alpha": Case(8.0, {"lora.lora_alpha": 8.0, "file.alpha": 8.0}),
    "lora_dropout": Case(0.5, {"lora.lora_dropout": 0.5}),
    "target_modules": Case(
        ("to_q", "to_v"), {"lora.target_modules": {"to_q", "to_v"}, "file.layers": {"to_q", "to_v"}}
    ),
    "steps": Case(3, {"row.step": [1, 2, 3], "metadata.steps": 3}),
    "batch_size": Case(3, {"latents": [(3, 4, 8, 8)] * 2, "metadata.batch_size": 3}),
    "accumulate": Case(2, {"step.accumulate": 2, "latents": [(2, 4, 8, 8)] * 4, "metadata.batch_size": 4}),
    "lr": Case(5e-3, {"optimizer.lr": 5e-3, "row.lr": [5e-3] * 2, "metadata.lr": 5e-3}),
    "lr_scheduler": Case("linear", {"row.lr": [1e-2, 5e-3]}),
    "lr_warmup_steps": Case(2, {"row.lr": [0.0, 5e-3]}, {"lr_scheduler": "constant_with_warmup"}),
    "weight_decay": Case(0.5, {"optimizer.weight_decay": 0.5}),
    "beta1": Case(0.8, {"optimizer.betas": (0.8, 0.999)}),
    "beta2": Case(0.95, {"optimizer.betas": (0.9, 0.95)}),
    "eps": Case(1e-3, {"optimizer.eps": 1e-3}),
    "max_grad_norm": Case(1e-3, {"optimizer.max_grad_norm": 1e-3}),
    "seed": Case(7, {"metadata.seed": 7, "step.seed": 7}),
    "resolution": Case(32, {"sizes.0": (24, 20, 3, 0, 32, 32), "latents": [(2, 4, 16, 16)] * 2}),
    "noise_offset": Case(0.1, {"step.noise_offset": 0.1}),
    "crop": Case("random", {"views": [4, 4, 4]}),
    "crops": Case(2, {"views": [2, 2, 2]}, {"crop": "random"}),
    "flip": Case(True, {"views": [2, 2, 2]}),
    "evaluate_every": Case(2, {"evaluated": [2]}, EVALUATED),
    "evaluate_prompts": Case("<more prompts>", {"evaluation.prompts": ("a sks cat outdoors",)}, EVALUATED),
    "evaluate_concept": Case(
        "tabby", {"evaluation.prompts": ("a sks cat",)}, {**EVALUATED, "evaluate_prompts": "<concepts>"}
    ),
    "evaluate_encoder": Case("another", {"evaluation.encoder": "another"}, EVALUATED),
    "evaluate_seeds": Case((3,), {"evaluation.config": sampling(seeds=(3,))}, EVALUATED),
    "evaluate_inference_steps": Case(5, {"evaluation.config": sampling(num_inference_steps=5)}, EVALUATED),
    "evaluate_guidance": Case(1.5, {"evaluation.config": sampling(guidance_scale=1.5)}, EVALUATED),
    "evaluate_batch": Case(3, {"evaluation.config": sampling(batch_size=3)}, EVALUATED),
    "evaluate_keep": Case(0.0, {"best": 1}, EVALUATED),
    "sample_every": Case(2, {"samples": {"step-000002": ["a sks cat"] * 2}}, SAMPLED),
    "sample_prompts": Case(
        ("<preserve>", "a sks cat"),
        {"samples": {"step-000002": [text for text in ("a dog", "a red car", "a sks cat") for _seed in (0, 1)]}},
        {**SAMPLED, "sample_every": 2},
    ),
    "checkpoint_every": Case(1, {"checkpoints": ["step-000001", "step-000002"]}),
    "keep_checkpoints": Case(1, {"checkpoints": ["step-000002"]}, {"checkpoint_every": 1}),
    "resume": Case(True, {"row.step": [1, 2], "latents": [(2, 4, 8, 8)]}, CONTINUED),
    "overwrite": Case(True, {"row.step": [1, 2], "latents": [(2, 4, 8, 8)] * 2}, CONTINUED),
    "log_every": Case(2, {"flushed": 1}),
    "tensorboard": Case(
        False,
        {"files": ["README.md", "metrics.jsonl", "pytorch_lora_weights.safetensors", "train_config.yaml"]},
        {"tensorboard": True},
    ),
    "log_with": Case(("wandb",), {"tracked": [1, 2, 2]}),
    "device": Case("meta", {"error": "device: expected a device of this machine, got 'meta'"}),
    "dtype": Case("bfloat16", {"dtypes": (torch.bfloat16, torch.bfloat16)}),
    "gradient_checkpointing": Case(True, {"gradient_checkpointing": True}),
    # That it reaches the step, test_loop shows with a simulated GPU.
    "capture": Case(True, {"error": "capture: expected a GPU to record on, got device cpu"}),
}

# Options that say what is written and shown: the adapter is the same bit for bit.
LEARN_NOTHING = {
    "output_dir",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
    "log_with",
    "sample_every",
    "sample_prompts",
    "gradient_checkpointing",
} | {option.name for option in dataclasses.fields(TrainConfig) if option.name.startswith("evaluate_")}


@pytest.fixture
def places(
    tiny_pipeline_dir: Path,
    tiny_sdxl_pipeline_dir: Path,
    concept_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """The paths that values name as <name>."""
    for folder in ("two", "bare"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            draw_picture(tmp_path / folder / f"{number}.png", COLOURS[number])
    for number in range(2):
        (tmp_path / "two" / f"{number}.txt").write_text("a sks cat")
    texts = {
        "preserve": "a dog\na red car\n",
        "prompts": "a sks cat\n",
        "more prompts": "a sks cat outdoors\n",
        "concepts.json": json.dumps(
            {
                "concepts": [
                    {"name": name, "trigger_prompts": [f"a sks {word}"]}
                    for name, word in (("tabby", "cat"), ("pug", "dog"))
                ]
            }
        ),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    outside = {"model": tiny_pipeline_dir, "sdxl": tiny_sdxl_pipeline_dir, "data": concept_dir}
    inside = {
        name.removesuffix(".json"): tmp_path / name
        for name in (*texts, "two", "bare", "output", "other", "earlier", "set")
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {f"<{name}>": str(path) for name, path in (outside | inside).items()}


class Spy:
    """Runs trainings, and notes what each part of them was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def run(self, config: TrainConfig) -> Seen:
        seen: Seen = {"latents": [], "flushed": 0, "evaluated": []}
        with self._watched(seen):
            try:
                result = loop.train(config, progress=False, report=lambda _line: None)
            except CatRsError as error:
                return {"error": str(error)}
        return seen | _written(result)

    @contextlib.contextmanager
    def _watched(self, seen: Seen) -> Iterator[None]:
        with self._monkeypatch.context() as patch:
            patch.setattr(trainer, "CatStep", _step_class(seen))
            patch.setattr(encoded_dataset, "EncodedDataset", _dataset_class(seen))
            patch.setattr(evaluation, "LiveEvaluation", _live_class(seen))
            patch.setattr(evaluation, "load_encoder", lambda path, device: path)
            patch.setattr(loop, "picture_of", lambda result: None)
            # Its result has no pictures.
            for name in ("_save_pictures", "last"):
                patch.setattr(evaluation.CheckpointEvaluations, name, lambda *_: None)
            patch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", _tracker_class(seen))
            patch.setattr(tracking, "_available_trackers", ["tensorboard", "wandb"])
            _watch(patch, loop, "load_pipeline", lambda pipeline: seen.update(pipeline=type(pipeline).__name__))
            patch.setattr(preserved_pictures, "general_prompts", lambda: ["a house"])
            _watch(patch, loop, "open_set", lambda preserved: seen.update(_of_set(preserved)))
            _watch(patch, TeacherBank, "build", lambda bank: seen.update(bank=(bank.pictures, bank.draws)))
            _watch(patch, TrainingLog, "flush", lambda _: seen.update(flushed=seen["flushed"] + 1))
            yield


def _watch(patch: pytest.MonkeyPatch, owner: Any, name: str, look: Callable[[Any], Any]) -> None:
    function = getattr(owner, name)

    def watched(*arguments: Any, **settings: Any) -> Any:
        result = function(*arguments, **settings)
        look(result)
        return result

    patch.setattr(owner, name, watched)


def _of_set(preserved: cat_rs.PreservationSet | None) -> Seen:
    return {} if preserved is None else {"set": set(preserved.prompts), "preserved.draws": preserved.draws}


def _step_class(seen: Seen) -> type[cat_rs.CatStep]:
    class SpyStep(cat_rs.CatStep):
        def __init__(self, model: Any, scheduler: Any, **settings: Any) -> None:
            super().__init__(model, scheduler, **settings)
            factor = settings["cat_factor"]
            ratio = (factor.ratio, factor.maximum) if isinstance(factor, cat_rs.CatFactorRatio) else None
            seen.update({f"step.{name}": value for name, value in settings.items()}, **{"step.cat_ratio": ratio})
            if isinstance(factor, cat_rs.CatFactorTarget):
                seen["step.cat_drift"] = factor.drift, factor.start, factor.minimum, factor.maximum
            seen["step.cat_factor"] = None if callable(factor) else factor
            seen["step.seed"] = settings["generator"].initial_seed()
            group = self.optimizer.param_groups[0]
            seen.update({f"optimizer.{name}": group[name] for name in ("betas", "eps", "weight_decay")})
            seen["optimizer.lr"] = settings["lr"]
            seen["optimizer.max_grad_norm"] = self.optimizer.max_grad_norm
            (lora,) = model.peft_config.values()
            names = ("r", "lora_alpha", "lora_dropout", "target_modules")
            seen.update({f"lora.{name}": getattr(lora, name) for name in names})
            seen["gradient_checkpointing"] = model.is_gradient_checkpointing

        def __call__(self, latents: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
            samples = settings.get("preserve")
            if samples is not None:
                seen.setdefault("preserved.latents", []).append(tuple(samples.latents.shape))
            seen["latents"].append(tuple(latents.shape))
            seen["dtypes"] = (latents.dtype, self.model.dtype)
            return super().__call__(latents, *arguments, **settings)

    return SpyStep


def _dataset_class(seen: Seen) -> type[EncodedDataset]:
    class SpyDataset(EncodedDataset):
        def __init__(self, views: Any, captions: Any, embeddings: Any, preserve_share: float) -> None:
            super().__init__(views, captions, embeddings, preserve_share)
            seen["pictures"], seen["views"] = len(views), [len(of_picture) for of_picture in views]
            seen["sizes.0"] = tuple(views[0][0].sizes.tolist())
            seen["captions"], seen["captions_no_trigger"] = captions.with_trigger, captions.without_trigger
            seen["preserved"], seen["preserve_share"] = captions.preserved, preserve_share

    return SpyDataset


def _live_class(seen: Seen) -> type:
    class FakeLive:
        """The later, the more like the concept, and the less like the base model."""

        def __init__(self, pipeline: Any, prompts: Any, encoder: Any, *, concept_images: str, config: Any) -> None:
            seen["evaluation.prompts"], seen["evaluation.encoder"] = prompts.trigger, encoder
            seen["evaluation.config"] = config
            self.settings: dict[str, Any] = {}

        def score(self, name: str) -> EvaluationResult:
            step = int(name.removeprefix("step "))
            seen["evaluated"].append(step)
            identity, ups = (Interval(value, value, value) for value in (0.4 + step / 10, 1.0 - step / 10))
            base = Scores(identity=Interval(0.4, 0.4, 0.4))
            return EvaluationResult({}, base, None, {name: Scores(identity=identity, ups=ups)}, ())

    return FakeLive


def _tracker_class(seen: Seen) -> type:
    class FakeTracker(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only, tracker = "wandb", False, False, None

        def __init__(self, project: str, **settings: Any) -> None:
            super().__init__()
            assert (project, settings["name"]) == ("cat-rs", Path(settings["dir"]).name)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert all(value is None or isinstance(value, str | int | float) for value in values.values()), values
            assert values["target_modules"] == "to_q to_k to_v to_out.0"

        def log(self, values: dict[str, float], step: int | None = None, **_more: Any) -> None:
            assert "train/loss" in values
            seen.setdefault("tracked", []).append(step)

        def finish(self) -> None:
            seen["tracked"].append(seen["tracked"][-1])

    return FakeTracker


def _written(result: Any) -> Seen:
    """What a training left on the disk."""
    folder = result.output_dir
    lora = cat_rs.load_lora(result.adapter)
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    seen: Seen = {f"metadata.{name}": value for name, value in lora.metadata.items()}
    for name in ("step", "lr", "cat_factor"):
        seen[f"row.{name}"] = pytest.approx([row[name] for row in rows])
    seen["row.with_cat"] = [row["step"] for row in rows if row["cat"] is not None]
    tensors = load_file(result.adapter)
    content = [tensor.numpy().tobytes() for _, tensor in sorted(tensors.items())]
    seen["adapter"] = hashlib.sha256(b"".join(content)).hexdigest()
    seen["folder"], seen["files"] = folder.name, sorted(path.name for path in folder.iterdir())
    seen["checkpoints"] = sorted(path.name for path in folder.glob("checkpoints/*"))
    seen["samples"] = {
        part.name: [json.loads(line)["text"] for line in (part / "metadata.jsonl").read_text().splitlines()]
        for part in sorted(folder.glob("samples/*"))
    }
    (alphas,) = lora.alphas.values()
    (seen["file.alpha"],) = set(alphas.values())
    seen["file.layers"] = {name.removesuffix(".0").rpartition(".")[2] for name in alphas}
    front = folder / "evaluations" / "front.json"
    if front.exists():
        seen["best"] = next(row["step"] for row in json.loads(front.read_text())["checkpoints"] if row["best"])
    return seen


@pytest.fixture
def run(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Seen]:
    """Trains with these options beside those of all runs."""

    def named(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(named, value))
        return places.get(value, value) if isinstance(value, str) else value

    def configured(options: dict[str, Any]) -> TrainConfig:
        return TrainConfig(**{name: named(value) for name, value in options.items()})

    def train(options: dict[str, Any]) -> Seen:
        options = BASIS | options
        if options["output_dir"] == "<earlier>" and not Path(places["<earlier>"]).exists():
            Spy(monkeypatch).run(configured(BASIS | {"output_dir": "<earlier>", "steps": 1, "checkpoint_every": 1}))
        if "<set>" in options.get("preserve_set", ()):
            arguments = ["--model", places["<model>"], "--output", places["<set>"], "--prompts", places["<preserve>"]]
            assert main(["preserve", "build", *arguments, "--inference-steps", "1", "--device", "cpu"]) == 0
        return Spy(monkeypatch).run(configured(options))

    return train


def test_every_option_has_its_case() -> None:
    check_table(TrainConfig, OPTIONS, BASIS)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_it_should(
    name: str, run: Callable[[dict[str, Any]], Seen], places: dict[str, str]
) -> None:
    case = OPTIONS[name]
    before = run(case.given)
    places["<output>"] += " with the option"
    after = run({**case.given, name: case.value})
    check_case(name, case, before, after)
    if "adapter" in before and "adapter" in after:
        assert (before["adapter"] == after["adapter"]) == (name in LEARN_NOTHING)
