"""PEFT's LoRA layers with a fused forward and backward, and an adapter switch that costs nothing per layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from cat_rs.errors import AdapterError
from cat_rs.functional import lora_linear

__all__ = ["PatchReport", "adapter_disabled", "base_parameters", "has_adapter", "patch_peft", "unpatch_peft"]


# Layers with an adapter, and whole modules that are trained as a copy (modules_to_save).
ADAPTER_MODULES = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class PatchReport(NamedTuple):
    """What :func:`patch_peft` did.

    Attributes:
        fused: Names of the layers that run the fused forward and backward.
        kept: Name to reason of the adapter layers that keep PEFT's own.
    """

    fused: list[str]
    kept: dict[str, str]


@dataclass
class _Switch:
    """Shared by all fused layers of a model: turning the adapter off touches this one flag."""

    enabled: bool = True
    # Adapter modules without a fused forward; these have PEFT's own flag set one by one.
    kept: list[Any] = field(default_factory=list)
    # The adapters the model had when it was patched: another one may have brought layers.
    adapters: frozenset[str] = frozenset()


class FusedLinear(PeftLinear):
    """A PEFT LoRA layer over torch.nn.Linear; becomes one by assignment of ``__class__``, so state is unchanged."""

    _cat_rs_switch: _Switch

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._cat_rs_switch.enabled:
            if self.merged:
                raise AdapterError(
                    "adapter_disabled: the adapter must not be merged, got merged weights: unmerge first"
                )
            return self.base_layer(x, *args, **kwargs)
        adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if adapter is None or args or kwargs or not self._fusable(x, adapter):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return lora_linear(
            x,
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
        )

    def _fusable(self, x: torch.Tensor, adapter: str) -> bool:
        """Whether the layer's state is one that the fused kernel computes: else PEFT's own forward runs."""
        if adapter not in self.lora_A or adapter in self.lora_variant or self._disable_adapters or self.merged:
            return False
        weight, bias, lora_A = self.base_layer.weight, self.base_layer.bias, self.lora_A[adapter].weight
        dropout = self.lora_dropout[adapter]
        return (
            x.device.type == "cpu"
            and x.dtype == weight.dtype == lora_A.dtype
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and self.lora_B[adapter].bias is None
            and (not dropout.training or isinstance(dropout, torch.nn.Identity))
            and not torch.is_autocast_enabled("cpu")
        )


def _adapter_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, ADAPTER_MODULES):
            yield name, module


def _adapter_names(model: torch.nn.Module) -> frozenset[str]:
    return frozenset(getattr(model, "peft_config", ()))


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether the model has PEFT adapter layers."""
    return any(True for _ in _adapter_modules(model))


def base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's parameters under the names that they have without an adapter."""
    unwrap: Any = getattr(model, "get_base_model", None)
    yield from _base_parameters(unwrap() if unwrap else model, "")


def _base_parameters(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    for name, param in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", param
    for name, child in module.named_children():
        yield from _base_parameters(child, f"{prefix}{name}.")


def patch_peft(model: torch.nn.Module) -> PatchReport:
    """Gives the model's PEFT LoRA layers over torch.nn.Linear the fused forward and backward of ``lora_linear``.

    Parameters, names and the state dict are unchanged, and so are results up to rounding. A fused layer falls back
    to PEFT's own forward, call by call, where it is asked for what is not fused: several active adapters, merged
    weights, dropout, DoRA and other variants, a bias in B, mixed dtypes, autocast, devices other than the CPU.
    Calling it again picks up layers added since.

    Args:
        model: A model with PEFT LoRA layers, e.g. after ``model.add_adapter(LoraConfig(...))``.

    Returns:
        Which layers are fused, and why the others are not.

    Raises:
        AdapterError: The model has no adapter layers.
    """
    layers = dict(_adapter_modules(model))
    if not layers:
        raise AdapterError(
            "patch_peft: `model` must have PEFT adapter layers (model.add_adapter(LoraConfig(...))), got none"
        )
    switch = next((layer._cat_rs_switch for layer in layers.values() if isinstance(layer, FusedLinear)), _Switch())
    report = PatchReport([], {})
    switch.kept.clear()
    switch.adapters = _adapter_names(model)
    for name, layer in layers.items():
        if not isinstance(layer, PeftLinear) or type(layer) not in (PeftLinear, FusedLinear):
            report.kept[name] = f"{type(layer).__name__} layers are not fused"
        elif type(layer.get_base_layer()) is not torch.nn.Linear or layer.fan_in_fan_out:
            base = type(layer.get_base_layer()).__name__
            report.kept[name] = f"the base layer is a {base}, not a plain torch.nn.Linear"
        else:
            layer.__class__ = FusedLinear
            layer._cat_rs_switch = switch
            report.fused.append(name)
            continue
        switch.kept.append(layer)
    return report


def unpatch_peft(model: torch.nn.Module) -> None:
    """Gives fused layers PEFT's own forward back."""
    for _, layer in _adapter_modules(model):
        if isinstance(layer, FusedLinear):
            layer.__class__ = PeftLinear
            del layer._cat_rs_switch


def _find_switch(model: torch.nn.Module) -> _Switch:
    """The model's switch; for a model that is not patched, one that lists all adapter layers."""
    kept = []
    for _, layer in _adapter_modules(model):
        if isinstance(layer, FusedLinear):
            switch = layer._cat_rs_switch
            if switch.adapters != _adapter_names(model) and hasattr(model, "peft_config"):
                patch_peft(model)
            return switch
        kept.append(layer)
    return _Switch(kept=kept)


@contextmanager
def adapter_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Within the context the model computes what the base model computes.

    For fused layers this is one flag for the whole model: no tensor work and no loop. ``requires_grad`` flags stay
    as they are, nesting works, and the state comes back when the body raises.

    Args:
        model: A model with PEFT adapter layers.
    """
    switch = _find_switch(model)
    # PEFT's own switch would also change requires_grad; the flag alone is what its forward reads.
    before = switch.enabled, [layer._disable_adapters for layer in switch.kept]
    switch.enabled = False
    for layer in switch.kept:
        layer._disable_adapters = True
    try:
        yield
    finally:
        switch.enabled = before[0]
        for layer, disabled in zip(switch.kept, before[1], strict=True):
            layer._disable_adapters = disabled
