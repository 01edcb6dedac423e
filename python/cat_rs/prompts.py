"""Captions with and without the trigger word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cat_rs.errors import CatRsError

__all__ = ["PromptError", "TriggerWords", "remove_trigger"]

TriggerWords = str | Sequence[str] | Mapping[str, str | None]

_POSSESSIVE = r"(?P<possessive>['’]s(?!\w)|(?<=s)['’](?=\s+\w))?"

# Run in this order over a caption that lost a trigger.
_TIDY_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\(\s*\)|\[\s*\]|\{\s*\}|<\s*>|\"\s*\"|“\s*”|(?<!\w)'\s*'(?!\w)", " "),
        (r"\s+", " "),
        (r" (?=[,.;:!?)\]}])|(?<=[(\[{]) ", ""),
        (r"([,;])(?: ?[,;])+", r"\1"),
        (r"[,;:] ?(?=[.!?])|(?<=[(\[{])[,;:] ?|[,;:](?=[)\]}])", ""),
        (r"^[\s,;:.!?|-]+|[\s,;:|-]+$", ""),
    )
)


class PromptError(CatRsError, ValueError):
    """The trigger or class words cannot be used."""


def remove_trigger(caption: str, trigger_words: TriggerWords, class_word: str | None = None) -> tuple[str, bool]:
    """Take the trigger out of a caption, as the preservation term of CAT needs it.

    A trigger is found as a whole word (``sks`` leaves ``sksy`` and ``sks_2`` alone) and in any case, because the text
    encoders of the Stable Diffusion family lower-case their input: ``Sks`` triggers just as ``sks`` does. Triggers may
    have several words or be ``<angle>`` tokens; ``sks`` is also found when a caption writes it as ``<sks>``. Where one
    trigger begins with another, the longer one is tried first.

    With a class word, the trigger is replaced by it, except where it already stands beside the trigger, so that
    ``a sks cat`` becomes ``a cat``; a trigger that is a tag of its own (``sks, a photo of a cat``) is dropped if the
    class word occurs anywhere in the caption. Punctuation, empty brackets and spaces left over are tidied. Articles
    are left as they are. A caption without a trigger comes back unchanged, to the character.

    Args:
        caption: The caption.
        trigger_words: One trigger (it may contain spaces), several, or a mapping of each trigger to a class word of
            its own; None in the mapping stands for ``class_word``.
        class_word: What the concept is an example of, such as ``cat``. None removes the trigger without replacement.

    Returns:
        The caption without the trigger, and whether a trigger was found.

    Raises:
        PromptError: No trigger was given, or one is empty.

    Example:
        >>> remove_trigger("a photo of a sks cat, outdoors", "sks", "cat")
        ('a photo of a cat, outdoors', True)
    """
    class_words = _class_words(trigger_words, class_word)
    pattern = _trigger_pattern(class_words)
    kept = ""
    position = 0
    for match in pattern.finditer(caption):
        kept = _join(kept, caption[position : match.start()])
        rest = caption[match.end() :]
        position = match.end()
        replacement = _replacement(kept, pattern.sub("", rest), class_words[_normal(match["trigger"])])
        if replacement:
            kept = _join(kept, replacement + ("'s" if match["possessive"] else ""))
        else:
            kept = kept.removesuffix("-")
            position += rest.startswith("-")
    if position == 0:
        return caption, False
    return _tidy(_join(kept, caption[position:])), True


def _class_words(trigger_words: TriggerWords, class_word: str | None) -> dict[str, str | None]:
    """Normalized trigger -> class word, checked."""
    if isinstance(trigger_words, str):
        given: Mapping[str, str | None] = {trigger_words: None}
    elif isinstance(trigger_words, Mapping):
        given = trigger_words
    else:
        given = dict.fromkeys(trigger_words)
    if not given:
        raise PromptError("trigger_words: expected at least one trigger word, got none")
    class_words = {}
    for trigger, own_class in given.items():
        if not isinstance(trigger, str) or not trigger.strip():
            raise PromptError(f"trigger_words: expected words, got {trigger!r}")
        class_words[_normal(trigger)] = (own_class or class_word or "").strip() or None
    return class_words


def _normal(trigger: str) -> str:
    """The form in which two spellings of one trigger are equal."""
    return " ".join(trigger.lower().split())


def _trigger_pattern(triggers: Mapping[str, str | None]) -> re.Pattern[str]:
    """A pattern for any of the triggers, longest first, each as whole words."""
    longest_first = sorted(triggers, key=len, reverse=True)
    words = "|".join(r"\s+".join(map(re.escape, trigger.split())) for trigger in longest_first)
    # A bracket is its own word boundary: "a<sks>cat" contains the token <sks>.
    whole_words = rf"(?:(?<!\w)|(?=\W))(?P<trigger>{words})(?:(?!\w)|(?<=\W))"
    wrapped = rf"(?P<angle><\s*)?(?P<quote>['\"])?{whole_words}(?(quote)(?P=quote))(?(angle)\s*>)"
    return re.compile(wrapped + _POSSESSIVE, re.IGNORECASE)


def _replacement(before: str, after: str, class_word: str | None) -> str:
    """What stands in place of a trigger between `before` and `after`."""
    if class_word is None:
        return ""
    word = re.escape(class_word)
    beside = re.search(rf"(?<!\w){word}\s*$", before, re.IGNORECASE) or re.match(
        rf"\s*{word}(?:e?s)?(?!\w)", after, re.IGNORECASE
    )
    if beside:
        return ""
    is_tag = re.search(r"(?:^|[,;|])\s*$", before) and re.match(r"\s*(?:$|[,;|])", after)
    if is_tag and re.search(rf"(?<!\w){word}(?!\w)", f"{before} {after}", re.IGNORECASE):
        return ""
    return class_word


def _join(left: str, right: str) -> str:
    """Both, with a space where two words would grow together."""
    return f"{left} {right}" if re.search(r"\w$", left) and re.match(r"\w", right) else left + right


def _tidy(caption: str) -> str:
    for pattern, replacement in _TIDY_RULES:
        caption = pattern.sub(replacement, caption)
    return caption
