"""The two captions of each picture: with the trigger (c) and without it (c0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cat_rs.options import ConfigError
from cat_rs.prompts import remove_trigger
from cat_rs.text_files import read_prompts
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import DatasetError

_SHOWN = 5


@dataclass(frozen=True)
class CaptionPairs:
    """Captions as given, and the same without the trigger.

    Attributes:
        with_trigger: One caption for each example.
        without_trigger: The same captions after `remove_trigger`; empty ones for `preserve` blank.
        changed: How many captions held a trigger.
        preserved: More prompts to preserve, which sometimes replace captions without the trigger.
    """

    with_trigger: tuple[str, ...]
    without_trigger: tuple[str, ...]
    changed: int
    preserved: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return a line for whoever starts the training."""
        text = f"trigger removed from {self.changed} of {len(self.with_trigger)} captions"
        pairs = zip(self.with_trigger, self.without_trigger, strict=True)
        example = next((f" ({before!r} -> {after!r})" for before, after in pairs if before != after), "")
        more = f"; {len(self.preserved)} prompts to preserve" if self.preserved else ""
        return text + example + more


def fill_template(config: TrainConfig) -> str | None:
    """Fill the trigger and class word into the caption template; `{name}` is left for each picture.

    Raises:
        ConfigError: The template has another field, or one that the settings do not fill.
    """
    if config.caption is None:
        return None
    triggers = list(config.class_words().items())
    trigger, class_word = triggers[0] if triggers else (None, config.class_word)
    fields = {"trigger": trigger, "class_word": class_word, "name": "{name}"}
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return config.caption.format_map(given)
    except (KeyError, ValueError, IndexError) as error:
        known = ", ".join("{" + name + "}" for name in given)
        raise ConfigError(f"caption: expected a text with the fields {known}, got {config.caption!r}") from error


def pair_captions(captions: Sequence[str], config: TrainConfig) -> CaptionPairs:
    """Take the trigger out of every caption.

    Raises:
        DatasetError: cat_factor > 0 and no caption holds a trigger: the preservation term would then hold the model
            to the base for the very captions that should change it.
    """
    triggers = config.class_words()
    if not triggers:
        return CaptionPairs(tuple(captions), tuple(captions), 0)
    removed = [remove_trigger(caption, triggers) for caption in captions]
    changed = sum(found for _, found in removed)
    if config.preserves() and changed == 0:
        shown = "; ".join(map(repr, captions[:_SHOWN])) + (" ..." if len(captions) > _SHOWN else "")
        raise DatasetError(
            f"trigger: expected {' or '.join(map(repr, triggers))} in the captions, which are preserved without "
            f"it; got no caption with it: {shown}"
        )
    without_trigger = tuple("" if config.preserved().preserve == "blank" else caption for caption, _ in removed)
    return CaptionPairs(tuple(captions), without_trigger, changed, _read_preserved(config))


def _read_preserved(config: TrainConfig) -> tuple[str, ...]:
    """Read the prompts of `preserve_prompts`, one a line."""
    if config.preserve_prompts is None:
        return ()
    try:
        prompts = tuple(dict.fromkeys(read_prompts(config.preserve_prompts)))
    except OSError as error:
        raise DatasetError(f"preserve_prompts: cannot read {config.preserve_prompts}: {error}") from error
    if not prompts:
        raise DatasetError(f"preserve_prompts: expected prompts, one a line, got none in {config.preserve_prompts}")
    for prompt in prompts:
        if remove_trigger(prompt, config.class_words())[1]:
            raise DatasetError(f"preserve_prompts: expected prompts without a trigger, got {prompt!r}")
    return prompts
