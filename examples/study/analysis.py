"""From the evaluations of the study to tables, a figure, and all figures as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cat_rs
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import EvaluationResult
from concepts import read_concepts
from methods import BATCH, LR, METHODS, PLAIN, RANK, RECIPE, STEPS, adapter_name
from multi import COMPARED, TRIO, wrong_at_equal_right, wrong_rates
from rule import RULES, match
from rule import __doc__ as rule_text

Run = tuple[str, int]
"""A concept and a seed."""

KINDS = ("class", "neighbour", "other class", "unlike captions")
FIGURES = ("identity", "ups", "tps", "kps", "drift", "diversity_retained", "prompt_similarity")
EQUAL_IDENTITY = 0.02
FIRST_RULE = next(iter(RULES))
UNLISTED = {"without those of any kind": KINDS, "without those of other kinds than the class": KINDS[1:]}


@dataclass(frozen=True)
class Point:
    """The figures of one adapter."""

    figures: dict[str, float]
    kinds: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float], clusters: Sequence[int] | None = None) -> Estimate:
        low, high = float("nan"), float("nan")
        if len(values) > 1:
            low, high = cat_rs.bootstrap_interval(values, "mean", clusters=clusters)
        return cls(sum(values) / len(values), low, high, len(values))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def write(
    output: Path,
    results: Mapping[Run, Path],
    judged: Mapping[Run, Path],
    together: Mapping[int, Path],
    costs: Mapping[str, Path],
) -> None:
    """Write tables.md, front.png and study.json."""
    output.mkdir(parents=True, exist_ok=True)
    own, others = ({run: EvaluationResult.load(file) for run, file in files.items()} for files in (results, judged))
    points = {run: read_points(result, run[0]) for run, result in own.items()}
    ruled = {name: gains(own, own, name) for name in METHODS if name != PLAIN}
    by_other = gains(own, others, RECIPE)
    unlisted = {
        title: {name: gains(own, own, name, kinds)[FIRST_RULE] for name in METHODS if name != PLAIN}
        for title, kinds in UNLISTED.items()
    }
    spent = {name: json.loads(file.read_text()) for name, file in costs.items()}
    rates = {
        seed: wrong_rates(json.loads(file.read_text(encoding="utf-8"))["appearances"])
        for seed, file in together.items()
    }
    scores = {
        seed: EvaluationResult.from_json(json.dumps(json.loads(file.read_text(encoding="utf-8"))["evaluation"]))
        for seed, file in together.items()
    }
    compared = {name: compare(points, name) for name in METHODS if name != PLAIN}
    sections = [
        "Written by `python examples/study/study.py`; the text about it is in [README.md](README.md).",
        "## At the last step\n\n" + last_step_table(points),
        "## UPS by kind of prompt, at the last step\n\n" + kinds_table(points),
        "## Against the best plain LoRA\n\n" + gains_table(ruled),
        "## Without the prompts that share a word with the general list\n\n" + unlisted_table(unlisted),
        "## Judged by a network that was trained on other pictures\n\n"
        + judged_table(ruled[RECIPE], by_other, list(others.values())),
        "## The highest identity that a method reaches\n\n" + reach_table(points),
        "## Against plain LoRA stopped early, at equal identity\n\n" + equal_identity_table(compared),
        "## Cost\n\n" + cost_table(spent),
        "## One adapter for three concepts, and three adapters added\n\n" + together_table(rates, scores),
        "## Every run, at the last step\n\n" + runs_table(points),
    ]
    write_bytes(output / "tables.md", ("# Study: tables\n\n" + "\n\n".join(sections) + "\n").encode())
    write_bytes(output / "front.png", front_figure(points))
    content = {
        "format": "cat-rs study 1",
        "training": {"steps": STEPS, "batch_size": BATCH, "rank": RANK, "lr": LR},
        "runs": [
            {"concept": run[0], "seed": run[1], "adapter": name, "figures": point.figures, "ups_by_kind": point.kinds}
            for run, adapters in points.items()
            for name, point in adapters.items()
        ],
        "equal_identity": compared,
        "against_the_best_plain": ruled,
        "without_prompts_of_the_general_list": unlisted,
        "judged_by_another_encoder": by_other,
        "wrong_at_equal_right": {name: wrong_at_equal_right(list(rates.values()), name) for name in COMPARED[1:]},
        "cost": spent,
        "three_concepts": rates,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, default=vars)
    write_bytes(output / "study.json", (text + "\n").encode())


def read_points(result: EvaluationResult, concept: str) -> dict[str, Point]:
    """The figures of every adapter of a run."""
    kinds = read_concepts()[concept].kinds
    points = {}
    for name, scores in result.adapters.items():
        figures = {key: getattr(scores, key).value for key in FIGURES if getattr(scores, key) is not None}
        by_kind = {}
        for kind, prompts in kinds.items():
            values = [
                value
                for row in result.prompts
                if row.model == name and row.prompt in prompts
                for value in row.similarity
            ]
            by_kind[kind] = cat_rs.harmonic_mean(values)
        points[name] = Point(figures, by_kind)
    return points


def last(name: str) -> str:
    """The adapter of a method's last step."""
    return f"{name} @ {METHODS[name].steps}"


