"""`cat-rs generate`: pictures of prompts, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from cat_rs.commands.sampling import SamplingSettings
from cat_rs.options import check_absent, option

_WHAT = "model and prompts"


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingSettings):
    """What to draw."""

    model: str = option(group=_WHAT, help="SD or SDXL model: a folder or a hub id", metavar="DIR_OR_ID")
    prompt: tuple[str, ...] = option(group=_WHAT, help="what to draw", metavar="TEXT")
    adapter: str | None = option(None, group=_WHAT, help="adapter file, or the folder that holds it", metavar="PATH")
    output_dir: str = option("pictures", group=_WHAT, help="folder for the pictures", metavar="DIR")
    overwrite: bool = option(False, group=_WHAT, help="replace the pictures of an earlier run")


def run(settings: Settings) -> None:
    """Draw the pictures as PNG files, their prompts in metadata.jsonl."""
    from cat_rs.evaluation import generate_pictures, save_pictures
    from cat_rs.evaluation.generation import adapter_files, picture_files

    config = settings.evaluation_config()
    files = picture_files(settings.output_dir, len(settings.prompt), config.seeds)
    check_absent("output_dir", files, overwrite=settings.overwrite)
    if settings.adapter is not None:
        adapter_files(settings.adapter)
    pipeline = settings.load_pipeline(settings.model)
    grid = generate_pictures(pipeline, settings.prompt, config, adapter=settings.adapter)
    drawn = save_pictures(grid, settings.output_dir)
    print(f"{len(drawn)} pictures in {settings.output_dir}")
