"""Runs the tests that need a GPU, and compute-sanitizer over a few of them; writes what passed: `make test-gpu`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
# Of each kernel one test at small sizes: under the sanitizer each takes a hundred times as long.
SANITIZED = "test_student_loss or mixed_dtypes or small_errors or (test_adamw and 1000) or a_row_without_direction"


def outcomes(report: Path) -> tuple[Counter[str], list[str]]:
    """Counts of what pytest's report says, and a line for each test that failed or was skipped."""
    counts: Counter[str] = Counter()
    lines = []
    for case in ElementTree.parse(report).iter("testcase"):
        found = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}[found[0].tag] if found else "passed"
        counts[outcome] += 1
        if found:
            reason = (found[0].get("message") or "").splitlines() or [""]
            lines.append(f"- {outcome}: `{case.get('classname')}::{case.get('name')}`: {reason[0]}")
    return counts, lines


def sanitize(arguments: Sequence[str]) -> str:
    """What compute-sanitizer says of a few tests."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return "not installed"
    tests = [*PYTEST, "tests/cuda/test_gpu.py", "-k", SANITIZED, *arguments]
    done = subprocess.run([sanitizer, "--error-exitcode", "9", *tests], cwd=ROOT, check=False)
    return "no errors" if done.returncode == 0 else f"errors (exit status {done.returncode})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tests; without a GPU says so."""
    parser = argparse.ArgumentParser(prog="make test-gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="by default benchmarks/results/gpu_tests.md")
    options, more = parser.parse_known_args(argv)

    import torch

    if not torch.cuda.is_available():
        print("make test-gpu needs an NVIDIA GPU that PyTorch can use", file=sys.stderr)
        return 2
    from benchmarks import harness
    from benchmarks.gpu.meter import Meter

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        status = subprocess.run([*PYTEST, f"--junitxml={report}", *more], cwd=ROOT, check=False).returncode
        counts, lines = outcomes(report)
    sanitized = sanitize(more)
    machine = {**Meter().describe(), **harness.describe_machine()}
    text = [
        "# Tests on a GPU",
        "",
        f"`make test-gpu`: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; "
        f"compute-sanitizer: {sanitized}.",
        "",
        *lines,
        "",
        *harness.table(("machine", ""), [[key, value] for key, value in machine.items()]),
    ]
    output = harness.RESULTS / "gpu_tests.md" if options.output is None else options.output
    harness.write_file(output, "\n".join(text) + "\n")
    print("\n".join(text))
    return 1 if status or sanitized.startswith("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
