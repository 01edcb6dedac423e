"""A CAT step of Stable Diffusion 1.5's U-Net with random weights, by the number of PyTorch's threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender
from benchmarks.step import SMALL, inputs

NAME = "threads"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    parser = harness.parser((__doc__ or "").splitlines()[0], repeats=7)
    options = parser.parse_args(argv)
    report = harness.start(NAME, "A CAT step by the number of threads", options, argv)
    settings = models.config(options.smoke)
    step = cat_rs.CatStep(models.add_lora(models.unet(settings)), models.scheduler())
    arguments = inputs(settings, 8 if options.smoke else SMALL)
    cores = os.cpu_count() or 1
    # Half of the cores and more threads than there are: what a wrong OMP_NUM_THREADS asks for.
    counts = sorted({1, max(1, cores // 2), cores, 2 * cores})
    contenders = [
        Contender(f"{count} threads", lambda: step(*arguments), lambda count=count: torch.set_num_threads(count))
        for count in counts
    ]
    samples = harness.measure(contenders, report.repeats, warm_up=1, sample_seconds=0)
    shape = f"latents {'x'.join(map(str, arguments[0].shape))}"
    for count in counts:
        report.add_times(Case("step", "float32", f"{shape}, {count} threads"), {OURS: samples[f"{count} threads"]})
        if count != cores:
            report.add_ratio(
                f"time: {count} threads / {cores}", samples[f"{count} threads"], samples[f"{cores} threads"]
            )
    report.note(f"{cores} threads: one a core, PyTorch's default where the processor has no second thread a core.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
