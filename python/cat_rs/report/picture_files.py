"""The pictures of an evaluation as files, and back.

A folder of pictures holds

    concept/NAME.png                    the concept's pictures, scaled down to 512 pixels
    MODEL/trigger/*.png                 one picture for each prompt and seed, with metadata.jsonl, as
    MODEL/no_trigger/*.png              `cat_rs.evaluation.save_pictures` writes them

MODEL is "base" or an adapter's name, in which what a file name cannot hold is percent-encoded. Those of a check are in
adapters/NAME/MODEL/KIND and in stack/MODEL/KIND, in the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from PIL import Image

from cat_rs.adapter_check import CheckResult
from cat_rs.adapter_check.result import KindGrids
from cat_rs.atomic import new_folder
from cat_rs.evaluation import (
    EvaluationFileError,
    EvaluationInputError,
    EvaluationPictures,
    EvaluationResult,
    ModelPictures,
    PictureGrid,
    load_pictures,
    save_pictures,
)
from cat_rs.evaluation.measures import BASE
from cat_rs.text_files import json_lines

_CONCEPT = "concept"
_CONCEPT_SIDE = 512
# What a page holds without growing out of a mail's size.
MAX_SIDE = 256
_CHECK_PROMPTS = 3
_CHECK_SEEDS = 1


def save_all_pictures(result: EvaluationResult, folder: str | os.PathLike[str]) -> None:
    """Write every picture of an evaluation as a file; a folder that exists is replaced as a whole or not at all.

    Args:
        result: A result with its pictures (`evaluate` returns them; a loaded result has none).
        folder: The folder to write, in the layout described at the top of this module.

    Raises:
        EvaluationInputError: The result has no pictures.
    """
    if result.pictures is None:
        raise EvaluationInputError("result: expected a result with pictures, got one that was read from a file")
    with new_folder(folder) as target:
        (target / _CONCEPT).mkdir()
        for number, image in enumerate(result.pictures.concept):
            scaled_down(image, _CONCEPT_SIDE).save(target / _CONCEPT / f"{number:03d}.png")
        for name, model in {BASE: result.pictures.base, **result.pictures.adapters}.items():
            save_pictures(model.trigger, target / folder_name(name) / "trigger")
            save_pictures(model.no_trigger, target / folder_name(name) / "no_trigger")


def save_check_pictures(result: CheckResult, folder: str | os.PathLike[str]) -> None:
    """Write every picture of a check as a file; a folder that exists is replaced as a whole or not at all."""
    with new_folder(folder) as target:
        for name, own in result.adapters.items():
            if own.pictures is not None:
                _save_kinds(own.pictures.grids, adapter_folder(target, name))
        if result.stack is not None:
            _save_kinds(result.stack.grids, stack_folder(target))


def adapter_folder(folder: Path, name: str) -> Path:
    """Return where the pictures of a check's adapter are."""
    return folder / "adapters" / folder_name(name)


def stack_folder(folder: Path) -> Path:
    """Return where the pictures of a check's stacks are."""
    return folder / "stack"


def read_kinds(
    folder: Path, prompts: Mapping[str, tuple[str, ...]], seeds: tuple[int, ...]
) -> dict[str, dict[str, PictureGrid]]:
    """Read some pictures of every model and kind that `save_check_pictures` wrote; errors are `read_pictures`'s."""
    return {
        unquote(model.name): {
            kind: _read_grid(model / folder_name(kind), texts, seeds, _CHECK_PROMPTS, _CHECK_SEEDS, MAX_SIDE)
            for kind, texts in prompts.items()
        }
        for model in sorted(folder.iterdir())
    }


