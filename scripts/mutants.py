"""Plant random faults with Cosmic Ray, and see whether the tests notice.

`python scripts/mutants.py --count 100` copies the package and its tests to build/mutants, draws 100 of all the mutants
of the modules below, and runs for each the tests of its module until one fails. It prints each survivor as a diff, and
at the end how many of how many were noticed. `--modules step/cat_factor.py` takes mutants of these modules only;
`--seed` draws others. A survivor needs a test, unless it computes the same.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import random
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, WorkerOutcome

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
PACKAGE = "python/cat_rs"
COPIED = ("python", "tests", "examples", "docs", "pyproject.toml", "README.md", "Cargo.toml")
# Modules, and the tests that must notice their faults, the quick ones first. The first pattern that fits counts.
STEP = ("tests/step/test_cat_step.py", "tests/cuda/test_step.py")
OPTIMIZER = (
    "tests/ops/test_adamw.py",
    "tests/step/test_optimizer_tools.py",
    "tests/step/test_tools.py",
    "tests/step/test_low_precision.py",
    *STEP,
)
TESTS: dict[str, tuple[str, ...]] = {
    "step/cat_factor.py": ("tests/step/test_cat_factor.py",),
    "step/noise_schedule.py": ("tests/step/test_noise_schedule.py", *STEP, "tests/step/test_families.py"),
    "step/optimizer.py": OPTIMIZER,
    "step/flat_buffers.py": OPTIMIZER,
    "step/teacher_bank.py": ("tests/step/test_teacher_bank.py",),
    "step/denoiser.py": ("tests/step/test_denoiser.py", "tests/step/test_families.py", *STEP),
    "step/collectives.py": ("tests/test_distributed.py",),
    "step/*.py": (
        *STEP,
        "tests/step/test_families.py",
        "tests/step/test_preservation.py",
        "tests/step/test_text_encoders.py",
        "tests/step/test_autocast.py",
        "tests/step/test_tools.py",
    ),
    "peft.py": (
        "tests/test_peft.py",
        "tests/step/test_preservation.py",
        "tests/step/test_autocast.py",
        "tests/step/test_low_precision.py",
    ),
    "adapter_file/*.py": ("tests/adapter_file",),
    "evaluation/encoder.py": ("tests/evaluation", "tests/test_hub.py"),
    "evaluation/*.py": ("tests/evaluation",),
}
# The defaults of public functions.
SIGNATURES = "tests/test_public_names.py"
# `X | None` in an annotation computes nothing.
LEFT_OUT = "core/ReplaceBinaryOperator_BitOr_*"
TIMEOUT = 1800


def main() -> int:
    """Run the mutants; returns 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="how many mutants are drawn (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--modules", nargs="+", default=list(TESTS), metavar="PATTERN", help="modules in python/cat_rs"
    )
    arguments = parser.parse_args()
    _copy_project()
    os.chdir(COPY)
    # An installed package must not be taken for the copy, and no module for one compiled before.
    os.environ |= {"PYTHONPATH": str(COPY / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    everything = _mutants(arguments.modules)
    if not everything:
        parser.error(f"--modules: expected modules that have tests here, got {' '.join(arguments.modules)}")
    chosen = random.Random(arguments.seed).sample(everything, min(arguments.count, len(everything)))
    for tests in sorted({_tests_of(mutant) for mutant in chosen}):
        if os.spawnvp(os.P_WAIT, sys.executable, shlex.split(_command(tests))) != 0:
            sys.exit(f"expected tests that pass before anything is planted, got a failure in {' '.join(tests)}")
    survivors = 0
    for number, mutant in enumerate(chosen, start=1):
        result = mutate_and_test([mutant], _command(_tests_of(mutant)), TIMEOUT)
        if result.worker_outcome != WorkerOutcome.NORMAL:
            sys.exit(f"{mutant.module_path}, {mutant.operator_name}: {result.output}")
        survived = not result.is_killed
        survivors += survived
        print(f"{number}/{len(chosen)} {'SURVIVED' if survived else 'noticed'}: {mutant.module_path}", flush=True)
        if survived:
            print(result.diff, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed, out of {len(everything)} mutants")
    return int(survivors > 0)


def _copy_project() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, COPY / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, COPY / name)


def _mutants(patterns: Iterable[str]) -> list[MutationSpec]:
    """All mutants of the modules, in an order that depends on nothing but their text."""
    paths = sorted(path for pattern in patterns for path in Path(PACKAGE).glob(pattern))
    with use_db(":memory:") as work:
        init([path for path in dict.fromkeys(paths) if _pattern_of(path)], work, {})
        found = [mutation for item in work.work_items for mutation in item.mutations]
    kept = [mutant for mutant in found if not fnmatch.fnmatch(mutant.operator_name, LEFT_OUT)]
    return sorted(kept, key=lambda mutant: (str(mutant.module_path), mutant.operator_name, mutant.occurrence))


def _pattern_of(path: Path) -> str | None:
    name = path.relative_to(PACKAGE).as_posix()
    return next((pattern for pattern in TESTS if fnmatch.fnmatch(name, pattern)), None)


def _tests_of(mutant: MutationSpec) -> tuple[str, ...]:
    return *TESTS[str(_pattern_of(Path(mutant.module_path)))], SIGNATURES


def _command(tests: Iterable[str]) -> str:
    return shlex.join([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests])


if __name__ == "__main__":
    sys.exit(main())
