"""``python -m tests.fuzz``: see the package."""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import shlex
import sys
import time
from collections.abc import Iterator

import torch

from tests.fuzz import adapter_files, concurrency, make, targets
from tests.fuzz.calls import Call, random_call
from tests.fuzz.children import evaluate, run_all, run_alone
from tests.fuzz.outcome import Outcome
from tests.fuzz.report import Report

BATCH = 200
"""Calls in a child process."""


def main() -> int:
    """The command; returns its exit status."""
    options = _options()
    torch.set_num_threads(1)
    if options.call:
        eval(options.call, dict(make.NAMESPACE))
        return 0
    make.prepare()
    report = Report()
    started = time.monotonic()
    found = [each for each in targets.targets() if options.only in each.name]
    for number, seed in enumerate(_seeds(options)):
        if _over(options, number, started):
            break
        if not options.only:
            _add_files(report, seed, options.files)
            if number % 20 == 0:
                _add_concurrency(report, seed)
        if found:
            _add_calls(report, found, seed, options)
    print(report.table())
    print()
    print(report.failures(options.failures))
    return int(report.failed(allow_unclear=options.allow_unclear))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--calls", type=int, help="how many calls to make instead")
    parser.add_argument("--files", type=int, default=20, help="mutated files to %(metavar)s calls", metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of calls (default: %(default)s)")
    parser.add_argument("--only", default="", help="a part of the names of the functions to call")
    parser.add_argument("--failures", type=int, default=40, help="kinds of failures to print (default: %(default)s)")
    parser.add_argument("--allow-unclear", action="store_true", help="fail on crashes and hangs alone")
    parser.add_argument("--as-found", action="store_true", help="print failing calls without making them simpler")
    parser.add_argument("--call", help="evaluate a call, as failures are printed, here")
    return parser.parse_args()


def _seeds(options: argparse.Namespace) -> Iterator[int]:
    return itertools.count(options.seed)


def _over(options: argparse.Namespace, batches: int, started: float) -> bool:
    if options.calls is not None:
        return batches * BATCH >= options.calls
    return time.monotonic() - started > options.seconds


def _add_calls(report: Report, found: list[targets.Target], seed: int, options: argparse.Namespace) -> None:
    rng = random.Random(seed)
    calls = [random_call(found, rng) for _ in range(min(BATCH, options.calls or BATCH))]
    reproduction = (lambda call, *_: _command(call)) if options.as_found else _reproduction
    for call, outcome in zip(calls, run_all(calls, evaluate), strict=True):
        report.add(call.target.name, outcome, functools.partial(reproduction, call, outcome, seed))


def _reproduction(call: Call, outcome: Outcome, seed: int) -> str:
    """The simplest call that ends in the same way."""
    wanted = outcome.group()[:2]
    if run_alone(call, evaluate).group()[:2] != wanted:
        return f"only after the others of --seed {seed} --calls {BATCH}: {_command(call)}"
    simpler = iter(call.simpler())
    while (candidate := next(simpler, None)) is not None:
        found = run_alone(candidate, evaluate)
        if found.group()[:2] == wanted and (outcome.kind != "unclear" or found.group() == outcome.group()):
            call, simpler = candidate, iter(candidate.simpler())
    return _command(call)


def _command(call: Call) -> str:
    return f"python -m tests.fuzz --call {shlex.quote(call.text())}"


def _add_files(report: Report, seed: int, count: int) -> None:
    files = adapter_files.mutated(seed, count)
    for file, outcome in zip(files, adapter_files.run(files), strict=True):
        report.add("adapter files", outcome, file.reproduction)


def _add_concurrency(report: Report, seed: int) -> None:
    for name, outcome in concurrency.run(seed):
        report.add(name, outcome, lambda name=name: f"python -m tests.fuzz.concurrency {name} --seed {seed}")


if __name__ == "__main__":
    sys.exit(main())
