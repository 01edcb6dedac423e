"""Runs work in child processes, so that a crash, a hang or a memory explosion is a result."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import make
from tests.fuzz.calls import Call
from tests.fuzz.outcome import Outcome, outcome_of

__all__ = ["evaluate", "run_all", "run_alone"]

SECONDS = 60.0
"""A piece of work that takes longer hangs, unless Ctrl-C ends it."""
PATIENCE = 20.0
"""How soon Ctrl-C has to."""
MEMORY = 1 << 30
"""Address space that a child may take beyond what it began with."""


def run_all(work: Sequence[Any], run: Callable[[Any], Outcome], *, memory: int = MEMORY) -> Iterator[Outcome]:
    """The outcome of each piece of work, in order; a new child goes on where one died."""
    done = 0
    while done < len(work):
        for outcome in _in_a_child(work[done:], run, memory):
            done += 1
            yield outcome


def run_alone(piece: Any, run: Callable[[Any], Outcome], *, memory: int = MEMORY) -> Outcome:
    """The outcome of one piece of work in a process of its own."""
    (outcome,) = run_all([piece], run, memory=memory)
    return outcome


def evaluate(call: Call) -> Outcome:
    """Makes the call, in this process."""
    torch.manual_seed(0)
    make.begun[0] = False
    error = _raised_by(call.text())
    outcome = outcome_of(call.target, error) if make.begun[0] else Outcome("unmade")
    if torch.distributed.is_initialized():
        # A step would take it for its group.
        torch.distributed.destroy_process_group()
    return outcome


def _raised_by(text: str) -> BaseException | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eval(text, dict(make.NAMESPACE))
    except BaseException as error:
        return error
    return None


def _in_a_child(work: Sequence[Any], run: Callable[[Any], Outcome], memory: int) -> Iterator[Outcome]:
    """Outcomes up to the end, or up to and with the piece of work that the child died of."""
    folder = Path(tempfile.mkdtemp(prefix="cat-rs-fuzz-"))
    said = folder / "stderr"
    reading, writing = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        # Python warns of threads; those of the libraries hold nothing here.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os.close(reading)
        # Where no call that is given a small number for a file's writes to it.
        writing = fcntl.fcntl(writing, fcntl.F_DUPFD, 500)
        _work(work, run, memory, writing, folder)
    os.close(writing)
    finished = 0
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            for line in _lines(pipe, child):
                finished += 1
                yield Outcome(**json.loads(line))
    finally:
        with contextlib.suppress(ProcessLookupError):
            if finished < len(work) and sys.exc_info()[0] is GeneratorExit:
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        text = said.read_text(errors="replace")[-8000:] if said.exists() else ""
        shutil.rmtree(folder, ignore_errors=True)
    if finished < len(work):
        # What PyTorch does not survive while an argument is made is not this package's.
        yield _death(status, text) if make.begun[0] else Outcome("unmade")


def _lines(pipe: Any, child: int) -> Iterator[bytes]:
    """What the child writes; one that is silent for too long is interrupted, then killed."""
    rest = b""
    waiting, interrupted = SECONDS, False
    while True:
        if not select.select([pipe], [], [], waiting)[0]:
            os.kill(child, signal.SIGKILL if interrupted else signal.SIGINT)
            waiting, interrupted = PATIENCE, True
            continue
        received = pipe.read(65536)
        if not received:
            return
        waiting, interrupted = SECONDS, False
        *whole, rest = (rest + received).split(b"\n")
        yield from whole


def _death(status: int, text: str) -> Outcome:
    if not os.WIFSIGNALED(status):
        return Outcome("crash", f"exit {os.waitstatus_to_exitcode(status)}", text)
    name = signal.Signals(os.WTERMSIG(status)).name
    return Outcome("hang", "", text) if name == "SIGKILL" else Outcome("crash", name, text)


def _work(work: Sequence[Any], run: Callable[[Any], Outcome], memory: int, pipe: int, folder: Path) -> None:
    """In the child: the outcomes, a line each; never returns."""
    status = 1
    try:
        with open(folder / "stderr", "wb") as stderr, open(os.devnull, "rb+") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(nothing.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory(memory)
        # After a fork PyTorch makes its pool of threads anew; two threads that ask for it at once end the process.
        torch.set_num_threads(1)
        for piece in work:
            started = time.monotonic()
            outcome = run(piece)
            if outcome.error == "KeyboardInterrupt" and time.monotonic() - started > SECONDS - 1:
                # Long, but not longer than somebody wants.
                outcome = Outcome("ok")
            os.write(pipe, json.dumps(asdict(outcome)).encode() + b"\n")
            gc.collect(0)
        status = 0
    finally:
        os._exit(status)


def _limit_memory(memory: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
