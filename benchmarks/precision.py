"""What a bfloat16 base model costs in quality: the bundled model trained on one concept in float32 and in bfloat16.

The adapter is trained in float32 in both. Pictures are drawn and embedded in float32, from the same noise.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import OURS, Case
from cat_rs.commands.demo import Concept, read_concepts
from cat_rs.evaluation import ClipEncoder, EvaluationConfig, EvaluationPrompts, evaluate
from cat_rs.training import TrainConfig, train
from cat_rs.training.model import load_pipeline

NAME = "precision"
DIFFERENCE_BAR = "<= 0.02"
EMOJI_MODEL = harness.ROOT / "examples" / "emoji_model"
CONCEPT = "tractor"
DTYPES = ("float32", "bfloat16")
FIGURES = ("identity", "ups", "tps")
TEXTS = {"identity": "identity", "ups": "UPS", "tps": "TPS"}


def train_adapter(concept: Concept, dtype: str, steps: int, folder: Path) -> tuple[str, float]:
    """The adapter's folder, and the seconds that its training took."""
    config = TrainConfig(
        model=str(EMOJI_MODEL / "model"),
        data=str(concept.pictures),
        output_dir=str(folder / dtype),
        trigger=(concept.trigger,),
        class_word=concept.class_word,
        preserve="captions",
        steps=steps,
        batch_size=4,
        lr=2e-4,
        checkpoint_every=0,
        tensorboard=False,
        dtype=dtype,
    )
    result = train(config)
    return str(result.output_dir), result.seconds


def scores(concept: Concept, adapters: dict[str, str], smoke: bool) -> Any:
    """Both adapters, evaluated on the same prompts and noise."""
    prompts = EvaluationPrompts(
        trigger=concept.trigger_prompts[: 1 if smoke else None],
        no_trigger=concept.no_trigger_prompts[: 1 if smoke else None],
        trigger_words=(concept.trigger,),
        class_word=concept.class_word,
    )
    pipeline = load_pipeline(str(EMOJI_MODEL / "model"), torch.float32, torch.device("cpu"))
    encoder = ClipEncoder.from_pretrained(EMOJI_MODEL / "clip", device=pipeline.device)
    config = EvaluationConfig(num_inference_steps=2 if smoke else 16, guidance_scale=3.0, seeds=(0, 1), batch_size=8)
    return evaluate(pipeline, adapters, prompts, encoder, concept_images=concept.pictures, config=config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser((__doc__ or "").splitlines()[0], repeats=1).parse_args(argv)
    report = harness.start(NAME, "A bfloat16 base model with a float32 adapter, against float32", options, argv)
    steps = 2 if options.smoke else 300
    (concept,) = read_concepts(EMOJI_MODEL, [CONCEPT])
    case = Case("train", "float32, bfloat16", f"{concept.name}, {steps} steps, batch 4")
    with tempfile.TemporaryDirectory() as folder:
        runs = {dtype: train_adapter(concept, dtype, steps, Path(folder)) for dtype in DTYPES}
        result = scores(concept, {dtype: adapter for dtype, (adapter, _) in runs.items()}, options.smoke)
    for dtype, (_, seconds) in runs.items():
        report.add(OURS if dtype == DTYPES[1] else dtype, case, "training", "s", [seconds])
    for figure in FIGURES:
        values = [getattr(result.adapters[dtype], figure) for dtype in DTYPES]
        for dtype, value in zip(DTYPES, values, strict=True):
            report.add_value(f"{TEXTS[figure]}, {dtype}", value.value, value.low, value.high)
        difference = abs(values[1].value - values[0].value)
        bar = DIFFERENCE_BAR if figure != "tps" else None
        report.add_value(f"{TEXTS[figure]}, difference", difference, difference, difference, bar)
    report.note("In brackets the 95 % bootstrap intervals of the scores.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
