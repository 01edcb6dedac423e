"""What `cat_rs.check` says of the study's adapters beside what the study says: ``python examples/study/checks.py``.

`check` sees an adapter's file and the base model alone. Ranks adapters by its UPS and by the study's: of each concept
every sixth of all methods, steps and scales, from another one on. The prompts of `check` were settled on the adapters
of the first seed; nobody had checked those of the others before. Of the first seed's last adapters, asks whether the
largest safe scale that one picture seed finds is safe with three others, and tells what is left of the base model at
false triggers. Every finished check is a file in the study's work folder: stop it at any time and start it again.
Writes checks.json, in which the seeds that are not run here stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

import cat_rs
import numpy as np
import torch
from analysis import Estimate
from cat_rs.adapter_check.prompts import CLASS, FALSE_TRIGGERS
from cat_rs.adapter_check.result import PictureCheck
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import ClipEncoder, EvaluationConfig, EvaluationResult
from concepts import CLIP, MODEL, read_concepts
from diffusers import StableDiffusionPipeline
from methods import METHODS, PLAIN, RECIPE, adapter_name
from rule import figures, half_of
from study import INFERENCE_STEPS, PICTURE_SEEDS, SEEDS, evaluation_file, run, stem

EVERY = 6
SCALED = (PLAIN, RECIPE)
# About as many as the class and its neighbours have.
PROMPTS_OF_A_KIND = 24
WITHOUT = "without the trigger"
# UPS by `check`: of all kinds without the trigger, of the class, and of the kind that suffers most.
FIGURES = ("all", "class", "worst")
MAX_DRIFT = 0.05
SCALES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("study"), metavar="DIR", help="the study's work folder")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/study"), metavar="DIR", help="folder for the results"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="some of the seeds")
    options = parser.parse_args()
    concepts = list(read_concepts())
    scored = {
        seed: [(options.work, concept, seed, name) for concept in concepts for name in sample(concepts.index(concept))]
        for seed in options.seeds
    }
    scaled = []
    if SEEDS[0] in options.seeds:
        scaled = [(options.work, concept, SEEDS[0], name) for concept in concepts for name in map(last, SCALED)]
    run(check_ups, list(itertools.chain(*scored.values())), options.workers)
    run(check_scale, scaled, options.workers)
    target = options.output / "checks.json"
    published = json.loads(target.read_text()) if target.exists() else {"ups": {}, "scales": []}
    ups = {int(seed): rows for seed, rows in published["ups"].items()}
    ups |= {seed: [json.loads(ups_file(*call).read_text()) for call in calls] for seed, calls in scored.items()}
    scales = [json.loads(scale_file(*call).read_text()) for call in scaled] or published["scales"]
    content = {
        "format": "cat-rs study checks 1",
        "spearman": {
            seed: {figure: correlation(rows, figure, "study") for figure in FIGURES} for seed, rows in ups.items()
        },
        "spearman_of_the_studys_halves": {
            seed: correlation(rows, "first_half", "second_half") for seed, rows in ups.items()
        },
        "false_triggers": false_triggers(scales),
        "ups": ups,
        "held": sum(row["held"] for row in scales),
        "found": sum(row["safest"] is not None for row in scales),
        "scales": scales,
    }
    write_bytes(target, (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps({name: value for name, value in content.items() if name not in ("ups", "scales")}, indent=1))


def sample(start: int) -> list[str]:
    """Every sixth of the study's adapters of a concept and seed."""
    return list(all_adapters(Path()))[start % EVERY :: EVERY]


def all_adapters(unit: Path) -> dict[str, tuple[Path, float]]:
    """Name -> file and scale, of all methods in the folder of a concept and seed."""
    return {
        name: (Path(adapter.path), adapter.scale)
        for method in METHODS.values()
        for name, adapter in method.adapters(unit / stem(method.name)).items()
    }


def last(method: str) -> str:
    """The name of a method's last adapter."""
    return adapter_name(method, METHODS[method].steps)


def correlation(rows: list[dict[str, Any]], one: str, other: str) -> dict[str, float]:
    """Rank correlation of two figures."""
    return spearman([row["concept"] for row in rows], [(row[one], row[other]) for row in rows])


