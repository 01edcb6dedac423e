"""Compares methods that preserve the base model, on the bundled model: ``python examples/study/study.py``.

Trains every method on every concept and seed, scores the adapters at several steps, does the same for adapters of
three concepts, measures what a step costs, and writes tables and a figure. Every finished part is a file in the work
folder: stop it at any time and start it again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import analysis
import multi
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import ScaledAdapter
from concepts import CLIP, MODEL, read_concepts
from judge import ImageNetEncoder
from measured import Measured
from methods import METHODS, PLAIN, RECIPE, adapter_file
from tqdm import tqdm

SEEDS = (0, 1, 2)
PICTURE_SEEDS = (0, 1)
INFERENCE_STEPS = 10
# Steps of the runs that are timed. The first imports and draws what the next two find; the last draws it again.
COST_STEPS = (2, 10, 50, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("study"), metavar="DIR", help="folder for all parts")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/study"), metavar="DIR", help="folder for the results"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=tuple(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="some of the seeds")
    options = parser.parse_args()
    # Where trainings keep the pictures that the base model drew.
    os.environ["XDG_CACHE_HOME"] = str((options.work / "cache").resolve())
    for name, stage in STAGES.items():
        if name in options.only:
            stage(options)


def train(options: argparse.Namespace) -> None:
    """Every method on every concept and seed, and the adapters of three concepts."""
    concepts = read_concepts()
    for concept in concepts.values():
        write_data(data_folder(options.work, concept.name), [concept])
    write_data(data_folder(options.work, "trio"), multi.trio())
    units = [(options.work, *unit) for unit in itertools.product(METHODS, concepts, options.seeds)]
    units.sort(key=lambda unit: unit[-1])
    run(train_unit, units, options.workers, "train")
    several = itertools.product(multi.COMPARED, options.seeds)
    run(train_together, [(options.work, *unit) for unit in several], options.workers)


def evaluate(options: argparse.Namespace) -> None:
    """All adapters of a concept and seed beside one base model."""
    units = [(options.work, concept, seed) for seed, concept in itertools.product(options.seeds, read_concepts())]
    run(evaluate_unit, units, options.workers)
    run(evaluate_together, [(options.work, seed) for seed in options.seeds], options.workers)


def judge(options: argparse.Namespace) -> None:
    """The same pictures, scored by an encoder that was trained on others."""
    units = [(options.work, concept, seed) for seed, concept in itertools.product(options.seeds, read_concepts())]
    run(judge_unit, units, options.workers)


def cost(options: argparse.Namespace) -> None:
    """Time and memory of each method, each in a process of its own, one after the other."""
    for name in METHODS:
        run(cost_of, [(options.work, name)], workers=1)


def analyse(options: argparse.Namespace) -> None:
    """Tables and figure; what was published of other seeds stays a part of them."""
    units = list(itertools.product(read_concepts(), options.seeds))
    measured = Measured.in_work(
        {unit: evaluation_file(options.work, *unit) for unit in units},
        {unit: judged_file(options.work, *unit) for unit in units},
        {seed: together_folder(options.work, seed) / "scores.json" for seed in options.seeds},
        {name: cost_file(options.work, name) for name in METHODS},
    )
    published = options.output / "study.json"
    if published.exists():
        measured = Measured.published(published).updated(measured)
    analysis.write(options.output, measured)


STAGES = {"train": train, "evaluate": evaluate, "judge": judge, "cost": cost, "analyse": analyse}


def stem(name: str) -> str:
    """A name as part of a path."""
    return name.replace(" ", "_")


def units_folder(work: Path) -> Path:
    return work / "units"


def data_folder(work: Path, concept: str) -> Path:
    """The concept's pictures with its trigger in the captions."""
    return work / "data" / stem(concept)


def unit_folder(work: Path, method: str, concept: str, seed: int) -> Path:
    """Where one method leaves its adapters."""
    return units_folder(work) / f"{stem(concept)}-seed{seed}" / stem(method)


def evaluation_file(work: Path, concept: str, seed: int) -> Path:
    """The scores of all adapters of a concept and seed."""
    return units_folder(work) / f"{stem(concept)}-seed{seed}" / "evaluation.json"


def judged_file(work: Path, concept: str, seed: int) -> Path:
    """The scores that the other encoder gives."""
    return evaluation_file(work, concept, seed).with_name("judged.json")


def together_folder(work: Path, seed: int) -> Path:
    """Where the adapters of three concepts and their scores are."""
    return work / "together" / f"seed{seed}"


def cost_file(work: Path, method: str) -> Path:
    return work / "cost" / f"{stem(method)}.json"


