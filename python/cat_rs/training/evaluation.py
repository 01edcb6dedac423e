"""Scores of a run's adapter on the way: the front of fidelity against preservation, and the best checkpoint.

The folder `evaluations` of a run holds, for each evaluated step,

    step-000150.json   the scores, as `EvaluationResult.save` writes them; the adapter in it is called "step 150"
    step-000150/       the adapter at that step, in diffusers' format, as long as it is on the front

and `front.json`, one object:

    format       "cat-rs front 1"
    rule         how the best checkpoint is chosen, in words
    base         scores of the base model
    checkpoints  one object for each evaluated step, in order: step, scores ({name: {"value", "low", "high"} or null},
                 as in an evaluation's JSON), on_front (bool), best (bool), adapter (path from the run's folder, or
                 null)

A checkpoint is on the front if no other one has both a higher identity and a higher UPS. The best one is that with the
highest UPS among those whose identity has come far enough from the base model's to the run's highest, see
`choose_best`; its adapter is also in the folder `best`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.adapter_file.paths import DIFFUSERS_FILE
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import EvaluationConfig, EvaluationPrompts, EvaluationResult, LiveEvaluation, load_encoder
from cat_rs.options import ConfigError
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError

EVALUATION_FOLDER = "evaluations"
BEST_FOLDER = "best"
FRONT_FILE = "front.json"
_FORMAT = "cat-rs front 1"
_RESULT_NAME = re.compile(r"step-(\d+)\.json")
# What may differ between evaluations that stand on one front.
_INDIFFERENT = ("adapters", "versions")
_SHOWN_PROMPTS = 4


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (identity, UPS) no other point exceeds in one figure without falling behind in the other."""

    def dominates(other: tuple[float, float], point: tuple[float, float]) -> bool:
        return other != point and other[0] >= point[0] and other[1] >= point[1]

    return [not any(dominates(other, point) for other in points) for point in points]


def choose_best(points: Sequence[tuple[float, float]], base_identity: float, keep: float) -> int:
    """Choose among the points (identity, UPS) of a run.

    Args:
        points: At least one.
        base_identity: The base model's identity similarity.
        keep: Which part of the way from there to the run's highest identity a point must have come, in [0, 1].

    Returns:
        The index of the highest UPS among the points that have come so far; of equal ones the first.
    """
    highest = max(identity for identity, _ in points)
    least = base_identity + keep * (highest - base_identity)
    fit = [index for index, (identity, _) in enumerate(points) if identity >= min(least, highest)]
    return max(fit, key=lambda index: (points[index][1], -index))


def read_prompts(config: TrainConfig) -> EvaluationPrompts:
    """The prompts that the settings name; the run's triggers and class word win over the file's."""
    words = config.class_words()
    class_word = config.class_word or next((word for word in words.values() if word), None)
    return EvaluationPrompts.load(
        str(config.evaluate_prompts),
        trigger_words=tuple(words),
        class_word=class_word,
        concept=config.evaluate_concept,
    )


def evaluation_is_due(config: TrainConfig, step: int) -> bool:
    """Whether the run is evaluated after this step: every so many, and the last."""
    return config.evaluate_every > 0 and step > 0 and (step % config.evaluate_every == 0 or step == config.steps)


