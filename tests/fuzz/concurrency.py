"""Threads, fork, Ctrl-C and inputs that change while a kernel reads them.

``python -m tests.fuzz.concurrency NAME`` runs one of them in this process.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import cat_rs
from cat_rs import _core
from tests.fuzz import make
from tests.fuzz.children import run_alone
from tests.fuzz.outcome import Outcome

__all__ = ["SCENARIOS", "run"]

SOON = 10.0
"""Seconds in which Ctrl-C has to end a call, on a busy machine."""


def same_arguments(rng: random.Random) -> None:
    """Several threads call with the same tensors, and get what one gets."""
    torch.set_num_threads(rng.choice((1, 2)))
    tensors = [make.tensor((2, 4, size, size)) for size in [rng.choice((1, 8, 64))] * 4]
    layer = [make.tensor(shape) for shape in ((70, 64), (96, 64), (96,), (4, 64), (96, 4))]
    rows = make.tensor((300, 64))
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: cat_rs.cat_loss(*tensors),
        lambda: cat_rs.lora_linear(*layer, 0.5),
        lambda: cat_rs.similarity(rows, rows.flip(0)),
        lambda: cat_rs.cross_similarity(rows, rows, "max"),
        lambda: torch.tensor(cat_rs.bootstrap_interval(rows[:, 0].abs(), resamples=500)),
    ]
    expected = [call() for call in calls]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            for number, call in enumerate(calls):
                if not torch.equal(call(), expected[number]):
                    wrong.append(f"call {number} returned something else")

    _in_threads(work, 4)
    if wrong:
        raise AssertionError(wrong[0])


def one_optimizer_each(rng: random.Random) -> None:
    """Several threads train, each its own parameters."""

    def work() -> None:
        optimizer = make.optimizer(max_grad_norm=1.0, low_precision=rng.choice((None, torch.bfloat16)))
        for _ in range(20):
            make._use_optimizer(optimizer)

    _in_threads(work, 4)


def saves_to_one_path(rng: random.Random) -> None:
    """Several threads save to one path; what is left is one of the files, whole."""
    path, state = make.path(), make.state()

    def work() -> None:
        for _ in range(5):
            cat_rs.save_lora(path, state)

    _in_threads(work, 4)
    cat_rs.load_lora(path)


def fork(rng: random.Random) -> None:
    """A child that was forked after kernels ran on several threads."""
    torch.set_num_threads(2)
    tensors = [make.tensor((4, 4, 64, 64)) for _ in range(4)]
    cat_rs.cat_loss(*tensors)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            cat_rs.cat_loss(*tensors)
            cat_rs.similarity(tensors[0].flatten(1), tensors[1].flatten(1))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status:
        raise AssertionError(f"the forked child ended with status {status}")


def interrupted(rng: random.Random) -> None:
    """Ctrl-C ends a call that would take minutes."""
    rows, values = make.tensor((60_000, 512)), make.tensor((50_000,)).abs()
    calls: dict[str, Callable[[], Any]] = {
        "cross_similarity": lambda: cat_rs.cross_similarity(rows, rows),
        "bootstrap_interval": lambda: cat_rs.bootstrap_interval(values, resamples=10_000_000),
        "bootstrap_difference": lambda: cat_rs.bootstrap_difference(values, values, resamples=10_000_000),
        "kps_difference": lambda: cat_rs.kps_difference([values] * 2, [values] * 2, resamples=10_000_000),
    }
    name = rng.choice(sorted(calls))
    ended: list[float] = []
    timer = threading.Timer(0.5, lambda: (ended.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT)))
    timer.start()
    try:
        calls[name]()
    except KeyboardInterrupt:
        waited = time.monotonic() - ended[0]
        if waited > SOON:
            raise AssertionError(f"{name} went on for {waited:.0f} seconds") from None
    else:
        timer.cancel()


def resized(rng: random.Random) -> None:
    """Another thread resizes an input between calls, and while a kernel may run."""
    name = rng.choice(("cat_loss", "similarity", "lora_linear"))
    shape = (256, 256)
    inputs = [make.tensor(shape) for _ in range(5)]
    stop = threading.Event()

    def resize() -> None:
        while not stop.is_set():
            size = rng.choice((0, 1, 255, 256))
            # Smaller sizes keep the storage: no reader can lose what it reads.
            inputs[0].resize_(size, 256)

    def work() -> None:
        for _ in range(300):
            try:
                if name == "cat_loss":
                    cat_rs.cat_loss(*inputs[:4])
                elif name == "similarity":
                    cat_rs.similarity(inputs[0], inputs[1])
                else:
                    _core.lora_linear_forward(inputs[0], inputs[1], None, inputs[2][:4], inputs[3][:, :4], 1.0)
            except cat_rs.errors.CatRsError:
                pass

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()


SCENARIOS: dict[str, Callable[[random.Random], None]] = {
    each.__name__: each for each in (same_arguments, one_optimizer_each, saves_to_one_path, fork, interrupted, resized)
}


def run(seed: int) -> Iterator[tuple[str, Outcome]]:
    """Each scenario's name and outcome."""
    for name in SCENARIOS:
        yield name, run_alone((name, seed), _outcome)


def _outcome(piece: tuple[str, int]) -> Outcome:
    name, seed = piece
    make.begun[0] = True
    try:
        SCENARIOS[name](random.Random(seed))
    except BaseException as error:
        return Outcome("crash", type(error).__name__, str(error))
    return Outcome("ok")


def _in_threads(work: Callable[[], None], count: int) -> None:
    """Raises what any of them raised."""
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    SCENARIOS[arguments.name](random.Random(arguments.seed))
