"""Build the documentation site, strictly: `make docs`. It needs the extra `docs`, and no built package.

The pages are the repository's own: README, docs/, and whatever they link to, at the same places, so that a link is
good here and on a forge. The reference is generated from the docstrings of all public names, those that
tests/public_names.json lists.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_NAMES = ROOT / "tests" / "public_names.json"
FENCED = re.compile(r"(?ms)^```.*?^```$")

# Page -> title, module, and names; a module's names that no other page has stand on the page without names.
REFERENCE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "step": (
        "The training step",
        "cat_rs",
        (
            "CatStep",
            "PreservationSamples",
            "PreservationSet",
            "PreservationDraw",
            "StepMetrics",
            "CatFactorRamp",
            "CatFactorRatio",
            "CatFactorTarget",
            "FlatAdamW",
            "TeacherBank",
            "TeacherDraws",
        ),
    ),
    "operations": (
        "Loss and layers",
        "cat_rs",
        (
            *("cat_loss", "CatLossParts", "lora_linear", "snr_weights", "remove_trigger"),
            *("patch_peft", "unpatch_peft", "adapter_disabled"),
        ),
    ),
    "files": ("Adapter files", "cat_rs", ("save_lora", "load_lora", "LoraFile", "merge_loras", "MergedLora")),
    "check": ("Checks of adapters", "cat_rs.adapter_check", ()),
    "scores": ("Scores", "cat_rs", ()),
    "evaluation": ("cat_rs.evaluation", "cat_rs.evaluation", ()),
    "report": ("cat_rs.report", "cat_rs.report", ()),
    "training": ("cat_rs.training", "cat_rs.training", ()),
    "errors": ("cat_rs.errors", "cat_rs.errors", ()),
}


def public_names() -> dict[str, Any]:
    """What tests/public_names.json lists."""
    content: dict[str, Any] = json.loads(PUBLIC_NAMES.read_text(encoding="utf-8"))
    return content


def reference_pages() -> dict[str, str]:
    """File name -> Markdown of the reference."""
    modules = public_names()["modules"]
    taken = {(module, name) for _, module, names in REFERENCE.values() for name in names}
    pages = {}
    for page, (title, module, names) in REFERENCE.items():
        rest = (name for name in modules[module] if (module, name) not in taken)
        shown = [name for name in names or rest if f"{module}.{name}" != "cat_rs.errors"]
        pages[f"{page}.md"] = "\n\n".join([f"# {title}", *(f"::: {module}.{name}" for name in shown)]) + "\n"
    return pages | {"commands.md": _commands_page()}


def _commands_page() -> str:
    parts = ["# Options of the commands"]
    for command, options in public_names()["commands"].items():
        rows = []
        for names, (_, choices, help_text) in options.items():
            flags = ", ".join(f"`{name}`" for name in names.split("/"))
            values = " One of " + ", ".join(f"`{choice}`" for choice in choices) + "." if choices else ""
            rows.append(f"| {flags} | {html.escape(help_text).replace('|', '&#124;')}.{values} |")
        parts.append("\n".join([f"## cat-rs {command}", "", "| option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def linked_files(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links or shows."""
    for link in re.findall(r"\]\(([^()\s#]+)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"\w+:", link):
            yield (page.parent / link).resolve()


def stage(folder: Path) -> None:
    """Copy the pages, and what they link to, to their places below a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    done: set[Path] = set()
    while waiting:
        file = waiting.pop()
        # What is missing is the builder's to report, as a dead link.
        if file in done or not file.is_file():
            continue
        done.add(file)
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if file.suffix == ".md":
            waiting.extend(linked_files(file))
    shutil.copy(ROOT / "docs" / "site.css", folder)
    (folder / "reference").mkdir()
    for name, text in reference_pages().items():
        (folder / "reference" / name).write_text(text, encoding="utf-8")


def format_math(source: str, *_arguments: Any, **_settings: Any) -> str:
    """A fence called `math` as MathML, which browsers show without a script; empty lines part formulas."""
    from latex2mathml.converter import convert

    formulas = (convert(formula, display="block") for formula in re.split(r"\n\s*\n", source.strip()))
    return "".join(f'<div class="formula">{formula}</div>' for formula in formulas)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build", metavar="DIR", help="(default: build)")
    output = parser.parse_args().output
    stage(output / "docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    # The configuration names functions of this folder.
    path = os.pathsep.join(filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "PYTHONPATH": path,
        "CAT_RS_PAGES": str((output / "docs").resolve()),
        "NO_MKDOCS_2_WARNING": "1",
    }
    done = subprocess.run([*command, "--site-dir", str((output / "site").resolve())], env=environment, check=False)
    if done.returncode == 0:
        print(f"wrote {output / 'site' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
