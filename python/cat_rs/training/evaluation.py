"""Scores of the adapter during training: the front of fidelity against preservation, and the best checkpoint.

The folder `evaluations` of a run holds, for each evaluated step,

    step-000150.json   the scores, as `EvaluationResult.save` writes them; the adapter in it is called "step 150"
    step-000150/       the adapter at that step, in diffusers' format, as long as it is on the front
    pictures/          pictures of the last evaluation for the first prompts and seed: in `base` and in `adapter`, each
                       with the folders `trigger` and `no_trigger`

and `front.json`, one object:

    format       "cat-rs front 1"
    rule         how the best checkpoint is chosen, in words
    base         scores of the base model
    checkpoints  one object for each evaluated step, in order: step, scores ({name: {"value", "low", "high"} or null},
                 as in an evaluation's JSON), on_front (bool), best (bool), adapter (path from the run's folder, or
                 null)

A checkpoint is on the front if no other one has both a higher identity and a higher UPS. The best one has the highest
UPS among those whose identity has come far enough from the base model's to the run's highest, see `choose_best`; its
adapter is also in the folder `best`. There is none while no identity is beyond the base model's interval.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cat_rs.adapter_file.paths import DIFFUSERS_FILE
from cat_rs.atomic import new_folder, write_bytes
from cat_rs.evaluation import (
    EvaluationPrompts,
    EvaluationResult,
    LiveEvaluation,
    PictureGrid,
    load_encoder,
    save_pictures,
)
from cat_rs.evaluation.front import choose_best, on_front
from cat_rs.evaluation.generation import picture_files
from cat_rs.evaluation.measures import Interval, labelled_values
from cat_rs.options import ConfigError
from cat_rs.run_folder import (
    BEST_FOLDER,
    EVALUATION_FOLDER,
    FRONT_FILE,
    FRONT_FORMAT,
    PICTURES_FOLDER,
    step_name,
    step_paths,
)
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import CheckpointError
from cat_rs.training.samples import evaluation_config, restore_dtype

# What may differ between the evaluations of one front.
_INDIFFERENT = ("adapters", "versions")
_SHOWN_PROMPTS = 4
# Folders of pictures.
_MODELS = ("base", "adapter")
_KINDS = ("trigger", "no_trigger")


class PicturePair(NamedTuple):
    """A picture of the base model and one with the adapter, by their paths from the run's folder."""

    prompt: str
    base: str
    adapter: str


@dataclass(frozen=True)
class LastEvaluation:
    """What the last evaluation of a run left in its folder.

    Attributes:
        step: The step after which it was.
        result: Its scores.
        best_step: The best step of the run; None if there is none.
        pictures: The first prompts' pictures, those with the trigger first.
    """

    step: int
    result: EvaluationResult
    best_step: int | None
    pictures: list[PicturePair]


