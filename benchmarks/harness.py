"""Measures contenders side by side, and writes what came out beside the machine it came from.

The contenders of a case take turns within one run (A B C A B C ...), so that drift of the machine hits all of them
alike. A case is checked before it is timed: a contender that computes something else is an error, not a row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat_rs._native import _core

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = "cat_rs"


class BenchmarkError(Exception):
    """A contender's result is not what the reference says."""


@dataclass(frozen=True)
class Contender:
    """One way to do the operation.

    Attributes:
        name: The provider: "torch", "peft", "cat_rs", ...
        run: One whole operation; what it returns is ignored.
        prepare: Runs before each operation, outside the timed region.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """What identifies a measurement beside its operation and provider."""

    mode: str
    dtype: str
    shape: str


@dataclass(frozen=True)
class Row:
    """One measured quantity of one provider."""

    op: str
    provider: str
    mode: str
    dtype: str
    shape: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """A quotient of medians, and the bar it is held to.

    Attributes:
        what: In words.
        value: Measured.
        p20, p80: Of the quotients of the single rounds.
        bar: ">= 5" or "<= 0.6"; None where nothing was promised.
        met: Whether the bar is met; None without a bar, or where the sizes were those of a smoke run.
    """

    what: str
    value: float
    p20: float
    p80: float
    bar: str | None = None
    met: bool | None = None


def meets(value: float, bar: str) -> bool:
    """Whether a value meets a bar such as ">= 5"."""
    sign, limit = bar.split()
    return value >= float(limit) if sign == ">=" else value <= float(limit)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = np.quantile(np.asarray(samples, dtype=np.float64), (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _time(contender: Contender, calls: int) -> float:
    """Seconds an operation, over `calls` of them."""
    if contender.prepare is not None:
        contender.prepare()
    start = time.perf_counter()
    for _ in range(calls):
        contender.run()
    return (time.perf_counter() - start) / calls


def measure(
    contenders: Sequence[Contender], repeats: int, *, warm_up: int = 3, sample_seconds: float = 2e-3
) -> dict[str, list[float]]:
    """Seconds an operation of each contender, one sample a round.

    Args:
        contenders: They take turns in this order.
        repeats: Rounds.
        warm_up: Untimed rounds before.
        sample_seconds: An operation faster than this is repeated until a sample takes about this long; one with a
            `prepare` is not.

    Returns:
        Contender's name -> `repeats` samples; the i-th samples of all come from the same round.
    """
    with _no_garbage_collection():
        seconds = {contender.name: math.inf for contender in contenders}
        for _ in range(max(warm_up, 1)):
            for contender in contenders:
                seconds[contender.name] = min(seconds[contender.name], _time(contender, 1))
        calls = {
            contender.name: 1
            if contender.prepare is not None
            else min(max(math.ceil(sample_seconds / max(seconds[contender.name], 1e-9)), 1), 10_000)
            for contender in contenders
        }
        samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(repeats):
            for contender in contenders:
                samples[contender.name].append(_time(contender, calls[contender.name]))
    return samples


def check_close(what: str, got: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """Compares with a float64 reference; the tolerance is relative to the reference's largest element.

    Raises:
        BenchmarkError: They differ; the message names the worst element.
    """
    if got.shape != reference.shape:
        raise BenchmarkError(f"{what}: expected shape {list(reference.shape)}, got {list(got.shape)}")
    error = (got.detach().double() - reference.detach().double()).abs()
    limit = tolerance * max(float(reference.detach().double().abs().max()), 1e-30)
    # Written so that NaN fails.
    if not bool((error <= limit).all()):
        worst = int(error.nan_to_num(nan=math.inf).argmax())
        raise BenchmarkError(
            f"{what}: differs from the reference by more than {limit:.3g} in {int((~(error <= limit)).sum())} of "
            f"{error.numel()} elements; worst at {worst}: expected {float(reference.flatten()[worst]):.9g}, "
            f"got {float(got.flatten()[worst]):.9g}"
        )


def peak_memory() -> int:
    """The largest resident size of this process since it started, or since :func:`reset_peak_memory`, in bytes."""
    # ru_maxrss would do but for a child's being that of its parent when that was larger.
    return _status("VmHWM")


def reset_peak_memory() -> int:
    """Lets :func:`peak_memory` start anew; returns the present resident size in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def extra_memory(operation: Callable[[], object]) -> int:
    """By how much the process grew at most while the operation ran, in bytes; allocators outside Python included."""
    # What was freed goes back to the system: the operation would use it again, unseen.
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak_memory()
    operation()
    return max(peak_memory() - before, 0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _first_line(path: str, key: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return None


def _cache_size(level: str) -> str | None:
    """The size of a data or unified cache, as the system tells it, e.g. "512K"."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (folder / "level").read_text().strip() == level and (folder / "type").read_text() != "Instruction\n":
                return (folder / "size").read_text().strip()
        except OSError:
            continue
    return None


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {'.'.join(platform.release().split('.')[:2])}, {platform.machine()}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    # New results are no change of what was measured.
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{commit} with changes" if changed else commit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_machine() -> dict[str, str]:
    """What a reader needs to place the figures."""
    build = _core.build_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    caches = ", ".join(f"L{level} {size}" for level in "123" if (size := _cache_size(level)))
    return {
        "processor": _first_line("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used",
        "caches": caches or "unknown",
        "memory": f"{memory:.0f} GiB",
        "SIMD": f"PyTorch {torch.backends.cpu.get_cpu_capability()}, cat_rs x86-64-{build['simd']}",
        "system": _system(),
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "cat_rs": build["version"],
        "peft": _version("peft"),
        "diffusers": _version("diffusers"),
        "commit": _commit(),
    }


@dataclass
class Report:
    """The rows and ratios of one script.

    Attributes:
        name: Of the script, and of the result files.
        title: Heading of the table.
        repeats: Rounds a case.
        command: That made it.
        smoke: Whether the sizes are those of a smoke run, which prove nothing.
    """

    name: str
    title: str
    repeats: int
    command: str
    smoke: bool
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def note(self, text: str) -> None:
        """A sentence under the table."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, provider: str, case: Case, metric: str, unit: str, samples: Sequence[float]) -> Row:
        """A row from samples."""
        row = Row(self.name, provider, case.mode, case.dtype, case.shape, metric, unit, *quantiles(samples))
        self.rows.append(row)
        return row

    def add_times(self, case: Case, samples: Mapping[str, Sequence[float]]) -> None:
        """Rows in ms or us, whichever suits the case."""
        unit, factor = ("us", 1e6) if max(quantiles(times)[1] for times in samples.values()) < 1e-3 else ("ms", 1e3)
        for provider, times in samples.items():
            self.add(provider, case, "time", unit, [seconds * factor for seconds in times])

    def add_bandwidth(self, case: Case, moved: int, samples: Mapping[str, Sequence[float]]) -> None:
        """GB/s: the bytes that must move, by the time it took."""
        for provider, times in samples.items():
            self.add(provider, case, "bandwidth", "GB/s", [moved / seconds / 1e9 for seconds in times])

    def add_ratio(
        self, what: str, numerator: Sequence[float], denominator: Sequence[float], bar: str | None = None
    ) -> float:
        """The quotient of two medians, with the spread of the quotients of the single rounds."""
        value = quantiles(numerator)[1] / quantiles(denominator)[1]
        low, _, high = quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])
        return self.add_value(what, value, low, high, bar)

    def add_value(self, what: str, value: float, low: float, high: float, bar: str | None = None) -> float:
        """A figure that is a ratio already."""
        met = None if bar is None or self.smoke else meets(value, bar)
        self.ratios.append(Ratio(what, value, low, high, bar, met))
        return value

    def content(self) -> dict[str, Any]:
        """All of it, but for the machine."""
        return {
            "name": self.name,
            "title": self.title,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
            "smoke": self.smoke,
            "repeats": self.repeats,
            "load_before": self.load_before,
            "ratios": [asdict(ratio) for ratio in self.ratios],
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
        }

    def write(self, folder: Path) -> None:
        """Writes <name>.json and <name>.md, each whole or not at all, and prints the table."""
        content = {**self.content(), "machine": describe_machine()}
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"{self.name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        text = _markdown(content)
        write_file(folder / f"{self.name}.md", text)
        print(text, flush=True)
        print(f"wrote {folder / self.name}.json and .md", flush=True)

    def missed(self) -> list[Ratio]:
        """The ratios that do not meet their bar."""
        return [ratio for ratio in self.ratios if ratio.met is False]


