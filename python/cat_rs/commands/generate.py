"""`cat-rs generate`: pictures of prompts, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from cat_rs.commands.sampling import SamplingSettings
from cat_rs.options import option

_WHAT = "model and prompts"


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingSettings):
    """What to draw."""

    model: str = option(group=_WHAT, help="SD or SDXL model: a folder or a hub id", metavar="DIR_OR_ID")
    prompt: tuple[str, ...] = option(group=_WHAT, help="what to draw", metavar="TEXT")
    adapter: str | None = option(None, group=_WHAT, help="adapter file, or the folder that holds it", metavar="PATH")
    output_dir: str = option("pictures", group=_WHAT, help="folder for the pictures", metavar="DIR")


def run(settings: Settings) -> None:
    """Draw the pictures as PNG files, their prompts in metadata.jsonl."""
    from cat_rs.evaluation import generate_pictures, save_pictures

    config = settings.evaluation_config()
    pipeline = settings.load_pipeline(settings.model)
    grid = generate_pictures(pipeline, settings.prompt, config, adapter=settings.adapter)
    files = save_pictures(grid, settings.output_dir)
    print(f"{len(files)} pictures in {settings.output_dir}")
