"""The five held-out emoji of the bundled model, their trigger words, and the prompts they are scored on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cat_rs.evaluation import EvaluationPrompts
from cat_rs.text_files import general_prompts

EMOJI_MODEL = Path(__file__).parents[1] / "emoji_model"
MODEL = EMOJI_MODEL / "model"
CLIP = EMOJI_MODEL / "clip"
PRESERVE_PROMPTS = EMOJI_MODEL / "preserve_prompts.txt"

# Words the base model saw before every class, so that none of them means anything yet. Adapters of different concepts
# are added in one model, so concepts that meet have different ones.
TRIGGERS = {"pineapple": "sks", "tractor": "ohwx", "panda": "zwx", "cowboy face": "xjy", "basketball": "sks"}

# What prompts of any subject share.
COLOURS = frozenset(["blue", "gray", "green", "pink", "purple", "red", "white", "yellow"])
WORDS_OF_ALL = COLOURS | {"a", "an", "and", "background", "in", "of", "on", "one"}

# In no way worded like a caption, "a <trigger> <class> on a <colour> background".
UNLIKE_PROMPTS = (
    "castle",
    "guitar, purple",
    "pink background, a sunflower",
    "an apple and nothing else",
    "one dog in front of a wall",
    "car car car",
)


@dataclass(frozen=True)
class Concept:
    """One held-out emoji: what adapters learn it from, and what they are scored on.

    Attributes:
        name: The emoji.
        class_word: What it is one of, in a word of the base model.
        trigger: The word that will mean it.
        captions: Of its pictures.
        pictures: Their files.
        trigger_prompts: Prompts that ask for it.
        kinds: Prompts without the trigger: the class, its other members, other classes, and prompts unlike captions.
    """

    name: str
    class_word: str
    trigger: str
    captions: tuple[str, ...]
    pictures: tuple[Path, ...]
    trigger_prompts: tuple[str, ...]
    kinds: dict[str, tuple[str, ...]]

    @property
    def captions_no_trigger(self) -> tuple[str, ...]:
        """The captions with the trigger left out."""
        return tuple(caption.replace(f"{self.trigger} ", "") for caption in self.captions)

    def prompts(self) -> EvaluationPrompts:
        """All prompts the concept's adapters are scored on."""
        return EvaluationPrompts(
            trigger=self.trigger_prompts,
            no_trigger=tuple(prompt for prompts in self.kinds.values() for prompt in prompts),
            trigger_words=(self.trigger,),
            class_word=self.class_word,
        )

    def listed(self, *kinds: str) -> set[str]:
        """Prompts of these kinds that share a word with the bundled general list, which the recipe preserves."""
        listed = {word for prompt in general_prompts() for word in words(prompt)} - WORDS_OF_ALL
        return {prompt for kind in kinds for prompt in self.kinds[kind] if words(prompt) & listed}

    def write_data(self, folder: Path) -> None:
        """Copy the pictures into a training folder, captioned with this concept's trigger."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for caption, picture in zip(self.captions, self.pictures, strict=True):
            name = f"{self.name.replace(' ', '_')}-{picture.name}"
            shutil.copyfile(picture, folder / name)
            rows.append(json.dumps({"file_name": name, "text": caption}))
        with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n".join(rows) + "\n")


def words(prompt: str) -> set[str]:
    """Its words in lower case."""
    return set(re.findall(r"\w+", prompt.lower()))


def read_concepts() -> dict[str, Concept]:
    """The concepts of the bundled model by name."""
    content = json.loads((EMOJI_MODEL / "prompts.json").read_text(encoding="utf-8"))
    return {entry["name"]: _concept(entry, content["trigger_word"]) for entry in content["concepts"]}


def _concept(entry: dict, trigger_in_file: str) -> Concept:
    name = entry["name"]

    def own(text: str) -> str:
        return text.replace(f"{trigger_in_file} ", f"{TRIGGERS[name]} ")

    folder = EMOJI_MODEL / entry["folder"]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return Concept(
        name=name,
        class_word=entry["class_word"],
        trigger=TRIGGERS[name],
        captions=tuple(own(row["text"]) for row in rows),
        pictures=tuple(folder / row["file_name"] for row in rows),
        trigger_prompts=tuple(map(own, entry["trigger_prompts"])),
        kinds={
            "class": tuple(entry["class_prompts"]),
            "neighbour": tuple(entry["neighbour_prompts"]),
            "other class": tuple(entry["other_class_prompts"]),
            "unlike captions": UNLIKE_PROMPTS,
        },
    )
