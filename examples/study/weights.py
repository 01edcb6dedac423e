"""Other weights of the default: ``python examples/study/weights.py``.

Trains the study's recipe with other factors, ramps and shares, on the two concepts that it was tuned on, and compares
each with plain LoRA by the study's first rule. Writes weights.json and weights.md. Stop it at any time and start it
again; it shares the work folder of `study.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import study
from analysis import table
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import ClipEncoder, EvaluationResult
from concepts import CLIP, read_concepts
from measured import FIRST_RULE, mean
from methods import LONGEST, METHODS, PLAIN, RECIPE, Method, adapter_file
from rule import RULES, match

CONCEPTS, SEEDS = ("pineapple", "tractor"), (0, 1)
WEIGHTS: dict[str, dict[str, float]] = {
    "factor 0.5": {"cat_factor": 0.5},
    "factor 1, the default": {},
    "factor 2": {"cat_factor": 2.0},
    "factor 3": {"cat_factor": 3.0},
    "factor 4": {"cat_factor": 4.0},
    "factor from 0.5 to 3": {"cat_factor": 0.5, "cat_factor_end": 3.0},
    "factor from 1 to 3": {"cat_factor": 1.0, "cat_factor_end": 3.0},
    "factor 1, a quarter of general prompts": {"preserve_share": 0.25},
}
STEPS = (LONGEST[0], LONGEST[2], LONGEST[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("study"), metavar="DIR", help="folder for all parts")
    parser.add_argument("--output", type=Path, default=Path("docs/study"), metavar="DIR", help="folder of the results")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str((options.work / "cache").resolve())
    for name in CONCEPTS:
        study.write_data(study.data_folder(options.work, name), [read_concepts()[name]])
    runs = list(itertools.product(CONCEPTS, SEEDS))
    study.run(study.train_unit, [(options.work, PLAIN, *run) for run in runs], options.workers, "train plain LoRA")
    units = [(options.work, weight, *run) for weight, run in itertools.product(WEIGHTS, runs)]
    study.run(train_unit, units, options.workers, "train")
    study.run(evaluate_unit, units, options.workers, "evaluate")
    write(options.output, [figures(*unit) for unit in units])


def weighted(weight: str) -> Method:
    """The recipe with another weight, under its own name."""
    return replace(METHODS[RECIPE], train=partial(METHODS[RECIPE].train, **WEIGHTS[weight]))


def unit_folder(work: Path, weight: str, concept: str, seed: int) -> Path:
    """Where adapters and scores of one weight are."""
    return work / "weights" / study.stem(weight) / f"{study.stem(concept)}-seed{seed}"


def train_unit(work: Path, weight: str, concept_name: str, seed: int) -> None:
    """Train with one weight on one concept, unless that is done."""
    method, folder = weighted(weight), unit_folder(work, weight, concept_name, seed)
    if not all(adapter_file(folder, step).exists() for step in method.kept):
        method.train(method, read_concepts()[concept_name], seed, study.data_folder(work, concept_name), folder)


def evaluate_unit(work: Path, weight: str, concept_name: str, seed: int) -> None:
    """Score these adapters and plain LoRA's, unless that is done."""
    folder = unit_folder(work, weight, concept_name, seed)
    target = folder / "evaluation.json"
    if not target.exists():
        adapters = study.adapters_of(work, [PLAIN], concept_name, seed) | weighted(weight).adapters(folder)
        study.score(work, concept_name, adapters, ClipEncoder.from_pretrained(CLIP), target)


def figures(work: Path, weight: str, concept: str, seed: int) -> dict[str, Any]:
    """The rule's pair of one run, the adapters on the way, and their highest identity over that of plain LoRA's."""
    result = EvaluationResult.load(unit_folder(work, weight, concept, seed) / "evaluation.json")
    pair = match(result, read_concepts()[concept], RECIPE, RULES[FIRST_RULE])
    assert pair is not None  # this rule always finds one
    identity = {name: scores.identity.value for name, scores in result.adapters.items()}
    ups = {name: scores.ups.value for name, scores in result.adapters.items()}
    own = METHODS[RECIPE].adapters_at_full_scale()
    return {
        "weight": weight,
        "concept": concept,
        "seed": seed,
        "pair": pair._asdict(),
        "highest_identity": max(identity[name] for name in own)
        / max(identity[name] for name in METHODS[PLAIN].adapters(Path())),
        "steps": {
            str(step): {"identity": identity[name], "ups": ups[name]} for step, name in zip(LONGEST, own, strict=True)
        },
    }


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write weights.json and weights.md."""
    content = {"format": "cat-rs weights 1", "rule": FIRST_RULE, "runs": rows}
    write_bytes(output / "weights.json", (json.dumps(content, indent=1) + "\n").encode())
    write_bytes(output / "weights.md", page(rows).encode())


def page(rows: list[dict[str, Any]]) -> str:
    """The table: means over the runs of each weight."""
    lines = []
    for weight in dict.fromkeys(row["weight"] for row in rows):
        own = [row for row in rows if row["weight"] == weight]
        on_the_way = (
            " / ".join(f"{mean(row['steps'][str(step)][key] for row in own):.3f}" for key in ("identity", "ups"))
            for step in STEPS
        )
        gains = [row["pair"]["ups"] for row in own]
        lines.append(
            [
                weight,
                f"{mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})",
                f"{mean(row['pair']['identity'] for row in own):+.3f}",
                f"{mean(row['highest_identity'] for row in own):.3f}",
                *on_the_way,
            ]
        )
    heading = ("weight", "UPS - UPS of plain LoRA", "identity - identity", "highest identity, of plain LoRA's")
    sections = (
        "# Other weights of the default",
        "Written by `python examples/study/weights.py`; the text about it is in [README.md](README.md).",
        f"Means over {len(CONCEPTS)} concepts ({', '.join(CONCEPTS)}) and {len(SEEDS)} seeds, the lowest and the "
        f'highest in parentheses. Pairs by the rule "{FIRST_RULE}". Identity / UPS after some of the steps.',
        table((*heading, *(f"step {step}" for step in STEPS)), lines),
    )
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main()
