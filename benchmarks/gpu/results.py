"""Results of the sections, in one JSON file and one table, with those of earlier runs on the same machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

FILE = "gpu.json"


def kept(folder: Path, machine: Mapping[str, str]) -> dict[str, Any]:
    """The sections of an earlier run that another run on this machine leaves as they are."""
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if before["machine"] != machine:
        print(f"{folder / FILE} is of another machine, version or commit: its figures are not kept", flush=True)
        return {}
    return dict(before["sections"])


def write(folder: Path, machine: Mapping[str, str], sections: Mapping[str, Any]) -> None:
    """Writes the file and the table, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "sections": sections}
    harness.write_file(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    harness.write_file((folder / FILE).with_suffix(".md"), table(machine, sections))


def _with_section(name: str, lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[name, *line] for line in lines]


def table(machine: Mapping[str, str], sections: Mapping[str, Any]) -> str:
    """One table of ratios and one of all figures."""
    ratios, rows, notes = [], [], []
    for name, section in sections.items():
        ratios += _with_section(name, harness.ratio_lines(section["ratios"]))
        rows += _with_section(name, harness.row_lines(section["rows"]))
        notes += [f"- {name}: `{section['command']}`, {section['date'][:10]}, {section['repeats']} rounds."]
        notes += [f"- {name}: {note}" for note in section["notes"]]
    lines = ["# On a GPU", "", "Medians by the device's clock; in brackets the 20th and 80th percentile.", ""]
    lines += [*harness.table(("section", *harness.RATIO_HEADER), ratios), ""]
    lines += [*harness.table(("section", *harness.ROW_HEADER), rows), ""]
    lines += [*notes, "", *harness.table(("machine", ""), [[key, value] for key, value in machine.items()])]
    return "\n".join(lines) + "\n"
