"""What each option of a command must change: one entry for each field of its settings, none left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Seen = dict[str, Any]
"""What a command did: name -> value, compared with ==."""


@dataclass(frozen=True)
class Case:
    """An option with a value of its own.

    Attributes:
        value: Another than the option's default.
        changes: What is seen with this value, and not without it.
        given: Other options that both runs have.
    """

    value: Any
    changes: Seen
    given: dict[str, Any] = field(default_factory=dict)


def check_table(settings: type, table: Mapping[str, Case], basis: dict[str, Any]) -> None:
    """Every option has an entry, whose value is another than the default and than what the other cases run with."""
    defaults = {option.name: option.default for option in dataclasses.fields(settings)}
    missing, unknown = sorted(defaults.keys() - table.keys()), sorted(table.keys() - defaults.keys())
    assert not missing, f"options of {settings.__name__} without an entry that tells what they change: {missing}"
    assert not unknown, f"entries of options that {settings.__name__} does not have: {unknown}"
    for name, case in table.items():
        assert case.changes, name
        assert case.value not in (defaults[name], (basis | case.given).get(name, defaults[name])), name


def check_case(name: str, case: Case, before: Seen, after: Seen) -> None:
    """What the case names has changed, and to what it names."""
    absent = object()
    for key, expected in case.changes.items():
        assert after.get(key, absent) == expected, f"{name}: {key}, of {after}"
        assert before.get(key, absent) != expected, f"{name}: {key} is {expected} without the option too"
