"""Plain LoRA stopped at CAT's identity, in the setting of `make demo`: ``python examples/study/stopped_early.py``.

Trains plain LoRA and CAT with 206 preserve prompts for 1,200 steps on three concepts and two seeds, scores plain LoRA
at several steps, and writes stopped-early.json and the tables in stopped-early.md. Stop it at any time and start it
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis import table
from cat_rs.evaluation import EvaluationResult
from concepts import PRESERVE_PROMPTS
from demo_setting import score_adapters, train_adapter

CONCEPTS = ("panda", "tractor", "pineapple")
SEEDS = (0, 1)
STEPS = 1200
EVERY = 50
SCORED = (*range(EVERY, 401, EVERY), 600, 800, 1000, STEPS)
CAT = f"CAT @ {STEPS}"
FIGURES = ("ups", "identity", "diversity_retained", "kps")
COMPARED = ("ups", "identity", "diversity", "kps")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("stopped-early"), metavar="DIR", help="folder for all parts")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/study"), metavar="DIR", help="folder for the results"
    )
    options = parser.parse_args()
    results = {}
    for concept, seed in itertools.product(CONCEPTS, SEEDS):
        print(f"{concept}, seed {seed}", flush=True)
        train_plain(options.work, concept, seed)
        train_cat(options.work, concept, seed)
        results[concept, seed] = score(options.work, concept, seed)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [found(concept, seed, result) for (concept, seed), result in results.items()]
    content = {"format": "cat-rs stopped early 1", "runs": runs}
    (options.output / "stopped-early.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.output / "stopped-early.md").write_text(page(runs), encoding="utf-8")


def plain(step: int) -> str:
    """The name of plain LoRA's adapter after a step."""
    return f"LoRA @ {step}"


def run_folder(work: Path, concept: str, seed: int) -> Path:
    """The folder of one concept and seed."""
    return work / f"{concept}-seed{seed}"


def train_plain(work: Path, concept: str, seed: int) -> None:
    """Train plain LoRA and keep its checkpoints, unless that is done."""
    folder = run_folder(work, concept, seed) / "LoRA"
    if not (folder / "checkpoints" / f"step-{STEPS:06d}").exists():
        # All of them, those of interruptions included.
        train_adapter(
            concept, seed, folder, steps=STEPS, cat_factor=0.0, checkpoint_every=EVERY, keep_checkpoints=STEPS
        )


def train_cat(work: Path, concept: str, seed: int) -> None:
    """Train CAT with the preserve prompts, unless that is done."""
    folder = run_folder(work, concept, seed) / "CAT"
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        train_adapter(concept, seed, folder, steps=STEPS, preserve_prompts=str(PRESERVE_PROMPTS))


def score(work: Path, concept: str, seed: int) -> EvaluationResult:
    """Score all adapters of one concept and seed, unless that is done."""
    folder = run_folder(work, concept, seed)
    target = folder / "evaluation.json"
    if not target.exists():
        adapters = {plain(step): folder / "LoRA" / "checkpoints" / f"step-{step:06d}" for step in SCORED}
        result = score_adapters(concept, {**adapters, CAT: folder / "CAT"}, (0, 1), work / "pictures")
        result.save(target)
    return EvaluationResult.load(target)


def stopped_at(identities: Mapping[int, float], wanted: float) -> int:
    """The first step whose identity is at least ``wanted``; if there is none, the step with the highest."""
    return next(
        (step for step, identity in identities.items() if identity >= wanted), max(identities, key=identities.get)
    )


def found(concept: str, seed: int, result: EvaluationResult) -> dict[str, Any]:
    """The figures of every adapter of a run, and CAT's differences from plain LoRA stopped early and at its end."""
    scores = {name: {key: vars(getattr(scores, key)) for key in FIGURES} for name, scores in result.adapters.items()}
    identities = {step: scores[plain(step)]["identity"]["value"] for step in SCORED}
    stopped = stopped_at(identities, scores[CAT]["identity"]["value"])
    differences = {
        name: {key: vars(getattr(result.compare(plain(step), CAT), key)) for key in COMPARED}
        for name, step in (("stopped", stopped), ("end", STEPS))
    }
    return {
        "concept": concept,
        "seed": seed,
        "base_identity": vars(result.base.identity),
        "stopped_at": stopped,
        "scores": scores,
        "cat_minus_lora": differences,
    }


def page(runs: list[dict[str, Any]]) -> str:
    """The tables."""

    def interval(value: Mapping[str, float], sign: str = "") -> str:
        return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"

    rows, gains, fronts = [], [], []
    for run in runs:
        name = f"{run['concept']}, {run['seed']}"
        stopped = run["stopped_at"]
        for label, key in (
            (f"LoRA, {STEPS:,} steps", plain(STEPS)),
            (f"LoRA, {stopped:,} steps", plain(stopped)),
            (f"CAT, {STEPS:,} steps", CAT),
        ):
            rows.append([name, label, *(interval(run["scores"][key][figure]) for figure in FIGURES)])
        for label, key in ((f"{STEPS:,}", "end"), (f"{stopped:,}", "stopped")):
            gains.append([name, label, *(interval(run["cat_minus_lora"][key][figure], "+") for figure in COMPARED)])
        scores = [run["scores"][plain(step)] for step in SCORED]
        fronts.append([name, *(f"{each['identity']['value']:.3f} / {each['ups']['value']:.3f}" for each in scores)])
    figures = ("UPS", "identity", "diversity kept", "KPS")
    sections = [
        "# Plain LoRA stopped at CAT's identity",
        "Written by `python examples/study/stopped_early.py`; [earlier.md](earlier.md) says what was trained.",
        "## Scores\n\n" + table(("concept, seed", "adapter", *figures), rows),
        "## CAT - LoRA, paired, at 1,200 steps and where plain LoRA has CAT's identity\n\n"
        + table(("concept, seed", "LoRA's steps", "UPS", "identity", "diversity", "KPS"), gains),
        "## Plain LoRA on the way: identity / UPS\n\n"
        + table(("concept, seed", *(f"{step:,} steps" for step in SCORED)), fronts),
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main()
