"""The PEFT adapters that a step trains: the denoiser's and those of text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from cat_rs.arguments import check, check_module
from cat_rs.errors import AdapterError, DtypeError, InvalidValueError
from cat_rs.step import collectives
from cat_rs.step.optimizer import FlatAdamW
from cat_rs.unwrap import unwrap_model

__all__ = ["Adapters"]


class Adapters:
    """A denoiser and text encoders whose PEFT adapters train together.

    Attributes:
        model, text_encoders: Without DistributedDataParallel, whose own reduction must not run.
        parameters: Those that train; names of a text encoder's begin with ``text_encoders[0].`` and so on.

    Raises:
        AdapterError, InvalidValueError: A module has no adapter that can train, or is given twice.
    """

    def __init__(self, model: torch.nn.Module, text_encoders: Sequence[torch.nn.Module]) -> None:
        check_module("CatStep", "model", model)
        check("CatStep", "text_encoders", text_encoders, "a sequence of modules", lambda modules: len(modules) >= 0)
        for index, encoder in enumerate(text_encoders):
            check_module("CatStep", f"text_encoders[{index}]", encoder)
        self.model = unwrap_model(model, ddp_only=True)
        self.text_encoders = tuple(unwrap_model(encoder, ddp_only=True) for encoder in text_encoders)
        self._modules = (self.model, *self.text_encoders)
        self.parameters = _adapter_parameters("model", self.model)
        for index, encoder in enumerate(self.text_encoders):
            argument = f"text_encoders[{index}]"
            if any(encoder is other for other in self._modules[: index + 1]):
                raise InvalidValueError(f"CatStep: `{argument}` must be another module, got one that was given before")
            for name, param in _adapter_parameters(argument, encoder).items():
                self.parameters[f"{argument}.{name}"] = param

    def check_no_float16(self) -> None:
        """Refuses parameters whose gradients a GradScaler does not unscale."""
        for name, param in self.parameters.items():
            if param.dtype == torch.float16:
                raise DtypeError(
                    "CatStep: `model` must have its adapter in float32 with a grad_scaler, which unscales no float16 "
                    f"gradient, got {name} in float16: diffusers.training_utils.cast_training_params(model)"
                )

    def make_optimizer(self, *arguments: Any, **options: Any) -> FlatAdamW:
        """Patches the modules; returns their parameters' FlatAdamW, whose low-precision copies their layers use."""
        from cat_rs import peft

        for module in self._modules:
            peft.patch_peft(module)
        low_precision = peft.lower_dtype(self._modules)
        optimizer = FlatAdamW(self.parameters.values(), *arguments, **options, low_precision=low_precision)
        self.use_copies_of(optimizer)
        return optimizer

    def use_copies_of(self, optimizer: FlatAdamW) -> None:
        """Lets the layers compute with the optimizer's low-precision copies of their weights."""
        from cat_rs import peft

        for module in self._modules:
            peft.use_copies_of(optimizer, module)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context all modules compute what their base models compute."""
        from cat_rs.peft import adapter_disabled

        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(adapter_disabled(module))
            yield

    def update_norm(self) -> torch.Tensor:
        """sum ||s B A||_F^2 over the layers of all modules."""
        from cat_rs.peft import update_norm

        return update_norm(self._modules)

    def layer_changes(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Within the context, collects what the adapter would change in each layer of the model that runs."""
        from cat_rs.peft import layer_changes

        return layer_changes(self.model)

    @torch.no_grad()
    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Copies saved parameters into those of the same names; raises AdapterError where names or shapes differ."""
        saved = {_plain_name(name): tensor for name, tensor in saved.items()}
        shapes, saved_shapes = (
            {name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (self.parameters, saved)
        )
        if shapes != saved_shapes:
            names = sorted(name for name in shapes | saved_shapes if shapes.get(name) != saved_shapes.get(name))
            raise AdapterError(
                f"CatStep: `state_dict` must be of this adapter, got other parameters: {len(names)} differ, e.g. "
                f"{names[0]}: {shapes.get(names[0])} here, {saved_shapes.get(names[0])} there"
            )
        for name, param in self.parameters.items():
            param.copy_(saved[name])


def _plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts into it, so that states fit compiled models and others."""
    return name.replace("_orig_mod.", "")


def _adapter_parameters(argument: str, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    # PEFT is imported only where a model with its layers is trained.
    from cat_rs.peft import has_adapter

    if not has_adapter(model):
        raise AdapterError(
            f"CatStep: `{argument}` must have PEFT adapter layers (model.add_adapter(LoraConfig(...))), got none"
        )
    trainable = {_plain_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise AdapterError(f"CatStep: `{argument}` must have trainable adapter parameters, got all of them frozen")
    for name, param in trainable.items():
        sharding = collectives.sharding_of(param)
        if sharding is not None:
            raise AdapterError(
                f"CatStep: `{argument}` must have its trainable parameters whole on every rank, got {name}: "
                f"{sharding}; shard only the frozen base: fully_shard(model, ignored_params=...) or "
                f"FullyShardedDataParallel(model, ignored_states=...), with the adapter's parameters"
            )
    return trainable
