"""Results as JSON: dataclasses of figures, texts, tables and other dataclasses.

Fields that do not take part in comparisons hold pictures, and are left out.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cat_rs.arguments import ABOUT_VALUES
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.text_files import read_text

R = TypeVar("R")


def to_json(format: str, result: Any, **more: Any) -> str:
    """Return a result as JSON, with a name of its form and with more that `from_json` does not read."""
    content = {"format": format, **_plain(result), **_plain(more)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(format: str, result: type[R], text: str) -> R:
    """Read what `to_json` wrote.

    Raises:
        EvaluationInputError: The text is something else.
    """
    try:
        content = json.loads(text)
        found = content["format"]
    except ABOUT_VALUES as error:
        raise EvaluationInputError(f"result: expected JSON of the format {format!r}, got {error!r}") from error
    if found != format:
        raise EvaluationInputError(f"result: expected the format {format!r}, got {found!r}")
    return _built(result, content, "")


def load_json(format: str, result: type[R], path: str | os.PathLike[str]) -> R:
    """Read a file of what `to_json` wrote.

    Raises:
        EvaluationFileError: It cannot be read.
        EvaluationInputError: It holds something else.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise EvaluationFileError(f"result: {path} cannot be read: {error}") from error
    return from_json(format, result, text)


def _stored(record: Any) -> list[Field[Any]]:
    return [item for item in fields(record) if item.compare]


def _plain(value: Any) -> Any:
    """Return a value as JSON types; JSON has no NaN."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in _stored(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _built(hint: Any, value: Any, place: str) -> Any:
    """Return JSON types as what a field's type says; `place` is where they stand in the file."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and type(None) in arguments):
        return value
    if hint is float:
        return math.nan if value is None else float(_checked(float, value, place))
    if origin is types.UnionType:
        return _built(arguments[0], value, place)
    if origin is tuple:
        items = enumerate(_checked(list, value, place))
        return tuple(_built(arguments[0], item, f"{place}.{number}") for number, item in items)
    if origin is Mapping:
        items = _checked(dict, value, place).items()
        return {name: _built(arguments[1], item, f"{place}.{name}") for name, item in items}
    if not is_dataclass(hint):
        return _checked(hint, value, place)
    hints, content, stem = get_type_hints(hint), _checked(dict, value, place), f"{place}." if place else ""
    # A file from before a field was added has its default.
    stored = [item for item in _stored(hint) if item.name in content or item.default is MISSING]
    for item in stored:
        if item.name not in content:
            raise EvaluationInputError(f"result: expected {stem}{item.name}, got none")
    return hint(**{item.name: _built(hints[item.name], content[item.name], f"{stem}{item.name}") for item in stored})  # type: ignore[operator]


def _checked(kind: type, value: Any, place: str) -> Any:
    """Return a value of a JSON type; true is no number."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise EvaluationInputError(f"result: expected {_KINDS[kind]} as {place}, got {value!r}")
    return value
