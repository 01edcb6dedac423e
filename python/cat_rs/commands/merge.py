"""`cat-rs merge`: several adapters as one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from cat_rs.options import ConfigError, check_absent, option

_FILES = "files"
_ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to add up, and what to write."""

    adapters: tuple[str, ...] = option(
        group=_FILES, help="adapter files, or the folders that hold them", positional=True
    )
    output: str = option(group=_FILES, help="file to write, for peft the folder", metavar="FILE")
    overwrite: bool = option(False, group=_FILES, help="replace the output if it is there")
    scales: tuple[float, ...] = option(
        (), group=_ADAPTER, help="scale of each adapter, in their order; 1 for all if not given", metavar="X"
    )
    cap: float | None = option(
        None,
        group=_ADAPTER,
        help="limit the singular values of each layer's sum to this many times the largest one that an adapter has "
        "there alone; 1 keeps adapters that pull in one direction from adding up",
    )
    to: Literal["diffusers", "peft", "kohya"] = option("diffusers", group=_ADAPTER, help="the format of the output")
    family: Literal["sd", "sdxl", "flux"] | None = option(
        None, group=_ADAPTER, help="the model's family, where the adapters do not tell; kohya's names depend on it"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", group=_ADAPTER, help="of the tensors; below float32 the sum is rounded"
    )

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("adapters: expected at least one, got none")
        if self.scales and len(self.scales) != len(self.adapters):
            raise ConfigError(
                f"scales: expected {len(self.adapters)} numbers, one for each adapter, got {len(self.scales)}"
            )


def run(settings: Settings) -> None:
    """Write the adapter; say what was added and what was capped."""
    import torch

    from cat_rs.adapter_file import merge_loras, save_lora
    from cat_rs.adapter_file.save import files_to_write

    check_absent("output", files_to_write(settings.output, settings.to), overwrite=settings.overwrite)
    merged, capped = merge_loras(settings.adapters, settings.scales or None, cap=settings.cap)
    dtype = getattr(torch, settings.dtype)
    written = save_lora(settings.output, merged, format=settings.to, family=settings.family, dtype=dtype)
    scales = settings.scales or (1.0,) * len(settings.adapters)
    parts = " + ".join(
        f"{scale:g} {os.path.basename(path)}" for scale, path in zip(scales, settings.adapters, strict=True)
    )
    print(f"{written}: {parts}, {sum(map(len, merged.alphas.values()))} layers")
    for layer in capped:
        values = "1 singular value" if layer.changed == 1 else f"{layer.changed} singular values"
        print(
            f"capped {layer.component} {layer.module}: {values}, the largest from "
            f"{layer.largest:.4g} to {layer.limit:.4g}"
        )
