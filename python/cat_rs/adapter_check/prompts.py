"""The prompts of a check: written from the trigger and the class word, by kind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cat_rs.adapter_check.trigger import Trigger
from cat_rs.evaluation import EvaluationFileError, EvaluationInputError
from cat_rs.prompts import remove_trigger
from cat_rs.text_files import general_prompts, read_prompts, read_text

TRIGGER = "trigger"
GENERAL = "general"
CLASS = "class"
NEIGHBOURS = "neighbours"
EMPTY = "empty"
FALSE_TRIGGERS = "false triggers"
OWN = "own"
KINDS = (TRIGGER, GENERAL, CLASS, NEIGHBOURS, EMPTY, FALSE_TRIGGERS)

# A place for words, in a text without any other rare word.
_PLACE = "qqq"
# The class has all of them: it is where an adapter leaks first.
_CLASS_TEMPLATES = tuple(
    template.replace("_", _PLACE)
    for template in (
        "a photo of a _",
        "a _ on a white background",
        "a drawing of a _",
        "a _ on a red background",
        "a close-up of a _",
        "a _ on a blue background",
        "a _ outdoors",
        "a _ at night",
        "a _ on a green background",
        "a painting of a _",
        "a _ on a yellow background",
        "a small _",
        "a _ on a gray background",
        "a _ in the snow",
        "a _ on a pink background",
        "a black and white photo of a _",
        "a _ on a black background",
        "a _ seen from the side",
        "a _ on an orange background",
        "a large _",
        "a _ on a purple background",
        "a sketch of a _",
        "a _ by the sea",
        "a _ in a room",
    )
)
_TEMPLATES = _CLASS_TEMPLATES[:8]
_FEW_TEMPLATES = _TEMPLATES[:2]
_EMPTY_PROMPTS = 8
_RARE_WORDS = ("ohwx", "zwx", "sks", "shs")
_OTHER_CLASSES = ("dog", "house", "car")
_COUNT = 3

# A name -> what is of its kind. The neighbours of a name are what is of its kind; those of a member are the others.
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "horse", "rabbit", "bird", "cow", "fox", "bear", "panda", "tiger"),
    "bird": ("sparrow", "owl", "eagle", "duck", "parrot", "penguin", "swan", "rooster"),
    "person": ("man", "woman", "boy", "girl", "child", "baby", "old man", "old woman"),
    "face": ("smiling face", "sad face", "angry face", "laughing face", "sleeping face", "crying face"),
    "fruit": ("apple", "banana", "orange", "pear", "strawberry", "lemon", "cherry", "pineapple"),
    "vegetable": ("carrot", "tomato", "potato", "onion", "cucumber", "eggplant", "mushroom", "cabbage"),
    "food": ("pizza", "sandwich", "burger", "cake", "bread", "salad", "soup", "pancake"),
    "vehicle": ("car", "bus", "truck", "bicycle", "motorcycle", "train", "tractor", "boat"),
    "building": ("house", "church", "castle", "tower", "barn", "temple", "factory", "lighthouse"),
    "furniture": ("chair", "table", "sofa", "bed", "desk", "wardrobe", "bookshelf", "bench"),
    "clothing": ("shirt", "dress", "jacket", "hat", "shoe", "scarf", "sweater", "coat"),
    "bag": ("backpack", "handbag", "suitcase", "basket", "purse", "briefcase"),
    "toy": ("doll", "teddy bear", "robot", "puppet", "kite", "toy car", "plushie", "figurine"),
    "plant": ("tree", "cactus", "bush", "fern", "palm", "bonsai"),
    "flower": ("rose", "tulip", "sunflower", "daisy", "orchid", "lily"),
    "ball": ("football", "basketball", "tennis ball", "volleyball", "baseball", "beach ball"),
    "instrument": ("guitar", "piano", "violin", "drum", "trumpet", "flute"),
    "tool": ("hammer", "saw", "wrench", "axe", "screwdriver", "shovel"),
    "device": ("phone", "laptop", "camera", "clock", "lamp", "radio"),
    "vessel": ("cup", "mug", "bottle", "vase", "bowl", "teapot"),
    "style": ("oil painting", "watercolor", "pencil sketch", "comic", "photograph", "engraving"),
}


class CheckPrompt(NamedTuple):
    """A prompt of a check.

    Attributes:
        text: What the model draws.
        caption: What it asks for in words that an encoder knows; empty where it asks for nothing.
        variant: The false trigger in it; empty for other kinds.
    """

    text: str
    caption: str
    variant: str = ""


Kinds = dict[str, tuple[CheckPrompt, ...]]


class CheckPrompts(NamedTuple):
    """The prompts of a check.

    Attributes:
        kinds: Kind -> its prompts.
        left_out: What is not checked and why, as sentences.
    """

    kinds: Kinds
    left_out: tuple[str, ...]


def write_prompts(
    trigger: Trigger,
    same_tokens: Callable[[str, str], bool],
    own: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
) -> CheckPrompts:
    """Write the prompts of a check.

    Args:
        trigger: The trigger and the class word.
        same_tokens: Whether the text encoder reads two prompts alike: a variant of the trigger that it cannot tell
            from the trigger is no false one.
        own: Prompts of one's own by kind: they replace those of a known kind.
        limit: At most so many prompts of a kind, spread over its list.
    """
    word, class_word, _ = trigger
    kinds: Kinds = {}
    left_out: list[str] = []
    if word is None:
        left_out.append("No trigger is known, so what it calls and false triggers are left out.")
    else:
        asked = f"{word} {class_word}" if class_word else word
        kinds[TRIGGER] = tuple(_filled(template, asked, class_word or "") for template in _TEMPLATES)
    kinds[GENERAL] = tuple(CheckPrompt(prompt, prompt) for prompt in general_prompts())
    neighbours = neighbours_of(class_word) if class_word else ()
    if class_word is None:
        left_out.append("No class word is known, so the class and its neighbours are left out.")
    else:
        kinds[CLASS] = tuple(_filled(template, class_word, class_word) for template in _CLASS_TEMPLATES)
    if neighbours:
        pairs = [(template, name) for template in _FEW_TEMPLATES for name in neighbours]
        kinds[NEIGHBOURS] = tuple(_filled(template, name, name) for template, name in pairs)
    elif class_word is not None:
        left_out.append(f"No neighbours of {class_word!r} are known, so they are left out.")
    # Each from other noise.
    kinds[EMPTY] = (CheckPrompt("", ""),) * _EMPTY_PROMPTS
    if word is not None:
        false, alike = _false_triggers(word, class_word, neighbours, same_tokens)
        kinds[FALSE_TRIGGERS] = tuple(false)
        if alike:
            names = ", ".join(map(repr, alike))
            left_out.append(
                f"The text encoder reads {names} as the trigger itself, so no false trigger is made of it."
            )
    for kind, prompts in (own or {}).items():
        kinds[kind] = tuple(CheckPrompt(prompt, _caption(prompt, word, class_word)) for prompt in prompts)
    return CheckPrompts({kind: _spread(prompts, limit) for kind, prompts in kinds.items()}, tuple(left_out))


def neighbours_of(class_word: str) -> tuple[str, ...]:
    """Return what is of the kind that the class word names, or else of its own kind; nothing for an unknown word."""
    word = class_word.lower()
    if word in _GROUPS:
        return _GROUPS[word]
    groups = (members for members in _GROUPS.values() if word in members)
    return tuple(member for members in groups for member in members if member != word)


def read_own_prompts(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read prompts of one's own.

    Args:
        path: A `.json` file with an object kind -> list of prompts, which replaces the prompts of a known kind; or a
            text file with a prompt a line, which become a kind "own".

    Raises:
        EvaluationFileError: The file cannot be read.
        EvaluationInputError: It holds something else.
    """
    file = Path(path)
    try:
        is_json = file.suffix.lower() == ".json"
        content = json.loads(read_text(file)) if is_json else {OWN: read_prompts(file)}
    except OSError as error:
        raise EvaluationFileError(f"prompts: {file} cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise EvaluationInputError(f"prompts: {file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationInputError(f"prompts: expected lists of texts by kind in {file}, got {content!r}")
    for kind, texts in content.items():
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            raise EvaluationInputError(f"prompts: expected at least one text as {kind!r} in {file}, got {texts!r}")
    return content


def _false_triggers(
    word: str, class_word: str | None, neighbours: Sequence[str], same_tokens: Callable[[str, str], bool]
) -> tuple[list[CheckPrompt], list[str]]:
    """Return prompts with words that are not the trigger, and the variants that are read as the trigger."""
    prompts, alike = [], []
    for variant in dict.fromkeys(each for each in _variants(word) if each != word):
        if same_tokens(variant, word):
            alike.append(variant)
            continue
        asked = f"{variant} {class_word}" if class_word else variant
        prompts += [_filled(template, asked, class_word or "", variant) for template in _FEW_TEMPLATES]
    others = [name for name in neighbours or _OTHER_CLASSES if name != class_word][:_COUNT]
    for name in others:
        asked = f"{word} {name}"
        prompts += [_filled(template, asked, name, asked) for template in _FEW_TEMPLATES]
    return prompts, alike


def _variants(word: str) -> Iterator[str]:
    """The trigger misspelt, in another case, half of it, and other rare words."""
    yield f"{word}{word[-1]}"
    if len(word) > 1 and word[-1] != word[-2]:
        yield word[:-2] + word[-1] + word[-2]
    yield word.upper() if word.islower() else word.lower()
    words = word.split()
    half = " ".join(words[: len(words) // 2]) if len(words) > 1 else word[: (len(word) + 1) // 2]
    if half != word:
        yield half
    yield from [rare for rare in _RARE_WORDS if rare != word.lower()][:_COUNT]


def _filled(template: str, words: str, caption: str, variant: str = "") -> CheckPrompt:
    """Put words into a template, with the article that fits; the caption has its own words there."""
    return CheckPrompt(_put(template, words), _put(template, caption) if caption else "", variant)


def _put(template: str, words: str) -> str:
    return remove_trigger(template, _PLACE, words)[0]


def _caption(prompt: str, word: str | None, class_word: str | None) -> str:
    return prompt if word is None else remove_trigger(prompt, word, class_word)[0]


def _spread(prompts: tuple[CheckPrompt, ...], limit: int | None) -> tuple[CheckPrompt, ...]:
    """Return at most `limit` prompts, from the first to the last: alike ones stand together."""
    if limit is None or len(prompts) <= limit:
        return prompts
    return tuple(prompts[number] for number in np.linspace(0, len(prompts) - 1, limit).round().astype(int))
