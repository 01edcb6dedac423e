"""What calls an adapter, as far as its file tells."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cat_rs.adapter_file.lora_file import LoraFile
from cat_rs.adapter_file.paths import DIFFUSERS_FILE, PEFT_FILE

# kohya's trainers read "10_sks cat" as ten repeats, the trigger and its class.
_FOLDER = re.compile(r"\d+_(.+)")
# Words of "a photo of sks dog" that are neither trigger nor class.
_AROUND = re.compile(
    r"\b(?:in the style of|an?|the|of|photo|photograph|picture|image|portrait|painting|drawing|rendering)\b\s*",
    re.IGNORECASE,
)
# Tags of every picture: more of them are a caption, not a trigger.
_MOST_WORDS = 3


class Trigger(NamedTuple):
    """What calls an adapter.

    Attributes:
        word: The trigger, which may have several words; None if nothing tells.
        class_word: What the concept is an example of; None if nothing tells.
        source: Where both come from, for readers.
    """

    word: str | None
    class_word: str | None
    source: str


def find_trigger(
    lora: LoraFile, path: str | os.PathLike[str], word: str | None = None, class_word: str | None = None
) -> Trigger:
    """Return the trigger and the class word of an adapter: the given ones, then what its metadata tell.

    Args:
        lora: The adapter.
        path: Where it was read from: a model card may lie beside it.
        word: The trigger, where the user gives one.
        class_word: The class word, where the user gives one.
    """
    told = (trigger for trigger in _found(lora, Path(path)) if trigger.word and trigger.word.strip())
    found = next(told, Trigger(None, None, "nowhere: the file does not tell"))
    if word is None and class_word is None:
        return found
    given = " and ".join(name for name, value in (("trigger", word), ("class word", class_word)) if value)
    # The class word in the file is that of its own trigger.
    own_class = found.class_word if word in (None, found.word) else None
    rest = "" if (word or not found.word) and (class_word or not own_class) else f", the rest {found.source}"
    return Trigger(word or found.word, class_word or own_class, f"the {given} as given{rest}")


def _found(lora: LoraFile, path: Path) -> Iterator[Trigger]:
    """What each kind of metadata tells, the surest first."""
    yield _own(lora.metadata, "from cat-rs's metadata")
    merged = lora.metadata.get("merged")
    for origin in merged if isinstance(merged, list) else ():
        if isinstance(origin, Mapping):
            yield _own(origin, "from cat-rs's metadata of an adapter that was merged")
    metadata = lora.file_metadata
    for key in ("modelspec.trigger_phrase", "instance_prompt"):
        yield _split(_AROUND.sub("", metadata.get(key, "")), f"from {key}")
    yield _split(_AROUND.sub("", _card_prompt(path)), "from the model card's instance_prompt")
    for key in ("ss_tag_frequency", "ss_dataset_dirs"):
        folders = _json(metadata.get(key, ""))
        for folder in folders:
            if match := _FOLDER.fullmatch(folder):
                yield _split(match[1].replace("_", " "), f"from a folder's name in {key}")
    for tags in _json(metadata.get("ss_tag_frequency", "")).values():
        counts = tags if isinstance(tags, dict) and all(isinstance(count, int) for count in tags.values()) else {}
        most = [tag.strip() for tag, count in counts.items() if count == max(counts.values())]
        if most and len(most) <= _MOST_WORDS:
            yield Trigger(most[0], None, "from the most frequent tag in ss_tag_frequency")


def _own(metadata: Mapping[str, Any], source: str) -> Trigger:
    """What cat-rs writes: one trigger with its class word, several with theirs, or several without."""
    trigger = metadata.get("trigger")
    if isinstance(trigger, Mapping) and trigger:
        word, class_word = next(iter(trigger.items()))
    elif isinstance(trigger, list) and trigger:
        word, class_word = trigger[0], None
    else:
        word, class_word = trigger, metadata.get("class_word")
    return Trigger(_text(word), _text(class_word), source)


def _split(phrase: str, source: str) -> Trigger:
    """The last word is the class, as in "sks cat"; a single one is the trigger."""
    *words, last = phrase.strip(" ,.").split() or [""]
    return Trigger(" ".join(words), last, source) if words else Trigger(last, None, source)


def _card_prompt(path: Path) -> str:
    """The instance_prompt of the model card that diffusers' training scripts write beside an adapter; else nothing."""
    import yaml
    from huggingface_hub import metadata_load

    folder = path.parent if path.name in (DIFFUSERS_FILE, PEFT_FILE) else path
    card = folder / "README.md"
    try:
        content = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return _text(content.get("instance_prompt")) or "" if isinstance(content, dict) else ""


def _json(text: str) -> Mapping[str, Any]:
    """An object of JSON; an empty one for other texts, which trainers may write as they like."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
