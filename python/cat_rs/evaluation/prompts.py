"""The prompts of an evaluation: with the trigger, and without it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.prompts import remove_trigger
from cat_rs.text_files import is_unicode, read_prompts, read_text

_PROMPTS = "_prompts"
_TRIGGER_PROMPTS = f"trigger{_PROMPTS}"


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts with the trigger and prompts without it.

    Attributes:
        trigger: Prompts that ask for the concept ("a sks cat on a red background").
        no_trigger: Prompts that ask for what the base model knew before ("a cat on a red background").
        trigger_words: The words that call the adapter.
        class_word: What the concept is, in a word the base model knows.
    """

    trigger: tuple[str, ...]
    no_trigger: tuple[str, ...]
    trigger_words: tuple[str, ...]
    class_word: str | None = None

    def __post_init__(self) -> None:
        for name in ("trigger", "no_trigger", "trigger_words"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise EvaluationInputError(f"{name}: expected a list of texts, got one text {value!r}")
            if not value:
                raise EvaluationInputError(f"{name}: expected at least one, got none")
            object.__setattr__(self, name, tuple(value))
        self._check_trigger_words()

    @classmethod
    def from_trigger_prompts(
        cls, trigger: Sequence[str], trigger_words: Sequence[str], class_word: str | None = None
    ) -> EvaluationPrompts:
        """Derive the prompts without the trigger from those with it.

        Args:
            trigger: Prompts that hold a trigger word.
            trigger_words: The words to remove.
            class_word: The word that says what the concept is; put in the trigger's place where the prompt
                lacks it.

        Raises:
            EvaluationInputError: A prompt holds no trigger word.
        """
        words = tuple(trigger_words)
        no_trigger = tuple(without_trigger(prompt, words, class_word) for prompt in trigger)
        return cls(tuple(trigger), no_trigger, words, class_word)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        trigger_words: Sequence[str] = (),
        class_word: str | None = None,
        concept: str | None = None,
        groups: Sequence[str] = (),
    ) -> EvaluationPrompts:
        """Read prompts from a file.

        A `.json` file holds an object with

            trigger_word, or trigger_words   optional, the same as the argument
            class_word                       optional, the same as the argument
            trigger_prompts                  prompts with the trigger
            <group>_prompts                  any number of lists of prompts without it; derived if there is none

        or with `concepts`, a list of such objects, each with a `name`; what they lack is taken from the whole. Any
        other file holds one prompt with the trigger a line; blank lines and lines that start with `#` are skipped.

        Args:
            path: The file.
            trigger_words: The trigger words; they win over the file's.
            class_word: The class word; it wins over the file's.
            concept: Which concept of a file with several.
            groups: Which lists of prompts without the trigger to take, such as "class"; all if empty.

        Raises:
            EvaluationFileError: The file cannot be read.
            EvaluationInputError: The file holds something else, or lacks what was asked for.
        """
        file = Path(path)
        try:
            if file.suffix.lower() == ".json":
                entry: Mapping[str, Any] = _json_entry(read_text(file), file, concept)
            else:
                entry = {_TRIGGER_PROMPTS: read_prompts(file)}
        except OSError as error:
            raise EvaluationFileError(f"prompts: {file} cannot be read: {error}") from error
        words = tuple(trigger_words) or _trigger_words(entry, file)
        word = class_word or entry.get("class_word")
        trigger = _texts(entry, _TRIGGER_PROMPTS, file)
        no_trigger = _no_trigger_prompts(entry, groups, file)
        if no_trigger:
            return cls(trigger, no_trigger, words, word)
        return cls.from_trigger_prompts(trigger, words, word)

    def class_captions(self) -> tuple[str, ...]:
        """Return the trigger prompts in words the encoder knows: the class word instead of the trigger."""
        return tuple(without_trigger(prompt, self.trigger_words, self.class_word) for prompt in self.trigger)

    def _check_trigger_words(self) -> None:
        for prompt in self.trigger:
            without_trigger(prompt, self.trigger_words, self.class_word)
        for prompt in self.no_trigger:
            if remove_trigger(prompt, list(self.trigger_words))[1]:
                raise EvaluationInputError(
                    f"no_trigger: expected prompts without {list(self.trigger_words)}, got {prompt!r}"
                )


def without_trigger(prompt: str, trigger_words: Sequence[str], class_word: str | None = None) -> str:
    """Put the class word in the trigger's place, or nothing where the prompt has it already.

    Raises:
        EvaluationInputError: The prompt holds no trigger word.
    """
    caption, changed = remove_trigger(prompt, list(trigger_words), class_word)
    if not changed:
        raise EvaluationInputError(f"trigger: expected a prompt with one of {list(trigger_words)}, got {prompt!r}")
    return caption


def _json_entry(text: str, file: Path, concept: str | None) -> Mapping[str, Any]:
    """Return the object of one concept, completed from the whole file."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise EvaluationInputError(f"prompts: {file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationInputError(f"prompts: expected a JSON object in {file}, got {type(content).__name__}")
    if "concepts" not in content:
        return content
    whole = {key: value for key, value in content.items() if key != "concepts"}
    try:
        concepts: dict[str, Mapping[str, Any]] = {entry["name"]: whole | entry for entry in content["concepts"]}
    except (KeyError, TypeError) as error:
        raise EvaluationInputError(f"prompts: expected concepts with a name in {file}, got {error!r}") from error
    if concept is None and len(concepts) == 1:
        return next(iter(concepts.values()))
    if concept not in concepts:
        raise EvaluationInputError(
            f"prompts: expected one of the concepts {', '.join(sorted(concepts))} of {file}, got {concept}"
        )
    return concepts[concept]


def _trigger_words(entry: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    if isinstance(entry.get("trigger_word"), str):
        return (entry["trigger_word"],)
    words = _texts(entry, "trigger_words", file)
    if not words:
        raise EvaluationInputError(f"prompts: expected trigger words in {file} or as an argument, got none")
    return words


def _no_trigger_prompts(entry: Mapping[str, Any], groups: Sequence[str], file: Path) -> tuple[str, ...]:
    found = [key for key in entry if key.endswith(_PROMPTS) and key != _TRIGGER_PROMPTS]
    wanted = [f"{group}{_PROMPTS}" for group in groups] or found
    for key in wanted:
        if key not in found:
            raise EvaluationInputError(f"groups: expected lists of {file} ({', '.join(found) or 'none'}), got {key}")
    return tuple(prompt for key in wanted for prompt in _texts(entry, key, file))


def _texts(entry: Mapping[str, Any], key: str, file: Path) -> tuple[str, ...]:
    value = entry.get(key, ())
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise EvaluationInputError(f"prompts: expected a list of texts as {key!r} in {file}, got {value!r}")
    for text in value:
        if not is_unicode(text):
            raise EvaluationInputError(
                f"prompts: expected Unicode in {file}, got half of a surrogate pair in {text!r}"
            )
    return tuple(value)
