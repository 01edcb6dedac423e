"""Runs all benchmarks, each in a process of its own: ``python -m benchmarks [--only NAME ...] [their options]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The longest last.
SCRIPTS = (
    "cat_loss",
    "noising",
    "adamw",
    "lora_linear",
    "lora_up",
    "frozen_linear",
    "frozen_conv2d",
    "similarity",
    "evaluation",
    "statistics",
    "precision",
    "check_weights",
    "peft_unet",
    "teacher_bank",
    "threads",
    "preservation",
    "step",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the scripts; options it does not know go to each of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run the benchmarks one after another.")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    options, rest = parser.parse_known_args(argv)
    failed = []
    for name in options.only:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *rest]
        if subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
