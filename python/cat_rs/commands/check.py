"""`cat-rs check`: what is in an adapter file, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cat_rs.options import ConfigError, option

if TYPE_CHECKING:
    from cat_rs.adapter_check import WeightReport

_FILES = "files"
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to look at."""

    adapters: tuple[str, ...] = option(
        group=_FILES, help="adapter files, or the folders that hold them", positional=True
    )
    model: str | None = option(
        None,
        group=_FILES,
        help="the model that the adapters are for: finds layers that it does not have, and compares updates with the "
        "weights that they change",
        metavar="DIR_OR_ID",
    )
    output: str | None = option(None, group=_FILES, help="JSON file for every layer's figures", metavar="FILE")

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("adapters: expected at least one, got none")


def run(settings: Settings) -> None:
    """Print what each adapter holds and what is out of line."""
    from cat_rs.adapter_check import check_weights
    from cat_rs.atomic import write_bytes
    from cat_rs.training.model import load_model_parts

    models = load_model_parts(settings.model)
    reports = {path: check_weights(path, models) for path in settings.adapters}
    print("\n\n".join(_text(path, report) for path, report in reports.items()))
    if settings.output is not None:
        content = {path: report.to_dict() for path, report in reports.items()}
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(settings.output, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _text(path: str, report: WeightReport) -> str:
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
        more = f" and {len(finding.layers) - _LISTED} more" if len(finding.layers) > _LISTED else ""
        lines.append(f"  {finding.kind}: {finding.text}")
        lines += [f"    {layer}" for layer in finding.layers[:_LISTED]] + ([f"   {more}"] if more else [])
    return "\n".join(lines if report.findings else [*lines, "  nothing out of line"])
