"""Measures cat_rs on a GPU, needs nothing but the wheel, torch, peft and diffusers.

Sections run in the order in which they are listed, the short ones first; what is measured is on disk after each, and
the table that the command prints at its end is ready to paste.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import kernels, layers, results, steps
from benchmarks.gpu.meter import Bench, Meter

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "cat_loss": kernels.cat_loss,
    "adamw": kernels.adamw,
    "noising": kernels.noising,
    "similarity": kernels.similarity,
    "step_sd15": steps.step_sd15,
    "step_sdxl": steps.step_sdxl,
    "lora_linear": layers.lora_linear,
}
QUICK_REPEATS = 7
# After which a quick run begins nothing more: it ends in ten minutes, and on a slow card in twenty.
QUICK_SECONDS = 480


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    options.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS)
    )
    options.add_argument("--quick", action="store_true", help="ten minutes: batch 1, fewer rounds, no torch.compile")
    options.add_argument("--repeats", type=int, default=20, help="rounds a case (default: %(default)s)")
    options.add_argument("--output", type=Path, metavar="DIR", help="where results go (default: benchmarks/results)")
    options.add_argument("--check", action="store_true", help="exit with status 1 where a bar is not met")
    return options


def run(options: argparse.Namespace, argv: Sequence[str], meter: Meter, *, smoke: bool = False) -> int:
    """Runs the sections; returns the exit status."""
    if options.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1, got {options.repeats}")
    deadline = time.monotonic() + QUICK_SECONDS if options.quick else math.inf
    command = shlex.join(["python", "-m", "benchmarks.gpu", *argv])
    folder = harness.RESULTS if options.output is None else options.output
    machine = {**meter.describe(), **harness.describe_machine()}
    done: dict[str, Any] = results.kept(folder, machine)
    failed, missed = [], []
    for name in [section for section in SECTIONS if section in options.only]:
        print(f"== {name}", flush=True)
        repeats = min(options.repeats, QUICK_REPEATS) if options.quick else options.repeats
        report = harness.Report(name, name, repeats, command, smoke)
        torch.manual_seed(0)
        try:
            bench = Bench(meter, report, options.quick, smoke, deadline)
            if not bench.leaves_out(name):
                SECTIONS[name](bench)
        except Exception:
            # The other sections are worth the machine's time.
            traceback.print_exc()
            failed.append(name)
            continue
        done[name] = report.content()
        missed += report.missed()
        # In the order of the table, whatever was measured first.
        done = {section: done[section] for section in SECTIONS if section in done}
        results.write(folder, machine, done)
    print(results.table(machine, done), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or (options.check and missed) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections; without a GPU says so."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs an NVIDIA GPU that PyTorch can use; torch.cuda.is_available() is False here",
            file=sys.stderr,
        )
        return 2
    return run(options, arguments, Meter())


if __name__ == "__main__":
    sys.exit(main())
