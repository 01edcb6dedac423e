"""CAT on a concept with fresh and with cached base predictions: ``python examples/study/teacher_bank.py CONCEPT``.

Writes DIR/CONCEPT.json, an evaluation whose adapters are named by their draws per picture. ``--table FILE ...`` prints
the table of such files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from analysis import table
from cat_rs.report import print_table
from demo_setting import score_adapters, train_adapter

FIGURES = ("ups", "tps", "kps", "identity", "diversity_retained")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("concept", nargs="?")
    parser.add_argument("--draws", type=int, nargs="+", default=(0, 16, 64, 256), help="per picture; 0 predicts anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("teacher-bank"), metavar="DIR")
    parser.add_argument("--table", type=Path, nargs="+", default=(), metavar="FILE")
    options = parser.parse_args()
    if (options.concept is None) == (not options.table):
        parser.error("expected a concept or --table")
    if options.table:
        print(rows_of(options.table))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Train and score an adapter for each number of draws."""
    adapters = {}
    for draws in options.draws:
        name = f"{draws} draws" if draws else "fresh"
        adapters[name] = options.output / options.concept.replace(" ", "_") / name.replace(" ", "-")
        settings = {"steps": options.steps, "preserve": "captions", "teacher_draws": draws}
        train_adapter(options.concept, options.seed, adapters[name], **settings)
    evaluation = score_adapters(options.concept, adapters, (0, 1, 2, 3), options.output / "pictures")
    print_table(evaluation)
    evaluation.save(options.output / f"{options.concept}.json")


def rows_of(files: list[Path]) -> str:
    """The figures of all adapters in the files, as a Markdown table."""
    rows = []
    for file in files:
        for name, adapter in json.loads(file.read_text(encoding="utf-8"))["adapters"].items():
            figures = [f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in map(adapter.get, FIGURES)]
            rows.append([file.stem, name, *figures])
    heading = ("concept", "base predictions", "UPS", "TPS", "KPS", "identity", "diversity kept")
    return table(heading, rows)


if __name__ == "__main__":
    main()
