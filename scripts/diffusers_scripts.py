"""Apply the changes of docs/diffusers-scripts.md to one of diffusers' training scripts.

    python scripts/diffusers_scripts.py train_dreambooth_lora.py train_dreambooth_lora_cat.py

A change is a unified diff without line numbers; `-...` stands for the lines up to the next removed one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "diffusers-scripts.md"
ELISION = "-..."


def changes() -> dict[str, str]:
    """Name of a script -> its changes, as the page shows them."""
    return dict(
        re.findall(r"(?ms)^## [^\n`]*`([^`\n]+)`[^\n]*\n.*?^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    )


def line_counts() -> dict[str, tuple[int, int]]:
    """Name of a script -> how many lines the page says are added and removed."""
    found = re.findall(
        r"(?m)^## [^\n`]*`([^`\n]+)`, (\d+) lines added, (\d+) removed$", PAGE.read_text(encoding="utf-8")
    )
    return {name: (int(added), int(removed)) for name, added, removed in found}


def applied(change: str, script: str) -> tuple[str, int, int]:
    """The changed script, and how many lines were added and removed.

    Raises:
        ValueError: The script does not have the place of a change, or has it twice.
    """
    lines, added, removed = script.split("\n"), 0, 0
    for hunk in change.removesuffix("\n").split("\n@@\n"):
        wanted = hunk.split("\n")
        ends = [(start, end) for start in range(len(lines)) if (end := _end(wanted, lines, start)) is not None]
        if len(ends) != 1:
            raise ValueError(f"expected one place in the script for this change, found {len(ends)}:\n{hunk}")
        ((start, end),) = ends
        new = [line[1:] for line in wanted if line[:1] in ("+", " ")]
        kept = sum(line.startswith(" ") for line in wanted)
        added, removed = added + len(new) - kept, removed + end - start - kept
        lines[start:end] = new
    return "\n".join(lines), added, removed


def _end(wanted: list[str], lines: list[str], start: int) -> int | None:
    """Where a change that begins at a line ends; None where it does not begin there."""
    place, skipping = start, False
    for line in wanted:
        if line.startswith("+"):
            continue
        if line == ELISION:
            skipping = True
            continue
        if skipping:
            while place < len(lines) and lines[place] != line[1:]:
                place += 1
        if place >= len(lines) or lines[place] != line[1:]:
            return None
        place, skipping = place + 1, False
    return place


def main() -> None:
    script, output = map(Path, sys.argv[1:])
    text, added, removed = applied(changes()[script.name], script.read_text(encoding="utf-8"))
    output.write_text(text, encoding="utf-8")
    print(f"{output}: {added} lines added, {removed} removed")


if __name__ == "__main__":
    main()
