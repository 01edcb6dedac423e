"""Text in the form in which words are compared: without case, in one Unicode form, with the edges of words marked."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["ATTACHED", "EDGE", "edge_between", "fold", "without_marks", "word_pattern"]

# Marks in folded text. A word may begin or end at EDGE; at ATTACHED, between two Hangul syllables, it may only end,
# because Korean writes particles on to the noun.
EDGE, ATTACHED = "\0", "\1"

_WORD, _UNSPACED, _HANGUL, _EXTENDS, _OTHER = range(5)

# How Unicode names the letters of scripts that put no spaces between words: any place among them may be an edge.
_UNSPACED_SCRIPTS = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI LUE "),
)
# Characters that people take for one another, though Unicode does not: apostrophes, quotation marks, hyphens, the two
# i's of Turkish, spaces of no width. The marks above are no text.
_ALIKE = str.maketrans(
    dict.fromkeys("’‘ʼ´`＇", "'")
    | dict.fromkeys("“”„＂", '"')
    | dict.fromkeys("‑‐", "-")
    | dict.fromkeys("\u200b\ufeff" + EDGE + ATTACHED, " ")
    | {"ı": "i"}
)
# Words that fold letter by letter; a mark may follow the last one.
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_]+(?![^\x00-\x7f])")
_VARIATION_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_ZERO_WIDTH_JOINER = "\u200d"
_VIRAMA = 9
# As in Unicode's stream-safe text: sorting the marks of a character takes quadratic time.
_MOST_MARKS = 30


def fold(text: str) -> tuple[str, list[int]]:
    """Fold a text for comparison.

    Returns:
        The folded text, between two EDGEs, with one space for each run of white space; and for each of its characters
        where it stood in `text` (for a mark, the place it marks).
    """
    folded: list[str] = []
    origins: list[int] = []
    left, joined = _OTHER, False
    start = 0
    while start < len(text):
        if plain := _PLAIN_WORD.match(text, start):
            end = plain.end()
            letters, places = plain[0].lower(), [*range(start, end)]
        else:
            end = _end_of_character(text, start)
            letters = _fold_character(text[start:end])
            places = [start] * len(letters)
        if letters and not (letters == " " and folded and folded[-1] == " "):
            mark = "" if joined else _mark(left, _kind(letters[0]))
            folded += mark, letters
            origins += [start] * len(mark) + places
            left = _WORD if plain else _last_kind(letters, left)
            joined = letters[-1] == _ZERO_WIDTH_JOINER or unicodedata.combining(letters[-1]) == _VIRAMA
        start = end
    return "".join(folded) + EDGE, [*origins, len(text)]


def _end_of_character(text: str, start: int) -> int:
    """Where the combining marks of the character at `start` end."""
    end = start + 1
    while end < len(text) and end - start < _MOST_MARKS and unicodedata.combining(text[end]):
        end += 1
    return end


def without_marks(folded: str) -> str:
    """Folded text without EDGE and ATTACHED: the form in which two spellings of one word are equal."""
    return folded.replace(EDGE, "").replace(ATTACHED, "").strip()


@lru_cache(maxsize=256)
def word_pattern(word: str) -> str:
    """A regular expression for a word in folded text; empty where folding leaves nothing of the word."""
    return f"[{EDGE}{ATTACHED}]?".join(map(re.escape, without_marks(fold(word)[0])))


def edge_between(left: str, right: str) -> str:
    """What lies between the end of one text and the beginning of another: EDGE, ATTACHED, or nothing inside a word."""
    return _mark(_last_kind(left), _kind(_fold_character(right[:1])[:1]))


def _mark(left: int, right: int) -> str:
    if right == _EXTENDS or left == right == _WORD:
        return ""
    return ATTACHED if left == right == _HANGUL else EDGE


def _last_kind(text: str, default: int = _OTHER) -> int:
    """The kind of the last character that does not extend another."""
    kinds = (_kind(char) for letter in reversed(text) for char in reversed(_fold_character(letter)))
    return next((kind for kind in kinds if kind != _EXTENDS), default)


@lru_cache(maxsize=4096)
def _fold_character(character: str) -> str:
    """Unicode's compatibility caseless form of a character and its marks, and what people take for alike."""
    text = character.translate(_ALIKE)
    for _ in range(2):
        text = unicodedata.normalize("NFKD", text).casefold()
    text = unicodedata.normalize("NFKD", text).translate(_ALIKE).replace("i\u0307", "i")
    return " " if text.isspace() else _VARIATION_SELECTORS.sub("", text)


@lru_cache(maxsize=4096)
def _kind(char: str) -> int:
    """What a folded character is to the edges of words."""
    if char in "\u200c\u200d":
        return _EXTENDS
    category, name = unicodedata.category(char), unicodedata.name(char, "")
    if category[0] == "M" or name.startswith(("HANGUL JUNG", "HANGUL JONG", "EMOJI MODIFIER")):
        return _EXTENDS
    if category[0] not in "LN" and char != "_":
        return _OTHER
    if name.startswith(_UNSPACED_SCRIPTS):
        return _UNSPACED
    return _HANGUL if name.startswith("HANGUL ") else _WORD
