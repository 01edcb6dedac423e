"""What a report is made from: the folders that `cat-rs evaluate`, `cat-rs demo` and `cat-rs train` write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_rs.errors import CatRsError
from cat_rs.evaluation import Comparison, EvaluationFileError, EvaluationInputError, EvaluationResult, Interval
from cat_rs.evaluation.measures import MEASURES, prompt_values
from cat_rs.options import read_config_file
from cat_rs.report.checks import Check, read_check
from cat_rs.report.curves import read_log
from cat_rs.report.picture_files import MAX_SIDE, read_pictures
from cat_rs.report.wording import concept_of
from cat_rs.run_folder import (
    CHECK_FILE,
    CONFIG_FILE,
    DEMO_FORMAT,
    FRONT_FILE,
    FRONT_FORMAT,
    PICTURES_FOLDER,
    RESULTS_FILE,
    step_name,
)
from cat_rs.text_files import printable, read_text

# What a page holds without growing out of a mail's size.
MAX_PROMPTS = 24
MAX_SEEDS = 4


@dataclass(frozen=True)
class Checkpoints:
    """What sets the evaluation of a training's checkpoints apart; its adapters are the checkpoints, in order.

    Attributes:
        training: The training's name.
        steps: The optimizer step of each adapter, by name.
        best: The name of the adapter that the training marked as its best; None if it marked none.
        rule: How the best one is chosen, in words.
    """

    training: str
    steps: Mapping[str, int]
    best: str | None
    rule: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, or those of one training's checkpoints.

    Attributes:
        label: What was evaluated, in a few words.
        file: Where it was read from.
        result: The evaluation, with pictures where they lie beside the file.
        comparisons: The differences between the adapters, of a finished evaluation.
        content: The JSON as it was read.
        checkpoints: For the evaluation of a training's checkpoints.
    """

    label: str
    file: Path
    result: EvaluationResult
    comparisons: tuple[Comparison, ...]
    content: Mapping[str, Any]
    checkpoints: Checkpoints | None = None

    def method(self, adapter: str) -> str:
        """Return whose colour an adapter has: its own, or that of the training whose checkpoint it is."""
        return adapter if self.checkpoints is None else self.checkpoints.training


@dataclass(frozen=True)
class Training:
    """One training: its settings, and a column of figures over the logged steps for each key of metrics.jsonl."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    metrics: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """What one of the paths given to a report holds.

    Attributes:
        path: As it was given.
        evaluations: Those of `cat-rs evaluate` and `cat-rs demo`, and of the checkpoints of `cat-rs train`.
        trainings: Those of `cat-rs train` and `cat-rs demo`.
        settings: What all trainings of a demo share; empty otherwise.
        summary: The means over a demo's runs, and the differences between the adapters; empty otherwise.
        checks: Those of `cat-rs check`.
    """

    path: Path
    evaluations: tuple[Evaluation, ...] = ()
    trainings: tuple[Training, ...] = ()
    settings: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None
    checks: tuple[Check, ...] = ()


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read one run.

    Args:
        path: A folder that `cat-rs evaluate`, `demo`, `train` or `check` wrote, or the JSON of all but a training.

    Raises:
        EvaluationFileError: A file is missing or cannot be read; names it.
        EvaluationInputError: A file holds something else; names it.
        ConfigError: train_config.yaml is not YAML.
    """
    given = Path(path)
    if not given.is_dir():
        return Run(given, checks=(read_check(given),)) if given.name == CHECK_FILE else _read_results(given, given)
    run = Run(given)
    if (given / RESULTS_FILE).is_file():
        run = _read_results(given, given / RESULTS_FILE)
    if (given / CONFIG_FILE).is_file():
        training = read_training(given)
        run = replace(run, trainings=(*run.trainings, training))
        if (given / FRONT_FILE).is_file():
            run = replace(run, evaluations=(*run.evaluations, read_front(given, training.name)))
    if (given / CHECK_FILE).is_file():
        run = replace(run, checks=(read_check(given / CHECK_FILE),))
    if not run.evaluations and not run.trainings and not run.checks:
        raise EvaluationFileError(
            f"runs: expected a folder that cat-rs evaluate, demo, train or check wrote, with {RESULTS_FILE}, "
            f"{CONFIG_FILE} or {CHECK_FILE}, got {given}"
        )
    return run


def read_training(folder: Path, name: str | None = None) -> Training:
    """Read the folder of a training; its name is `name`, or that of the folder."""
    settings = read_config_file(folder / CONFIG_FILE)
    return Training(name or printable(folder.resolve().name), folder, settings, read_log(folder))


def read_front(folder: Path, training: str) -> Evaluation:
    """Read the evaluations of a training's checkpoints, as one whose adapters are the checkpoints."""
    file = folder / FRONT_FILE
    front = _read_json(file)
    if front.get("format") != FRONT_FORMAT:
        raise EvaluationInputError(f"runs: {file}: expected the format {FRONT_FORMAT!r}, got {front.get('format')!r}")
    try:
        steps = {int(entry["step"]): bool(entry["best"]) for entry in front["checkpoints"]}
        rule = str(front["rule"])
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationInputError(f"runs: expected the checkpoints of a training in {file}, got {error!r}") from error
    if not steps:
        raise EvaluationInputError(f"runs: expected at least one checkpoint in {file}, got none")
    files = {step: file.with_name(f"{step_name(step)}.json") for step in steps}
    contents = {step: _read_json(path) for step, path in files.items()}
    evaluations = {step: _evaluation(contents[step], files[step], None) for step in steps}
    names = {step: next(iter(evaluation.result.adapters)) for step, evaluation in evaluations.items()}
    best = next((names[step] for step, is_best in steps.items() if is_best), None)
    return Evaluation(
        training,
        file,
        _joined([evaluation.result for evaluation in evaluations.values()]),
        (),
        {"front": front, "steps": list(contents.values())},
        Checkpoints(training, {name: step for step, name in names.items()}, best, rule),
    )