def compare(points: Mapping[Run, Mapping[str, Point]], name: str) -> dict[str, Any]:
    """A method's last adapter against plain LoRA's adapter of the nearest identity, in each run where one is near."""
    differences, identities, steps = [], [], []
    for adapters in points.values():
        mine = adapters[last(name)].figures
        nearest = min(
            (f"{PLAIN} @ {step}" for step in METHODS[PLAIN].kept),
            key=lambda other: abs(adapters[other].figures["identity"] - mine["identity"]),
        )
        other = adapters[nearest].figures
        if abs(other["identity"] - mine["identity"]) <= EQUAL_IDENTITY:
            differences.append(mine["ups"] - other["ups"])
            identities.append(mine["identity"] - other["identity"])
            steps.append(int(nearest.split()[-1]))
    if not differences:
        return {"runs": 0}
    return {
        "runs": len(differences),
        "ups": Estimate.of(differences),
        "identity": Estimate.of(identities),
        "plain_stopped_at": steps,
        "higher": sum(difference > 0 for difference in differences),
    }


def gains(
    results: Mapping[Run, EvaluationResult],
    judged: Mapping[Run, EvaluationResult],
    name: str,
    unlisted: Sequence[str] = (),
) -> dict[str, Any]:
    """A method against plain LoRA by each rule: differences on the scored prompts, concepts resampled as wholes.

    The adapters are chosen by `results`, the differences are those in `judged`. Prompts of the kinds `unlisted` that
    share a word with the general list are left out.
    """
    concepts = read_concepts()
    numbers = {concept: number for number, concept in enumerate(concepts)}
    found = {}
    for title, rule in RULES.items():
        matches = {
            run: match(each, concepts[run[0]], name, rule, judged[run], concepts[run[0]].listed(*unlisted))
            for run, each in results.items()
        }
        matched = {run: each for run, each in matches.items() if each is not None}
        clusters = [numbers[concept] for concept, _ in matched]
        found[title] = {
            "runs": len(matched),
            "matches": {f"{concept}, {seed}": each._asdict() for (concept, seed), each in matched.items()},
        }
        for figure in ("ups", "identity") if matched else ():
            found[title][figure] = Estimate.of([getattr(each, figure) for each in matched.values()], clusters)
    return found


