"""Processes of one torch.distributed group, for tests."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

RANKS = 2
TIMEOUT = 240
"""Seconds until processes that wait for each other count as hanging."""


def join_group(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )


def on_ranks(work: Callable[..., None], folder: Path, *arguments: Any) -> list[Any]:
    """Runs `work(rank, folder, *arguments)` in a process for each rank; what each saved in `results-<rank>.pt`."""
    context = torch.multiprocessing.spawn(work, (folder, *arguments), nprocs=RANKS, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes did not end within {TIMEOUT} s")
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(RANKS)]
