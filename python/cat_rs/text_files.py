"""Text files as people's editors write them: captions, prompts, settings and JSON lines."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from cat_rs.errors import CatRsError

_OTHER_ENCODINGS = {
    # UTF-32's mark begins with UTF-16's.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BOM = "\ufeff"
_GENERAL_PROMPTS = Path(__file__).parent / "data" / "general_prompts.txt"


class TextFileError(CatRsError, OSError):
    """A file is not a text in UTF-8, or has no possible name; the caller names it."""


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text in UTF-8, with or without a byte order mark; its line ends stay as they are.

    Raises:
        OSError: The file cannot be read; `TextFileError`: it is in another encoding.
    """
    try:
        # Without the flag, opening a pipe waits for somebody who writes to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TextFileError("expected a text in UTF-8, got a pipe or a device")
            data = file.read()
    except ValueError as error:
        # "\0", or half of a surrogate pair.
        raise TextFileError(f"expected the name of a file, got {os.fspath(path)!a}") from error
    other = next((name for mark, name in _OTHER_ENCODINGS.items() if data.startswith(mark)), None)
    if other is None and b"\0" in data:
        other = "UTF-16 or no text"
    if other is not None:
        raise TextFileError(f"expected a text in UTF-8, got {other}; save it as UTF-8")
    try:
        return data.decode().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise TextFileError(f"expected a text in UTF-8, got other bytes: {error}; save it as UTF-8") from error


def is_unicode(text: str) -> bool:
    """Whether a text is whole: JSON can hold half of a surrogate pair, which no text encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """Return a file's name as text: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a file of prompts, one a line; blank lines and lines that start with `#` are skipped.

    Raises:
        OSError: As `read_text` does.
    """
    # Not str.splitlines: it splits at characters that stand inside a prompt, such as U+2028.
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    stripped = (line.strip().removeprefix(_BOM).strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def general_prompts() -> list[str]:
    """Return the bundled prompts, which ask for subjects, places, styles and plain backgrounds of every kind."""
    return read_prompts(_GENERAL_PROMPTS)


def json_lines(path: str | os.PathLike[str]) -> list[str]:
    r"""Read a file of JSON lines, which end at "\n" only; a mark that two joined files leave inside is dropped.

    Raises:
        OSError: As `read_text` does.
    """
    return [line.removeprefix(_BOM) for line in read_text(path).removesuffix("\n").split("\n")]
