"""Measures work that a GPU does in a queue: with events, on inputs that its cache does not hold."""

from __future__ import annotations

import itertools
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks import harness
from benchmarks.harness import Contender

Set = TypeVar("Set")
# Inputs of an operation take turns until they are this many times the cache.
CACHES = 3
MOST_SETS = 64


class Peak(NamedTuple):
    """Bytes of the device at most.

    Attributes:
        allocated: In tensors.
        reserved: That PyTorch took, graphs' pools included.
    """

    allocated: int
    reserved: int


class Meter:
    """A CUDA device and its clock.

    Attributes:
        device: The device.
        cache: Bytes of its last cache.
        memory: Bytes of its memory.
        low_precision: The dtype of 16 bits that it is fast in.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.cache = int(properties.L2_cache_size)
        self.memory = int(properties.total_memory)
        # Before compute capability 8.0, bfloat16 is emulated.
        self.low_precision = torch.bfloat16 if properties.major >= 8 else torch.float16

    def seconds(self, run: Callable[[], Any], calls: int) -> float:
        """Of one call, by the device's clock."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def reset_peak(self) -> None:
        """Lets :meth:`peak` start anew, from what is in use."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Peak:
        """Since :meth:`reset_peak`."""
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    def describe(self) -> dict[str, str]:
        """What a reader needs to place the figures."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "GPU": f"{properties.name}, compute {properties.major}.{properties.minor}",
            "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB, L2 {self.cache / 2**20:.0f} MiB",
            "driver": _driver(),
            "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


@dataclass(frozen=True)
class Bench:
    """What the sections need.

    Attributes:
        meter: Clock and device.
        report: Where the section's figures go.
        quick: Whether to leave out what takes longest.
        smoke: Whether to run at sizes that prove nothing, to see that it runs.
        deadline: The time, by :func:`time.monotonic`, from which on nothing more is begun.
    """

    meter: Meter
    report: harness.Report
    quick: bool
    smoke: bool
    deadline: float = math.inf

    @property
    def device(self) -> torch.device:
        """The meter's."""
        return self.meter.device

    def leaves_out(self, what: str, needed: int = 0) -> bool:
        """Whether a case is left out, with a note that says why: for lack of time, or of so many bytes of memory."""
        if needed > self.meter.memory:
            reason = f"needs {needed / 2**30:.0f} GiB of {self.meter.memory / 2**30:.0f}"
        elif time.monotonic() >= self.deadline:
            reason = "the time of a quick run is over"
        else:
            return False
        self.report.note(f"{what} was left out: {reason}.")
        return True


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions of float32 are float32's, as what they are compared with."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


def rotations(moved: int, cache: int) -> int:
    """How many sets of inputs, of which an operation moves so many bytes, the cache does not hold."""
    return min(max(math.ceil(CACHES * cache / max(moved, 1)), 1), MOST_SETS)


def rotating(function: Callable[[Set], Any], sets: Sequence[Set]) -> Callable[[], Any]:
    """Calls the function with one set after the other."""
    turns = itertools.cycle(sets)
    return lambda: function(next(turns))


def copy_contender(moved: int, meter: Meter) -> Contender:
    """The device's copy of as many bytes, half of them read and half written: what its memory allows."""
    count = rotations(moved, meter.cache)
    sets = [tuple(torch.ones(max(moved // 8, 1), device=meter.device) for _ in range(2)) for _ in range(count)]
    return Contender("copy", rotating(lambda pair: pair[0].copy_(pair[1]), sets))


def measure(
    meter: Meter,
    contenders: Sequence[Contender],
    repeats: int,
    *,
    warm_up: int = 3,
    sample_seconds: float = 5e-3,
    least_calls: int = 1,
    most_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds an operation of each contender, one sample a round in which all take turns.

    Args:
        meter: The clock.
        contenders: Without ``prepare``.
        repeats: Rounds.
        warm_up: Calls before.
        sample_seconds: An operation faster than this is repeated until a sample takes about this long.
        least_calls: Of an operation between two looks at the clock.
        most_seconds: No round begins when the others took longer.
    """
    calls = {}
    for contender in contenders:
        for _ in range(max(warm_up - 1, 0)):
            contender.run()
        seconds = meter.seconds(contender.run, 1)
        calls[contender.name] = min(max(math.ceil(sample_seconds / max(seconds, 1e-9)), least_calls), 1000)
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    began = time.monotonic()
    for number in range(repeats):
        if number and time.monotonic() - began > most_seconds:
            break
        for contender in contenders:
            samples[contender.name].append(meter.seconds(contender.run, calls[contender.name]))
    return samples
