"""The weights of an adapter file: how large each layer's update is, of what kind, and which layers are out of line."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cat_rs.adapter_file.layer import Layer
from cat_rs.adapter_file.lora_file import LoraFile, layers_of
from cat_rs.adapter_file.model import base_layers, size_error
from cat_rs.adapter_file.read import read_lora
from cat_rs.adapter_file.update import factors, singular_values

__all__ = ["Finding", "LayerUpdate", "WeightReport", "check_weights"]

# Iglewicz and Hoaglin (1993): a value whose modified z-score is beyond 3.5 is an outlier. Where layers are all alike,
# one is named only if it is this many times the median, too.
_OUTLIER = 3.5
_NOTABLE = 4.0
# Trainers give convolutions and blocks scales of their own; a fault is what few layers of a kind have.
_FEW = 0.1
# Above it, an update is as large as what it changes.
_AS_LARGE = 1.0

Values = NDArray[np.float64]


@dataclass(frozen=True)
class LayerUpdate:
    """The update scale * B A of one layer, with singular values s_1 >= s_2 >= ...

    Attributes:
        component: "unet", "text_encoder" ...
        module: The layer's name.
        rank: r, the rows of A.
        alpha: lora_alpha.
        scale: alpha / r; with rsLoRA alpha / sqrt(r).
        norm: sqrt(sum s_i^2), the Frobenius norm.
        largest: s_1, the spectral norm.
        effective_rank: exp(-sum p_i log p_i) with p_i = s_i / sum s (Roy and Vetterli 2007); 0 for a zero update.
        first_share: s_1^2 / sum s_i^2; None for a zero update.
        relative: norm / the Frobenius norm of the base weight; None without the model.
    """

    component: str
    module: str
    rank: int
    alpha: float
    scale: float
    norm: float
    largest: float
    effective_rank: float
    first_share: float | None
    relative: float | None


@dataclass(frozen=True)
class Finding:
    """Something to know before the adapter is used.

    Attributes:
        kind: "not finite", "absent", "size", "zero", "duplicate", "scale", "spike", "large" or "dora".
        layers: The layers, as "component: module".
        text: What is the matter, as a sentence without the layers.
    """

    kind: str
    layers: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class WeightReport:
    """What `check_weights` found.

    Attributes:
        format: "diffusers", "peft" or "kohya".
        family: "sd", "sdxl" or "flux"; None where nothing tells.
        layers: Every layer whose values are finite.
        findings: What is out of line; empty for an ordinary adapter.
    """

    format: str
    family: str | None
    layers: tuple[LayerUpdate, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


def check_weights(
    adapter: LoraFile | str | os.PathLike[str], models: Mapping[str, torch.nn.Module] | None = None
) -> WeightReport:
    """Looks at the weights of an adapter; draws nothing.

    Singular values come from the factors, in float64: with B = Q_B R_B and A^T = Q_A R_A they are those of R_B R_A^T.
    The update of a DoRA layer depends on the base weight; its direction's, scale * B A, is reported.

    Args:
        adapter: What `load_lora` returned, or the path of a file or folder that it reads.
        models: Component -> model, such as {"unet": unet}: then layers that the model does not have are found, and
            updates are compared with the weights that they change. None looks at the file alone.

    Raises:
        AdapterError: The file is damaged or no LoRA.
        OSError: The file cannot be read.
    """
    threads = torch.get_num_threads()
    # Matrices this small gain nothing from threads, which wait for each other long where others use the processor.
    torch.set_num_threads(1)
    try:
        return _checked(adapter, models or {})
    finally:
        torch.set_num_threads(threads)


def _checked(adapter: LoraFile | str | os.PathLike[str], models: Mapping[str, torch.nn.Module]) -> WeightReport:
    lora = adapter if isinstance(adapter, LoraFile) else read_lora(adapter, models, finite=False)
    findings: list[Finding] = []
    layers, weights = _placed(lora, models, findings)
    whole = [layer for layer in layers if _is_finite(layer)]
    broken = [layer for layer in layers if not _is_finite(layer)]
    findings += _finding("not finite", broken, "NaN or infinity: every picture would be black or noise")
    updates = [_update(lora, layer, weights.get((layer.component, layer.module))) for layer in whole]
    doras = [layer for layer in whole if layer.magnitude is not None]
    findings += _finding("dora", doras, "a DoRA, which cannot be merged with others")
    findings += _zeros(whole, updates)
    findings += _duplicates(whole, updates)
    findings += _scales(whole, updates)
    findings += _spikes(whole, updates)
    large = [layer for layer, update in zip(whole, updates, strict=True) if (update.relative or 0.0) > _AS_LARGE]
    findings += _finding("large", large, "the update is larger than the weight that it changes")
    return WeightReport(lora.format, lora.family, tuple(updates), tuple(findings))


def _placed(
    lora: LoraFile, models: Mapping[str, torch.nn.Module], findings: list[Finding]
) -> tuple[list[Layer], dict[tuple[str, str], torch.Tensor]]:
    """All layers, and the base weights of those that fit the models; adds what does not fit to the findings."""
    layers: list[Layer] = []
    weights: dict[tuple[str, str], torch.Tensor] = {}
    absent: list[Layer] = []
    wrong: list[Layer] = []
    for component in lora.state:
        own = list(layers_of(lora, component))
        if not models:
            layers += own
            continue
        if component not in models:
            layers += own
            absent += own
            continue
        for layer, base in base_layers(models[component], own):
            layers.append(layer)
            if base is None:
                absent.append(layer)
            elif size_error(layer, base) is not None:
                wrong.append(layer)
            elif isinstance(weight := getattr(base, "weight", None), torch.Tensor) and weight.is_floating_point():
                weights[layer.component, layer.module] = weight
    rest = len(layers) - len(absent) - len(wrong)
    other = "" if rest >= len(layers) / 2 else f"; only {rest} of {len(layers)} layers fit: it is for another model"
    findings += _finding("absent", absent, f"the model has no such layer{other}")
    findings += _finding("size", wrong, f"the model has this layer in another size{'' if absent else other}")
    return layers, weights


def _update(lora: LoraFile, layer: Layer, weight: torch.Tensor | None) -> LayerUpdate:
    rslora = bool(lora.configs.get(layer.component, {}).get("use_rslora"))
    values = singular_values(factors(layer, rslora=rslora)).numpy()
    norm, total = float(np.linalg.norm(values)), float(values.sum())
    parts = values[values > 0] / total if total else values[:0]
    return LayerUpdate(
        component=layer.component,
        module=layer.module,
        rank=layer.rank,
        alpha=layer.rank if layer.alpha is None else float(layer.alpha),
        scale=layer.scale(rslora),
        norm=norm,
        largest=float(values.max(initial=0.0)),
        effective_rank=float(np.exp(-(parts * np.log(parts)).sum())) if total else 0.0,
        first_share=float(values[0] ** 2 / norm**2) if norm else None,
        relative=None if weight is None else norm / float(weight.detach().double().norm()),
    )


def _is_finite(layer: Layer) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in layer.state().values())


def _zeros(layers: Sequence[Layer], updates: Sequence[LayerUpdate]) -> Iterator[Finding]:
    zero = [layer for layer, update in zip(layers, updates, strict=True) if update.norm == 0]
    text = "the whole adapter does nothing" if len(zero) == len(layers) else "the update is zero"
    yield from _finding("zero", zero, text)


def _duplicates(layers: Sequence[Layer], updates: Sequence[LayerUpdate]) -> Iterator[Finding]:
    same = defaultdict(list)
    for layer, update in zip(layers, updates, strict=True):
        if update.norm:
            digest = hashlib.sha256()
            for tensor in (layer.lora_A, layer.lora_B):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            same[digest.digest()].append(layer)
    for group in same.values():
        if len(group) > 1:
            yield from _finding("duplicate", group, "these layers have the same values")


def _scales(layers: Sequence[Layer], updates: Sequence[LayerUpdate]) -> Iterator[Finding]:
    """Layers whose scale hardly any other layer of their kind has: of one component, rank and sort."""
    kinds = defaultdict(list)
    for layer, update in zip(layers, updates, strict=True):
        kinds[layer.component, layer.rank, layer.lora_A.dim()].append((layer, update.scale))
    for group in kinds.values():
        counts = Counter(scale for _, scale in group)
        usual = counts.most_common(1)[0][0]
        odd = [layer for layer, scale in group if scale != usual and counts[scale] < _FEW * len(group)]
        yield from _finding("scale", odd, f"alpha / r is not {usual:g}, as in the other layers of this rank")


def _spikes(layers: Sequence[Layer], updates: Sequence[LayerUpdate]) -> Iterator[Finding]:
    """Layers whose largest singular value is far above the others', on a logarithmic scale, by component."""
    for component in dict.fromkeys(layer.component for layer in layers):
        own = [(layer, u) for layer, u in zip(layers, updates, strict=True) if layer.component == component and u.norm]
        if not own:
            continue
        logs = np.log([update.largest for _, update in own])
        median = float(np.median(logs))
        spread = float(np.median(np.abs(logs - median)))
        far = (0.6745 * (logs - median) > _OUTLIER * spread) & (logs - median > np.log(_NOTABLE))
        spikes = [layer for (layer, _), is_far in zip(own, far, strict=True) if is_far]
        text = f"the largest singular value is far above the median of the layers, {np.exp(median):.3g}"
        yield from _finding("spike", spikes, text)


def _finding(kind: str, layers: Iterable[Layer], text: str) -> list[Finding]:
    names = tuple(f"{layer.component}: {layer.module}" for layer in layers)
    return [Finding(kind, names, text)] if names else []
