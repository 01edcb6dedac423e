"""PEFT's LoRA layers with a fused forward and backward, and an adapter switch that costs nothing per layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from cat_rs.arguments import check_module
from cat_rs.dtypes import compute_dtype
from cat_rs.errors import AdapterError
from cat_rs.frozen_layers import FrozenConv2d, FrozenLinear, patch_frozen, unpatch_frozen
from cat_rs.ops.frozen_linear import frozen_linear
from cat_rs.ops.lora_linear import LoraLinearFunction, WeightCopyFunction, lora_linear
from cat_rs.ops.lora_up import LoraUpFunction, lora_up_
from cat_rs.ops.operator import KERNEL_DEVICES, LOW_PRECISION, rounded
from cat_rs.unwrap import unwrap_model

if TYPE_CHECKING:
    from cat_rs.step.optimizer import FlatAdamW

__all__ = [
    "PatchReport",
    "adapter_disabled",
    "base_parameters",
    "has_adapter",
    "layer_changes",
    "lower_dtype",
    "patch_peft",
    "unpatch_peft",
    "update_norm",
    "use_copies_of",
]


# Layers with an adapter, and whole modules that are trained as a copy (modules_to_save).
ADAPTER_MODULES = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class PatchReport(NamedTuple):
    """What :func:`patch_peft` did.

    Attributes:
        fused: Names of the layers that run the fused forward and backward.
        kept: Name to reason of the adapter layers that keep PEFT's own.
        convolutions: Names of the frozen convolutions that run as a matrix product on small inputs.
        linear: Names of the frozen linear layers, with an adapter or without, that run products of this package's own.
    """

    fused: list[str]
    kept: dict[str, str]
    convolutions: list[str]
    linear: list[str]


@dataclass
class AdapterSwitch:
    """Shared by all patched layers of a model: turning the adapter off touches this one flag."""

    enabled: bool = True
    # Adapter modules that do not know the switch; these have PEFT's own flag set one by one.
    others: list[Any] = field(default_factory=list)
    # The flags of `others` before the adapter was turned off.
    flags: list[bool] = field(default_factory=list)
    # Blocks that may checkpoint their activations.
    checkpointing: list[Any] = field(default_factory=list)
    # The adapters the model had when it was patched: another one may have brought layers.
    adapters: frozenset[str] = frozenset()
    # Keeps low-precision copies of the model's weights.
    optimizer: weakref.ref[FlatAdamW] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The weights of a copied or loaded model are not the optimizer's.
        return {**vars(self), "optimizer": None}

    def turn(self, enabled: bool) -> None:
        """Turns the adapter on or off."""
        if enabled == self.enabled:
            return
        self.enabled = enabled
        if not enabled:
            # PEFT's own switch would also change requires_grad; the flag alone is what its forward reads.
            self.flags = [layer._disable_adapters for layer in self.others]
        for layer, flag in zip(self.others, self.flags, strict=True):
            layer._disable_adapters = flag if enabled else True

    @contextmanager
    def turned(self, enabled: bool) -> Iterator[None]:
        """The adapter on or off within the context."""
        before = self.enabled
        self.turn(enabled)
        try:
            yield
        finally:
            self.turn(before)

    def follow_checkpointing(self) -> None:
        """Makes checkpointed blocks remember the switch; blocks are told to checkpoint at any time."""
        for block in self.checkpointing:
            function = getattr(block, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, _CheckpointWithSwitch):
                block._gradient_checkpointing_func = _CheckpointWithSwitch(function, self)


@dataclass
class _CheckpointWithSwitch:
    """A checkpoint function whose recomputation sees the switch as the first computation did."""

    checkpoint: Callable[..., Any]
    switch: AdapterSwitch

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_WithSwitch(function, self.switch, self.switch.enabled), *args, **kwargs)


@dataclass
class _WithSwitch:
    function: Callable[..., Any]
    switch: AdapterSwitch
    enabled: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.switch.turned(self.enabled):
            return self.function(*args, **kwargs)


class _SwitchedLayer:
    """A PEFT layer that reads the model's switch; a layer becomes one by assignment of ``__class__``."""

    # Without slots, and behind PEFT's class among the bases, it leaves the memory layout as it was, which that
    # assignment asks for.
    __slots__ = ()
    _cat_rs_switch: AdapterSwitch
    _modules: dict[str, Any]
    active_adapters: list[str]
    scaling: dict[str, Any]
    merged: bool
    _disable_adapters: bool

    # Without these torch.nn.Module finds its parts in an exception handler, and a call would take a third longer.
    base_layer = property(lambda self: self._modules["base_layer"])
    lora_A = property(lambda self: self._modules["lora_A"])
    lora_B = property(lambda self: self._modules["lora_B"])
    lora_dropout = property(lambda self: self._modules["lora_dropout"])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._cat_rs_switch.enabled:
            if self.merged:
                raise AdapterError(
                    "adapter_disabled: the adapter must not be merged, got merged weights: unmerge first"
                )
            own = {key: value for key, value in kwargs.items() if key not in _LAYER_ARGUMENTS}
            return self.base_layer(x, *args, **own)
        if not (args or kwargs or self._disable_adapters or self.merged):
            y = self._fused(x)
            if y is not None:
                return y
        return _PEFT_CLASSES[type(self)].forward(self, x, *args, **kwargs)

    def _get_name(self) -> str:
        """The name in ``print(model)``."""
        return _PEFT_CLASSES[type(self)].__name__

    def _fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output, or None where it is asked for something that is not fused."""
        return None

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _compute_dtype(self, x: torch.Tensor, adapters: list[str]) -> torch.dtype | None:
        """The dtype in which the layer computes; None where PEFT converts on the way, or another device does."""
        if x.device.type not in KERNEL_DEVICES or not (type(x) in _PLAIN_TENSORS or torch.compiler.is_compiling()):
            return None
        return self._common_dtype(x.dtype, adapters)

    def _common_dtype(self, dtype: torch.dtype, adapters: list[str]) -> torch.dtype | None:
        """The dtype in which the layer computes on an input of this dtype."""
        weight, lora_A = self.base_layer.weight, self.lora_A
        base, own = weight.dtype, {lora_A[name].weight.dtype for name in adapters}
        device = weight.device.type
        # Weights that are offloaded until a hook of their own layer fetches them are on no device.
        if device not in KERNEL_DEVICES or any(lora_A[name].weight.device != weight.device for name in adapters):
            return None
        if torch.is_autocast_enabled(device):
            autocast = torch.get_autocast_dtype(device)
            return autocast if {dtype, base, *own} <= {torch.float32, autocast} else None
        # Float32 weights of an adapter beside a lower dtype are rounded to it.
        allowed = {dtype, torch.float32} if dtype in LOW_PRECISION else {dtype}
        return dtype if base == dtype and own <= allowed else None

    def _copy_of(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The optimizer's copy of a weight in this lower dtype, where there is one."""
        # No version tells of what was written through .data, as averages of weights are for validation. Those run
        # without gradients, the optimizer's steps do not.
        if weight.dtype == dtype or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        reference = self._cat_rs_switch.optimizer
        optimizer = None if reference is None else reference()
        copy = None if optimizer is None else optimizer.low_precision_copy(weight)
        return copy if copy is not None and copy.dtype == dtype else None

    def _down(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The down projection of one adapter."""
        lora_A, x = self.lora_A[name], self.lora_dropout[name](x)
        weight = lora_A.weight
        if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return lora_A(x)
        copy = self._copy_of(weight, x.dtype)
        weight = rounded(weight, x.dtype) if copy is None else WeightCopyFunction.apply(weight, copy)
        if isinstance(lora_A, torch.nn.Conv2d):
            return lora_A._conv_forward(x, weight, None)
        return torch.nn.functional.linear(x, weight)

    def _up(self, y: torch.Tensor, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """Adds the up projection of one adapter onto the layer's output, in place."""
        weight, convolution = self.lora_B[name].weight, isinstance(self, FusedConv2d)
        copy = self._copy_of(weight, y.dtype)
        lora_B = weight.flatten(1)
        if copy is None:
            return lora_up_(y, hidden, lora_B, self.scaling[name], channels_second=convolution)
        scaling = float(self.scaling[name])
        return LoraUpFunction.apply(y, hidden, lora_B, scaling, convolution, copy.flatten(1))

    def _bias(self, adapters: list[str], dtype: torch.dtype) -> torch.Tensor | None:
        """The sum of the layer's bias and those of the adapters."""
        bias = self.base_layer.bias
        for name in adapters:
            own = self.lora_B[name].bias
            if own is not None:
                own = self.scaling[name] * own
                bias = own if bias is None else bias + own
        return None if bias is None else _as(bias, dtype)


class FusedLinear(lora.Linear, _SwitchedLayer):
    """A PEFT LoRA layer over torch.nn.Linear."""

    forward = _SwitchedLayer.forward
    _get_name = _SwitchedLayer._get_name

    def _fused(self, x: torch.Tensor) -> torch.Tensor | None:
        adapters, base = self._active(), self.base_layer
        dtype = self._compute_dtype(x, adapters)
        if dtype is None or _why_not_fused(self, adapters) or base.weight.requires_grad:
            return None
        x, weight, bias = _as(x, dtype), _as(base.weight, dtype), self._bias(adapters, dtype)
        if len(adapters) == 1 and not _drops(self.lora_dropout[adapters[0]]):
            (name,) = adapters
            lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
            low_A, low_B = self._copy_of(lora_A, dtype), self._copy_of(lora_B, dtype)
            if low_A is None or low_B is None:
                return lora_linear(x, weight, bias, lora_A, lora_B, self.scaling[name])
            scaling = float(self.scaling[name])
            return LoraLinearFunction.apply(x, weight, bias, lora_A, lora_B, scaling, (low_A, low_B))
        y = frozen_linear(x, weight, bias)
        for name in adapters:
            y = self._up(y, self._down(x, name), name)
        return y


class FusedConv2d(lora.Conv2d, _SwitchedLayer):
    """A PEFT LoRA layer over torch.nn.Conv2d: the up projection is added onto the convolution's output in place."""

    forward = _SwitchedLayer.forward
    _get_name = _SwitchedLayer._get_name

    def _fused(self, x: torch.Tensor) -> torch.Tensor | None:
        adapters, base = self._active(), self.base_layer
        dtype = self._compute_dtype(x, adapters)
        if dtype is None or x.dim() != 4 or _why_not_fused(self, adapters):
            return None
        if any(self.lora_B[name].bias is not None for name in adapters):
            y = base._conv_forward(x.to(dtype), base.weight.to(dtype), self._bias(adapters, dtype))
        else:
            y = base(x)
            if isinstance(base, FrozenConv2d) and base.runs_as_product(x):
                # Its output is a view of a matrix, which autograd lets nobody write to.
                y = y.clone()
        for name in adapters:
            y = self._up(y, self._down(x, name), name)
        return y


class SwitchedConv1d(lora.Conv1d, _SwitchedLayer):
    """PEFT's own forward behind the switch."""

    forward = _SwitchedLayer.forward
    _get_name = _SwitchedLayer._get_name


class SwitchedConv3d(lora.Conv3d, _SwitchedLayer):
    """PEFT's own forward behind the switch."""

    forward = _SwitchedLayer.forward
    _get_name = _SwitchedLayer._get_name


class SwitchedEmbedding(lora.Embedding, _SwitchedLayer):
    """PEFT's own forward behind the switch."""

    forward = _SwitchedLayer.forward
    _get_name = _SwitchedLayer._get_name


_PATCHED_CLASSES: dict[type[Any], type[Any]] = {
    lora.Linear: FusedLinear,
    lora.Conv2d: FusedConv2d,
    lora.Conv1d: SwitchedConv1d,
    lora.Conv3d: SwitchedConv3d,
    lora.Embedding: SwitchedEmbedding,
}
_PEFT_CLASSES: dict[type[Any], type[Any]] = {patched: own for own, patched in _PATCHED_CLASSES.items()}
# What PEFT's forward takes for itself, beside the base layer's arguments.
_LAYER_ARGUMENTS = ("adapter_names", *lora.VARIANT_KWARG_KEYS)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, which takes longer to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _drops(dropout: torch.nn.Module) -> bool:
    return dropout.training and not isinstance(dropout, torch.nn.Identity)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether calling the module does nothing but its class's forward: no hooks, no offloading."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _why_not_fused(layer: _SwitchedLayer, adapters: list[str]) -> str | None:
    """What of the layer and of these adapters of its is not fused, whatever the input."""
    if not isinstance(layer, FusedLinear | FusedConv2d):
        return f"{type(layer).__name__.removeprefix('Switched')} layers are not fused"
    base = layer.base_layer
    linear = isinstance(layer, FusedLinear)
    if not (type(base) in (torch.nn.Linear, FrozenLinear) if linear else isinstance(base, torch.nn.Conv2d)):
        return f"the base layer is a {type(base).__name__}, not a plain torch.nn.{'Linear' if linear else 'Conv2d'}"
    if layer.fan_in_fan_out if linear else base.groups != 1:
        return "its weight is stored transposed (fan_in_fan_out)" if linear else "the convolution has groups"
    if not _is_plain(base):
        return "the base layer has hooks"
    if not adapters:
        return "no adapter is active"
    for name in adapters:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__.removesuffix('Variant')}"
        parts = (layer.lora_B[name], layer.lora_A[name], layer.lora_dropout[name])
        if not all(_is_plain(part) for part in parts):
            return f"adapter {name!r} has hooks"
        if not isinstance(layer.scaling[name], int | float):
            return f"the scaling of adapter {name!r} is a {type(layer.scaling[name]).__name__}"
    return None


