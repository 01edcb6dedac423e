"""The table of compare.py's results: python docs/teacher-bank/table.py docs/teacher-bank/*.json"""

import json
import sys
from pathlib import Path

FIGURES = ("ups", "tps", "kps", "identity", "diversity_retained")


def main() -> None:
    print("| concept | base predictions | UPS | TPS | KPS | identity | diversity kept |")
    print("|---|---|---|---|---|---|---|")
    for file in map(Path, sys.argv[1:]):
        for name, adapter in json.loads(file.read_text(encoding="utf-8"))["adapters"].items():
            figures = [f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in map(adapter.get, FIGURES)]
            print(f"| {file.stem} | {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