def write_file(path: Path, text: str) -> None:
    """The file whole, or as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


RATIO_HEADER = ("ratio", "measured", "bar", "met")
ROW_HEADER = ("provider", "mode", "dtype", "shape", "metric", "median")


def ratio_lines(ratios: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines of a table of ratios."""
    words = {True: "yes", False: "**no**", None: ""}
    return [
        [
            ratio["what"],
            f"{number(ratio['value'])} ({number(ratio['p20'])} to {number(ratio['p80'])})",
            ratio["bar"] or "",
            words[ratio["met"]],
        ]
        for ratio in ratios
    ]


def row_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines of a table of rows."""
    return [
        [
            row["provider"],
            row["mode"],
            row["dtype"],
            row["shape"],
            row["metric"],
            f"{number(row['p50'])} {row['unit']} ({number(row['p20'])} to {number(row['p80'])})",
        ]
        for row in rows
    ]


def _markdown(content: Mapping[str, Any]) -> str:
    lines = [f"# {content['title']}", ""]
    if content["smoke"]:
        lines += ["**A smoke run: tiny sizes, to see that the script works. The figures mean nothing.**", ""]
    lines += [
        f"`{content['command']}`, {content['date'][:10]}. Median of {content['repeats']} rounds in which the "
        "contenders took turns; in brackets the 20th and 80th percentile.",
        "",
    ]
    if content["load_before"] > 0.5:
        lines += [f"The machine was not idle: the load before the run was {content['load_before']:.2f}.", ""]
    if content["ratios"]:
        lines += [*table(RATIO_HEADER, ratio_lines(content["ratios"])), ""]
    lines += [*table(ROW_HEADER, row_lines(content["rows"])), ""]
    if content["notes"]:
        lines += [*(f"- {note}" for note in content["notes"]), ""]
    lines += table(("machine", ""), [[key, value] for key, value in content["machine"].items()])
    return "\n".join(lines) + "\n"


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every script has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--repeats", type=int, default=repeats, help="rounds a case (default: %(default)s)")
    options.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds: does the script work?")
    options.add_argument("--output", type=Path, metavar="DIR", help="where results go (default: benchmarks/results)")
    options.add_argument("--check", action="store_true", help="exit with status 1 where a bar is not met")
    options.add_argument("--compare", type=Path, metavar="FILE", help="an earlier result file to print beside")
    return options


def prepare(smoke: bool) -> None:
    """Fixed random numbers; one thread for a smoke run, whose tensors are too small for more."""
    torch.manual_seed(0)
    if smoke:
        torch.set_num_threads(1)


def start(name: str, title: str, options: argparse.Namespace, argv: Sequence[str] | None) -> Report:
    """An empty report; a smoke run gets two rounds."""
    if options.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1, got {options.repeats}")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if options.output is not None and "--output" in arguments:
        place = arguments.index("--output")
        del arguments[place : place + 2]
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *arguments])
    prepare(options.smoke)
    return Report(name, title, min(options.repeats, 2) if options.smoke else options.repeats, command, options.smoke)


def finish(report: Report, options: argparse.Namespace) -> int:
    """Writes the report; returns the exit status."""
    # A smoke run must not replace figures that mean something.
    fallback = Path(tempfile.mkdtemp(prefix="cat-rs-benchmarks-")) if options.smoke else RESULTS
    if options.compare is not None:
        _print_comparison(report, options.compare)
    report.write(fallback if options.output is None else options.output)
    return 1 if options.check and report.missed() else 0


def _print_comparison(report: Report, path: Path) -> None:
    """Our own rows beside those of an earlier result."""
    key = ("provider", "mode", "dtype", "shape", "metric", "unit")
    before = {tuple(row[name] for name in key): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for row in map(asdict, report.rows):
        old = before.get(tuple(row[name] for name in key))
        if old is not None and row["provider"] == OURS:
            names = " ".join(row[name] for name in key[1:5])
            print(f"{names}: {number(old['p50'])} -> {number(row['p50'])} {row['unit']}")


def copy_contender(moved: int) -> Contender:
    """Moves as many bytes as an operation must, half of them read, half written: what the memory allows."""
    source = torch.ones(max(moved // 8, 1), dtype=torch.float32)
    target = torch.empty_like(source)
    return Contender("copy", lambda: target.copy_(source))
