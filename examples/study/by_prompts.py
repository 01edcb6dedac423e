"""UPS of a demo's results by kind of prompt: ``python examples/study/by_prompts.py docs/study/results.json``."""

import json
import sys
from pathlib import Path

import cat_rs
from concepts import EMOJI_MODEL

KINDS = ("class", "neighbour", "other_class")


def main() -> None:
    content = json.loads((EMOJI_MODEL / "prompts.json").read_text(encoding="utf-8"))
    concepts = {concept["name"]: concept for concept in content["concepts"]}
    for file in sys.argv[1:]:
        runs = json.loads(Path(file).read_text(encoding="utf-8"))["runs"]
        for run in runs:
            print(run["concept"], run["seed"], end="")
            for kind in KINDS:
                prompts = concepts[run["concept"]][f"{kind}_prompts"]
                for adapter in ("LoRA", "CAT"):
                    values = [
                        value
                        for row in run["evaluation"]["prompts"]
                        if row["model"] == adapter and row["prompt"] in prompts
                        for value in row["similarity"]
                    ]
                    print(f"  {kind} {adapter} {cat_rs.harmonic_mean(values):.3f}", end="")
            print()


if __name__ == "__main__":
    main()
