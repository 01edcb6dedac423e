"""Checks of adapters as a report reads them: the result, and some of its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cat_rs.adapter_check import CheckResult
from cat_rs.evaluation import EvaluationInputError, PictureGrid
from cat_rs.report.picture_files import adapter_folder, read_kinds, stack_folder
from cat_rs.run_folder import PICTURES_FOLDER
from cat_rs.text_files import read_text


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        file: Where it was read from.
        result: The result, with pictures where they lie beside the file.
        content: The JSON as it was read.
    """

    file: Path
    result: CheckResult
    content: Mapping[str, Any]


def read_check(file: Path) -> Check:
    """Read one check, and the pictures beside it.

    Raises:
        EvaluationFileError: A file is missing or cannot be read; names it.
        EvaluationInputError: It holds something else; names it.
    """
    try:
        result = CheckResult.load(file)
    except EvaluationInputError as error:
        raise EvaluationInputError(f"runs: {file}: {error}") from error
    pictures = file.parent / PICTURES_FOLDER
    if pictures.is_dir():
        result = _with_pictures(result, pictures)
    return Check(file, result, json.loads(read_text(file)))


def _with_pictures(result: CheckResult, folder: Path) -> CheckResult:
    seeds = tuple(result.settings.get("sampling", {}).get("seeds", ()))

    def grids(place: Path, prompts: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, PictureGrid]] | None:
        return read_kinds(place, prompts, seeds) if place.is_dir() else None

    adapters = {
        name: own
        if own.pictures is None
        else replace(
            own, pictures=replace(own.pictures, grids=grids(adapter_folder(folder, name), own.pictures.prompts))
        )
        for name, own in result.adapters.items()
    }
    stack = result.stack
    if stack is not None:
        stack = replace(stack, grids=grids(stack_folder(folder), stack.prompts))
    return replace(result, adapters=adapters, stack=stack)
