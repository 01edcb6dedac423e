"""Captions with and without the trigger word."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import takewhile

from cat_rs.errors import CatRsError
from cat_rs.folding import ATTACHED, EDGE, edge_between, fold, without_marks, word_pattern

__all__ = ["PromptError", "TriggerWords", "remove_trigger"]

TriggerWords = str | Sequence[str] | Mapping[str, str | None]

_SEPARATORS = ",;，、；،؛"
_COMMAS, _STOPS = f"{_SEPARATORS}:：", ".!?。！？؟"
_OPENING, _CLOSING = r"(\[{（【「『《", r")\]}）】」』》"
_EMPTY = r"\( ?\)|\[ ?\]|\{ ?\}|< ?>|（ ?）|【 ?】|「 ?」|『 ?』|《 ?》|\" ?\"|“ ?”|(?<!\w)(?:' ?'|‘ ?’)(?!\w)"

# Run in this order over a caption that lost a trigger.
_TIDY_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (_EMPTY, " "),
        (r" +", " "),
        (rf" (?=[{_COMMAS}{_STOPS}{_CLOSING}])|(?<=[{_OPENING}]) ", ""),
        (rf"([{_SEPARATORS}])(?: ?[{_SEPARATORS}])+", r"\1"),
        (rf"[{_COMMAS}] ?(?=[{_STOPS}])|(?<=[{_OPENING}])[{_COMMAS}] ?|[{_COMMAS}](?=[{_CLOSING}])", ""),
    )
)
_NO_BEGINNING, _NO_END = f" \u200b|-{_COMMAS}{_STOPS}", f" \u200b|-{_COMMAS}"

_QUOTED = r"[\s\"'“”‘’()\[\]{}<>]*"
_ARTICLE = re.compile(rf"(?<![\w'’-])(an?)(?={_QUOTED}$)", re.IGNORECASE)
_ENGLISH_WORD = re.compile(rf"{_QUOTED}([a-z0-9][\w'’]*)", re.IGNORECASE)
# "An" goes by sound: "an hour", "a unicorn".
_TAKES_AN = re.compile(
    r"(?!e[uw]|once\b|one\b|uni(?![dmn])|u\b|us\b|us[aeu]|ut[eio]|ubi|uk[eru]|ufo|ur[aiou])[aeiou]"
    r"|hour|honest|hono|heir|8|1[18](?!\d)",
    re.IGNORECASE,
)

# English words that do not belong to the noun before them ("a sks on grass"), and endings of words that rarely do
# ("a sks sleeping", "sks wears a hat").
_FUNCTION_WORD = re.compile(
    r"(?:an?|the|this|that|these|those|some|any|each|every|no|my|your|his|her|its|our|their|another|other|and|or|but|nor"
    r"|as|than|then|while|when|where|who|which|whose|with|without|in|into|inside|on|onto|upon|at|by|of|off|to|for|from"
    r"|over|under|above|below|behind|beside|between|near|next|before|after|against|among|around|across|along|through"
    r"|toward|down|up|out|outside|outdoors?|indoors?|like|via|per|is|are|was|were|be|been|has|have|had|do|did|can|will"
    r"|would|may|must|not|only|also|too|again|alone|together|here|there|now|very|asleep|awake)",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"(?:sat|ran|lay|led|fed|hid|held|stood|slept|ate|swam|flew|seen|made|worn|shown|taken|drawn|eaten|broken|shot|used"
    r"|\w{3,}(?:ing|ed|ly)|\w{2,}(?<![us])s)",
    re.IGNORECASE,
)
_NEXT_WORD = re.compile(r"\s+([a-z][a-z'’-]*)", re.IGNORECASE)
_BEFORE_A_NOUN = re.compile(
    r"(?:^|[,;:.]|\b(?:an?|the|this|that|one|my|your|his|her|our|their|of))\s*$", re.IGNORECASE
)
# Words of French, Spanish and Portuguese that English does not have. There an adjective follows its noun, and "a" is
# another word.
_NO_ENGLISH = re.compile(
    r"\b(?:de|da|das|dos|du|des|la|le|les|el|los|las|un|une|una|uno|uma|um|en|em|na|dans|avec|sur|con|com|sobre|para"
    r"|pour|et|est|está|estão|são|é|à)\b",
    re.IGNORECASE,
)
# "the fruit sks": a noun before its name. Colours, sizes and words with these endings are rather adjectives.
_NOUN_BEFORE = re.compile(r"\b(?:the|my|your|his|her|our|their)\s+([a-z]{3,})\s*$", re.IGNORECASE)
_ADJECTIVE = re.compile(
    r"red|blue|green|black|white|gr[ae]y|brown|pink|orange|gold|golden|silver|big|small|large|huge|tall|short|long|old"
    r"|new|good|bad|great|nice|cute|same|real|wild|dark|light|round|fat|thin|sweet|whole|first|second|last|other|own|only"
    r"|\w+(?:y|ful|ous|ish|al|ic|ive|ed|ing|able|ible|less|est|ant|ent)",
    re.IGNORECASE,
)
_LONGEST_NOUN = 3
_LONGEST_WORD = 40


class PromptError(CatRsError, ValueError):
    """The trigger or class words cannot be used."""


class _Gap:
    """What stands between two triggers; or a class word in the place of one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._answers: dict[str, bool] = {}

    @cached_property
    def stripped(self) -> str:
        return self.text.strip()

    @cached_property
    def _folded(self) -> str:
        return fold(self.text)[0]

    def has(self, pattern: str) -> bool:
        """Whether the folded text matches; asked for each trigger beside the piece, searched for once."""
        if pattern not in self._answers:
            self._answers[pattern] = re.search(pattern, self._folded) is not None
        return self._answers[pattern]


