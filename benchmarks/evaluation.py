"""Scores of two adapters on the bundled model's CLIP: a pair of pictures at a time, and all at once with cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import cat_rs
from benchmarks import harness
from benchmarks.harness import OURS, ROOT, Case, Contender
from cat_rs.evaluation import load_pictures

NAME = "evaluation"
BAR = ">= 5"
CLIP = ROOT / "examples" / "emoji_model" / "clip"
CONCEPT = ROOT / "examples" / "emoji_model" / "concepts" / "pineapple"
ADAPTERS = 2
SIZE = 64
BY_PAIR = "one pair at a time"
TOLERANCE = 1e-5
# Of a model in float16.
LOOSE = 1e-2

Scores = dict[str, float]


@dataclass(frozen=True)
class Pictures:
    """One model's pictures: the first half of the prompts holds the trigger, the other half does not."""

    trigger: list[Image.Image]
    no_trigger: list[Image.Image]


@dataclass(frozen=True)
class Data:
    """What is scored."""

    base: Pictures
    adapters: list[Pictures]
    concept: list[Image.Image]
    trigger_texts: list[str]
    no_trigger_texts: list[str]


def make_data(prompts: int, concept_pictures: int) -> Data:
    """Pictures of random colours; an adapter's are the base model's, mixed with others."""
    generator = np.random.default_rng(0)
    half = prompts // 2
    shape = (2, half, SIZE, SIZE, 3)
    base = generator.integers(0, 256, shape)

    def pictures(pixels: np.ndarray) -> Pictures:
        kinds = [[Image.fromarray(one) for one in kind] for kind in pixels.astype(np.uint8)]
        return Pictures(*kinds)

    adapters = [pictures((base * 2 + generator.integers(0, 256, shape)) // 3) for _ in range(ADAPTERS)]
    texts = [f"a fruit on a {colour} background" for colour in ("white", "gray", "red", "green", "blue", "yellow")]
    return Data(
        base=pictures(base),
        adapters=adapters,
        concept=list(load_pictures(CONCEPT).images[:concept_pictures]),
        trigger_texts=[texts[number % len(texts)] for number in range(half)],
        no_trigger_texts=[texts[-1 - number % len(texts)] for number in range(half)],
    )


class ByPair:
    """As evaluation scripts do it: one picture in a call of CLIP, the cosine of a pair, mapped to [0, 1]."""

    def __init__(self, data: Data, model: Any, processor: Any) -> None:
        self._data = data
        self._model = model.eval()
        self._processor = processor

    def _embed(self, image: Image.Image) -> torch.Tensor:
        inputs = self._processor(images=image, return_tensors="pt")
        return self._model.get_image_features(inputs["pixel_values"].to(self._model.dtype)).pooler_output

    def image_similarity(self, one: Image.Image, other: Image.Image) -> float:
        """s of two pictures."""
        return float((F.cosine_similarity(self._embed(one), self._embed(other)) + 1) / 2)

    def prompt_similarity(self, image: Image.Image, text: str) -> float:
        """The cosine of a picture and a text."""
        tokens = self._processor(text=[text], padding=True, return_tensors="pt")
        of_text = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return float(F.cosine_similarity(self._embed(image), of_text))

    @torch.inference_mode()
    def preservation(self) -> list[Scores]:
        """KPS and its parts of every adapter."""
        return [self._preservation(adapted) for adapted in self._data.adapters]

    @torch.inference_mode()
    def everything(self) -> list[Scores]:
        """Also identity and prompt similarity."""
        return [self._preservation(adapted) | self._learned(adapted) for adapted in self._data.adapters]

    def _preservation(self, adapted: Pictures) -> Scores:
        base = self._data.base
        kinds = ((base.no_trigger, adapted.no_trigger), (base.trigger, adapted.trigger))
        ups, tps = (
            len(left) / sum(1 / self.image_similarity(*pair) for pair in zip(left, right, strict=True))
            for left, right in kinds
        )
        return {"ups": ups, "tps": tps, "kps": 2 / (1 / ups + 1 / tps)}

    def _learned(self, adapted: Pictures) -> Scores:
        data = self._data
        identity = [2 * self.image_similarity(image, one) - 1 for image in adapted.trigger for one in data.concept]
        trigger, no_trigger = (
            [self.prompt_similarity(image, text) for image, text in zip(images, texts, strict=True)]
            for images, texts in ((adapted.trigger, data.trigger_texts), (adapted.no_trigger, data.no_trigger_texts))
        )
        return {
            "identity": float(np.mean(identity)),
            "prompt_similarity": float(np.mean(trigger)),
            "prompt_similarity_no_trigger": float(np.mean(no_trigger)),
        }


class AtOnce:
    """The same with KpsEvaluator: every picture is embedded once, in batches. The intervals come on top."""

    def __init__(self, data: Data, evaluator: cat_rs.KpsEvaluator) -> None:
        self._data = data
        self._evaluator = evaluator

    def preservation(self) -> list[Scores]:
        """KPS and its parts of every adapter."""
        base = self._embedded(self._data.base)
        return [self._preservation(base, self._embedded(adapted)) for adapted in self._data.adapters]

    def everything(self) -> list[Scores]:
        """Also identity and prompt similarity."""
        data, evaluator = self._data, self._evaluator
        base, concept = self._embedded(data.base), evaluator.embed_images(data.concept)
        texts = evaluator.embed_texts(data.trigger_texts), evaluator.embed_texts(data.no_trigger_texts)
        scores = []
        for adapted in map(self._embedded, data.adapters):
            learned = {
                "identity": 2 * float(cat_rs.cross_similarity(adapted[0], concept).mean()) - 1,
                "prompt_similarity": 2 * float(cat_rs.similarity(adapted[0], texts[0]).mean()) - 1,
                "prompt_similarity_no_trigger": 2 * float(cat_rs.similarity(adapted[1], texts[1]).mean()) - 1,
            }
            scores.append(self._preservation(base, adapted) | learned)
        return scores

    def _embedded(self, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        embed = self._evaluator.embed_images
        return embed(pictures.trigger), embed(pictures.no_trigger)

    def _preservation(self, base: Sequence[torch.Tensor], adapted: Sequence[torch.Tensor]) -> Scores:
        result = cat_rs.kps(base[1], adapted[1], base[0], adapted[0])
        return {"ups": result.ups, "tps": result.tps, "kps": result.kps}


def check(what: str, got: list[Scores], expected: list[Scores], tolerance: float) -> None:
    """Compare every figure of every adapter."""
    for number, (mine, reference) in enumerate(zip(got, expected, strict=True)):
        for name, value in reference.items():
            # Written so that NaN fails.
            if not abs(mine[name] - value) <= tolerance:
                wanted = f"expected {value:.7g} +- {tolerance:g}, got {mine[name]:.7g}"
                raise harness.BenchmarkError(f"{NAME} {what}: {name} of adapter {number}: {wanted}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    from transformers import CLIPModel, CLIPProcessor

    options = harness.parser(__doc__ or "", repeats=5).parse_args(argv)
    report = harness.start(NAME, "Scores of two adapters", options, argv)
    prompts, concept_pictures = (8, 2) if options.smoke else (200, 5)
    data = make_data(prompts, concept_pictures)
    processor = CLIPProcessor.from_pretrained(CLIP)
    as_filed = CLIPModel.from_pretrained(CLIP)
    half = f"{BY_PAIR}, {str(as_filed.dtype).removeprefix('torch.')}"
    ways = {
        half: ByPair(data, as_filed, processor),
        BY_PAIR: ByPair(data, CLIPModel.from_pretrained(CLIP).float(), processor),
        OURS: AtOnce(data, cat_rs.KpsEvaluator(CLIP)),
    }
    shape = f"{prompts} prompts x {ADAPTERS} adapters"
    for mode, names in (("KPS", (half, BY_PAIR, OURS)), ("KPS, identity, prompt similarity", (BY_PAIR, OURS))):
        operations = {name: ways[name].preservation if mode == "KPS" else ways[name].everything for name in names}
        expected = operations[BY_PAIR]()
        for name in names:
            check(name, operations[name](), expected, LOOSE if name == half else TOLERANCE)
        contenders = [Contender(name, operation) for name, operation in operations.items()]
        samples = harness.measure(contenders, report.repeats, warm_up=1)
        report.add_times(Case(mode, "float32", shape), samples)
        bar = None if mode == "KPS" else BAR
        report.add_ratio(f"{BY_PAIR} / cat_rs, {mode}", samples[BY_PAIR], samples[OURS], bar)
        if half in samples:
            report.add_ratio(f"{half} / cat_rs, {mode}", samples[half], samples[OURS])
    report.note(
        "Generation is not timed. One pair at a time: a call of CLIP for each picture of each pair (base and adapted; "
        "for identity also adapted and each of the concept's pictures; for prompt similarity also adapted and its "
        "prompt). cat_rs embeds every picture once, in batches, and computes intervals too."
    )
    report.note(
        f"{half}: as transformers loads the bundled file. cat_rs computes in float32, whatever the file holds. The "
        "arithmetic of a picture is the same one by one and in batches: for KPS alone, the gain is in the calls, in "
        "preprocessing, and in embedding the base model's pictures once."
    )
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
