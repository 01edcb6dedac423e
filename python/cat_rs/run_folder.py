"""The names and formats of what a run leaves in its folder: a training, an evaluation or a demo.

Names are relative to the folder. `cat-rs train` writes the settings, the log, checkpoints and evaluations of some of
them; `cat-rs evaluate`, `cat-rs demo` and `cat-rs check` write results, pictures and drawings of them.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.errors import CatRsError
from cat_rs.text_files import json_lines

CONFIG_FILE = "train_config.yaml"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
CHECKPOINT_FOLDER = "checkpoints"
BANK_FILE = "teacher_bank.safetensors"
EVALUATION_FOLDER = "evaluations"
FRONT_FILE = f"{EVALUATION_FOLDER}/front.json"
FRONT_FORMAT = "cat-rs front 1"
BEST_FOLDER = "best"
SAMPLE_FOLDER = "samples"
CARD_FILE = "README.md"
LOCK_FILE = ".training.lock"

RESULTS_FILE = "results.json"
CHECK_FILE = "check.json"
DEMO_FORMAT = "cat-rs demo 1"
PICTURES_FOLDER = "pictures"
CONTACT_SHEET_FILE = "contact_sheet.png"
CURVES_FILE = "curves.png"


class MetricsError(CatRsError, ValueError):
    """A metrics.jsonl holds something that is not a log; the text names the line."""


def step_name(step: int) -> str:
    """The name of what belongs to one step: a checkpoint, an evaluation, sample pictures; without a suffix."""
    return f"step-{step:06d}"


def step_paths(folder: str | os.PathLike[str], suffix: str = "") -> dict[int, Path]:
    """Everything in a folder that is named by its step and ends in `suffix`, in the order of the steps."""
    found = {path: re.fullmatch(rf"step-(\d+){re.escape(suffix)}", path.name) for path in Path(folder).glob("step-*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def metrics_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each an object with a step.

    A last line that was cut off while it was written is left out.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        OSError: It cannot be read.
        MetricsError: A line before the last is broken, or one is not an object with a step.
    """
    file = _metrics_file(path)
    try:
        lines = json_lines(file)
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(lines):
                break
            raise MetricsError(f"line {number} of {file} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise MetricsError(f"expected an object with a step in line {number} of {file}, got {line}")
        rows.append(row)
    return rows


def read_metrics(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float64]]:
    """Read a metrics.jsonl as `metrics_rows` does: a column for each key, NaN where a line lacks it.

    Raises:
        OSError: It cannot be read.
        MetricsError: It holds no step, or something that is no log.
    """
    rows = metrics_rows(path)
    if not rows:
        raise MetricsError(f"expected at least one logged step in {_metrics_file(path)}, got none")
    keys = {key for row in rows for key in row}
    return {key: np.array([_number(row.get(key)) for row in rows]) for key in sorted(keys)}


def _metrics_file(path: str | os.PathLike[str]) -> Path:
    return Path(path, METRICS_FILE) if Path(path).is_dir() else Path(path)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