def write_data(folder: Path, concepts: Iterable[Any]) -> None:
    """Write a training folder, unless it is there."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for concept in concepts:
        concept.write_data(unfinished)
    unfinished.rename(folder)


def train_unit(work: Path, method_name: str, concept_name: str, seed: int) -> None:
    """Train one method on one concept, unless that is done."""
    method, concept = METHODS[method_name], read_concepts()[concept_name]
    folder = unit_folder(work, method_name, concept_name, seed)
    if not all(adapter_file(folder, step).exists() for step in method.kept):
        method.train(method, concept, seed, data_folder(work, concept_name), folder)


def train_together(work: Path, method_name: str, seed: int) -> None:
    """Train one adapter on three concepts, unless that is done."""
    method = multi.together(METHODS[method_name])
    folder = together_folder(work, seed) / stem(method_name)
    if not all(adapter_file(folder, step).exists() for step in method.kept):
        method.train(method, multi.trio()[0], seed, data_folder(work, "trio"), folder)


def evaluate_unit(work: Path, concept_name: str, seed: int) -> None:
    """Score all adapters of one concept and seed, unless that is done."""
    from cat_rs.evaluation import ClipEncoder

    target = evaluation_file(work, concept_name, seed)
    if not target.exists():
        adapters = adapters_of(work, METHODS, concept_name, seed)
        score(work, concept_name, adapters, ClipEncoder.from_pretrained(CLIP), target)


def judge_unit(work: Path, concept_name: str, seed: int) -> None:
    """Score the adapters of plain LoRA and of the recipe by the other encoder, unless that is done."""
    target = judged_file(work, concept_name, seed)
    if not target.exists():
        score(work, concept_name, adapters_of(work, (PLAIN, RECIPE), concept_name, seed), ImageNetEncoder(), target)


def adapters_of(work: Path, methods: Iterable[str], concept_name: str, seed: int) -> dict[str, ScaledAdapter]:
    """Name -> adapter, of some methods."""
    return {
        name: adapter
        for method in methods
        for name, adapter in METHODS[method].adapters(unit_folder(work, method, concept_name, seed)).items()
    }


def score(work: Path, concept_name: str, adapters: dict[str, ScaledAdapter], encoder: Any, target: Path) -> None:
    """Score adapters of a concept beside one base model."""
    import torch
    from cat_rs.evaluation import evaluate
    from diffusers import StableDiffusionPipeline

    result = evaluate(
        StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32),
        adapters,
        read_concepts()[concept_name].prompts(),
        encoder,
        concept_images=data_folder(work, concept_name),
        **sampling(work),
    )
    result.save(target)


def evaluate_together(work: Path, seed: int) -> None:
    """Score the adapters of three concepts of one seed, unless that is done."""
    folder = together_folder(work, seed)
    target = folder / "scores.json"
    if not target.exists():
        adapters = multi.adapters_of(units_folder(work), seed, folder)
        multi.score(adapters, data_folder(work, "trio"), target, **sampling(work))


def sampling(work: Path) -> dict[str, Any]:
    """How pictures are drawn, and where they are kept."""
    from cat_rs.evaluation import EvaluationConfig

    config = EvaluationConfig(num_inference_steps=INFERENCE_STEPS, seeds=PICTURE_SEEDS, batch_size=16)
    return {"config": config, "cache": work / "pictures", "progress": False}


def cost_of(work: Path, method_name: str) -> None:
    """Seconds of a step and of what else a training takes, and peak memory, from runs of two lengths."""
    target = cost_file(work, method_name)
    if target.exists():
        return
    concept = next(iter(read_concepts().values()))
    folder = target.with_suffix("")
    seconds = []
    for number, steps in enumerate(COST_STEPS):
        drawn = folder / ("drawn" if number < len(COST_STEPS) - 1 else "drawn-again")
        os.environ["XDG_CACHE_HOME"] = str((drawn / "cache").resolve())
        method = replace(METHODS[method_name], steps=steps, kept=(steps,))
        write_data(drawn / "data", [concept])
        start = time.perf_counter()
        method.train(method, concept, 0, drawn / "data", folder / f"run-{number}")
        seconds.append(time.perf_counter() - start)
    a_step = (seconds[2] - seconds[1]) / (COST_STEPS[2] - COST_STEPS[1])
    figures = {
        "seconds_per_step": a_step,
        "seconds_before": seconds[3] - COST_STEPS[3] * a_step,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    shutil.rmtree(folder)
    write_bytes(target, (json.dumps(figures, indent=2) + "\n").encode())


def run(task: Callable[..., None], calls: list[tuple], workers: int, what: str | None = None) -> None:
    """Run a task for each tuple of arguments, in new processes of one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        futures = [pool.submit(task, *call) for call in calls]
        bar = tqdm(as_completed(futures), total=len(futures), desc=what or task.__name__, file=sys.stdout)
        for future in bar:
            future.result()


def start_worker() -> None:
    """For a small model a second process gains more than a second thread."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Workers whose parent is killed would wait for it forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


if __name__ == "__main__":
    main()
