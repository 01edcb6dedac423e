"""What a report shows of evaluations and trainings, and all of it as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat_rs.evaluation import EvaluationInputError, EvaluationResult
from cat_rs.report.checks import Check
from cat_rs.report.curves import Panel, make_panels
from cat_rs.report.fronts import Front, FrontPoint
from cat_rs.report.sources import Evaluation, Run, Training, read_run
from cat_rs.report.style import SERIES
from cat_rs.report.wording import concept_of, listed
from cat_rs.run_folder import RESULTS_FILE

FORMAT = "cat-rs report 1"


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        title: The headline.
        runs: What was read.
        series: The number of the colour of each adapter and training, by name.
        fronts: A chart for each set of adapters that were evaluated alike.
        panels: A chart for each figure of the trainings.
    """

    title: str
    runs: tuple[Run, ...]
    series: Mapping[str, int]
    fronts: tuple[Front, ...]
    panels: tuple[Panel, ...]

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Those of all runs."""
        return tuple(evaluation for run in self.runs for evaluation in run.evaluations)

    @property
    def trainings(self) -> tuple[Training, ...]:
        """Those of all runs."""
        return tuple(training for run in self.runs for training in run.trainings)

    @property
    def checks(self) -> tuple[Check, ...]:
        """Those of all runs."""
        return tuple(check for run in self.runs for check in run.checks)


def read_report(runs: Sequence[str | os.PathLike[str]], *, title: str | None = None) -> Report:
    """Read what a report shows; arguments and errors are those of `write_report`."""
    if not runs:
        raise EvaluationInputError("runs: expected at least one, got none")
    read = _with_distinct_labels([read_run(path) for path in runs])
    evaluations = [evaluation for run in read for evaluation in run.evaluations]
    trainings = [training for run in read for training in run.trainings]
    methods = [evaluation.method(name) for evaluation in evaluations for name in evaluation.result.adapters]
    checked = [name for run in read for check in run.checks for name in check.result.adapters]
    names = [*methods, *(training.name for training in trainings), *checked]
    series = {name: number % len(SERIES) for number, name in enumerate(dict.fromkeys(names))}
    logs = [(training.name, series[training.name], training.metrics) for training in trainings]
    return Report(
        title=_title(evaluations, trainings, methods or names) if title is None else title,
        runs=tuple(read),
        series=series,
        fronts=_fronts(evaluations, series),
        panels=tuple(panel for panel in make_panels(logs) if panel.curves),
    )


def report_json(report: Report) -> str:
    """Return every figure of a report as JSON: what was read, as it was read, and what its charts are drawn from.

    The object holds format ("cat-rs report 1"), title, runs (path, settings, summary, evaluations with label, file and
    the JSON object of the evaluation, trainings with name, folder and settings, checks with file and JSON object),
    fronts (title, base, other_seed and points) and curves (key, title, and lines with name, steps, values and
    smoothed). Unknown numbers are null.
    """
    content = {
        "format": FORMAT,
        "title": report.title,
        "runs": [
            {
                "path": os.fspath(run.path),
                "settings": run.settings,
                "summary": run.summary,
                "evaluations": [
                    {"label": each.label, "file": os.fspath(each.file), "evaluation": each.content}
                    for each in run.evaluations
                ],
                "trainings": [
                    {"name": each.name, "folder": os.fspath(each.folder), "settings": each.settings}
                    for each in run.trainings
                ],
                "checks": [{"file": os.fspath(each.file), "check": each.content} for each in run.checks],
            }
            for run in report.runs
        ],
        "fronts": [dataclasses.asdict(front) for front in report.fronts],
        "curves": [
            {
                "key": panel.key,
                "title": panel.title,
                "lines": [
                    {key: getattr(line, key) for key in ("name", "steps", "values", "smoothed")}
                    for line in panel.curves
                ],
            }
            for panel in report.panels
        ],
    }
    return json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _with_distinct_labels(runs: Sequence[Run]) -> list[Run]:
    """Add the file or folder to labels that several evaluations share."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    labels = [evaluation.label for evaluation in evaluations]
    absolute = [_place(evaluation).parent for evaluation in evaluations if evaluation.file.is_absolute()]
    root = os.path.commonpath(absolute) if absolute else "."

    def distinct(evaluation: Evaluation) -> Evaluation:
        if labels.count(evaluation.label) == 1:
            return evaluation
        place = _place(evaluation)
        # Where the files of all of them are is nobody else's business.
        own = os.path.relpath(place, root) if place.is_absolute() else place
        return dataclasses.replace(evaluation, label=f"{evaluation.label} ({own})")

    return [dataclasses.replace(run, evaluations=tuple(map(distinct, run.evaluations))) for run in runs]