class CheckpointEvaluations:
    """Evaluates a run in its main process, and keeps the folder described above.

    Args:
        config: The run's settings.
        pipeline: The run's, with the adapter in its U-Net.
        prompts: What `read_prompts` returned.
        write_adapter: Writes the adapter as it is now into a folder.

    Raises:
        ConfigError: The folder holds evaluations of other prompts or settings.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        prompts: EvaluationPrompts,
        write_adapter: Callable[[Path], object],
    ) -> None:
        self._config = config
        self._output = Path(config.output_dir)
        self._folder = self._output / EVALUATION_FOLDER
        self._write_adapter = write_adapter
        self._live = LiveEvaluation(
            pipeline,
            prompts,
            load_encoder(config.evaluate_encoder, device=pipeline.unet.device),
            concept_images=config.data,
            config=EvaluationConfig(
                num_inference_steps=config.evaluate_inference_steps,
                guidance_scale=config.evaluate_guidance,
                seeds=config.evaluate_seeds,
                height=config.resolution,
                width=config.resolution,
                batch_size=config.evaluate_batch,
            ),
        )
        for step in self._steps():
            self._check_settings(step)

    def is_missing(self, step: int) -> bool:
        """Whether the evaluation of this step is due and was not done."""
        return evaluation_is_due(self._config, step) and not self._result_file(step).exists()

    def forget_after(self, step: int) -> None:
        """Remove evaluations of later steps, which the continued run takes again."""
        for later in self._steps():
            if later > step:
                self._result_file(later).unlink()
        self._write_front()

    def evaluate(self, step: int) -> tuple[EvaluationResult, str]:
        """Score the run's adapter as it is now.

        Returns:
            The result, and a line about it.

        Raises:
            CheckpointError: A file cannot be written.
        """
        result = self._live.score(f"step {step}")
        try:
            self._folder.mkdir(exist_ok=True)
            self._adapter_folder(step).mkdir(exist_ok=True)
            self._write_adapter(self._adapter_folder(step))
            result.save(self._result_file(step))
            best = self._write_front()
        except OSError as error:
            raise CheckpointError(f"cannot write the evaluation of step {step} in {self._folder}: {error}") from error
        scores = result.adapters[f"step {step}"]
        figures = (("identity", scores.identity), ("UPS", scores.ups), ("KPS", scores.kps))
        text = ", ".join(f"{name} {figure.value:.3f}" for name, figure in figures if figure is not None)
        return result, f"step {step}: {text}" + (", the best so far" if best == step else "")

    def _write_front(self) -> int | None:
        """Write front.json, keep the adapters of the front, and put the best one in its place; its step."""
        steps = self._steps()
        results = {step: EvaluationResult.load(self._result_file(step)) for step in steps}
        self._remove_adapters(set(steps))
        if not steps:
            (self._folder / FRONT_FILE).unlink(missing_ok=True)
            shutil.rmtree(self._output / BEST_FOLDER, ignore_errors=True)
            return None
        points = [_point(result, step) for step, result in results.items()]
        base = results[steps[0]].base
        base_identity = base.identity.value if base.identity is not None else 0.0
        best = steps[choose_best(points, base_identity, self._config.evaluate_keep)]
        front = {step for step, is_on in zip(steps, on_front(points), strict=True) if is_on}
        rows = [
            {
                "step": step,
                "scores": json.loads(result.to_json())["adapters"][f"step {step}"],
                "on_front": step in front,
                "best": step == best,
                "adapter": self._adapter_path(step) if step in front else None,
            }
            for step, result in results.items()
        ]
        content = {
            "format": _FORMAT,
            "rule": "the highest UPS among the checkpoints whose identity has come "
            f"{self._config.evaluate_keep:.0%} of the way from the base model's to the run's highest",
            "base": json.loads(results[steps[0]].to_json())["base"],
            "checkpoints": rows,
        }
        adapter = self._adapter_folder(best) / DIFFUSERS_FILE
        if adapter.exists():
            (self._output / BEST_FOLDER).mkdir(exist_ok=True)
            write_bytes(self._output / BEST_FOLDER / DIFFUSERS_FILE, adapter.read_bytes())
        write_bytes(self._folder / FRONT_FILE, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
        self._remove_adapters(front)
        return best

    def _check_settings(self, step: int) -> None:
        """Evaluations of other prompts or samplers do not belong on one front."""
        earlier = EvaluationResult.load(self._result_file(step)).settings
        own = json.loads(json.dumps(self._live.settings))
        names = [name for name in own if name not in _INDIFFERENT and own[name] != earlier.get(name)]
        if names:
            raise ConfigError(
                f"evaluate_every: expected the {', '.join(names)} of the evaluations in {self._folder}, got others; "
                "remove that folder to begin a new front"
            )

    def _steps(self) -> list[int]:
        names = (_RESULT_NAME.fullmatch(path.name) for path in self._folder.glob("step-*.json"))
        return sorted(int(name[1]) for name in names if name)

    def _result_file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.json"

    def _adapter_folder(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _adapter_path(self, step: int) -> str | None:
        file = self._adapter_folder(step) / DIFFUSERS_FILE
        return file.relative_to(self._output).as_posix() if file.exists() else None

    def _remove_adapters(self, keep: set[int]) -> None:
        kept = {self._adapter_folder(step).name for step in keep}
        for folder in self._folder.glob("step-*"):
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)


def figures_of(result: EvaluationResult) -> dict[str, float]:
    """The adapter's figures by name, for a log."""
    (scores,) = result.adapters.values()
    return {name: figure.value for name, figure in vars(scores).items() if figure is not None}


def picture_of(result: EvaluationResult) -> NDArray[np.uint8]:
    """The first prompts' pictures of the first seed, with the trigger above those without it: [H, W, 3]."""
    if result.pictures is None:
        raise ValueError("a result with pictures is needed")
    (model,) = result.pictures.adapters.values()
    rows = []
    for grid in (model.trigger, model.no_trigger):
        shown = [grid.picture(index % len(grid.prompts), 0) for index in range(_SHOWN_PROMPTS)]
        rows.append(np.concatenate([np.asarray(picture.convert("RGB")) for picture in shown], axis=1))
    return np.concatenate(rows, axis=0)


def _point(result: EvaluationResult, step: int) -> tuple[float, float]:
    scores = result.adapters[f"step {step}"]
    return tuple(0.0 if figure is None else figure.value for figure in (scores.identity, scores.ups))  # type: ignore[return-value]