def read_pictures(
    result: EvaluationResult, folder: str | os.PathLike[str], *, max_prompts: int, max_seeds: int, max_side: int
) -> EvaluationPictures:
    """Read pictures that `save_all_pictures` wrote; their latents are not kept.

    Args:
        result: The result to which they belong.
        folder: The folder.
        max_prompts: How many prompts with the trigger to read, and as many without, spread over the list.
        max_seeds: How many seeds to read of each prompt.
        max_side: Larger pictures are scaled down to this side, in pixels.

    Raises:
        EvaluationFileError: A file is missing or broken; names it.
        EvaluationInputError: The pictures are those of other prompts or seeds.
    """

    def model(name: str) -> ModelPictures:
        place, prompts = Path(folder, folder_name(name)), result.settings["prompts"]
        seeds = tuple(result.settings["sampling"]["seeds"])
        return ModelPictures(
            *(
                _read_grid(place / kind, tuple(prompts[kind]), seeds, max_prompts, max_seeds, max_side)
                for kind in ("trigger", "no_trigger")
            )
        )

    concept = load_pictures(Path(folder, _CONCEPT)).images
    return EvaluationPictures(
        tuple(scaled_down(image, max_side) for image in concept),
        model(BASE),
        {name: model(name) for name in result.adapters},
    )


def folder_name(model: str) -> str:
    """Return the name of a model's folder: no separator, no leading dot, and different for each model."""
    name = quote(model, safe=" ")
    return f"%2E{name[1:]}" if name.startswith(".") else name


def scaled_down(image: Image.Image, side: int) -> Image.Image:
    """Return the picture, its longer side at most `side` pixels long."""
    if max(image.size) <= side:
        return image
    scaled = image.copy()
    scaled.thumbnail((side, side), Image.Resampling.LANCZOS)
    return scaled


def spread(count: int, shown: int) -> list[int]:
    """Return `shown` of `count` numbers, spread from the first to the last: prompts of one kind stand together."""
    return np.unique(np.linspace(0, count - 1, min(shown, count)).round().astype(int)).tolist()


def _save_kinds(grids: Mapping[str, KindGrids] | None, folder: Path) -> None:
    for model, kinds in (grids or {}).items():
        for kind, grid in kinds.items():
            save_pictures(grid, folder / folder_name(model) / folder_name(kind))


def _read_grid(
    folder: Path, prompts: tuple[str, ...], seeds: tuple[int, ...], max_prompts: int, max_seeds: int, max_side: int
) -> PictureGrid:
    rows = _read_metadata(folder / "metadata.jsonl")
    expected = [(prompt, seed) for prompt in prompts for seed in seeds]
    if [(row.get("text"), row.get("seed")) for row in rows] != expected:
        raise EvaluationInputError(
            f"pictures: expected those of the result's {len(prompts)} prompts and {len(seeds)} seeds in {folder}, "
            "got others: the folder belongs to another evaluation"
        )
    chosen, shown_seeds = spread(len(prompts), max_prompts), min(len(seeds), max_seeds)
    numbers = [prompt * len(seeds) + seed for prompt in chosen for seed in range(shown_seeds)]
    images = tuple(scaled_down(_read_picture(folder, rows[number]), max_side) for number in numbers)
    shown = tuple(prompts[number] for number in chosen)
    return PictureGrid(shown, seeds[:shown_seeds], images, torch.empty(len(images), 0))


def _read_metadata(file: Path) -> list[Mapping[str, Any]]:
    try:
        rows = [json.loads(line) for line in json_lines(file)]
    except (OSError, json.JSONDecodeError) as error:
        raise EvaluationFileError(f"pictures: {file} cannot be read: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise EvaluationInputError(f"pictures: expected one JSON object a line in {file}")
    return rows


def _read_picture(folder: Path, row: Mapping[str, Any]) -> Image.Image:
    name = row.get("file_name")
    if not isinstance(name, str) or Path(name).name != name:
        raise EvaluationInputError(
            f"pictures: expected the name of a file beside it in {folder / 'metadata.jsonl'}, got {name!r}"
        )
    return load_pictures(folder / name).images[0]
