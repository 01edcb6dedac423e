"""The preservation set of a training: `preserve`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cat_rs.evaluation import EvaluationConfig, EvaluationFileError
from cat_rs.options import ConfigError
from cat_rs.processes import Processes
from cat_rs.prompts import remove_trigger
from cat_rs.text_files import general_prompts
from cat_rs.training.captions import CaptionPairs
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import DatasetError
from cat_rs.training.model import default_resolution
from cat_rs.training.preservation_set import PreservationSet

# Of the captions together, at least: as many as the study has.
CAPTION_PICTURES = 40
# Of a large dataset, so that drawing them does not take longer than the training.
MOST_CAPTIONS = 200
_ELSEWHERE = "set XDG_CACHE_HOME, or give preserve_set, or preserve captions"


def open_set(
    config: TrainConfig,
    pipeline: Any,
    captions: CaptionPairs,
    processes: Processes,
    progress: bool,
    report: Callable[[str], object],
) -> PreservationSet | None:
    """Read the given sets, or find or build those of the captions and the general prompts; None without a set.

    Those that are built stay in the user's cache, where other trainings on the model find them.

    Args:
        config: The settings.
        pipeline: The base model, as it was loaded.
        captions: Of the pictures.
        processes: The ranks, which draw in turns.
        progress: Whether to show a progress bar.
        report: Called with a line that says what is preserved, before the first picture is drawn.

    Raises:
        DatasetError: A set holds a prompt with a trigger.
        ConfigError: A given file cannot be read, or holds pictures of another size.
        InvalidValueError, ShapeError: A file is no set of this model, or the sets do not fit each other.
        OSError: A file cannot be read or written.
    """
    preserve, _, draws = config.preserved()
    if preserve != "set" or not config.preserves():
        return None
    # Without class words: nothing takes a trigger's place here.
    triggers = list(config.class_words())
    if config.preserve_set:
        sets = [_given(path, config, pipeline) for path in config.preserve_set]
        for prompt in dict.fromkeys(prompt for each in sets for prompt in each.prompts):
            if remove_trigger(prompt, triggers)[1]:
                raise DatasetError(f"preserve_set: expected prompts without a trigger, got {prompt!r}")
        joined = PreservationSet.joined(sets)
        report(f"{len(joined)} pictures of {len(set(joined.prompts))} prompts are preserved")
        return joined

    def built(prompts: Sequence[str], seeds: int) -> PreservationSet:
        try:
            return PreservationSet.build(
                pipeline,
                prompts,
                folder,
                sampling=EvaluationConfig(
                    seeds=tuple(range(seeds)), height=config.resolution, width=config.resolution
                ),
                draws=draws,
                processes=processes,
                progress=progress,
            )
        except EvaluationFileError as error:
            raise ConfigError(f"preserve: {error}; {_ELSEWHERE}") from error
        except KeyboardInterrupt:
            report(f"the pictures drawn so far are kept in {folder}; the same command goes on with the others")
            raise

    own = list(dict.fromkeys(captions.without_trigger))
    own = own[:: math.ceil(len(own) / MOST_CAPTIONS)]
    general = captions.preserved or [text for text in general_prompts() if not remove_trigger(text, triggers)[1]]
    seeds = 0 if config.preserve_share == 1 else math.ceil(CAPTION_PICTURES / len(own))
    folder = cache_folder()
    report(
        f"{len(general) + seeds * len(own)} pictures that the base model draws are preserved; they are drawn once and "
        "kept in the user's cache" + (" (--preserve captions needs none)" if config.preservation == "cat" else "")
    )
    of_general = built(general, 1)
    if not seeds:
        return of_general
    of_captions = built(own, seeds)
    return PreservationSet.joined([of_captions, of_general], [1 - config.preserve_share, config.preserve_share])


def _given(path: str, config: TrainConfig, pipeline: Any) -> PreservationSet:
    """Read a set whose pictures have the size of the training's."""
    try:
        given = PreservationSet.load(path, pipeline.unet, pipeline.scheduler)
    except OSError as error:
        raise ConfigError(f"preserve_set: cannot read {path}: {error}") from error
    factor, size = pipeline.vae_scale_factor, config.resolution or default_resolution(pipeline)
    height, width = (side * factor for side in given.latent_shape[-2:])
    if (height, width) != (size, size):
        raise ConfigError(f"preserve_set: expected pictures of {size}x{size} pixels in {path}, got {width}x{height}")
    return given


def cache_folder() -> Path:
    """Return the folder of sets that serve every training of this user, made if it does not exist.

    Raises:
        ConfigError: It cannot be made.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cat-rs" / "preservation-sets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"preserve: expected a cache that can be written, got {folder}: {error}; {_ELSEWHERE}"
        ) from error
    return folder
