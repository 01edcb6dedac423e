"""Trains CAT on a concept of the emoji model with fresh and with cached base predictions, and scores all adapters.

``python docs/teacher-bank/compare.py CONCEPT [--draws 0 16 64 256] [--seed 0] [--steps 400] [--output DIR]``
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from cat_rs.atomic import write_bytes
from cat_rs.commands import demo
from cat_rs.report import print_table


def main() -> None:
    """Writes DIR/CONCEPT.json: an evaluation whose adapters are named by their draws a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("concept")
    parser.add_argument("--draws", type=int, nargs="+", default=(0, 16, 64, 256), help="a picture; 0 predicts anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("teacher-bank"), metavar="DIR")
    options = parser.parse_args()
    settings = demo.Settings(steps=options.steps, picture_seeds=(0, 1, 2, 3), preserve=False)
    (concept,) = demo.read_concepts(Path(settings.emoji_model), [options.concept])
    adapters = {}
    for draws in options.draws:
        name = f"{draws} draws" if draws else "fresh"
        folder = options.output / concept.name / name.replace(" ", "-")
        trained = demo._train(
            replace(settings, teacher_draws=draws), concept, options.seed, settings.cat_factor, folder
        )
        adapters[name] = str(trained.output_dir)
    evaluation = demo._evaluate(settings, concept, adapters)
    print_table(evaluation)
    write_bytes(options.output / f"{concept.name}.json", evaluation.to_json().encode())


if __name__ == "__main__":
    main()
