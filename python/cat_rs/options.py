"""Settings as dataclasses: one definition gives the fields, the command-line options and the config-file keys."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cat_rs.errors import CatRsError
from cat_rs.text_files import read_text

__all__ = [
    "ConfigError",
    "add_options",
    "check_absent",
    "check_range",
    "from_mapping",
    "given_options",
    "option",
    "read_config_file",
    "suggestion",
]

Settings = TypeVar("Settings")

_METAVARS = {int: "N", float: "X", str: "TEXT"}


# Names of these settings in diffusers' and kohya's training scripts.
_OTHER_NAMES = {
    "pretrained_model_name_or_path": "model",
    "train_data_dir": "data",
    "instance_data_dir": "data",
    "instance_prompt": "caption",
    "class_prompt": "class_word",
    "learning_rate": "lr",
    "unet_lr": "lr",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "min_snr_gamma": "snr_gamma",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "adam_weight_decay": "weight_decay",
    "mixed_precision": "dtype",
    "random_flip": "flip",
    "checkpointing_steps": "checkpoint_every",
    "save_every_n_steps": "checkpoint_every",
    "checkpoints_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "validation_steps": "evaluate_every",
    "validation_prompt": "sample_prompts",
    "sample_every_n_steps": "sample_every",
    "report_to": "log_with",
}


class ConfigError(CatRsError, ValueError):
    """A setting that is unknown, missing, of the wrong type or out of range."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    group: str,
    help: str,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a dataclass field that is also a command-line option.

    Args:
        default: The field's default; a field without one must be given.
        group: The heading under which `--help` lists the option.
        help: One line on what it does; the default is appended.
        metavar: What `--help` shows for the value.
        positional: Whether it is given by its position, without a name.
    """
    metadata = {"group": group, "help": help, "metavar": metavar, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add one option for each field of the dataclass `settings`, under its group's heading.

    The parser sets no defaults, so that a config file can set what the command line does not give.
    """
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(settings)
    for field in _own_fields_first(settings):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if field.metadata["positional"]:
            # Optional to the parser: a config file may hold it.
            groups[title].add_argument(
                field.name,
                nargs="*" if typing.get_origin(hints[field.name]) is tuple else "?",
                default=argparse.SUPPRESS,
                metavar=_flag(field),
                help=field.metadata["help"],
            )
            continue
        groups[title].add_argument(
            _flag(field),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_help_text(field),
            **_argument_kind(hints[field.name], field.metadata["metavar"]),
        )


def given_options(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the options of `settings` that the command line gave."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def suggestion(unknown: str, settings: type) -> str:
    """Return "; did you mean --lr?" for an option that is not one, or an empty text where nothing comes near."""
    name = unknown.lstrip("-").partition("=")[0].replace("-", "_")
    fields = {field.name: field for field in dataclasses.fields(settings)}
    near = [_OTHER_NAMES.get(name, name), *difflib.get_close_matches(name, fields, n=1)]
    return next((f"; did you mean {_flag(fields[one])}?" for one in near if one in fields), "")


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML (`.yaml`, `.yml`) or JSON file of settings.

    Raises:
        ConfigError: The file cannot be read, or does not hold a mapping, or has a setting in both spellings, such as
            `class_word` and `class-word`.
    """
    import yaml

    path = Path(path)
    try:
        text = read_text(path)
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error}") from error
    except (json.JSONDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML or JSON, got text that is neither: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in named:
            raise ConfigError(f"{path}: expected each setting once, got {name} as {key} and in its other spelling")
        named[name] = value
    return named


def from_mapping(settings: type[Settings], values: Mapping[str, Any], source: str = "settings") -> Settings:
    """Build the dataclass `settings` from plain values, checking every name and type.

    Args:
        settings: The dataclass.
        values: Name -> value, as a config file or the command line gives them.
        source: Where the values come from, for the error text.

    Raises:
        ConfigError: A name is unknown or missing, or a value has the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, settings))}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        hint = suggestion(unknown[0], settings)
        raise ConfigError(
            f"{source}: unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(fields)}{hint}"
        )
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ConfigError(f"{source}: missing {', '.join(_flag(fields[name]) for name in missing)}")
    hints = typing.get_type_hints(settings)
    return settings(**{name: _convert(value, hints[name], f"{source}: {name}") for name, value in values.items()})


def check_range(name: str, value: float | None, minimum: float, *, exclusive: bool = False) -> None:
    """Raise ConfigError unless `value` is None, or finite and at least (`exclusive`: above) the minimum."""
    if value is None:
        return
    if not (minimum < value if exclusive else minimum <= value) or value == float("inf"):
        raise ConfigError(f"{name}: expected a number {'>' if exclusive else '>='} {minimum}, got {value}")


def check_absent(name: str, files: Iterable[Path], *, overwrite: bool) -> None:
    """Raise ConfigError if a file that a command will write is there already, unless it may be overwritten."""
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more files" if len(there) > 1 else ""
        raise ConfigError(f"{name}: expected a new place, got {there[0]}{more}; give --overwrite or another place")


def _own_fields_first(settings: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass, inherited ones last."""
    bases = [base for base in settings.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    return sorted(dataclasses.fields(settings), key=lambda field: field.name in inherited)


def _flag(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("positional"):
        return field.metadata["metavar"] or field.name.upper()
    return f"--{field.name.replace('_', '-')}"


def _help_text(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    if field.default is dataclasses.MISSING:
        return f"{text} (required)"
    if field.default is None or field.default is False or field.default == ():
        return text
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"{text} (default: {shown})".replace("%", "%%")


def _argument_kind(hint: Any, metavar: str | None) -> dict[str, Any]:
    """Return the argparse arguments that parse a value of type `hint`."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "type": typing.get_args(hint)[0], "metavar": metavar}
    return {"type": hint, "metavar": metavar or _METAVARS[hint]}


def _is_union(hint: Any) -> bool:
    """Return whether the type is `X | None`; with Literal it is a `typing.Union`."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _without_none(hint: Any) -> Any:
    """Return `X` of `X | None`."""
    if _is_union(hint):
        return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert `value` to the type `hint`: lists to tuples, whole numbers to floats where a float is meant."""
    if value is None and _is_union(hint):
        return None
    hint = _without_none(hint)
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        if value not in kinds:
            raise ConfigError(f"{name}: expected one of {', '.join(kinds)}; got {value!r}")
        return value
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, kinds[0], name) for item in items)
    if isinstance(value, bool) == (hint is bool):
        if hint is float and isinstance(value, (int, float, str)):
            # YAML reads "1e-4", without a point, as text.
            with contextlib.suppress(ValueError):
                return float(value)
        elif isinstance(value, hint):
            return value
    raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}")
