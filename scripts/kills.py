"""Kill a running evaluation or training at random moments; started again, it must end as if nothing had happened.

`python scripts/kills.py evaluate train --kills 20` runs `cat-rs` on the bundled model with few prompts and steps: once
without a kill, then for every kill in a new folder. SIGKILL comes at a moment drawn from the time that the first run
worked; the same command, of a training with --resume, then finishes. Compared are the bytes of what a run is for:
results.json and the contact sheet of an evaluation, the adapter of a training. Prints a line a kill; exits with 1 if
one differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMOJI_MODEL = ROOT / "examples" / "emoji_model"
CONCEPT = EMOJI_MODEL / "concepts" / "pineapple"
PROMPTS = ("a sks fruit on a red background", "a sks fruit on a blue background", "a sks fruit")
TRIGGER = ("--trigger", "sks", "--class-word", "fruit")
POLL = 0.005
ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Task:
    """A command of `cat-rs` that writes into a folder.

    Attributes:
        name: What is run.
        arguments: Of the command, without the folder.
        begun: Appears in the folder when the models are loaded and the work begins.
        kept: Folder of the parts that a rerun goes on from.
        results: Files that must come out the same.
    """

    name: str
    arguments: tuple[str, ...]
    begun: str
    kept: str
    results: tuple[str, ...]

    def start(self, folder: Path, *more: str) -> subprocess.Popen[bytes]:
        """Start it, silently."""
        command = [sys.executable, "-m", "cat_rs.cli", *self.arguments, "--output-dir", str(folder), *more]
        with (folder.parent / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def finish(self, folder: Path, *more: str) -> None:
        """Run it to the end."""
        if self.start(folder, *more).wait():
            raise failure(self, folder)

    def parts(self, folder: Path) -> int:
        """How many whole parts there are to go on from."""
        return sum(not path.name.startswith(".") for path in folder.joinpath(self.kept).glob("*"))

    def go_on(self, folder: Path) -> None:
        """Start the killed run again, and let it finish."""
        self.finish(folder, "--resume" if self.name == "train" and self.parts(folder) else "--overwrite")

    def outcome(self, folder: Path) -> tuple[bytes, ...]:
        """The bytes of the results."""
        return tuple((folder / name).read_bytes() for name in self.results)


def train_task(seed: int = 0, steps: int = 30) -> Task:
    """A short training with dropout, whose checkpoints hold the state of the random generators."""
    places = ("--model", str(EMOJI_MODEL / "model"), "--data", str(CONCEPT))
    options = ("--rank", "4", "--batch-size", "2", "--lora-dropout", "0.1", "--checkpoint-every", "2")
    arguments = ("train", *places, *TRIGGER, *options, "--steps", str(steps), "--seed", str(seed))
    return Task("train", arguments, "metrics.jsonl", "checkpoints", (ADAPTER,))


def evaluate_task(work: Path) -> Task:
    """A short evaluation of two adapters, trained for it."""
    adapters = []
    for seed in range(2):
        folder = work / f"adapter-{seed}"
        if not (folder / ADAPTER).exists():
            train_task(seed, steps=5).finish(folder, "--overwrite", "--lr", "1e-2")
        adapters.append(str(folder))
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    places = ("--model", str(EMOJI_MODEL / "model"), "--encoder", str(EMOJI_MODEL / "clip"), "--data", str(CONCEPT))
    options = ("--prompts", str(prompts), "--inference-steps", "4", "--picture-batch", "2")
    arguments = ("evaluate", *places, "--adapters", *adapters, *TRIGGER, *options)
    return Task("evaluate", arguments, "cache/pictures", "cache/pictures", ("results.json", "contact_sheet.png"))


def failure(task: Task, folder: Path) -> SystemExit:
    """What ends this script when a command fails of itself."""
    said = (folder.parent / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return SystemExit("\n".join([f"cat-rs {task.name} failed:", *said[-20:]]))


def wait_until_begun(task: Task, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the work to begin."""
    while not (folder / task.begun).exists():
        if process.poll() is not None:
            raise failure(task, folder)
        time.sleep(POLL)


def killed(task: Task, folder: Path, moment: float) -> bool:
    """Start the task and kill it `moment` seconds after its work began; False if it had ended by then."""
    process = task.start(folder)
    wait_until_begun(task, process, folder)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def undisturbed(task: Task, folder: Path) -> float:
    """Run the task to its end; the seconds from the beginning of its work."""
    process = task.start(folder)
    wait_until_begun(task, process, folder)
    began = time.monotonic()
    if process.wait():
        raise failure(task, folder)
    return time.monotonic() - began


def survived(task: Task, work: Path, kills: int, moments: random.Random) -> int:
    """How many of the kills left no trace in the results."""
    seconds = undisturbed(task, work / f"{task.name}-whole")
    expected = task.outcome(work / f"{task.name}-whole")
    same = number = 0
    while number < kills:
        with tempfile.TemporaryDirectory(prefix=f"{task.name}-", dir=work, ignore_cleanup_errors=True) as place:
            folder, moment = Path(place, "run"), moments.uniform(0, seconds)
            if not killed(task, folder, moment):
                # It was faster this time.
                continue
            number += 1
            parts = task.parts(folder)
            task.go_on(folder)
            is_same = task.outcome(folder) == expected
            same += is_same
            print(
                f"{task.name} {number:2}: killed {moment:6.2f} s after its work began, {parts:2} parts kept; "
                f"{'identical' if is_same else 'DIFFERENT'} after the rerun",
                flush=True,
            )
    print(f"{task.name}: {same} of {kills} identical", flush=True)
    return same


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kills; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("evaluate", "train"), help="what is killed")
    parser.add_argument("--kills", type=int, default=20, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args(arguments)
    # The command line of this checkout, whatever is installed; two runs compare bit for bit at one number of threads.
    paths = filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="cat-rs-kills-") as folder:
        work, failed = Path(folder), False
        # The pictures that trainings preserve are drawn by the first run, which is not killed.
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        for what in options.what:
            task = evaluate_task(work) if what == "evaluate" else train_task()
            failed |= survived(task, work, options.kills, random.Random(options.seed)) < options.kills
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