class CheckpointEvaluations:
    """Evaluates a training's adapter on rank 0, and keeps the folder described above; does nothing if not asked to.

    Raises:
        EvaluationInputError, EvaluationFileError: The file of prompts cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._output = Path(config.output_dir)
        self._folder = self._output / EVALUATION_FOLDER
        self._prompts = evaluation_prompts(config) if config.evaluate_every else None

    def load_encoder(self, device: torch.device) -> None:
        """Load the encoder, before anything is overwritten.

        Raises:
            EvaluationInputError, EvaluationFileError: It cannot be used.
        """
        if self._prompts is not None:
            self._encoder = load_encoder(self._config.evaluate_encoder, device=device)

    def open(self, pipeline: Any, save_adapter: Callable[[Path], object]) -> None:
        """Look at the evaluations that are there; the encoder is loaded.

        Args:
            pipeline: The pipeline with the adapter in its U-Net.
            save_adapter: Writes the adapter as it is now into a folder.

        Raises:
            ConfigError: The folder holds evaluations of other prompts or settings.
        """
        config = self._config
        if self._prompts is None:
            return
        restore_dtype(pipeline, config)
        self._save_adapter = save_adapter
        self._live = LiveEvaluation(
            pipeline,
            self._prompts,
            self._encoder,
            concept_images=config.data,
            config=evaluation_config(config),
        )
        for result in self._results().values():
            self._check_settings(result)

    def is_due(self, step: int) -> bool:
        """Return whether the adapter is scored after this step: every so many, and the last."""
        every = self._config.evaluate_every
        return every > 0 and step > 0 and (step % every == 0 or step == self._config.steps)

    def resume(self, step: int) -> bool:
        """Remove the evaluations after this step, which the continued training takes again.

        Returns:
            Whether the step's own evaluation is due and missing.
        """
        if self._prompts is None:
            return False
        for later, file in step_paths(self._folder, ".json").items():
            if later > step:
                file.unlink()
        self._write_front()
        return self.is_due(step) and not self._result_file(step).exists()

    def evaluate(self, step: int) -> tuple[EvaluationResult, str]:
        """Score the adapter as it is now.

        Returns:
            The result, and a line about it.

        Raises:
            CheckpointError: A file cannot be written.
        """
        result = self._live.score(f"step {step}")
        try:
            self._folder.mkdir(exist_ok=True)
            self._adapter_folder(step).mkdir(exist_ok=True)
            self._save_adapter(self._adapter_folder(step))
            self._save_pictures(result)
            result.save(self._result_file(step))
            best = self._write_front()
        except OSError as error:
            raise CheckpointError(f"cannot write the evaluation of step {step} in {self._folder}: {error}") from error
        text = ", ".join(labelled_values(result.adapters[f"step {step}"], "identity", "ups", "kps"))
        base = base_identity(result)
        beside = f"base: identity {base.value:.3f} [{base.low:.3f}, {base.high:.3f}]"
        news = "; the best so far" if best == step else "; no step is beyond the base yet" if best is None else ""
        return result, f"step {step}: {text}; {beside}{news}"

    def last(self) -> LastEvaluation | None:
        """Return the last evaluation; None if nothing is evaluated."""
        results = self._results() if self._prompts is not None else {}
        if not results:
            return None
        step, result = next(reversed(results.items()))
        rows = json.loads((self._output / FRONT_FILE).read_text(encoding="utf-8"))["checkpoints"]
        best = next((row["step"] for row in rows if row["best"]), None)
        return LastEvaluation(step, result, best, self._picture_pairs(result))

    def _save_pictures(self, result: EvaluationResult) -> None:
        """Write the first prompts' pictures in the place of the last evaluation's."""
        if result.pictures is None:
            raise ValueError("a result with pictures is needed")
        (model,) = result.pictures.adapters.values()
        with new_folder(self._folder / PICTURES_FOLDER) as folder:
            for name, grids in zip(_MODELS, (result.pictures.base, model), strict=True):
                for kind in _KINDS:
                    save_pictures(_first_pictures(getattr(grids, kind)), folder / name / kind)

    def _picture_pairs(self, result: EvaluationResult) -> list[PicturePair]:
        pairs = []
        for kind in _KINDS:
            prompts = result.settings["prompts"][kind][:_SHOWN_PROMPTS]
            folders = [self._folder / PICTURES_FOLDER / name / kind for name in _MODELS]
            seed = result.settings["sampling"]["seeds"][:1]
            files = zip(prompts, *(picture_files(folder, len(prompts), seed) for folder in folders), strict=False)
            # A run of an earlier version left none.
            pairs += [
                PicturePair(prompt, *(path.relative_to(self._output).as_posix() for path in paths))
                for prompt, *paths in files
                if all(path.exists() for path in paths)
            ]
        return pairs

    def _write_front(self) -> int | None:
        """Write front.json, keep the adapters of the front, and copy the best one; return the best one's step."""
        results = self._results()
        steps = list(results)
        self._keep_adapters(results)
        if not results:
            (self._output / FRONT_FILE).unlink(missing_ok=True)
            shutil.rmtree(self._output / BEST_FOLDER, ignore_errors=True)
            return None
        points = [_point(result, step) for step, result in results.items()]
        chosen = choose_best(points, base_identity(results[steps[0]]), self._config.evaluate_keep)
        best = None if chosen is None else steps[chosen]
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
            "format": FRONT_FORMAT,
            "rule": "the highest UPS among the checkpoints whose identity is beyond the base model's interval and has "
            f"come {self._config.evaluate_keep:.0%} of the way from the base model's to the run's highest",
            "base": json.loads(results[steps[0]].to_json())["base"],
            "checkpoints": rows,
        }
        adapter = None if best is None else self._adapter_folder(best) / DIFFUSERS_FILE
        if adapter is None:
            shutil.rmtree(self._output / BEST_FOLDER, ignore_errors=True)
        elif adapter.exists():
            (self._output / BEST_FOLDER).mkdir(exist_ok=True)
            write_bytes(self._output / BEST_FOLDER / DIFFUSERS_FILE, adapter.read_bytes())
        write_bytes(self._output / FRONT_FILE, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
        self._keep_adapters(front)
        return best

    def _check_settings(self, earlier: EvaluationResult) -> None:
        """Keep evaluations with other prompts or samplers off this front."""
        own = json.loads(json.dumps(self._live.settings))
        names = [name for name in own if name not in _INDIFFERENT and own[name] != earlier.settings.get(name)]
        if names:
            raise ConfigError(
                f"evaluate_every: expected the {', '.join(names)} of the evaluations in {self._folder}, got others; "
                "remove that folder to begin a new front"
            )

    def _results(self) -> dict[int, EvaluationResult]:
        return {step: EvaluationResult.load(file) for step, file in step_paths(self._folder, ".json").items()}

    def _result_file(self, step: int) -> Path:
        return self._folder / f"{step_name(step)}.json"

    def _adapter_folder(self, step: int) -> Path:
        return self._folder / step_name(step)

    def _adapter_path(self, step: int) -> str | None:
        file = self._adapter_folder(step) / DIFFUSERS_FILE
        return file.relative_to(self._output).as_posix() if file.exists() else None

    def _keep_adapters(self, steps: Collection[int]) -> None:
        for step, folder in step_paths(self._folder).items():
            if step not in steps:
                shutil.rmtree(folder)


def figures_of(result: EvaluationResult) -> dict[str, float]:
    """Return the adapter's figures by name, for a log."""
    (scores,) = result.adapters.values()
    return {name: figure.value for name, figure in vars(scores).items() if figure is not None}


def picture_of(result: EvaluationResult) -> NDArray[np.uint8]:
    """Return the first prompts' pictures of one seed, with the trigger above, without it below: [1, H, W, 3]."""
    if result.pictures is None:
        raise ValueError("a result with pictures is needed")
    (model,) = result.pictures.adapters.values()
    rows = []
    for grid in (model.trigger, model.no_trigger):
        shown = [grid.picture(index % len(grid.prompts), 0) for index in range(_SHOWN_PROMPTS)]
        rows.append(np.concatenate([np.asarray(picture.convert("RGB")) for picture in shown], axis=1))
    return np.concatenate(rows, axis=0)[None]


def evaluation_prompts(config: TrainConfig) -> EvaluationPrompts:
    """Read the prompts that the settings name; the settings' triggers and class word win over the file's."""
    words = config.class_words()
    class_word = config.class_word or next((word for word in words.values() if word), None)
    return EvaluationPrompts.load(
        str(config.evaluate_prompts),
        trigger_words=tuple(words),
        class_word=class_word,
        concept=config.evaluate_concept,
    )


def base_identity(result: EvaluationResult) -> Interval:
    return result.base.identity or Interval(0.0, 0.0, 0.0)


def _point(result: EvaluationResult, step: int) -> tuple[float, float]:
    scores = result.adapters[f"step {step}"]
    identity, ups = (0.0 if figure is None else figure.value for figure in (scores.identity, scores.ups))
    return identity, ups


def _first_pictures(grid: PictureGrid) -> PictureGrid:
    """Return the first prompts' pictures for the first seed."""
    prompts = grid.prompts[:_SHOWN_PROMPTS]
    images = tuple(grid.picture(index, 0) for index in range(len(prompts)))
    return PictureGrid(prompts, grid.seeds[:1], images, grid.latents[:: len(grid.seeds)][: len(prompts)])
