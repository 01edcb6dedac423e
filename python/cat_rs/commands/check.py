"""`cat-rs check`: what is in an adapter file, what is wrong with it, and what it does to the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cat_rs.commands.sampling import SamplingSettings, name_and_path
from cat_rs.options import ConfigError, check_absent, option
from cat_rs.processes import Processes, leave
from cat_rs.run_folder import CHECK_FILE, PICTURES_FOLDER

if TYPE_CHECKING:
    from cat_rs.adapter_check import AdapterCheck, CheckResult, PictureCheck, WeightReport

_FILES = "files"
_PROMPTS = "prompts"
_STRENGTH = "strength"
_STACK = "stacking"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingSettings):
    """What to look at."""

    adapters: tuple[str, ...] = option(
        group=_FILES,
        help="adapter files, or the folders that hold them; NAME=PATH names one in the result",
        positional=True,
    )
    model: str | None = option(
        None,
        group=_FILES,
        help="the model that the adapters are for; without it, the weights are looked at alone",
        metavar="DIR_OR_ID",
    )
    weights_only: bool = option(False, group=_FILES, help="look at the weights, and draw nothing")
    encoder: str = option(
        "openai/clip-vit-large-patch14",
        group=_FILES,
        help="CLIP, SigLIP or DINOv2: a folder or a hub id",
        metavar="DIR_OR_ID",
    )
    output_dir: str = option("check", group=_FILES, help=f"folder for {CHECK_FILE} and the pictures", metavar="DIR")
    overwrite: bool = option(False, group=_FILES, help="replace the results of an earlier check")
    cache: str | None = option(
        None,
        group=_FILES,
        help="folder that keeps pictures and embeddings, for other checks and to go on after a kill; "
        "cache in the output folder if not given",
        metavar="DIR",
    )

    trigger: tuple[str, ...] = option(
        (), group=_PROMPTS, help="the trigger of each adapter, where its file does not tell", metavar="WORD"
    )
    class_word: tuple[str, ...] = option(
        (), group=_PROMPTS, help="what each adapter's concept is an example of, likewise", metavar="WORD"
    )
    prompts: str | None = option(
        None,
        group=_PROMPTS,
        help="prompts of one's own: a text file, one a line; or JSON with a list for each kind, which replaces that "
        "kind's",
        metavar="FILE",
    )
    limit: int = option(48, group=_PROMPTS, help="at most so many prompts of a kind, spread over its list")

    scales: tuple[float, ...] = option(
        (0.4, 0.6, 0.8, 1.0), group=_STRENGTH, help="what the adapter's update is multiplied by", metavar="X"
    )
    max_drift: float = option(
        0.05, group=_STRENGTH, help="drift without the trigger that is still safe, for the largest safe scale"
    )

    rewind: str | None = option(
        None,
        group=_STRENGTH,
        help="of a run folder that cat-rs train --evaluate-every wrote: write its best checkpoint at the best scale, "
        "folded in, by the rule of --evaluate-every; model and prompts are the run's own",
        metavar="FILE",
    )

    stack: bool = option(False, group=_STACK, help="also draw all pairs of the adapters, and all of them, together")
    stack_scales: tuple[float, ...] = option(
        (), group=_STACK, help="scale of each adapter in a stack, in their order; 1 for all if not given", metavar="X"
    )
    concepts: tuple[str, ...] = option(
        (),
        group=_STACK,
        help="folders of pictures of an adapter's concept, by which a stack tells whether it appears; without them, "
        "by the adapter's own pictures when it is alone",
        metavar="NAME=FOLDER",
    )

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("adapters: expected at least one, got none")
        if self.rewind is not None and len(self.adapters) > 1:
            raise ConfigError(f"rewind: expected one run folder, got {len(self.adapters)}")

    def named_adapters(self) -> dict[str, str]:
        """Return name -> path; adapters of the same name have their paths as names."""
        named = [name_and_path(adapter) for adapter in self.adapters]
        names = [name for name, _ in named]
        return {path if names.count(name) > 1 else name: path for name, path in named}


def run(settings: Settings) -> None:
    """Print what each adapter holds, does, and what is out of line; write check.json."""
    if settings.rewind is not None:
        _rewind(settings, settings.rewind)
        return
    from cat_rs.report.picture_files import save_check_pictures

    output = Path(settings.output_dir)
    check_absent("output_dir", [output / CHECK_FILE], overwrite=settings.overwrite)
    try:
        result = _check(settings)
        reports = Processes.current().is_main
    finally:
        leave()
    if not reports:
        return
    output.mkdir(parents=True, exist_ok=True)
    if any(each.pictures is not None for each in result.adapters.values()):
        save_check_pictures(result, output / PICTURES_FOLDER)
    # Last, as it tells that the check is whole.
    result.save(output / CHECK_FILE)
    print("\n\n".join(_text(name, each) for name, each in result.adapters.items()))
    if result.stack is not None:
        print("\ntogether\n\n" + _listed(result.stack.findings))
    print(f"\nresults: {output / CHECK_FILE}")


def _check(settings: Settings) -> CheckResult:
    """Check on all ranks that a launcher started."""
    from cat_rs.adapter_check import AdapterCheck, CheckResult, check, check_weights
    from cat_rs.evaluation import load_encoder
    from cat_rs.training.model import load_model_parts

    adapters = settings.named_adapters()
    if settings.model is None or settings.weights_only:
        models = load_model_parts(settings.model)
        return CheckResult(
            {"adapters": adapters},
            {name: AdapterCheck(check_weights(path, models), (), None) for name, path in adapters.items()},
        )
    config = settings.evaluation_config()
    processes = settings.join_processes()
    pipeline = settings.load_pipeline(settings.model, processes)
    return check(
        adapters,
        pipeline,
        load_encoder(settings.encoder, device=pipeline.device),
        triggers=settings.trigger,
        class_words=settings.class_word,
        prompts=settings.prompts,
        limit=settings.limit,
        scales=settings.scales,
        max_drift=settings.max_drift,
        stack=settings.stack,
        stack_scales=settings.stack_scales,
        concepts=dict(map(name_and_path, settings.concepts)),
        config=config,
        cache=settings.cache or Path(settings.output_dir) / "cache",
        processes=processes,
    )


def _rewind(settings: Settings, output: str) -> None:
    from cat_rs.adapter_file.save import files_to_write
    from cat_rs.evaluation.measures import format_interval
    from cat_rs.training import rewind

    check_absent("rewind", files_to_write(output, "diffusers"), overwrite=settings.overwrite)
    cache = settings.cache or Path(settings.output_dir) / "cache"
    found = rewind(settings.adapters[0], output, scales=settings.scales, device=settings.device, cache=cache)
    for point in found.points:
        figures = f"identity {format_interval(point.identity)}, UPS {format_interval(point.ups)}"
        print(f"step {point.step} x {point.scale:g}: {figures}{', the best' if point == found.best else ''}")
    print(f"written: {found.file}" if found.file else "nothing is written: no identity is beyond the base model's")


def _text(name: str, checked: AdapterCheck) -> str:
    parts = [_weights(name, checked.weights)]
    if checked.pictures is not None:
        parts.append(_pictures(checked.pictures))
    return "\n\n".join([*parts, _listed(checked.findings)]).rstrip()


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _pictures(checked: PictureCheck) -> str:
    """Return tables: drift by kind and scale, and effect and damage by scale."""
    from cat_rs.evaluation.measures import format_interval

    rows = [["drift", "another seed", *(f"scale {each.scale:g}" for each in checked.scales)]]
    for kind in checked.scales[0].kinds:
        floor = checked.other_seed.get(kind)
        figures = [None if floor is None else floor.drift, *(each.kinds[kind].drift for each in checked.scales)]
        rows.append([f"  {kind}", *map(format_interval, figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _weights(path: str, report: WeightReport) -> str:
    lines = [f"{path}: {report.format}, {report.family or 'unknown family'}"]
    for component in dict.fromkeys(layer.component for layer in report.layers):
        own = [layer for layer in report.layers if layer.component == component]
        ranks = ", ".join(map(str, sorted({layer.rank for layer in own})))
        scales = ", ".join(f"{scale:g}" for scale in sorted({layer.scale for layer in own}))
        sizes = [layer.norm if layer.relative is None else layer.relative for layer in own]
        of = "" if own[0].relative is None else " of the weight's"
        shares = [layer.first_share for layer in own if layer.first_share is not None]
        share = f", first singular value {median(shares):.0%} of it" if shares else ""
        lines.append(
            f"  {component}: {len(own)} layers, rank {ranks}, scale {scales}; update's norm {median(sizes):.3g}{of} "
            f"(median), {max(sizes):.3g} (largest), effective rank "
            f"{median(layer.effective_rank for layer in own):.1f}{share}"
        )
    for finding in report.findings:
        more = f" and {len(finding.layers) - _SHOWN} more" if len(finding.layers) > _SHOWN else ""
        lines.append(f"  {finding.kind}: {finding.text}")
        lines += [f"    {layer}" for layer in finding.layers[:_SHOWN]] + ([f"   {more}"] if more else [])
    return "\n".join(lines if report.findings else [*lines, "  nothing out of line"])