def gains_table(ruled: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, by_rule in ruled.items():
        for title, found in by_rule.items() if name == RECIPE else [(FIRST_RULE, by_rule[FIRST_RULE])]:
            cells = [f"{found[key]}" if found["runs"] else "-" for key in ("ups", "identity")]
            rows.append([name, title, str(found["runs"]), *cells])
    text = (rule_text or "").partition("\n\n")[2].strip()
    heading = ("method", "rule", "runs", "UPS - UPS of plain LoRA", "identity - identity")
    return f"{text}\n\nIntervals: concepts resampled as wholes.\n\n{table(heading, rows)}"


def unlisted_table(unlisted: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        [name, *(f"{by_name[name][key]}" for by_name in unlisted.values() for key in ("ups", "identity"))]
        for name in METHODS
        if name != PLAIN
    ]
    heading = ("method", *(f"{figure}, {title}" for title in unlisted for figure in ("UPS", "identity")))
    text = (
        f'The last two methods preserve the bundled general list. By the rule "{FIRST_RULE}", such prompts left out '
        "of both halves."
    )
    return f"{text}\n\n{table(heading, rows)}"


def judged_table(
    own: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]], results: Sequence[EvaluationResult]
) -> str:
    """The same pairs of adapters by both encoders."""
    rows = [
        [title, str(found["runs"]), *(f"{each[title][key]}" for each in (own, other) for key in ("ups", "identity"))]
        for title, found in own.items()
        if found["runs"]
    ]
    heading = ("rule", "runs", "UPS by CLIP", "identity by CLIP", "UPS by the other", "identity by the other")
    floor = mean(result.other_seed.ups.value for result in results if result.other_seed is not None)
    base = mean(result.base.identity.value for result in results)
    text = (
        f"{RECIPE} less plain LoRA, the same adapters, by {results[0].settings['encoder']}. On its scale, base "
        f"against base with other noise has a UPS of {floor:.3f}, and the base model an identity of {base:.3f}."
    )
    return f"{text}\n\n{table(heading, rows)}"


def reach_table(points: Mapping[Run, Mapping[str, Point]]) -> str:
    def highest(run: Mapping[str, Point], name: str) -> float:
        return max(run[adapter].figures["identity"] for adapter in METHODS[name].adapters_at_full_scale())

    rows = []
    for name in METHODS:
        shares = [highest(run, name) / highest(run, PLAIN) for run in points.values()]
        rows.append([name, f"{mean(highest(run, name) for run in points.values()):.3f}", str(Estimate.of(shares))])
    return table(("method", "highest identity", "of plain LoRA's"), rows)


def last_step_table(points: Mapping[Run, Mapping[str, Point]]) -> str:
    columns = ("identity", "ups", "kps", "tps", "diversity_retained", "prompt_similarity")
    heading = ("method", "identity", "UPS", "KPS", "TPS", "diversity retained", "CLIP-T")
    rows = []
    for name in METHODS:
        estimates = [Estimate.of([run[last(name)].figures[key] for run in points.values()]) for key in columns]
        rows.append([name, str(estimates[0]), str(estimates[1]), *(f"{each.value:.3f}" for each in estimates[2:])])
    text = "\n".join(f"- **{method.name}**: {method.what}" for method in METHODS.values())
    title = f"Means over {len(points)} runs, with 95 % bootstrap intervals over the runs."
    return f"{title}\n\n{table(heading, rows)}\n\n{text}"


def kinds_table(points: Mapping[Run, Mapping[str, Point]]) -> str:
    rows = [
        [name, *(f"{mean(run[last(name)].kinds[kind] for run in points.values()):.3f}" for kind in KINDS)]
        for name in METHODS
    ]
    return table(("method", *KINDS), rows)


