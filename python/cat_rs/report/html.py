"""The page of a report. Prompts and names may come from anybody, so the template escapes them as text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.metadata
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cat_rs.adapter_check import AdapterCheck, Finding, PictureCheck, StackCheck
from cat_rs.adapter_check.prompts import GENERAL
from cat_rs.adapter_check.result import KindGrids
from cat_rs.evaluation import EvaluationPictures, Interval, PictureGrid, PromptScores, Scores
from cat_rs.evaluation.measures import BASE, MEANINGS, MEASURES, labelled_values
from cat_rs.report.charts import to_svg
from cat_rs.report.check_charts import draw_layers, draw_strength
from cat_rs.report.content import Report
from cat_rs.report.curves import draw_panel
from cat_rs.report.fronts import draw_front
from cat_rs.report.picture_files import MAX_SIDE, spread
from cat_rs.report.sources import Evaluation, Run
from cat_rs.report.wording import encoder_of, extent_of
from cat_rs.text_files import printable

_FOLDER = Path(__file__).parent / "page"

# How many prompts of a sheet and rows of a table show before they are unfolded.
_SHOWN_PROMPTS = 4
_SHOWN_ROWS = 10
_SHOWN_CONCEPT = 12
_SHOWN_LAYERS = 5

# The columns of a table of scores.
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("in short", ("identity", "ups", "kps")),
    ("with the trigger", ("tps", "prompt_similarity")),
    (
        "without the trigger",
        ("diversity", "diversity_retained", "drift", "prompt_similarity_no_trigger", "pixel_rmse", "latent_rmse"),
    ),
)


@dataclass(frozen=True)
class Figure:
    """A number as the page shows it: sorted by `value`, with its bounds in a line of their own."""

    value: float
    text: str
    bounds: str = ""

    @property
    def lost(self) -> int:
        """What is missing to 1, in percent."""
        return round(100 * min(1.0, max(0.0, 1.0 - self.value)))


def render_html(report: Report) -> str:
    """Return the page; it holds its style, script, pictures and charts, and loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content = {
        "title": report.title,
        "subtitle": _subtitle(report.evaluations),
        "sheets": [
            _sheet(report, evaluation, evaluation.result.pictures)
            for evaluation in report.evaluations
            if evaluation.result.pictures is not None
        ],
        "without_pictures": [
            evaluation.label
            for evaluation in report.evaluations
            if evaluation.result.pictures is None and evaluation.checkpoints is None
        ],
        "fronts": [
            _chart(draw_front(front), f"front{number}", front.title) for number, front in enumerate(report.fronts)
        ],
        "has_other_seed": any(front.other_seed is not None for front in report.fronts),
        "has_checkpoints": any(point.step is not None for front in report.fronts for point in front.points),
        "rules": _rules(report.evaluations),
        "panels": [
            _chart(draw_panel(panel), f"panel{number}", panel.title, panel.note)
            for number, panel in enumerate(report.panels)
        ],
        "legend": [
            {"name": name, "series": report.series[name]}
            for name in dict.fromkeys(training.name for training in report.trainings)
        ],
        "scores": _scores(report),
        "meanings": _meanings(report.evaluations),
        "comparisons": _comparisons(report),
        "prompt_tables": [table for table in map(_prompt_table, report.evaluations) if table["rows"]],
        "checks": [
            _checked(name, own, report.series[name], str(number))
            for number, (name, own) in enumerate(
                item for each in report.checks for item in each.result.adapters.items()
            )
        ],
        "stacks": [_stacked(each.result.stack) for each in report.checks if each.result.stack is not None],
        "settings": _settings(report),
        "version": importlib.metadata.version("cat-rs"),
    }
    sections = [
        {"id": name, "title": title}
        for name, title, shown in (
            ("checks", "Checks", content["checks"]),
            ("pictures", "Pictures", content["sheets"] or content["without_pictures"]),
            ("front", "Learned against kept", content["fronts"]),
            ("curves", "Training", content["panels"]),
            ("scores", "Scores", content["scores"]),
            ("comparisons", "Comparisons", content["comparisons"]),
            ("prompts", "Prompt by prompt", content["prompt_tables"]),
            ("settings", "Settings", content["settings"]),
        )
        if shown
    ]
    return environment.get_template("report.html").render(
        **content,
        sections=sections,
        # The policy allows this script alone, so that none can be smuggled in with a name.
        script_hash=f"sha256-{digest}",
        script=Markup(script),
        style=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
    )


def _chart(figure: Any, prefix: str, title: str, note: str = "") -> dict[str, Any]:
    """Return a chart with a name for screen readers; its figures are in the tables."""
    from markupsafe import Markup, escape

    svg = to_svg(figure, prefix).replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return {"title": title, "note": note, "svg": Markup(svg)}


