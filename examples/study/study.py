"""Compares methods that preserve the base model, on the bundled model: ``python examples/study/study.py``.

Trains every method on every concept and seed, scores the adapters at several steps, trains adapters of several concepts,
and writes the tables and the figure of docs/study. Every finished part is a file in the work folder: stop it at any time
and start it again.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from concepts import read_concepts
from methods import METHODS, Method, adapter_file
from tqdm import tqdm

SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("study"), metavar="DIR", help="folder for all parts")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--only", choices=("train",), help="stop after this stage")
    options = parser.parse_args()
    prepare(options.work)
    units = [
        (method, concept, seed)
        for seed, method, concept in itertools.product(SEEDS, METHODS, read_concepts())
    ]
    run(train_unit, [(options.work, *unit) for unit in units], options.workers, "train")


def prepare(work: Path) -> None:
    """Write the training folders of the concepts."""
    for concept in read_concepts().values():
        folder = data_folder(work, concept.name)
        if not folder.exists():
            concept.write_data(folder)


def data_folder(work: Path, concept: str) -> Path:
    """The concept's pictures with its trigger in the captions."""
    return work / "data" / concept.replace(" ", "_")


def unit_folder(work: Path, method: str, concept: str, seed: int) -> Path:
    """Where one trained adapter and its scores are."""
    return work / "units" / f"{concept.replace(' ', '_')}-seed{seed}" / method.replace(" ", "_")


def train_unit(work: Path, method_name: str, concept_name: str, seed: int) -> None:
    """Train one method on one concept, unless that is done."""
    method, concept = METHODS[method_name], read_concepts()[concept_name]
    folder = unit_folder(work, method_name, concept_name, seed)
    if all(adapter_file(folder, step).exists() for step in method.kept):
        return
    method.train(method, concept, seed, data_folder(work, concept_name), folder)


def run(task: Callable[..., None], arguments: Iterable[tuple], workers: int, what: str) -> None:
    """Run a task for each tuple of arguments, in processes of one thread."""
    calls = list(arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as pool:
        futures = [pool.submit(task, *call) for call in calls]
        for future in tqdm(as_completed(futures), total=len(futures), desc=what, file=sys.stdout):
            future.result()


def one_thread() -> None:
    """Small models gain more from a second process than from a second thread."""
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
