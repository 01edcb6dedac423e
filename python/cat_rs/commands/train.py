"""`cat-rs train`: a LoRA from a folder of pictures."""

from __future__ import annotations

from cat_rs.processes import Processes, leave
from cat_rs.training import TrainConfig, train

Settings = TrainConfig


def run(settings: TrainConfig) -> None:
    """Train, and say where the adapter is."""
    try:
        result = train(settings)
        reports = Processes.current().is_main
    finally:
        leave()
    if not reports:
        return
    print(f"{result.steps} steps in {result.seconds:.0f} s; adapter: {result.adapter}")
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps had a gradient that was not finite and left the weights alone")