def remove_trigger(caption: str, trigger_words: TriggerWords, class_word: str | None = None) -> tuple[str, bool]:
    """Take the trigger out of a caption, as the preservation term of CAT needs it.

    A trigger is found as a whole word (``sks`` leaves ``sksy`` and ``sks_2`` alone), in any case and in any Unicode
    form, because text encoders read several spellings alike: ``Sks`` triggers just as ``sks`` does. In scripts that
    put no spaces between words, such as Chinese, Japanese and Thai, it is found wherever it stands. Triggers may
    have several words or be ``<angle>`` tokens; ``sks`` is also found when a caption writes it as ``<sks>``. Where one
    trigger begins with another, the longer one is tried first.

    With a class word, the trigger is replaced by it, except where it already stands beside the trigger, so that
    ``a sks cat`` becomes ``a cat``; a trigger that is a tag of its own (``sks, a photo of a cat``) is dropped if the
    class word occurs anywhere in the caption. Punctuation, empty brackets and spaces left over are tidied, and an
    English article before the trigger is fitted to the word that now follows it (``a sks animal`` becomes
    ``an animal``). A caption without a trigger comes back unchanged, to the character.

    Args:
        caption: The caption.
        trigger_words: One trigger (it may contain spaces), several, or a mapping of each trigger to a class word of
            its own; None in the mapping stands for ``class_word``.
        class_word: What the concept is an example of, such as ``cat``. None removes the trigger without replacement.

    Returns:
        The caption without the trigger, and whether a trigger was found.

    Raises:
        PromptError: The caption or the class word is not a text, no trigger was given, or one is empty.

    Warns:
        UserWarning: An English caption calls the concept something else than the class word, which would then stand
            beside another noun: ``a sks fruit`` with the class word ``dog`` becomes ``a dog fruit``.

    Examples:
        >>> remove_trigger("a photo of a sks cat, outdoors", "sks", "cat")
        ('a photo of a cat, outdoors', True)
    """
    class_words = _class_words(trigger_words, class_word)
    if not isinstance(caption, str):
        raise PromptError(f"caption: expected a text, got {type(caption).__name__}")
    text, origins = fold(caption)
    matches = list(_trigger_pattern(class_words).finditer(text))
    if not matches:
        return caption, False
    bounds = [0, *(origins[end] for match in matches for end in match.span()), len(caption)]
    gaps = [_Gap(caption[start:end]) for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    mentioned = {word for word in class_words.values() if word and any(gap.has(_anywhere(word)) for gap in gaps)}

    is_english = "".join(filter(None, class_words.values())).isascii() and not _NO_ENGLISH.search(caption)
    pieces = [gaps[0].text]
    places = set()  # Indices of the pieces behind which a trigger stood.
    before = gaps[0]
    for match, gap, after in zip(matches, gaps[1:], _texts_after(gaps), strict=True):
        word = class_words[without_marks(match["trigger"])]
        is_tag = before.stripped[-1:] in _SEPARATORS and after.stripped[:1] in _SEPARATORS
        if (
            word is None
            or before.has(_at_end(word))
            or after.has(_at_beginning(word))
            or (is_tag and word in mentioned)
        ):
            has_particle = text[match.end()] == ATTACHED
            left = pieces.pop().removesuffix("-")
            left = left.rstrip() if has_particle else left
            pieces += [left] if left or not pieces else []
            places.add(len(pieces) - 1)
            _append(pieces, gap.text.removeprefix("-"), attached=has_particle)
        else:
            if is_english and not match["possessive"]:
                _warn_of_another_noun(before.text, word, after.text)
            places.add(len(pieces) - 1)
            _append(pieces, word + ("'s" if match["possessive"] else ""))
            _append(pieces, gap.text, attached=True)
            before = _Gap(word)
            mentioned.add(word)
        if gap.stripped:
            before = gap
    return _tidy("".join(_with_articles(pieces, places) if is_english else pieces)), True


def _class_words(trigger_words: TriggerWords, class_word: str | None) -> dict[str, str | None]:
    """Folded trigger -> class word, checked."""
    given: Mapping[str, str | None]
    if isinstance(trigger_words, str):
        given = {trigger_words: None}
    elif isinstance(trigger_words, Mapping):
        given = trigger_words
    else:
        try:
            given = dict.fromkeys(trigger_words)
        except TypeError as error:
            got = type(trigger_words).__name__
            raise PromptError(f"trigger_words: expected one or several texts, got {got}") from error
    if not given:
        raise PromptError("trigger_words: expected at least one trigger word, got none")
    class_words = {}
    for trigger, own_class in given.items():
        folded = without_marks(fold(trigger)[0]) if isinstance(trigger, str) else ""
        if not folded:
            # Other objects may have no text that can be shown, such as a tensor without memory.
            got = repr(trigger) if isinstance(trigger, str) else f"a {type(trigger).__name__}"
            raise PromptError(f"trigger_words: expected words, got {got}")
        for word in (own_class, class_word):
            if not isinstance(word, str | None):
                raise PromptError(f"class_word: expected a text or None, got {type(word).__name__}")
        word = own_class or class_word or ""
        class_words[folded] = word.strip() or None
    return class_words


def _trigger_pattern(triggers: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the triggers in folded text, longest first, each as whole words."""
    words = "|".join(map(word_pattern, sorted(triggers, key=len, reverse=True)))
    opened = rf"(?P<angle><{EDGE}(?: {EDGE})?)?(?P<quoted>(?P<quote>['\"]){EDGE})?"
    closed = rf"(?(quoted){EDGE}(?P=quote))(?(angle){EDGE}(?: {EDGE})?>)"
    possessive = rf"(?P<possessive>{EDGE}'{EDGE}s(?={EDGE})|(?<=s){EDGE}'(?={EDGE} {EDGE}\w))?"
    return re.compile(rf"(?<={EDGE}){opened}(?P<trigger>{words})(?=[{EDGE}{ATTACHED}]){closed}{possessive}")


def _anywhere(word: str) -> str:
    return f"{EDGE}{word_pattern(word)}[{EDGE}{ATTACHED}]"


def _at_end(word: str) -> str:
    return rf"{EDGE}{word_pattern(word)}{EDGE}(?:[ (\[{{-]{EDGE})*\Z"


def _at_beginning(word: str) -> str:
    return rf"\A{EDGE}(?:[ )\]}}-]{EDGE})*{word_pattern(word)}(?:e?s)?[{EDGE}{ATTACHED}]"


def _texts_after(gaps: Sequence[_Gap]) -> list[_Gap]:
    """For each trigger what follows it, other triggers aside."""
    texts = []
    after = gaps[-1]
    for gap in reversed(gaps[1:]):
        after = gap if gap.stripped else after
        texts.append(after)
    return texts[::-1]


def _append(pieces: list[str], piece: str, *, attached: bool = False) -> None:
    """Add a piece, with a space where two words would grow together; with `attached`, not before a Hangul particle."""
    if not piece:
        return
    edge = edge_between(pieces[-1], piece)
    if pieces[-1] and edge != EDGE and not (attached and edge == ATTACHED):
        pieces.append(" ")
    pieces.append(piece)


def _with_articles(pieces: list[str], places: set[int]) -> list[str]:
    """Fit "a" and "an" before the places where a trigger stood to the words that follow now."""
    fitted = []
    following = ""
    for index in reversed(range(len(pieces))):
        piece = pieces[index]
        word = _ENGLISH_WORD.match(following) if index in places else None
        if word and not _FUNCTION_WORD.fullmatch(word[1]):
            piece = _ARTICLE.sub(partial(_article, word[1]), piece)
        following = piece if piece.strip() else following
        fitted.append(piece)
    return fitted[::-1]


def _article(word: str, found: re.Match[str]) -> str:
    """The article of `word`, written as the one that was found."""
    if word.isupper() and 1 < len(word) < 5:
        return found[0]  # "a UFO", "an SUV": how it is spelled out is not known.
    article = "an" if _TAKES_AN.match(word) else "a"
    if found[1].islower():
        return article
    return article.upper() if word.isupper() else article.capitalize()


def _warn_of_another_noun(before: str, class_word: str, after: str) -> None:
    words: list[str] = []
    word = _NEXT_WORD.match(after)
    while word and not _FUNCTION_WORD.fullmatch(word[1]) and len(words) <= _LONGEST_NOUN:
        words.append(word[1])
        word = _NEXT_WORD.match(after, word.end())
    noun = list(takewhile(lambda word: not _VERB.fullmatch(word), words))
    named = _NOUN_BEFORE.search(before[-_LONGEST_WORD:]) if not words else None
    if named and not _ADJECTIVE.fullmatch(named[1]):
        warnings.warn(
            f"class_word: {class_word!r} takes the trigger's place in '{named[1]} {class_word}'; expected the word "
            "that the captions have for the concept",
            stacklevel=3,
        )
    is_noun = 0 < len(noun) <= _LONGEST_NOUN and _BEFORE_A_NOUN.search(before[-_LONGEST_WORD:])
    if class_word in words or (is_noun and not noun[0].lower().startswith(class_word.lower())):
        warnings.warn(
            f"class_word: {class_word!r} takes the trigger's place in '{class_word} {' '.join(words)}'; "
            "expected the word that the captions have for the concept",
            stacklevel=3,
        )


def _tidy(caption: str) -> str:
    for pattern, replacement in _TIDY_RULES:
        caption = pattern.sub(replacement, caption)
    return caption.lstrip(_NO_BEGINNING).rstrip(_NO_END)