def _joined(results: list[EvaluationResult]) -> EvaluationResult:
    """Put the adapters of evaluations with the same base model into one."""
    first, *others = results
    own = [row for result in others for row in result.prompts if row.model in result.adapters]
    adapters = {name: scores for result in results for name, scores in result.adapters.items()}
    return replace(first, adapters=adapters, prompts=(*first.prompts, *own))


def _read_results(given: Path, file: Path) -> Run:
    content = _read_json(file)
    if content.get("format") == DEMO_FORMAT:
        return _demo(given, file, content)
    evaluation = _evaluation(content, file, file.parent)
    return Run(given, evaluations=(replace(evaluation, label=concept_of(evaluation.result)),))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except OSError as error:
        raise EvaluationFileError(f"runs: {file} cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise EvaluationInputError(f"runs: expected JSON in {file}: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationInputError(f"runs: expected a JSON object in {file}, got {type(content).__name__}")
    return content


def _demo(given: Path, file: Path, content: Mapping[str, Any]) -> Run:
    try:
        entries = [
            (f"{entry['concept']}, seed {entry['seed']}", entry["evaluation"], entry.get("folder"))
            for entry in content["runs"]
        ]
        settings, summary = dict(content["training"]), dict(content["summary"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationInputError(f"runs: expected the results of a demo in {file}, got {error!r}") from error
    if not all(map(_is_summary, summary.values())):
        raise EvaluationInputError(f"runs: {file}: expected two means and their difference for each figure in summary")
    evaluations, trainings = [], []
    for label, evaluation, name in entries:
        if not isinstance(evaluation, dict) or not isinstance(name, str | None):
            raise EvaluationInputError(f"runs: expected an evaluation and its folder for {label} in {file}")
        folder = None if name is None else file.parent / name
        evaluations.append(replace(_evaluation(evaluation, file, folder), label=label))
        if folder is not None:
            places = {adapter: folder / adapter for adapter in evaluations[-1].result.adapters}
            trainings += [
                read_training(place, adapter) for adapter, place in places.items() if (place / CONFIG_FILE).is_file()
            ]
    return Run(given, tuple(evaluations), tuple(trainings), settings, summary)


def _evaluation(content: Mapping[str, Any], file: Path, folder: Path | None) -> Evaluation:
    """Read one evaluation, and the pictures in `folder`."""
    try:
        result = EvaluationResult.from_json(json.dumps(content))
    except EvaluationInputError as error:
        raise EvaluationInputError(f"runs: {file}: {error}") from error
    wrong = next(_mistakes(result), None)
    if wrong is not None:
        raise EvaluationInputError(f"runs: {file}: expected {wrong}")
    if folder is not None and (folder / PICTURES_FOLDER).is_dir():
        pictures = read_pictures(
            result, folder / PICTURES_FOLDER, max_prompts=MAX_PROMPTS, max_seeds=MAX_SEEDS, max_side=MAX_SIDE
        )
        result = replace(result, pictures=pictures)
    try:
        comparisons = result.comparisons()
    except CatRsError as error:
        raise EvaluationInputError(f"runs: {file}: {error}") from error
    return Evaluation("", file, result, comparisons, content)


def _mistakes(result: EvaluationResult) -> Iterator[str]:
    """Say what the page needs and a file written by hand may lack, each as the words after "expected"."""
    settings = result.settings if isinstance(result.settings, dict) else {}
    parts = (settings.get(key) for key in ("prompts", "sampling"))
    prompts, sampling = (part if isinstance(part, dict) else {} for part in parts)
    for key in ("trigger", "no_trigger", "trigger_words"):
        if not _is_list(prompts.get(key), lambda text: isinstance(text, str)):
            yield f"at least one text in settings.prompts.{key}"
    if not isinstance(prompts.get("class_word"), str | None):
        yield "a text or null as settings.prompts.class_word"
    if not _is_list(sampling.get("seeds"), _is_number):
        yield "at least one number in settings.sampling.seeds"
    if not isinstance(settings.get("encoder"), str):
        yield "a name as settings.encoder"
    if not result.adapters:
        yield "at least one of adapters"
    for name, scores in {"base": result.base, "other_seed": result.other_seed, **result.adapters}.items():
        if scores is not None and not all(map(_is_interval, filter(None, vars(scores).values()))):
            yield f"numbers as the scores of {name}"
    columns = {measure.column for measure in MEASURES.values()}
    for number, row in enumerate(result.prompts):
        if not all(_is_number(value) for column in columns for value in prompt_values(row, column)):
            yield f"numbers in row {number} of prompts"


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(check, value))


def _is_interval(figure: Interval) -> bool:
    """Return whether all parts are numbers; both bounds are NaN where there are none."""
    bounds = (figure.low, figure.high)
    return _is_number(figure.value) and (all(map(_is_number, bounds)) or all(bound != bound for bound in bounds))


def _is_summary(row: Any) -> bool:
    """Return whether a row holds the means of two methods, and their difference with its bounds."""
    if not isinstance(row, dict) or len(row) != 3 or not isinstance(row.get("difference"), dict):
        return False
    difference = row["difference"]
    means = [value for key, value in row.items() if key != "difference"]
    return set(difference) == {"value", "low", "high"} and all(map(_is_number, [*means, *difference.values()]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
