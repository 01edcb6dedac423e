"""`cat-rs preserve build`: the pictures that preserve a base model, for all trainings on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cat_rs.commands.sampling import SAMPLING, SamplingSettings
from cat_rs.options import ConfigError, check_absent, option
from cat_rs.processes import leave
from cat_rs.prompts import remove_trigger
from cat_rs.text_files import general_prompts, read_prompts

_WHAT = "model and set"
_PROMPTS = "prompts"


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingSettings):
    """What to draw."""

    action: str = option(group=_WHAT, help="draw the pictures and write the set", metavar="build", positional=True)
    model: str = option(group=_WHAT, help="SD or SDXL model: a folder or a hub id", metavar="DIR_OR_ID")
    output: str = option(group=_WHAT, help="file of the set", metavar="FILE")
    overwrite: bool = option(False, group=_WHAT, help="replace an earlier set")
    teacher_draws: int = option(
        8, group=_WHAT, help="cached base predictions per picture; with 0 each step of a training predicts anew"
    )

    prompts: tuple[str, ...] = option((), group=_PROMPTS, help="files of prompts, one a line", metavar="FILE")
    general: bool = option(
        False, group=_PROMPTS, help="the bundled general prompts; also used where no others are given"
    )
    data: str | None = option(
        None,
        group=_PROMPTS,
        help="folder of pictures of a concept, for their captions without the trigger",
        metavar="FOLDER",
    )
    trigger: tuple[str, ...] = option(
        (), group=_PROMPTS, help="trigger words of the captions; WORD=CLASS gives one a class word", metavar="WORD"
    )
    class_word: str | None = option(
        None, group=_PROMPTS, help="stands in for the trigger in the captions", metavar="WORD"
    )

    picture_seeds: tuple[int, ...] = option(
        (0,), group=SAMPLING, help="one picture for each prompt and seed", metavar="N"
    )

    def __post_init__(self) -> None:
        if self.action != "build":
            raise ConfigError(f"preserve: expected build, got {self.action!r}")
        if self.data is not None and not self.trigger:
            raise ConfigError("trigger: expected the trigger word of the captions in data, got none")


def run(settings: Settings) -> None:
    """Build the set, and say where it is."""
    from cat_rs.training.preservation_set import SUFFIX, PreservationSet

    check_absent("output", [Path(settings.output)], overwrite=settings.overwrite)
    prompts = _prompts(settings)
    try:
        processes = settings.join_processes()
        pipeline = settings.load_pipeline(settings.model, processes)
        built = PreservationSet.build(
            pipeline,
            prompts,
            settings.output,
            sampling=settings.evaluation_config(),
            draws=settings.teacher_draws,
            processes=processes,
        )
    finally:
        leave()
    if processes.is_main:
        output = Path(settings.output)
        file = output / f"{built.key}{SUFFIX}" if output.is_dir() else output
        print(f"{file}: pictures: {len(built)}, prompts: {len(prompts)}")


def _prompts(settings: Settings) -> list[str]:
    """The prompts of all sources, each once.

    Raises:
        ConfigError, DatasetError: A file of prompts, or the folder of pictures, cannot be used.
    """
    from cat_rs.training import TrainConfig
    from cat_rs.training.captions import pair_captions
    from cat_rs.training.dataset import read_folder

    found = []
    for file in settings.prompts:
        try:
            read = read_prompts(file)
        except OSError as error:
            raise ConfigError(f"prompts: cannot read {file}: {error}") from error
        if not read:
            raise ConfigError(f"prompts: expected at least one prompt in {file}, got none")
        words = [trigger.partition("=")[0] for trigger in settings.trigger]
        for prompt in read:
            if words and remove_trigger(prompt, words)[1]:
                raise ConfigError(f"prompts: expected prompts without a trigger in {file}, got {prompt!r}")
        found += read
    if settings.general or not (settings.prompts or settings.data):
        found += general_prompts()
    if settings.data is not None:
        config = TrainConfig(
            model=settings.model, data=settings.data, trigger=settings.trigger, class_word=settings.class_word
        )
        captions = [example.caption for example in read_folder(settings.data)]
        found += pair_captions(captions, config).without_trigger
    return list(dict.fromkeys(found))
