"""Several adapters as one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cat_rs.adapter_file.layer import Layer
from cat_rs.adapter_file.lora_file import LoraFile, assembled, layers_of
from cat_rs.adapter_file.read import load_lora
from cat_rs.adapter_file.update import Factors, decomposition, factors, joined, singular_values
from cat_rs.arguments import check, refusing
from cat_rs.errors import AdapterError, InvalidValueError

__all__ = ["CappedLayer", "MergedLora", "merge_loras"]


class CappedLayer(NamedTuple):
    """A layer whose singular values were limited.

    Attributes:
        component: "unet", "text_encoder" ...
        module: The layer's name.
        limit: The largest singular value that was allowed.
        largest: The largest one before.
        changed: How many were above the limit.
    """

    component: str
    module: str
    limit: float
    largest: float
    changed: int


class MergedLora(NamedTuple):
    """What `merge_loras` made.

    Attributes:
        lora: The adapter, for `save_lora` and `LoraFile.load_into`.
        capped: The layers that ``cap`` changed.
    """

    lora: LoraFile
    capped: tuple[CappedLayer, ...]


def merge_loras(
    adapters: Sequence[LoraFile | str | os.PathLike[str]],
    scales: Sequence[float] | None = None,
    *,
    cap: float | None = None,
) -> MergedLora:
    r"""Several adapters as one, exact: its update of a layer is the sum of theirs.

    .. math::
        \Delta W = \sum_i w_i s_i B_i A_i
          = \begin{pmatrix} w_1 s_1 B_1 & w_2 s_2 B_2 & \cdots \end{pmatrix}
            \begin{pmatrix} A_1 \\ A_2 \\ \vdots \end{pmatrix}

    with s the scale that the file gives the layer (alpha / r, with rsLoRA alpha / sqrt(r)). Ranks add up; alpha is the
    rank, so that the merged scale is 1. A single adapter is one with its scale folded in.

    Args:
        adapters: Files or folders that `load_lora` reads, or what it returned.
        scales: w, a finite number for each adapter, as ``set_adapters`` of diffusers takes it; 1 if None.
        cap: Limits the singular values of each layer's sum to this many times the largest one that an adapter has
            there alone, at its scale: 1 keeps adapters that pull in one direction from adding up. None limits nothing.

    Returns:
        The adapter, with float32 tensors, and which layers were capped.

    Raises:
        InvalidValueError: An argument is outside its domain.
        AdapterError: A file is damaged or no LoRA, the adapters are for different models, or one is a DoRA, whose
            updates do not add up.
        OSError: A file cannot be read.
    """
    expected = "a list of adapters, each a path or a LoraFile"
    kinds = (LoraFile, str, os.PathLike)
    check("merge_loras", "adapters", adapters, expected, lambda it: not isinstance(it, kinds) and len(it))
    for each in adapters:
        check("merge_loras", "adapters", each, expected, lambda it: isinstance(it, kinds))
    if cap is not None:
        check("merge_loras", "cap", cap, "a finite number > 0 or None", lambda it: 0 < it < math.inf)
    loras = [each if isinstance(each, LoraFile) else load_lora(each) for each in adapters]
    with refusing("merge_loras", "scales", "a number for each adapter, or None", scales):
        weights = [1.0] * len(loras) if scales is None else [float(scale) for scale in scales]
    if len(weights) != len(loras) or not all(map(math.isfinite, weights)):
        raise InvalidValueError(
            f"merge_loras: `scales` must be {len(loras)} finite numbers, one for each adapter, got {weights}"
        )
    families = sorted({lora.family for lora in loras if lora.family is not None})
    if len(families) > 1:
        raise AdapterError(f"merge_loras: expected adapters for one model, got {' and '.join(families)}")
    parts: dict[tuple[str, str], list[tuple[float, bool, Layer]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for layer in layers_of(lora):
            rslora = bool(lora.configs.get(layer.component, {}).get("use_rslora"))
            # CLIP's `text_model.` is in some files.
            name = layer.module.removeprefix("text_model.")
            parts.setdefault((layer.component, name), []).append((weight, rslora, layer))
    layers, capped = [], []
    for same in parts.values():
        layer, limited = _merged(same, cap)
        layers.append(layer)
        capped += [] if limited is None else [limited]
    if any(layer.bias is not None for layer in layers):
        # A LoraConfig has biases for all layers or for none.
        layers = [
            layer if layer.bias is not None else layer._replace(bias=torch.zeros(layer.lora_B.shape[0]))
            for layer in layers
        ]
    origins = [{"scale": weight, **lora.metadata} for lora, weight in zip(loras, weights, strict=True)]
    lora = assembled(layers, {}, {"merged": origins}, {}, "diffusers", next(iter(families), None))
    return MergedLora(lora, tuple(capped))


def _merged(parts: Sequence[tuple[float, bool, Layer]], cap: float | None) -> tuple[Layer, CappedLayer | None]:
    """One layer of several adapters."""
    first = parts[0][2]
    for _, _, layer in parts:
        if layer.magnitude is not None:
            raise AdapterError(f"merge_loras: expected LoRA, got a DoRA at {layer.module}: its updates do not add up")
        shapes = [(each.lora_A.shape[1:], each.lora_B.shape[:1]) for each in (first, layer)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"merge_loras: expected adapters for one model, got {layer.module} with A {list(first.lora_A.shape)}, "
                f"B {list(first.lora_B.shape)} and with A {list(layer.lora_A.shape)}, B {list(layer.lora_B.shape)}"
            )
    alone = [factors(layer, rslora=rslora, strength=weight) for weight, rslora, layer in parts]
    update, limited = joined(alone), None
    if cap is not None:
        update, limited = _limited(update, alone, cap, first)
    rank = update.A.shape[0]
    biases = [
        weight * layer.scale(rslora) * layer.bias.double() for weight, rslora, layer in parts if layer.bias is not None
    ]
    return (
        first._replace(
            lora_A=update.A.float().reshape(rank, *first.lora_A.shape[1:]).contiguous(),
            lora_B=update.B.float().reshape(-1, rank, *first.lora_B.shape[2:]).contiguous(),
            bias=torch.stack(biases).sum(0).float() if biases else None,
            alpha=float(rank),
        ),
        limited,
    )


def _limited(
    update: Factors, alone: Sequence[Factors], cap: float, layer: Layer
) -> tuple[Factors, CappedLayer | None]:
    limit = cap * max(float(singular_values(part)[0]) for part in alone)
    u, s, vh = decomposition(update)
    changed = int((s > limit).sum())
    if not changed:
        return update, None
    root = s.clamp(max=limit).sqrt()
    capped = CappedLayer(layer.component, layer.module, limit, float(s.max()), changed)
    return Factors(u * root, root[:, None] * vh), capped