def equal_identity_table(compared: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, found in compared.items():
        if found["runs"]:
            gain = found["ups"]
            text = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
            rows.append([name, str(found["runs"]), text, str(found["higher"]), f"{found['identity'].value:+.3f}"])
        else:
            rows.append([name, "0", "-", "-", "-"])
    heading = ("method", "runs with a match", "UPS - UPS of plain LoRA", "higher in", "identity - identity")
    return (
        f"Each method's last adapter beside the adapter of plain LoRA, of those saved every {METHODS[PLAIN].kept[0]} "
        f"steps, whose identity is nearest, where that is within {EQUAL_IDENTITY}; means over runs with paired 95 % "
        f"bootstrap intervals.\n\n{table(heading, rows)}"
    )


def cost_table(spent: Mapping[str, Mapping[str, float]]) -> str:
    plain = spent[PLAIN]["seconds_per_step"]
    rows = [
        [
            name,
            f"{1000 * cost['seconds_per_step']:.0f}",
            f"{cost['seconds_per_step'] / plain:.2f}",
            f"{cost['seconds_before']:.1f}",
            f"{cost['peak_memory_mib']:.0f}",
        ]
        for name, cost in spent.items()
    ]
    heading = ("method", "ms a step", "of plain LoRA's", "seconds beside the steps", "peak memory, MiB")
    return f"One thread, one process a method, from runs of two lengths.\n\n{table(heading, rows)}"


def together_table(rates: Mapping[int, Mapping[str, Mapping[str, float]]], scores: Mapping[int, Any]) -> str:
    rows = []
    kinds = ("wrong", "wrong with trigger", "wrong without trigger", "right")
    names = [f"{name}, {way}" for way in ("together", "added") for name in COMPARED]
    for name in ["base", *names]:
        means = [f"{mean(rate[name][kind] for rate in rates.values()):.3f}" for kind in kinds]
        if name == "base":
            rows.append([name, *means, "-", "-"])
        else:
            figures = (
                mean(getattr(result.adapters[name], key).value for result in scores.values()) for key in ("ups", "kps")
            )
            rows.append([name, *means, *(f"{value:.3f}" for value in figures)])
    heading = ("adapter", "wrong concept", "with trigger", "without trigger", "asked concept appears", "UPS", "KPS")
    return f"Concepts: {', '.join(TRIO)}. Means over {len(rates)} seeds.\n\n{table(heading, rows)}"


def runs_table(points: Mapping[Run, Mapping[str, Point]]) -> str:
    names = list(METHODS)
    rows = [
        [f"{concept}, {seed}"]
        + [
            f"{adapters[last(name)].figures['identity']:.2f} / {adapters[last(name)].figures['ups']:.3f}"
            for name in names
        ]
        for (concept, seed), adapters in points.items()
    ]
    return f"Identity / UPS.\n\n{table(('run', *names), rows)}"


def front_figure(points: Mapping[Run, Mapping[str, Point]]) -> bytes:
    """Identity against UPS, means over the runs: a line for each method and scale through the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def place(adapter: str) -> tuple[float, float]:
        figures = [run[adapter].figures for run in points.values()]
        return mean(each["identity"] for each in figures), mean(each["ups"] for each in figures)

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    colours = iter(plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    for method in METHODS.values():
        own = method.name in (PLAIN, RECIPE)
        colour = {PLAIN: "black", RECIPE: "crimson"}.get(method.name) or next(colours)
        for scale in method.scales:
            names = [adapter_name(method.name, step, scale) for step in method.kept]
            line, weak = ("-", 1.0) if scale == 1.0 else (":", 0.45)
            label = method.name if scale == 1.0 else None
            width, size = (2.2, 6) if own and scale == 1.0 else (1.2, 3)
            axes.plot(
                *zip(*map(place, names), strict=True),
                f"{line}o",
                color=colour,
                alpha=weak,
                linewidth=width,
                markersize=size,
                label=label,
            )
            if scale != 1.0:
                text = {"textcoords": "offset points", "xytext": (5, 0), "fontsize": 7}
                axes.annotate(f"x {scale:g}", place(names[-1]), color=colour, **text)
    axes.set_xlabel("identity: mean cosine to the concept's pictures, with the trigger")
    axes.set_ylabel("UPS: what survived of the base model, without the trigger")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
