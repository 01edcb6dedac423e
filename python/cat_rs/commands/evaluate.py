"""`cat-rs evaluate`: what adapters learned and what they destroyed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cat_rs.commands.sampling import SamplingSettings, name_and_path
from cat_rs.options import ConfigError, check_absent, option
from cat_rs.processes import Processes, leave
from cat_rs.run_folder import CONTACT_SHEET_FILE, PICTURES_FOLDER, RESULTS_FILE

if TYPE_CHECKING:
    from cat_rs.evaluation import EvaluationResult

_WHAT = "model and adapters"
_PROMPTS = "prompts"


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingSettings):
    """What to compare."""

    model: str = option(group=_WHAT, help="the base model: a folder or a hub id", metavar="DIR_OR_ID")
    adapters: tuple[str, ...] = option(
        group=_WHAT, help="adapter files, or folders that hold one; NAME=PATH names it in the table", metavar="PATH"
    )
    data: str = option(group=_WHAT, help="folder of the concept's pictures, for identity", metavar="FOLDER")
    encoder: str = option(
        "openai/clip-vit-large-patch14",
        group=_WHAT,
        help="CLIP, SigLIP or DINOv2: a folder or a hub id",
        metavar="DIR_OR_ID",
    )
    output_dir: str = option("evaluation", group=_WHAT, help="folder for the results", metavar="DIR")
    overwrite: bool = option(False, group=_WHAT, help="replace the results of an earlier evaluation")
    cache: str | None = option(
        None,
        group=_WHAT,
        help="folder that keeps pictures and embeddings, for other evaluations and to go on after a kill; "
        "cache in the output folder if not given",
        metavar="DIR",
    )

    prompts: str = option(
        group=_PROMPTS,
        help="file of prompts with the trigger, one a line; or JSON with trigger_prompts and, say, class_prompts",
        metavar="FILE",
    )
    trigger: tuple[str, ...] = option((), group=_PROMPTS, help="trigger words, if the file lacks them", metavar="WORD")
    class_word: str | None = option(None, group=_PROMPTS, help="what the concept is an example of", metavar="WORD")
    concept: str | None = option(None, group=_PROMPTS, help="which concept of a file with several", metavar="NAME")

    def named_adapters(self) -> dict[str, str]:
        """Return name -> path."""
        named = dict(map(name_and_path, self.adapters))
        if len(named) < len(self.adapters):
            raise ConfigError(f"adapters: expected different names, got {' '.join(self.adapters)}; give NAME=PATH")
        return named


def run(settings: Settings) -> None:
    """Print the table and the comparisons; write results.json, contact_sheet.png and the pictures."""
    from cat_rs.report import contact_sheet, print_table, save_all_pictures

    try:
        result = _evaluate(settings)
        reports = Processes.current().is_main
    finally:
        leave()
    if not reports:
        return
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    save_all_pictures(result, output / PICTURES_FOLDER)
    contact_sheet(result, output / CONTACT_SHEET_FILE)
    # Last, as it tells that the evaluation is whole.
    result.save(output / RESULTS_FILE)
    print_table(result)
    print(f"results: {output / 'results.json'}, pictures: {output / 'contact_sheet.png'}")


def _evaluate(settings: Settings) -> EvaluationResult:
    """Evaluate on all ranks that a launcher started."""
    from cat_rs.evaluation import EvaluationPrompts, evaluate, load_encoder
    from cat_rs.evaluation.generation import adapter_files

    output = Path(settings.output_dir)
    check_absent("output_dir", [output / RESULTS_FILE], overwrite=settings.overwrite)
    adapters = settings.named_adapters()
    for path in adapters.values():
        adapter_files(path)
    config = settings.evaluation_config()
    prompts = EvaluationPrompts.load(
        settings.prompts, trigger_words=settings.trigger, class_word=settings.class_word, concept=settings.concept
    )
    processes = settings.join_processes()
    pipeline = settings.load_pipeline(settings.model, processes)
    return evaluate(
        pipeline,
        adapters,
        prompts,
        load_encoder(settings.encoder, device=pipeline.device),
        concept_images=settings.data,
        config=config,
        cache=settings.cache or output / "cache",
        processes=processes,
    )
