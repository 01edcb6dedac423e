"""`cat-rs convert`: an adapter file in another format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cat_rs.options import ConfigError, check_absent, option

_FILES = "files"
_ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to read, and what to write."""

    input: str = option(group=_FILES, help="adapter file, or the folder that holds it", positional=True)
    output: str = option(group=_FILES, help="file to write, for peft the folder", positional=True)
    overwrite: bool = option(False, group=_FILES, help="replace OUTPUT if it is there")
    to: Literal["diffusers", "peft", "kohya"] = option(group=_FILES, help="the format of OUTPUT")
    family: Literal["sd", "sdxl", "flux"] | None = option(
        None, group=_ADAPTER, help="the model's family, where the adapter does not tell; kohya's names depend on it"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, group=_ADAPTER, help="of the tensors; as they are if not given"
    )
    model: str | None = option(
        None,
        group=_ADAPTER,
        help="the model that the adapter is for: every layer of the adapter is looked up in it",
        metavar="DIR_OR_ID",
    )


def run(settings: Settings) -> None:
    """Convert the adapter."""
    import torch

    from cat_rs.adapter_file import save_lora
    from cat_rs.adapter_file.lora_file import check_fit
    from cat_rs.adapter_file.model import family_of_model
    from cat_rs.adapter_file.read import read_lora
    from cat_rs.adapter_file.save import files_to_write
    from cat_rs.training.model import load_model_parts

    check_absent("output", files_to_write(settings.output, settings.to), overwrite=settings.overwrite)
    models = load_model_parts(settings.model)
    lora = read_lora(settings.input, models)
    check_fit(lora, models)
    denoisers = [family_of_model(models[name]) for name in lora.state if name in models]
    family = settings.family or lora.family or next(filter(None, denoisers), None)
    if settings.to == "kohya" and family is None:
        raise ConfigError(
            "family: expected --family sd, sdxl or flux with --to kohya where the file does not tell, got none"
        )
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    written = save_lora(settings.output, lora, format=settings.to, family=family, dtype=dtype)
    parts = ", ".join(f"{len(alphas)} layers of {name}" for name, alphas in lora.alphas.items())
    print(f"{written}: {parts}, from {lora.format} to {settings.to}")
