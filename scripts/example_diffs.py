"""Write the differences between examples/train_lora.py and its variants into docs/in-your-script.md."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "in-your-script.md"
PLAIN = "train_lora.py"


def difference(variant: str) -> list[str]:
    """The unified diff from the plain script to a variant, by lines."""
    before, after = ((EXAMPLES / name).read_text(encoding="utf-8").splitlines() for name in (PLAIN, variant))
    return list(difflib.unified_diff(before, after, PLAIN, variant, n=1, lineterm=""))


def line_counts(variant: str) -> tuple[int, int]:
    """How many lines a variant adds, and how many it takes away."""
    lines = difference(variant)[2:]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def with_differences(page: str) -> str:
    """The page with every diff block, known by the file in its second line, as the files are now."""

    def current(block: re.Match[str]) -> str:
        return "\n".join(["```diff", *difference(block["variant"]), "```"])

    return re.sub(r"(?ms)^```diff\n[^\n]*\n\+\+\+ (?P<variant>[^\n]+)\n.*?^```$", current, page)


def main() -> None:
    page = with_differences(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