def false_triggers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """UPS at false triggers of each kind of adapter, concepts resampled as wholes."""
    concepts = list(read_concepts())
    found = {}
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        own = [row for row in rows if row["adapter"] == adapter]
        clusters = [concepts.index(row["concept"]) for row in own]
        found[adapter] = vars(Estimate.of([row["false_triggers"] for row in own], clusters))
    return found


def ups_file(work: Path, concept: str, seed: int, name: str) -> Path:
    return work / "checks" / f"{stem(concept)}-seed{seed}-{stem(name)}.json"


def scale_file(work: Path, concept: str, seed: int, name: str) -> Path:
    return ups_file(work, concept, seed, f"scales of {name}")


def check_ups(work: Path, concept: str, seed: int, name: str) -> None:
    """UPS of one adapter by `check`, by the study and by its halves, unless that is done."""
    target = ups_file(work, concept, seed, name)
    if target.exists():
        return
    _, scale = all_adapters(Path())[name]
    (checked,) = checked_pictures(work, concept, seed, name, (scale,), PICTURE_SEEDS).scales
    study = EvaluationResult.load(evaluation_file(work, concept, seed))
    first, second = (figures(study, half_of(read_concepts()[concept], half))[name].ups for half in (0, 1))
    write(
        target,
        concept=concept,
        adapter=name,
        **dict(
            zip(FIGURES, (checked.kinds[kind].ups.value for kind in (WITHOUT, CLASS, checked.damaged)), strict=True)
        ),
        study=study.adapters[name].ups.value,
        first_half=first,
        second_half=second,
    )


def check_scale(work: Path, concept: str, seed: int, name: str) -> None:
    """The largest safe scale by one picture seed, and the damage there with three others, unless that is done."""
    target = scale_file(work, concept, seed, name)
    if target.exists():
        return
    adapter = (work, concept, seed, name)
    found = checked_pictures(*adapter, SCALES, (0,))
    damage = None
    if found.safest is not None:
        damage = checked_pictures(*adapter, (found.safest,), (1, 2, 3)).scales[0].damage.value
    write(
        target,
        concept=concept,
        adapter=name,
        false_triggers=found.scales[-1].kinds[FALSE_TRIGGERS].ups.value,
        safest=found.safest,
        damage=[each.damage.value for each in found.scales],
        damage_with_other_seeds=damage,
        held=damage is not None and damage <= MAX_DRIFT,
    )


def checked_pictures(
    work: Path, concept: str, seed: int, name: str, scales: tuple[float, ...], picture_seeds: tuple[int, ...]
) -> PictureCheck:
    """What `check` finds in pictures at scales; trigger and class word come from the file."""
    file, _ = all_adapters(evaluation_file(work, concept, seed).parent)[name]
    checked = cat_rs.check(
        {"adapter": file},
        StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32),
        ClipEncoder.from_pretrained(CLIP),
        scales=scales,
        max_drift=MAX_DRIFT,
        limit=PROMPTS_OF_A_KIND,
        config=EvaluationConfig(num_inference_steps=INFERENCE_STEPS, seeds=picture_seeds, batch_size=16),
        cache=work / "check-pictures",
        progress=False,
    )
    pictures = checked.adapters["adapter"].pictures
    assert pictures is not None
    assert pictures.trigger == read_concepts()[concept].trigger
    return pictures


def write(target: Path, **content: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, (json.dumps(content, indent=1) + "\n").encode())


def spearman(concepts: list[str], pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Rank correlation, with an interval that resamples concepts as wholes."""
    values, names = np.array(pairs), np.array(concepts)
    groups = [values[names == name] for name in dict.fromkeys(concepts)]
    random = np.random.default_rng(0)
    resampled = [
        _rank_correlation(np.concatenate([groups[index] for index in random.integers(len(groups), size=len(groups))]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": _rank_correlation(values), "low": float(low), "high": float(high), "adapters": len(pairs)}


def _rank_correlation(values: np.ndarray) -> float:
    return float(np.corrcoef([_ranks(column) for column in values.T])[0, 1])


def _ranks(column: np.ndarray) -> np.ndarray:
    """Of equal values the mean: a resampled adapter stands in the list more than once."""
    ordered = np.sort(column)
    return np.searchsorted(ordered, column, "left") + np.searchsorted(ordered, column, "right")


if __name__ == "__main__":
    main()