def _why_left_to_peft(layer: _SwitchedLayer, adapters: list[str]) -> str | None:
    """What of the device and the dtypes of the layer and of these adapters of its leaves it to PEFT."""
    weight = layer.base_layer.weight
    if weight.device.type not in (*KERNEL_DEVICES, "meta"):
        return f"there are no kernels for {weight.device.type} here, as cat-rs info says"
    base = weight.dtype
    for name in adapters:
        if layer._common_dtype(base, [name]) is None:
            if weight.is_meta:
                return "its weights are offloaded"
            own, other = (str(dtype).removeprefix("torch.") for dtype in (layer.lora_A[name].weight.dtype, base))
            return f"adapter {name!r} is in {own}, the base layer in {other}"
    return None


def _adapter_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, ADAPTER_MODULES):
            yield name, module


def _adapter_names(model: torch.nn.Module) -> frozenset[str]:
    return frozenset(getattr(model, "peft_config", ()))


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether the model has PEFT adapter layers."""
    return any(True for _ in _adapter_modules(model))


def _lora_branches(model: torch.nn.Module) -> Iterator[tuple[Any, Any, Any, float]]:
    """Layer, A, B and scaling of each active LoRA adapter over a linear layer or a convolution."""
    for _, layer in _adapter_modules(model):
        for name in getattr(layer, "active_adapters", ()):
            if name in getattr(layer, "lora_A", ()):
                yield layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name]


def update_norm(models: Iterable[torch.nn.Module]) -> torch.Tensor:
    """The squared norm of what LoRA adapters add to the weights, sum ||s B A||_F^2; autograd reaches A and B.

    ||s B A||_F^2 = s^2 tr(B^T B A A^T), from products of r x r elements.

    Raises:
        AdapterError: The models have no LoRA layers.
    """
    norms = []
    for _, down, up, scaling in (branch for model in models for branch in _lora_branches(model)):
        A, B = (part.weight.to(compute_dtype(part.weight)).flatten(1) for part in (down, up))
        norms.append(scaling**2 * ((B.T @ B) * (A @ A.T)).sum())
    if not norms:
        raise AdapterError("CatStep: `model` must have LoRA layers for this preservation, got none")
    return torch.stack(norms).sum()


@contextmanager
def layer_changes(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what the adapter would change in each layer that is called with the adapter off.

    Of each call, mean (s B A x)^2 / mean (W x + b)^2 over the elements; autograd reaches A and B alone. There is no
    dropout.

    Raises:
        AdapterError: The model has no LoRA layers.
    """
    branches: dict[Any, list[tuple[Any, Any, float]]] = {}
    for layer, down, up, scaling in _lora_branches(model):
        branches.setdefault(layer, []).append((down, up, scaling))
    if not branches:
        raise AdapterError("CatStep: `model` must have LoRA layers for this preservation, got none")
    changes: list[torch.Tensor] = []

    def collect(layer: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        with torch.enable_grad():
            x = given[0].detach()
            parts = [scaling * up(down(x.to(down.weight.dtype))) for down, up, scaling in branches[layer]]
            change = torch.stack(parts).sum(0)
            dtype = compute_dtype(change)
            changes.append(change.to(dtype).square().mean() / output.to(dtype).square().mean())

    hooks = [layer.register_forward_hook(collect) for layer in branches]
    try:
        yield changes
    finally:
        for hook in hooks:
            hook.remove()


def base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's parameters under the names that they have without an adapter."""
    yield from _base_parameters(unwrap_model(model, peft=True), "")


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
    """Gives the model's PEFT LoRA layers a fused forward and backward, and a switch common to all.

    Fused are layers over torch.nn.Linear and torch.nn.Conv2d, with any number of active adapters, dropout, biases in
    B and trained biases, in float32, float64, bfloat16 and float16, and under autocast. Parameters, names and the
    state dict are unchanged, and so are results up to rounding. A float32 adapter over a base layer in bfloat16 or
    float16 computes in the base layer's dtype, where PEFT converts the input to float32; its gradients are float32
    (see :func:`cat_rs.lora_linear`). PEFT's own forward runs, call by call, where a layer is asked for something else:
    merged weights, DoRA and other variants, an adapter for each sample, an adapter in another dtype than these, a
    layer with hooks, grouped convolutions, devices without kernels of this package (the CPU and NVIDIA GPUs have
    them). Calling it again picks up layers added since.

    The model's frozen linear layers, with an adapter or without, run this package's float32 products on processors
    where PyTorch's are slower, and its large frozen convolutions run as one matrix product where their input is small:
    see :mod:`cat_rs.frozen_layers`.

    Args:
        model: A model with PEFT LoRA layers, e.g. after ``model.add_adapter(LoraConfig(...))``.

    Returns:
        Which layers are fused in their present state, and why the others are not.

    Raises:
        AdapterError: The model has no adapter layers, or its adapter is disabled at the moment.
    """
    check_module("patch_peft", "model", model)
    layers = dict(_adapter_modules(model))
    if not layers:
        raise AdapterError(
            "patch_peft: `model` must have PEFT adapter layers (model.add_adapter(LoraConfig(...))), got none"
        )
    patched = (layer._cat_rs_switch for layer in layers.values() if isinstance(layer, _SwitchedLayer))
    switch = next(patched, None) or AdapterSwitch()
    if not switch.enabled:
        raise AdapterError("patch_peft: `model` must have its adapter on, got one within adapter_disabled")
    switch.others.clear()
    switch.adapters = _adapter_names(model)
    switch.checkpointing = [block for block in model.modules() if hasattr(block, "gradient_checkpointing")]
    switch.follow_checkpointing()
    frozen = patch_frozen(model)
    report = PatchReport([], {}, frozen.convolutions, frozen.linear)
    for name, layer in layers.items():
        if type(layer) in _PATCHED_CLASSES:
            layer.__class__ = _PATCHED_CLASSES[type(layer)]
        if type(layer) not in _PEFT_CLASSES:
            switch.others.append(layer)
            report.kept[name] = f"{type(layer).__name__} layers are not fused"
            continue
        layer._cat_rs_switch = switch
        adapters = layer._active()
        reason = _why_not_fused(layer, adapters) or _why_left_to_peft(layer, adapters)
        if reason is None:
            report.fused.append(name)
        else:
            report.kept[name] = reason
    return report


def lower_dtype(models: Iterable[torch.nn.Module]) -> torch.dtype | None:
    """The dtype below float32 in which the fused layers of patched models compute with float32 adapters.

    Args:
        models: Patched models.

    Returns:
        The dtype; None where no layer does so, or where several dtypes are in use.
    """
    dtypes = set()
    for _, layer in (found for model in models for found in _adapter_modules(model)):
        if isinstance(layer, _SwitchedLayer) and _why_not_fused(layer, adapters := layer._active()) is None:
            base = layer.base_layer.weight.dtype
            if base in LOW_PRECISION and any(layer.lora_A[name].weight.dtype == torch.float32 for name in adapters):
                dtypes.add(base)
    return dtypes.pop() if len(dtypes) == 1 else None


def use_copies_of(optimizer: FlatAdamW, model: torch.nn.Module) -> None:
    """Lets the layers of a patched model compute with the low-precision copies of its weights that an optimizer keeps.

    A layer whose weight has no copy that is up to date rounds the weight in every call, and so does every layer where
    gradients are off.
    """
    for _, layer in _adapter_modules(model):
        if isinstance(layer, _SwitchedLayer):
            layer._cat_rs_switch.optimizer = weakref.ref(optimizer)
            return


def unpatch_peft(model: torch.nn.Module) -> None:
    """Gives patched layers PEFT's own forward back, and frozen layers PyTorch's."""
    check_module("unpatch_peft", "model", model)
    unpatch_frozen(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _CheckpointWithSwitch):
            module._gradient_checkpointing_func = function.checkpoint
        if isinstance(module, _SwitchedLayer):
            module.__class__ = _PEFT_CLASSES[type(module)]
            del module._cat_rs_switch


def _find_switch(model: torch.nn.Module) -> AdapterSwitch:
    """The model's switch; for a model that is not patched, one that lists all adapter layers."""
    others = []
    for _, layer in _adapter_modules(model):
        if isinstance(layer, _SwitchedLayer):
            switch = layer._cat_rs_switch
            if switch.adapters != _adapter_names(model) and hasattr(model, "peft_config"):
                patch_peft(model)
            switch.follow_checkpointing()
            return switch
        others.append(layer)
    return AdapterSwitch(others=others)


@contextmanager
def adapter_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Within the context the model computes what the base model computes.

    For a patched model this is one flag for all LoRA layers: no tensor work and no loop over layers. ``requires_grad``
    flags stay as they are, nesting works, and the state comes back when the body raises. Blocks of diffusers and
    transformers models that checkpoint their activations are recomputed with the adapter as it was when they ran, in
    whatever state the backward pass finds it.

    Args:
        model: A model with PEFT adapter layers; a model without any is its own base model, and nothing changes.
    """
    check_module("adapter_disabled", "model", model)
    with _find_switch(model).turned(False):
        yield
