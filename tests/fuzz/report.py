"""The table of outcomes and the reproductions of failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fuzz.outcome import KINDS, Outcome

__all__ = ["MAX_UNCLEAR", "Report"]

MAX_UNCLEAR = 0.005
"""Share of calls whose error may be unclear."""


@dataclass
class Group:
    """Failures that look alike: the first, how many, and what ran."""

    outcome: Outcome
    reproduction: Callable[[], str]
    count: int = 1


@dataclass
class Report:
    """Outcomes by function."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    groups: dict[tuple[str, ...], Group] = field(default_factory=dict)

    def add(self, name: str, outcome: Outcome, reproduction: Callable[[], str]) -> None:
        """Counts an outcome; ``reproduction`` is asked for only if it is printed."""
        self.counts.setdefault(name, Counter())[outcome.kind] += 1
        if outcome.kind in ("unmade", "ok", "clear"):
            return
        key = (name, *outcome.group())
        if key in self.groups:
            self.groups[key].count += 1
        else:
            self.groups[key] = Group(outcome, reproduction)

    def total(self) -> Counter[str]:
        """Outcomes of everything."""
        return sum(self.counts.values(), Counter())

    def failed(self, *, allow_unclear: bool) -> bool:
        """Whether anything crashed or hung, or, unless that is allowed, too many errors were unclear."""
        total = self.total()
        return bool(total["crash"] or total["hang"]) or (not allow_unclear and _share(total) >= MAX_UNCLEAR)

    def table(self) -> str:
        """Functions and outcomes."""
        width = max(map(len, self.counts), default=0) + 2
        lines = ["".ljust(width) + "".join(kind.rjust(9) for kind in KINDS) + "  unclear %"]
        for name, counts in (*sorted(self.counts.items()), ("all", self.total())):
            numbers = "".join(f"{counts[kind]:9,}" for kind in KINDS)
            lines.append(f"{name.ljust(width)}{numbers}{100 * _share(counts):11.2f}")
        return "\n".join(lines)

    def failures(self, most: int) -> str:
        """Groups of failures, the most severe and the most frequent first."""
        order = sorted(
            self.groups.items(), key=lambda item: (-KINDS.index(item[1].outcome.kind), item[0][0], -item[1].count)
        )
        parts = []
        for (name, *_), group in order[:most]:
            outcome = group.outcome
            # A process that dies tells more than an exception.
            lines = outcome.text.strip().splitlines()[: 60 if outcome.kind == "crash" else 6]
            said = "\n".join(f"    {line}" for line in lines)
            place = f" in {outcome.place}" if outcome.place else ""
            parts.append(
                f"{outcome.kind.upper()} {name}, {group.count} times: {outcome.error or 'no answer'}{place}\n{said}\n"
                f"    {group.reproduction()}"
            )
        if len(order) > most:
            parts.append(f"... and {len(order) - most} more kinds of failures")
        return "\n\n".join(parts)


def _share(counts: Counter[str]) -> float:
    """Of unclear errors among the calls that were made."""
    return counts["unclear"] / max(1, counts.total() - counts["unmade"])
