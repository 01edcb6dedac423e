"""From what the study measured to tables, a figure, and all figures as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cat_rs
from cat_rs.atomic import write_bytes
from concepts import read_concepts
from measured import FIRST_RULE, FORMAT, KINDS, OTHERS, Measured, Pairs, Point, Run, mean
from methods import BATCH, LR, METHODS, PLAIN, RANK, RECIPE, STEPS, adapter_name
from multi import COMPARED, TRIO, wrong_at_equal_right
from rule import __doc__ as rule_text

EQUAL_IDENTITY = 0.02


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


def write(output: Path, measured: Measured) -> None:
    """Write tables.md, front.png and study.json."""
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / "tables.md", tables(measured).encode())
    write_bytes(output / "front.png", front_figure(measured.points))
    text = json.dumps(content(measured), indent=1, ensure_ascii=False, default=vars)
    write_bytes(output / "study.json", (text + "\n").encode())


def content(measured: Measured) -> dict[str, Any]:
    """What study.json holds: every run, and the means."""
    rates = list(measured.rates.values())
    return {
        "format": FORMAT,
        "training": {"steps": STEPS, "batch_size": BATCH, "rank": RANK, "lr": LR},
        "runs": [
            {"concept": run[0], "seed": run[1], "adapter": name, "figures": point.figures, "ups_by_kind": point.kinds}
            for run, adapters in measured.points.items()
            for name, point in adapters.items()
        ],
        "equal_identity": {name: compare(measured.points, name) for name in OTHERS},
        "against_the_best_plain": {name: gains(by_rule) for name, by_rule in measured.pairs.items()},
        "without_prompts_of_the_general_list": {title: gains(found) for title, found in measured.unlisted.items()},
        "judged_by_another_encoder": gains(measured.judged),
        "judge": measured.judge,
        "wrong_at_equal_right": {name: wrong_at_equal_right(rates, name) for name in COMPARED[1:]},
        "cost": measured.cost,
        "three_concepts": measured.rates,
    }


def tables(measured: Measured) -> str:
    """The page of tables."""
    points = measured.points
    ruled = {name: gains(by_rule) for name, by_rule in measured.pairs.items()}
    sections = [
        "Written by `python examples/study/study.py`; the text about it is in [README.md](README.md).",
        "## At the last step\n\n" + last_step_table(points),
        "## UPS by kind of prompt, at the last step\n\n" + kinds_table(points),
        "## Against the best plain LoRA\n\n" + gains_table(ruled),
        "## Without the prompts that share a word with the general list\n\n"
        + unlisted_table({title: gains(found) for title, found in measured.unlisted.items()}),
        "## Judged by a network that was trained on other pictures\n\n"
        + judged_table(ruled[RECIPE], gains(measured.judged), measured.judge),
        "## The highest identity that a method reaches\n\n" + reach_table(points),
        "## Against plain LoRA stopped early, at equal identity\n\n"
        + equal_identity_table({name: compare(points, name) for name in OTHERS}),
        "## Cost\n\n" + cost_table(measured.cost),
        "## One adapter for three concepts, and three adapters added\n\n" + together_table(measured.rates),
        "## Every run, at the last step\n\n" + runs_table(points),
    ]
    return "# Study: tables\n\n" + "\n\n".join(sections) + "\n"


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


def gains(named: Mapping[str, Pairs]) -> dict[str, Any]:
    """Name of a rule or method -> its pairs with plain LoRA, and their means, concepts resampled as wholes."""
    numbers = {concept: number for number, concept in enumerate(read_concepts())}
    found: dict[str, Any] = {}
    for name, pairs in named.items():
        clusters = [numbers[concept] for concept, _ in pairs]
        found[name] = {
            "runs": len(pairs),
            "matches": {f"{concept}, {seed}": pair._asdict() for (concept, seed), pair in pairs.items()},
        }
        for figure in ("ups", "identity") if pairs else ():
            found[name][figure] = Estimate.of([getattr(pair, figure) for pair in pairs.values()], clusters)
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
        for name in OTHERS
    ]
    heading = ("method", *(f"{figure}, {title}" for title in unlisted for figure in ("UPS", "identity")))
    text = (
        f'The last two methods preserve the bundled general list. By the rule "{FIRST_RULE}", such prompts left out '
        "of both halves."
    )
    return f"{text}\n\n{table(heading, rows)}"


def judged_table(own: Mapping[str, Any], other: Mapping[str, Any], judge: Mapping[str, Any]) -> str:
    """The same pairs of adapters by both encoders."""
    rows = [
        [title, str(found["runs"]), *(f"{each[title][key]}" for each in (own, other) for key in ("ups", "identity"))]
        for title, found in own.items()
        if found["runs"]
    ]
    heading = ("rule", "runs", "UPS by CLIP", "identity by CLIP", "UPS by the other", "identity by the other")
    text = (
        f"{RECIPE} less plain LoRA, the same adapters, by {judge['encoder']}. On its scale, base against base with "
        f"other noise has a UPS of {judge['base_with_other_noise']:.3f}, and the base model an identity of "
        f"{judge['base_identity']:.3f}."
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


def together_table(rates: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    kinds = ("wrong", "wrong with trigger", "wrong without trigger", "right")
    names = ("base", *(f"{name}, {way}" for way in ("together", "added") for name in COMPARED))
    rows = [[name, *(f"{mean(rate[name][kind] for rate in rates.values()):.3f}" for kind in kinds)] for name in names]
    heading = ("adapter", "wrong concept", "with trigger", "without trigger", "asked concept appears")
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
