"""Public names, their signatures and the command line's options are those of the committed list.

After a change that is meant: ``python -m tests.test_public_names`` writes the list anew; CHANGELOG says what changed.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from cat_rs import cli
from cat_rs.options import add_options

LIST = Path(__file__).with_name("public_names.json")
MODULES = (
    "cat_rs",
    "cat_rs.adapter_check",
    "cat_rs.errors",
    "cat_rs.evaluation",
    "cat_rs.report",
    "cat_rs.training",
)


def _signature(function: Any) -> str:
    try:
        # One type, however a module spells it.
        return str(inspect.signature(function)).replace("torch.Tensor", "Tensor")
    except (TypeError, ValueError):  # an exception class without a signature of its own
        return ""


def _members(owner: type) -> dict[str, str]:
    """What a class adds to those of others: methods with their signatures, properties, and fields with their types."""
    members = {}
    own = [base for base in reversed(owner.__mro__) if base.__module__.startswith("cat_rs")]
    for name, value in {name: value for base in own for name, value in vars(base).items()}.items():
        if name.startswith("_") and name != "__call__":
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function):
            members[name] = _signature(function)
        elif isinstance(value, property):
            members[name] = "property"
    if dataclasses.is_dataclass(owner):
        members |= {field.name: str(field.type) for field in dataclasses.fields(owner)}
    return members


def _described(value: Any) -> Any:
    if isinstance(value, type) and not issubclass(value, enum.Enum):
        bases = [base.__name__ for base in value.__bases__]
        return {"bases": bases, "signature": _signature(value), "members": _members(value)}
    return _signature(value) if callable(value) else type(value).__name__


def _options(command: Any) -> dict[str, Any]:
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser, importlib.import_module(command.module).Settings)
    return {
        "/".join(action.option_strings) or action.dest: [
            action.nargs,
            None if action.choices is None else list(action.choices),
            action.help,
        ]
        for action in parser._actions
    }


def public_names() -> dict[str, Any]:
    """Everything that people's scripts may rely on."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    exported = {
        # The module of errors has no __all__: its classes are public.
        name: sorted(getattr(module, "__all__", [key for key in vars(module) if key.endswith("Error")]))
        for name, module in modules.items()
    }
    return {
        "modules": {
            name: {key: _described(getattr(modules[name], key)) for key in names} for name, names in exported.items()
        },
        "commands": {name: _options(command) for name, command in cli._COMMANDS.items()},
    }


def test_public_names_and_options_are_the_committed_ones() -> None:
    assert public_names() == json.loads(LIST.read_text(encoding="utf-8"))


if __name__ == "__main__":
    LIST.write_text(json.dumps(public_names(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
