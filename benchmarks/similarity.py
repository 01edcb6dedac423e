"""Paired similarities of embeddings: PyTorch and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from tests import references
from torch.nn import functional as F

import cat_rs
from benchmarks import harness
from benchmarks.harness import OURS, Case, Contender

NAME = "similarity"
BAR = ">= 2"
# Pairs checked at a time: the reference computes in float64.
BLOCK = 10_000


def check(a: torch.Tensor, b: torch.Tensor) -> None:
    """Both contenders against float64, block by block."""
    cosine, score = F.cosine_similarity(a, b, dim=1), cat_rs.similarity(a, b)
    for start in range(0, len(a), BLOCK):
        block = slice(start, start + BLOCK)
        expected = torch.from_numpy(references.similarity(a[block], b[block]))
        harness.check_close(f"{NAME} torch", (1 + cosine[block].double()) / 2, expected, 1e-5)
        harness.check_close(f"{NAME} cat_rs", score[block], expected, 1e-5)


def pairs(count: int, width: int, report: harness.Report) -> None:
    """s(a_i, b_i) of many pairs."""
    a, b = torch.randn(count, width), torch.randn(count, width)
    check(a, b)
    operations = {
        "torch": lambda: F.cosine_similarity(a, b, dim=1),
        OURS: lambda: cat_rs.similarity(a, b),
    }
    case = Case("pairs", "float32", f"{count}x{width}")
    for name, operation in operations.items():
        report.add(name, case, "extra memory", "MB", [harness.extra_memory(operation) / 1e6])

    moved = a.nbytes + b.nbytes
    copy = harness.copy_contender(moved)
    contenders = [*(Contender(name, operation) for name, operation in operations.items()), copy]
    samples = harness.measure(contenders, report.repeats, warm_up=1)
    report.add_times(case, {name: samples[name] for name in operations})
    report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, copy.name)})
    report.add_ratio(f"F.cosine_similarity / cat_rs, {case.shape}", samples["torch"], samples[OURS], BAR)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=20).parse_args(argv)
    report = harness.start(NAME, "Similarities of embeddings", options, argv)
    pairs(*((1000, 64) if options.smoke else (1_000_000, 512)), report)
    report.note(
        "torch gives the cosine alone, cat_rs s = (1 + cos) / 2 and an error for a row that is zero or not finite."
    )
    report.note("extra memory: growth of the process at most while the operation ran once, its result included.")
    report.note("copy: torch's copy of as many bytes, half of them read and half written; the operation only reads.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
