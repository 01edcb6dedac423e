"""Plain LoRA stopped at CAT's identity, in the setting of `make demo`: ``python examples/study/stopped_early.py``.

Takes the demo's committed results, trains their plain LoRA again, and scores its checkpoints until one has CAT's
identity, up to 0.02. Writes stopped-early.json and the tables in stopped-early.md. Stop it at any time and start it
again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import EQUAL_IDENTITY, table
from cat_rs.evaluation import EvaluationResult
from demo_setting import score_adapters, train_adapter

DOCS = Path(__file__).parents[2] / "docs"
FILES = ("demo/results.json", "study/results-preserve-seed0.json", "study/results-preserve-seed1.json")
STOPPED = "stopped"
STEPS = 1200
EVERY = 50
FIGURES = {"ups": "UPS", "identity": "identity", "diversity_retained": "diversity kept", "kps": "KPS"}
COMPARED = {"ups": "UPS", "identity": "identity", "diversity": "diversity", "kps": "KPS"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--concepts", nargs="+", metavar="NAME", help="those of the demo's runs; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="the same")
    parser.add_argument("--work", type=Path, default=Path("stopped-early"), metavar="DIR", help="folder for all parts")
    parser.add_argument("--output", type=Path, default=DOCS / "study", metavar="DIR", help="folder for the results")
    options = parser.parse_args()
    runs = []
    for file, concept, seed, demo in demo_runs():
        if concept not in (options.concepts or [concept]) or seed not in (options.seeds or [seed]):
            continue
        print(f"{file}: {concept}, seed {seed}", flush=True)
        train_plain(options.work, concept, seed)
        runs.append({"file": file, "concept": concept, "seed": seed, **stop(options.work, concept, seed, demo)})
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"format": "cat-rs stopped early 1", "steps": STEPS, "runs": runs}
    (options.output / "stopped-early.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.output / "stopped-early.md").write_text(page(runs), encoding="utf-8")


def demo_runs() -> list[tuple[str, str, int, EvaluationResult]]:
    """File, concept, seed and evaluation of the demo's runs; their adapters are LoRA and CAT."""
    runs = []
    for file in FILES:
        for run in json.loads((DOCS / file).read_text(encoding="utf-8"))["runs"]:
            runs.append((file, run["concept"], run["seed"], EvaluationResult.from_json(json.dumps(run["evaluation"]))))
    return runs


def train_plain(work: Path, concept: str, seed: int) -> None:
    """Train plain LoRA and keep its checkpoints, unless that is done."""
    folder = work / f"{concept}-seed{seed}"
    if not (folder / "checkpoints" / f"step-{STEPS:06d}").exists():
        # All of them, those of interruptions included.
        settings = {"cat_factor": 0.0, "checkpoint_every": EVERY, "keep_checkpoints": STEPS}
        train_adapter(concept, seed, folder, steps=STEPS, **settings)


def score(work: Path, concept: str, seed: int, step: int) -> EvaluationResult:
    """Score plain LoRA after a step, unless that is done."""
    folder = work / f"{concept}-seed{seed}"
    target = folder / f"step-{step:06d}.json"
    if not target.exists():
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        score_adapters(concept, {STOPPED: checkpoint}, (0, 1), work / "pictures").save(target)
    return EvaluationResult.load(target)


def stop(work: Path, concept: str, seed: int, demo: EvaluationResult) -> dict[str, Any]:
    """Find plain LoRA's first checkpoint with CAT's identity, and compare CAT with it."""
    wanted = demo.adapters["CAT"].identity.value - EQUAL_IDENTITY
    steps = {}
    for step in range(EVERY, STEPS + 1, EVERY):
        plain = score(work, concept, seed, step)
        stopped = plain.adapters[STOPPED]
        steps[step] = {"identity": stopped.identity.value, "ups": stopped.ups.value}
        if stopped.identity.value >= wanted:
            break
    return {"steps": steps, **compared(demo, plain)}


def compared(demo: EvaluationResult, plain: EvaluationResult) -> dict[str, Any]:
    """The scores of LoRA, LoRA stopped early and CAT, and CAT's paired differences from both."""
    rows = (*demo.prompts, *(row for row in plain.prompts if row.model == STOPPED))
    both = replace(demo, adapters={**demo.adapters, **plain.adapters}, prompts=rows)
    return {
        "scores": {
            name: {key: vars(getattr(scores, key)) for key in FIGURES} for name, scores in both.adapters.items()
        },
        "cat_minus_lora": {
            name: {key: vars(getattr(both.compare(name, "CAT"), key)) for key in COMPARED}
            for name in ("LoRA", STOPPED)
        },
    }


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The tables. Intervals of single scores are those of the stopped adapter; the demo's are on their own page."""

    def interval(value: Mapping[str, float], sign: str = "") -> str:
        return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"

    scores, differences, fronts = [], [], []
    for run in runs:
        name = f"{run['concept']}, {run['seed']}" + (" (demo)" if run["file"] == FILES[0] else "")
        last = max(map(int, run["steps"]))
        for adapter, label in (("LoRA", f"LoRA, {STEPS}"), (STOPPED, f"LoRA, {last}"), ("CAT", f"CAT, {STEPS}")):
            own = run["scores"][adapter]
            figures = [interval(own[key]) if adapter == STOPPED else f"{own[key]['value']:.3f}" for key in FIGURES]
            scores.append([name, label, *figures])
        for adapter, step in (("LoRA", STEPS), (STOPPED, last)):
            own = run["cat_minus_lora"][adapter]
            differences.append([name, str(step), *(interval(own[key], "+") for key in COMPARED)])
        on_the_way = (f"{step}: {each['identity']:.3f} / {each['ups']:.3f}" for step, each in run["steps"].items())
        fronts.append([name, "; ".join(on_the_way)])
    sections = [
        "# Plain LoRA stopped at CAT's identity",
        "Written by `python examples/study/stopped_early.py`. The demo's CAT is the default of `cat-rs train`; the "
        "others preserved 206 prompts beside the captions ([earlier.md](earlier.md)).",
        f"Plain LoRA is scored every {EVERY} steps and stopped when its identity is CAT's up to {EQUAL_IDENTITY}.",
        "## Scores\n\n" + table(("concept, seed", "adapter, steps", *FIGURES.values()), scores),
        "## CAT - LoRA, paired\n\n" + table(("concept, seed", "LoRA's steps", *COMPARED.values()), differences),
        "## Plain LoRA on the way\n\n" + table(("concept, seed", "steps: identity / UPS"), fronts),
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main()
