"""`cat-rs demo`: plain LoRA beside CAT on the bundled emoji model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cat_rs import bootstrap_interval
from cat_rs.atomic import write_bytes
from cat_rs.commands.sampling import SamplingSettings
from cat_rs.options import ConfigError, option
from cat_rs.run_folder import CONTACT_SHEET_FILE, CURVES_FILE, DEMO_FORMAT, PICTURES_FOLDER, RESULTS_FILE
from cat_rs.text_files import read_text

if TYPE_CHECKING:
    from cat_rs.training import TrainConfig

_WHAT = "model and concepts"
_TRAINING = "training (the same for both adapters)"

_TRAINED_WITH = ("steps", "batch_size", "lr", "rank", "cat_factor")

PLAIN = "LoRA"
CAT = "CAT"


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingSettings):
    """What is trained and compared."""

    emoji_model: str = option(
        "examples/emoji_model", group=_WHAT, help="folder with model, clip, concepts and prompts.json", metavar="DIR"
    )
    concepts: tuple[str, ...] = option(
        (), group=_WHAT, help="concepts by name; the first if not given", metavar="NAME"
    )
    seeds: tuple[int, ...] = option((0,), group=_WHAT, help="training seeds; each is a run of its own", metavar="N")
    output_dir: str = option("demo", group=_WHAT, help="folder for the results", metavar="DIR")

    steps: int = option(1200, group=_TRAINING, help="optimizer steps")
    batch_size: int = option(4, group=_TRAINING, help="pictures in a batch")
    lr: float = option(2e-4, group=_TRAINING, help="learning rate")
    rank: int = option(16, group=_TRAINING, help="rank r of the adapters")
    cat_factor: float = option(1.0, group=_TRAINING, help="weight of the preservation term in the CAT adapter")
    preserve: Literal["captions", "blank", "set"] | None = option(
        None,
        group=_TRAINING,
        help="what the CAT adapter preserves, as for cat-rs train; the default of cat-rs train if not given",
    )


@dataclass(frozen=True)
class Concept:
    """A held-out emoji with its pictures and prompts."""

    name: str
    class_word: str
    pictures: Path
    trigger: str
    trigger_prompts: tuple[str, ...]
    no_trigger_prompts: tuple[str, ...]


@dataclass(frozen=True)
class DemoRun:
    """One concept and seed: both adapters, evaluated.

    Attributes:
        concept: The concept's name.
        seed: The training seed.
        seconds: Training time of each adapter.
        preserved: What the CAT adapter preserved, as `TrainConfig.preserved` names it.
        evaluation: A `cat_rs.evaluation.EvaluationResult`.
        folder: Where the adapters and pictures of this run are.
    """

    concept: str
    seed: int
    seconds: dict[str, float]
    preserved: dict[str, Any]
    evaluation: Any
    folder: Path


def run(settings: Settings) -> None:
    """Train and evaluate every concept and seed; write results.json, the pictures, and drawings of them."""
    from cat_rs.report import print_table

    concepts = read_concepts(Path(settings.emoji_model), settings.concepts)
    runs = []
    for concept in concepts:
        for seed in settings.seeds:
            print(f"\n{concept.name}, seed {seed}")
            runs.append(_run_one(settings, concept, seed))
            print_table(runs[-1].evaluation)
    summary = summarize(runs)
    _write_results(settings, runs, summary)
    if summary:
        print(format_summary(summary, len(runs)))
    print(f"\nresults, contact sheet and curves: {settings.output_dir}")


def read_concepts(emoji_model: Path, names: Sequence[str]) -> list[Concept]:
    """Read the named concepts from the emoji model's prompts.json, or its first.

    Raises:
        ConfigError: There is no such file or concept.
    """
    file = emoji_model / "prompts.json"
    try:
        content = json.loads(read_text(file))
        trigger = content["trigger_word"]
        known = {entry["name"]: _concept(entry, trigger, emoji_model) for entry in content["concepts"]}
    except FileNotFoundError as error:
        expected = f"the emoji model's folder, got {emoji_model} without {file.name}"
        raise ConfigError(f"emoji_model: expected {expected}") from error
    except (OSError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(
            f"emoji_model: expected the concepts of the emoji model in {file}, got: {error!r}"
        ) from error
    unknown = [name for name in names if name not in known]
    if unknown or not known:
        raise ConfigError(f"concepts: expected names out of {', '.join(known)}; got {', '.join(unknown)}")
    return [known[name] for name in names] or list(known.values())[:1]


def summarize(runs: Sequence[DemoRun]) -> dict[str, Any]:
    """Return means over the runs, and the paired difference CAT - LoRA with its interval; empty for a single run."""
    if len(runs) < 2:
        return {}
    summary = {}
    for figure in ("ups", "tps", "kps", "identity", "drift"):
        plain, cat = ([getattr(run.evaluation.adapters[name], figure).value for run in runs] for name in (PLAIN, CAT))
        differences = [with_cat - without for without, with_cat in zip(plain, cat, strict=True)]
        low, high = bootstrap_interval(differences, "mean")
        summary[figure] = {
            PLAIN: sum(plain) / len(plain),
            CAT: sum(cat) / len(cat),
            "difference": {"value": sum(differences) / len(differences), "low": low, "high": high},
        }
    return summary


def format_summary(summary: dict[str, Any], runs: int) -> str:
    """Return the summary as a table."""
    lines = [f"\nmean over {runs} runs", f"{'':10}{PLAIN:>8}{CAT:>8}  {CAT} - {PLAIN} (95 % interval)"]
    for figure, row in summary.items():
        difference = row["difference"]
        lines.append(
            f"{figure:10}{row[PLAIN]:8.3f}{row[CAT]:8.3f}  "
            f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
        )
    return "\n".join(lines)


def _concept(entry: dict[str, Any], trigger: str, emoji_model: Path) -> Concept:
    return Concept(
        name=entry["name"],
        class_word=entry["class_word"],
        pictures=emoji_model / entry["folder"],
        trigger=trigger,
        trigger_prompts=tuple(entry["trigger_prompts"]),
        no_trigger_prompts=(*entry["class_prompts"], *entry["neighbour_prompts"], *entry["other_class_prompts"]),
    )


def _run_one(settings: Settings, concept: Concept, seed: int) -> DemoRun:
    from cat_rs.report import contact_sheet, save_all_pictures, training_curves

    folder = Path(settings.output_dir, "runs", f"{concept.name.replace(' ', '_')}-seed{seed}")
    configs = {
        PLAIN: _config(settings, concept, seed, folder / PLAIN, cat_factor=0.0),
        CAT: _config(settings, concept, seed, folder / CAT, settings.cat_factor, settings.preserve),
    }
    results = {name: _train(config) for name, config in configs.items()}
    evaluation = _evaluate(settings, concept, {name: str(result.output_dir) for name, result in results.items()})
    save_all_pictures(evaluation, folder / PICTURES_FOLDER)
    contact_sheet(evaluation, folder / CONTACT_SHEET_FILE)
    training_curves({name: result.metrics for name, result in results.items()}, folder / CURVES_FILE)
    seconds = {name: round(result.seconds, 1) for name, result in results.items()}
    return DemoRun(concept.name, seed, seconds, configs[CAT].preserved()._asdict(), evaluation, folder)


def _config(
    settings: Settings, concept: Concept, seed: int, output: Path, cat_factor: float, preserve: Any = None
) -> TrainConfig:
    from cat_rs.training import TrainConfig

    return TrainConfig(
        model=str(Path(settings.emoji_model, "model")),
        data=str(concept.pictures),
        output_dir=str(output),
        trigger=(concept.trigger,),
        class_word=concept.class_word,
        cat_factor=cat_factor,
        preserve=preserve,
        rank=settings.rank,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=seed,
        checkpoint_every=0,
        overwrite=True,
        dtype=settings.dtype,
    )


def _train(config: TrainConfig) -> Any:
    from cat_rs.training import train

    print(f"training {Path(config.output_dir).name} (cat_factor {config.cat_factor:g})")
    return train(config)


def _evaluate(settings: Settings, concept: Concept, adapters: dict[str, str]) -> Any:
    from cat_rs.evaluation import ClipEncoder, EvaluationPrompts, evaluate

    prompts = EvaluationPrompts(
        trigger=concept.trigger_prompts,
        no_trigger=concept.no_trigger_prompts,
        trigger_words=(concept.trigger,),
        class_word=concept.class_word,
    )
    pipeline = settings.load_pipeline(str(Path(settings.emoji_model, "model")))
    encoder = ClipEncoder.from_pretrained(Path(settings.emoji_model, "clip"), device=pipeline.device)
    return evaluate(
        pipeline,
        adapters,
        prompts,
        encoder,
        concept_images=concept.pictures,
        config=settings.evaluation_config(),
    )


def _write_results(settings: Settings, runs: Sequence[DemoRun], summary: dict[str, Any]) -> None:
    """Write the figures of all runs, and put the first run's pictures on top."""
    output = Path(settings.output_dir)
    content = {
        "format": DEMO_FORMAT,
        "training": {name: getattr(settings, name) for name in _TRAINED_WITH} | runs[0].preserved,
        "summary": summary,
        "runs": [
            {
                "concept": run.concept,
                "seed": run.seed,
                "training_seconds": run.seconds,
                "folder": run.folder.relative_to(output).as_posix(),
                "evaluation": json.loads(run.evaluation.to_json()),
            }
            for run in runs
        ],
    }
    write_bytes(
        output / RESULTS_FILE,
        (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"),
    )
    for name in (CONTACT_SHEET_FILE, CURVES_FILE):
        write_bytes(output / name, (runs[0].folder / name).read_bytes())