def _subtitle(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return what was evaluated, one line for each way it was done."""
    results = (evaluation.result for evaluation in evaluations)
    lines = (
        f"{extent_of(result)}. Encoder: {encoder_of(result)}. Ranges are 95 % bootstrap intervals."
        for result in results
    )
    return list(dict.fromkeys(lines))


def _sheet(report: Report, evaluation: Evaluation, pictures: EvaluationPictures) -> dict[str, Any]:
    result = evaluation.result
    models, prompts = {BASE: result.base, **result.adapters}, result.settings["prompts"]
    return {
        "label": evaluation.label,
        "models": [{"name": name, "series": _series(report, evaluation, name)} for name in models],
        "concept_count": len(pictures.concept),
        "concept": [_picture(image, "") for image in pictures.concept[:_SHOWN_CONCEPT]],
        "halves": [
            _half(title, models, measure, _grids(pictures, kind), prompts[kind])
            for title, measure, kind in (
                ("With the trigger", "identity", "trigger"),
                ("Without the trigger", "ups", "no_trigger"),
            )
        ],
    }


def _grids(pictures: EvaluationPictures, kind: str) -> list[PictureGrid]:
    return [getattr(model, kind) for model in (pictures.base, *pictures.adapters.values())]


def _half(
    title: str,
    models: Mapping[str, Scores],
    measure: str,
    grids: Sequence[PictureGrid],
    evaluated: Sequence[str],
) -> dict[str, Any]:
    """Return one side of a sheet: a group of rows for each prompt, a row for each seed, a column for each model."""
    prompts, seeds = grids[0].prompts, grids[0].seeds
    first = set(spread(len(prompts), _SHOWN_PROMPTS))
    return {
        "title": title,
        "notes": ["".join(labelled_values(model, measure)) for model in models.values()],
        "prompts": [
            {
                "text": prompt or "(empty prompt)",
                "extra": number not in first,
                "rows": [
                    {
                        "seed": seed,
                        "cells": [
                            _picture(grid.picture(number, place), f"{name}: {prompt}, seed {seed}")
                            for name, grid in zip(models, grids, strict=True)
                        ],
                    }
                    for place, seed in enumerate(seeds)
                ],
            }
            for number, prompt in enumerate(prompts)
        ],
        "hidden": len(prompts) - len(first),
        "left_out": len(evaluated) - len(prompts),
    }


def _checked(name: str, own: AdapterCheck, series: int, prefix: str) -> dict[str, Any]:
    """Return what the page shows of one checked adapter; `prefix` sets its charts' ids apart."""
    checked = own.pictures
    charts = [_chart(draw_layers(own.weights, series), f"layers{prefix}", f"{name}: layers")]
    if checked is not None:
        charts.insert(0, _chart(draw_strength(checked, series), f"strength{prefix}", f"{name}: effect and damage"))
    return {
        "name": name,
        "series": series,
        "findings": [*(_weight_finding(each) for each in own.weights.findings), *own.findings],
        "charts": charts,
        "kinds": [] if checked is None else _kinds(checked),
        "scales": [] if checked is None else [f"{each.scale:g}" for each in checked.scales],
        "sheet": None if checked is None or checked.grids is None else _check_sheet(checked, checked.grids, series),
    }


def _weight_finding(finding: Finding) -> str:
    more = f" and {len(finding.layers) - _SHOWN_LAYERS} more" if len(finding.layers) > _SHOWN_LAYERS else ""
    return f"Weights, {finding.kind}: {finding.text} ({', '.join(finding.layers[:_SHOWN_LAYERS])}{more})."


def _kinds(checked: PictureCheck) -> list[dict[str, Any]]:
    """Return a row for each kind of prompts: drift with another seed and at each scale, and the rest at the last."""
    last = checked.scales[-1].kinds
    rows = []
    for kind in last:
        floor = checked.other_seed.get(kind)
        drifts = [None if floor is None else floor.drift, *(each.kinds[kind].drift for each in checked.scales)]
        rest = [getattr(last[kind], name) for name in ("ups", "diversity_retained", "prompt_similarity_no_trigger")]
        rows.append({"kind": kind, "figures": [_figure(figure) for figure in (*drifts, *rest)]})
    return rows


def _check_sheet(checked: PictureCheck, grids: Mapping[str, KindGrids], series: int) -> dict[str, Any]:
    """Return pictures of the base model and of the adapter at each scale side by side, kind by kind."""
    names = [f"{each.scale:g}" for each in checked.scales]
    models = [{"name": BASE, "series": None}, *({"name": f"x {name}", "series": series} for name in names)]
    halves = []
    for kind, evaluated in checked.prompts.items():
        scores = {BASE: checked.base[kind], **{f"x {each.scale:g}": each.kinds[kind] for each in checked.scales}}
        own = [grids[name][kind] for name in (BASE, *names)]
        halves.append(_half(kind.capitalize(), scores, "drift", own, evaluated))
    return {"models": models, "halves": halves}


def _stacked(stack: StackCheck) -> dict[str, Any]:
    """Return what the page shows of adapters together: sentences, and pictures of every model side by side."""
    sheet = None
    if stack.grids is not None:
        stacks = {each.name: Scores(drift=each.drift) for each in stack.stacks}
        models = (BASE, *stack.scales, *stacks)
        # A stack's drift is that of general prompts.
        scores = {kind: stacks if kind == GENERAL else {} for kind in stack.prompts}
        sheet = {
            "models": [{"name": name, "series": None} for name in models],
            "halves": [
                _half(
                    kind.capitalize(),
                    {name: scores[kind].get(name, Scores()) for name in models},
                    "drift",
                    [stack.grids[name][kind] for name in models],
                    prompts,
                )
                for kind, prompts in stack.prompts.items()
            ],
        }
    return {"findings": stack.findings, "sheet": sheet}


def _picture(image: Image.Image, alt: str) -> dict[str, Any]:
    """Return a picture as a data URI; without loss where it was not scaled down."""
    buffer = io.BytesIO()
    if max(image.size) < MAX_SIDE:
        image.save(buffer, format="WEBP", lossless=True)
    else:
        image.save(buffer, format="WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"source": f"data:image/webp;base64,{data}", "width": image.width, "height": image.height, "alt": alt}


def _scores(report: Report) -> dict[str, Any]:
    """Return the table of all models; empty without an evaluation."""
    if not report.evaluations:
        return {}
    measures = [name for _, names in _GROUPS for name in names]
    rows = []
    for evaluation in report.evaluations:
        result = evaluation.result
        models = {BASE: result.base, "base, other seed": result.other_seed, **result.adapters}
        rows += [
            {
                "label": evaluation.label,
                "model": name,
                "series": _series(report, evaluation, name),
                "figures": [_figure(getattr(scores, measure)) for measure in measures],
            }
            for name, scores in models.items()
            if scores is not None
        ]
    return {"labelled": len(report.evaluations) > 1, "groups": _column_groups(measures), "rows": rows}


def _column_groups(shown: Collection[str]) -> list[dict[str, Any]]:
    """Return the groups of columns of a table that shows some of the measures."""
    groups = [
        {"title": title, "columns": [MEASURES[name] for name in names if name in shown]} for title, names in _GROUPS
    ]
    return [group for group in groups if group["columns"]]


def _series(report: Report, evaluation: Evaluation, name: str) -> int | None:
    """Return the number of a model's colour; the base model has none."""
    return report.series[evaluation.method(name)] if name in evaluation.result.adapters else None


def _meanings(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    encoders = ", ".join(dict.fromkeys(encoder_of(evaluation.result) for evaluation in evaluations))
    meanings = {
        **MEANINGS,
        "Intervals": "95 % bootstrap intervals over the prompts, for one trained adapter. Training again with another "
        "seed may move a figure by more.",
        "Encoder": f"All figures but the RMSE depend on the encoder, here {encoders}. Figures of different encoders "
        "cannot be compared.",
    }
    return [{"name": name, "text": text} for name, text in meanings.items()]


def _rules(evaluations: Sequence[Evaluation]) -> list[str]:
    """Say how trainings chose their best checkpoint, one line for each way."""
    checkpoints = [evaluation.checkpoints for evaluation in evaluations]
    chosen = [each for each in checkpoints if each is not None and each.best is not None]
    rules = dict.fromkeys(each.rule for each in chosen)
    trainings = {rule: [each.training for each in chosen if each.rule == rule] for rule in rules}
    return [f"A ring marks the best checkpoint of {', '.join(names)}: {rule}." for rule, names in trainings.items()]


def _comparisons(report: Report) -> list[dict[str, Any]]:
    """Return tables of differences: over the runs of a demo, and between the adapters of an evaluation."""
    tables = [_summary(report, run) for run in report.runs if run.summary]
    return tables + [_differences(report, each) for each in report.evaluations if each.comparisons]


def _differences(report: Report, evaluation: Evaluation) -> dict[str, Any]:
    """Return the differences of each adapter's figures from the first one's."""
    comparisons = evaluation.comparisons
    measures = [
        name for _, names in _GROUPS for name in names if any(getattr(each, name, None) for each in comparisons)
    ]
    return {
        "title": f"{evaluation.label}: difference to {comparisons[0].a}",
        "groups": _column_groups(measures),
        "rows": [
            {
                "name": comparison.b,
                "series": _series(report, evaluation, comparison.b),
                "figures": [_figure(getattr(comparison, name), sign="+") for name in measures],
            }
            for comparison in comparisons
        ],
    }


def _summary(report: Report, run: Run) -> dict[str, Any]:
    """Return the means over the runs of a demo, and the difference of its two methods."""
    summary = run.summary or {}
    plain, method = [name for name in next(iter(summary.values())) if name != "difference"]
    rows = [
        {
            "name": name,
            "series": report.series.get(name),
            "figures": [_bare_figure(row[name]) for row in summary.values()],
        }
        for name in (plain, method)
    ]
    # A file written by hand may hold other figures.
    labels = [MEASURES[name].label if name in MEASURES else name for name in summary]
    columns = [{"label": label, "note": ""} for label in labels]
    differences = [_figure(Interval(**row["difference"]), sign="+") for row in summary.values()]
    return {
        "title": f"{_own_part(os.fspath(run.path))}: means over {len(run.evaluations)} trainings of each",
        "groups": [{"title": "", "columns": columns}],
        "rows": [*rows, {"name": f"{method} − {plain}", "series": None, "figures": differences}],
    }


def _prompt_table(evaluation: Evaluation) -> dict[str, Any]:
    """Return a row for each prompt, the most changed one first."""
    adapters = list(evaluation.result.adapters)
    found: dict[tuple[bool, str], dict[str, PromptScores]] = {}
    for scores in evaluation.result.prompts:
        found.setdefault((scores.trigger, scores.prompt), {})[scores.model] = scores
    rows = []
    for (trigger, prompt), models in found.items():
        if all(name in models and models[name].similarity for name in adapters):
            similarity = [_mean(models[name].similarity) for name in adapters]
            diversity = [models[name].diversity if name in models else None for name in (BASE, *adapters)]
            rows.append(
                {
                    "prompt": prompt,
                    "kind": "with" if trigger else "without",
                    "similarity": [_bare_figure(value) for value in (min(similarity), *similarity)],
                    "diversity": [None if value is None else _bare_figure(value) for value in diversity],
                }
            )
    return {
        "label": evaluation.label,
        "adapters": adapters,
        "models": [BASE, *adapters],
        "rows": sorted(rows, key=lambda row: row["similarity"][0].value),
        "diverse": any(figure is not None for row in rows for figure in row["diversity"]),
        "hidden": max(0, len(rows) - _SHOWN_ROWS),
    }


def _settings(report: Report) -> list[dict[str, Any]]:
    """Return the settings: those that all evaluations share, those of each, and the same for the trainings."""
    evaluations = {evaluation.label: _evaluation_settings(evaluation) for evaluation in report.evaluations}
    checks = {os.fspath(each.file): _lines(each.result.settings) for each in report.checks}
    trainings = {os.fspath(training.folder): _lines(training.settings) for training in report.trainings}
    # What a demo says of its trainings is all there is where their folders are gone.
    trainings |= {
        os.fspath(run.path): _lines(run.settings) for run in report.runs if run.settings and not run.trainings
    }
    parts = {"evaluation": evaluations, "check": checks, "training": trainings}
    return [group for kind, settings in parts.items() for group in _grouped(kind, settings)]


def _grouped(kind: str, settings: Mapping[str, dict[str, str]]) -> Iterator[dict[str, Any]]:
    shared = set.intersection(*(set(lines.items()) for lines in settings.values())) if settings else set()
    for number, (name, lines) in enumerate(settings.items()):
        if number == 0 and shared and len(settings) > 1:
            yield {"title": f"All {kind}s", "lines": [line for line in lines.items() if line in shared]}
        own = [line for line in lines.items() if len(settings) == 1 or line not in shared]
        if own:
            yield {"title": f"{kind.capitalize()}: {_own_part(name)}", "lines": own}


def _evaluation_settings(evaluation: Evaluation) -> dict[str, str]:
    settings = dict(evaluation.result.settings)
    prompts = settings.pop("prompts")
    return _lines({**settings, "trigger words": prompts["trigger_words"], "class word": prompts["class_word"]})


def _lines(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the text of each setting that was made."""
    lines: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines |= _lines(value, f"{prefix}{key}: ")
        elif value is not None and value != [] and value != ():
            lines[f"{prefix}{key}"] = _text(value)
    return lines


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else _own_part(str(value))


def _own_part(text: str) -> str:
    """A path's last name where it is absolute: where the files are is nobody else's business."""
    return printable(Path(text).name) if os.path.isabs(text) else text


def _figure(interval: Interval | None, *, sign: str = "") -> Figure | None:
    if interval is None:
        return None
    # Intervals of a single value have no bounds.
    value, low, high = (f"{number:{sign}.3f}".replace("-", "−") for number in dataclasses.astuple(interval))
    return Figure(interval.value, value, f"{low} to {high}" if interval.low == interval.low else "")


def _bare_figure(value: float) -> Figure:
    return Figure(value, f"{value:.3f}".replace("-", "−"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
