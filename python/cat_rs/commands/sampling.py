"""What the commands that draw pictures share: options, and names for adapters."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cat_rs.options import option
from cat_rs.processes import Processes
from cat_rs.text_files import printable

SAMPLING = "sampling"
MACHINE = "machine"


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How pictures are drawn, and where."""

    picture_seeds: tuple[int, ...] = option(
        (0, 1), group=SAMPLING, help="one picture for each prompt and seed", metavar="N"
    )
    inference_steps: int = option(16, group=SAMPLING, help="denoising steps of a picture")
    guidance_scale: float = option(3.0, group=SAMPLING, help="classifier-free guidance; 1 is none")
    height: int | None = option(None, group=SAMPLING, help="in pixels; the model's own if not given")
    width: int | None = option(None, group=SAMPLING, help="in pixels; the model's own if not given")
    picture_batch: int = option(8, group=SAMPLING, help="pictures drawn at once")
    device: str = option("auto", group=MACHINE, help="cpu, cuda or cuda:N; auto takes a GPU if there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", group=MACHINE, help="of the weights")

    def evaluation_config(self) -> Any:
        """Return the settings as `cat_rs.evaluation` takes them."""
        from cat_rs.evaluation import EvaluationConfig

        return EvaluationConfig(
            num_inference_steps=self.inference_steps,
            guidance_scale=self.guidance_scale,
            seeds=self.picture_seeds,
            height=self.height,
            width=self.width,
            batch_size=self.picture_batch,
        )

    def join_processes(self) -> Processes:
        """Join the processes that a launcher started."""
        from cat_rs.training.model import choose_device

        return Processes.init(choose_device(self.device))

    def load_pipeline(self, model: str, processes: Processes | None = None) -> Any:
        """Load a model onto the chosen device; each rank takes its own GPU."""
        import torch

        from cat_rs.training.model import choose_device, load_pipeline

        device = (processes or Processes()).own_device(choose_device(self.device))
        return load_pipeline(model, getattr(torch, self.dtype), device)


def name_and_path(adapter: str) -> tuple[str, str]:
    """Split NAME=PATH; a path may have a "=" of its own, such as runs/lr=1e-4."""
    name, _, path = adapter.partition("=")
    if not path or os.sep in name or os.path.exists(adapter):
        return printable(Path(adapter).stem), adapter
    return printable(name), path
