"""A short run of the fuzzer, always the same: calls of everything, mutated files, threads and signals."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from random import Random

import torch

import cat_rs
from cat_rs import _core
from tests.fuzz.calls import random_call
from tests.fuzz.targets import NOT_CALLED, targets


def test_a_short_run_crashes_nothing() -> None:
    # So few calls do not tell a share of unclear errors: `make fuzz` does.
    options = ["--seed", "7", "--calls", "400", "--allow-unclear", "--as-found"]
    command = [sys.executable, "-m", "tests.fuzz", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_is_called() -> None:
    found = targets()
    names = {target.name for target in found}
    functions = [name for name in dir(_core) if not name.startswith("_")]
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cat_rs::")]
    public = [name for name in cat_rs.__all__ if callable(getattr(cat_rs, name)) and name not in NOT_CALLED]
    expected = {
        *(f"_core.{name}" for name in functions),
        *(f"torch.ops.cat_rs.{name.partition('::')[2]}" for name in operators),
        *(f"cat_rs.{name}" for name in public),
    }
    assert expected <= names
    rng = Random(0)
    assert {random_call(found, rng).target.name for _ in range(60_000)} == names


def test_what_is_not_called_is_there() -> None:
    for name in NOT_CALLED:
        owner, _, member = name.partition(".")
        assert inspect.isclass(getattr(cat_rs, owner))
        assert not member or hasattr(getattr(cat_rs, owner), member)


def test_a_seed_tells_the_calls() -> None:
    found = targets()
    first, again = ([random_call(found, rng).text() for _ in range(50)] for rng in (Random(3), Random(3)))
    assert first == again
    assert max(Counter(first).values()) < 50
