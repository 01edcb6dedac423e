"""After a run: the best of its checkpoints at the best scale, as one adapter file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cat_rs.adapter_file import load_lora, merge_loras, save_lora
from cat_rs.evaluation import EvaluationResult, Interval, ScaledAdapter, evaluate, load_encoder
from cat_rs.evaluation.front import choose_best
from cat_rs.options import ConfigError
from cat_rs.run_folder import CONFIG_FILE, FRONT_FILE
from cat_rs.training.config import TrainConfig
from cat_rs.training.evaluation import base_identity, evaluation_prompts
from cat_rs.training.model import choose_device, load_pipeline
from cat_rs.training.samples import evaluation_config


@dataclass(frozen=True)
class RewindPoint:
    """A checkpoint at one scale.

    Attributes:
        step: The step after which it was kept.
        scale: What its update is multiplied by.
        identity: How well the concept is drawn.
        ups: What was kept of the base model.
    """

    step: int
    scale: float
    identity: Interval
    ups: Interval


@dataclass(frozen=True)
class Rewind:
    """What `rewind` found.

    Attributes:
        points: Every checkpoint at every scale.
        best: The best of them; None if no identity is beyond the base model's interval.
        file: The adapter that was written; None if there is no best one.
    """

    points: tuple[RewindPoint, ...]
    best: RewindPoint | None
    file: Path | None


def rewind(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    scales: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    device: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Rewind:
    """Choose among the checkpoints of a run at several scales, by the rule of ``evaluate_every``, and write the best.

    The checkpoints are those that the run kept: the front of its evaluations. They are scored on the run's own
    prompts, pictures and encoder.

    Args:
        run: The folder of a training with ``evaluate_every``.
        output: The file to write, or a folder: the checkpoint's adapter with the scale folded in.
        scales: What a checkpoint's update is multiplied by.
        device: Where pictures are drawn: cpu, cuda, cuda:N; auto takes a GPU if there is one.
        cache: A folder that keeps pictures and embeddings, as `cat_rs.evaluation.evaluate` takes it.
        progress: Whether to show a progress bar that counts pictures.

    Raises:
        ConfigError: The folder has no evaluations, or a setting cannot be used.
        EvaluationInputError, EvaluationFileError: The prompts, pictures or adapters cannot be used.
        TrainingError: The model cannot be loaded.
    """
    folder = Path(run)
    checkpoints = _checkpoints(folder)
    config = TrainConfig.load(folder / CONFIG_FILE)
    chosen = choose_device(device)
    points = {
        f"step {step} x {scale:g}": (step, ScaledAdapter(path, scale))
        for step, path in checkpoints.items()
        for scale in scales
    }
    result = evaluate(
        load_pipeline(config.model, getattr(torch, config.dtype), chosen),
        {name: adapter for name, (_, adapter) in points.items()},
        evaluation_prompts(config),
        load_encoder(config.evaluate_encoder, device=chosen),
        concept_images=config.data,
        config=evaluation_config(config),
        cache=cache,
        progress=progress,
    )
    scored = tuple(_point(result, name, step, adapter.scale) for name, (step, adapter) in points.items())
    figures = [(point.identity.value, point.ups.value) for point in scored]
    index = choose_best(figures, base_identity(result), config.evaluate_keep)
    if index is None:
        return Rewind(scored, None, None)
    best = scored[index]
    adapter = load_lora(checkpoints[best.step])
    metadata = {**adapter.metadata, "rewind": {"step": best.step, "scale": best.scale}}
    file = save_lora(output, merge_loras([adapter], [best.scale]).lora, metadata=metadata)
    return Rewind(scored, best, file)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return the adapters of the run's front by step."""
    file = folder / FRONT_FILE
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["checkpoints"]
        found = {int(row["step"]): folder / row["adapter"] for row in rows if row["adapter"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"rewind: expected the folder of a training with evaluate_every, got {folder}: {error!r}"
        ) from error
    if not found:
        raise ConfigError(f"rewind: expected checkpoints that were kept in {file}, got none")
    return found


def _point(result: EvaluationResult, name: str, step: int, scale: float) -> RewindPoint:
    scores = result.adapters[name]
    assert scores.identity is not None
    assert scores.ups is not None
    return RewindPoint(step, scale, scores.identity, scores.ups)