def _place(evaluation: Evaluation) -> Path:
    """The folder of an evaluation, or its file where that has a name of its own."""
    return evaluation.file.parent if evaluation.file.name == RESULTS_FILE else evaluation.file


def _title(evaluations: Sequence[Evaluation], trainings: Sequence[Training], methods: Sequence[str]) -> str:
    if not evaluations:
        return f"{'Training' if trainings else 'Check'} of {listed(methods)}"
    concepts = listed([f"“{concept_of(evaluation.result)}”" for evaluation in evaluations])
    return f"{concepts}: base model against {listed(methods)}"


def _fronts(evaluations: Sequence[Evaluation], series: Mapping[str, int]) -> tuple[Front, ...]:
    """Put evaluations on one chart whose encoder, prompts, seeds, sampler and concept agree."""
    alike: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        alike.setdefault(_conditions(evaluation.result), []).append(evaluation)
    fronts = [_front(group, series) for group in alike.values()]
    return tuple(front for front in fronts if front.points)


def _conditions(result: EvaluationResult) -> str:
    """Return what must agree between adapters that share a chart."""
    settings = result.settings
    shared = {key: settings.get(key) for key in ("pipeline", "scheduler", "encoder", "prompts", "concept_images")}
    shared["sampling"] = {key: value for key, value in settings["sampling"].items() if key != "batch_size"}
    # Two concepts may have the same prompts and file names, but not the same pictures.
    shared["base"] = None if result.base.identity is None else round(result.base.identity.value, 3)
    return json.dumps(shared, sort_keys=True)


def _front(evaluations: Sequence[Evaluation], series: Mapping[str, int]) -> Front:
    points = []
    for evaluation in evaluations:
        labels = _labels(evaluation, evaluations)
        for name, scores in evaluation.result.adapters.items():
            if scores.identity is not None and scores.ups is not None:
                step, best = None, False
                if evaluation.checkpoints is not None:
                    step, best = evaluation.checkpoints.steps[name], name == evaluation.checkpoints.best
                colour = series[evaluation.method(name)]
                points.append(FrontPoint(labels[name], colour, scores.identity, scores.ups, step, best))
    first = evaluations[0].result
    other_seed = None if first.other_seed is None else first.other_seed.ups
    title = listed([evaluation.label for evaluation in evaluations])
    return Front(title, tuple(points), first.base.identity, other_seed)


def _labels(evaluation: Evaluation, together: Sequence[Evaluation]) -> dict[str, str]:
    """Return what stands beside each point: of checkpoints, the first, the best and the last have a label."""
    names = list(evaluation.result.adapters)
    checkpoints = evaluation.checkpoints
    if checkpoints is not None:
        prefix = "" if len(together) == 1 else f"{checkpoints.training}, "
        shown = (names[0], checkpoints.best, names[-1])
        return {name: f"{prefix}{name}" if name in shown else "" for name in names}
    everywhere = [name for other in together for name in other.result.adapters]
    return {name: name if everywhere.count(name) == 1 else f"{name}: {evaluation.label}" for name in names}


def _plain(value: Any) -> Any:
    """Return `value` in the types of JSON; NaN becomes null, a date its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
