"""The CAT training step: base prediction, doubled student batch, fused loss, flat AdamW."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cat_rs._native import _core
from cat_rs.convolution import patch_frozen_convolutions
from cat_rs.errors import AdapterError, DtypeError, InvalidValueError, ShapeError
from cat_rs.optim import FlatAdamW
from cat_rs.schedule import NoiseSchedule

if TYPE_CHECKING:
    from cat_rs.teacher_bank import TeacherBank

__all__ = ["CatStep", "StepMetrics"]

Cond = torch.Tensor | Mapping[str, Any]
Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor]


class StepMetrics(NamedTuple):
    """What a step measured, 0-dim tensors.

    Attributes:
        loss: diffusion + cat_factor * cat.
        diffusion: The diffusion term.
        cat: The preservation term, without its factor; 0 with cat_factor 0.
        grad_norm: The gradient's L2 norm before clipping; NaN on a step that only accumulates.
    """

    loss: torch.Tensor
    diffusion: torch.Tensor
    cat: torch.Tensor
    grad_norm: torch.Tensor


def _as_kwargs(name: str, cond: Cond) -> Mapping[str, Any]:
    if isinstance(cond, torch.Tensor):
        return {"encoder_hidden_states": cond}
    if isinstance(cond, Mapping):
        return cond
    raise InvalidValueError(
        f"CatStep: `{name}` must be a tensor (encoder_hidden_states) or a mapping of the model's keyword arguments, "
        f"got {type(cond).__name__}"
    )


def _join(name: str, first: Any, second: Any) -> Any:
    """Both conditions along the batch; what is not a tensor must be the same in both."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dim() == 0 or first.shape != second.shape:
            raise ShapeError(
                f"CatStep: `cond_no_trigger{name}` must have cond's shape {list(first.shape)} and a batch dimension, "
                f"got {list(second.shape)}"
            )
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            raise InvalidValueError(
                f"CatStep: `cond_no_trigger{name}` must have cond's keys {sorted(first)}, got {sorted(second)}"
            )
        return {key: _join(f"{name}[{key!r}]", first[key], second[key]) for key in first}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return type(first)([_join(f"{name}[{index}]", *pair) for index, pair in pairs])
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor) or first != second:
        raise InvalidValueError(f"CatStep: `cond_no_trigger{name}` must equal cond's {first!r}, got {second!r}")
    return first


def _denoiser_predict(model: torch.nn.Module) -> Predict:
    """How to call a diffusers denoiser: its first argument is the latent, and it takes ``timestep``."""
    unwrap: Callable[[], torch.nn.Module] | None = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap else model
    parameters = list(inspect.signature(inner.forward).parameters)
    if not parameters or "timestep" not in parameters:
        raise InvalidValueError(
            f"CatStep: `model` must take its latent first and have an argument 'timestep', got {type(inner).__name__} "
            f"with {parameters}: pass predict=lambda model, latents, timesteps, cond: ..."
        )
    latent_name = parameters[0]
    takes_return_dict = "return_dict" in parameters

    def predict(
        model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        options = {"return_dict": False} if takes_return_dict else {}
        output = model(**{latent_name: latents}, timestep=timesteps, **cond, **options)
        return output[0] if isinstance(output, tuple) else output

    return predict


class CatStep:
    """One training step of Contrastive Adapter Training (arXiv 2404.07554).

    A step draws noise and timesteps, writes noisy latents and target in one pass, predicts with the base model
    (the same modules with the adapter off) and, in one call at batch 2B, with the adapted model for the prompts with
    and without the trigger, evaluates the loss and its gradient in one pass, runs the model's backward and one
    :class:`FlatAdamW` step. Given noise and timesteps, the adapter equals that of the plain recipe (two model calls,
    ``F.mse_loss``, ``clip_grad_norm_``, ``AdamW``) up to float32 rounding.

    The model's PEFT LoRA layers get the fused forward of :func:`cat_rs.patch_peft`, its large frozen convolutions run
    as matrix products where the picture is small, and its trainable parameters become views of a flat buffer; names
    and state dict stay.

    Args:
        model: A diffusers denoiser with a PEFT adapter (``model.add_adapter(LoraConfig(...))``), on the CPU. What
            requires a gradient is trained.
        scheduler: The model's diffusers scheduler: one with ``alphas_cumprod`` or a flow-matching one.
        lr, betas, eps, weight_decay, max_grad_norm: Of :class:`FlatAdamW`.
        cat_factor: Weight of the preservation term; 0 trains plain LoRA, at its cost. May be set between steps.
        snr_gamma: Min-SNR weighting of both terms (arXiv 2303.09556); None for uniform weights.
        prediction_type: "epsilon", "v_prediction" or "flow"; by default the scheduler's.
        accumulate: Calls to one optimizer step; each contributes 1/accumulate of its gradient.
        predict: ``predict(model, latents, timesteps, cond) -> prediction`` for models that are not called like a
            diffusers denoiser; ``cond`` is a mapping.
        generator: Draws noise and timesteps; by default torch's global one. Saved with the state.
        teacher_bank: Stored draws of noise, timestep and base prediction, instead of fresh ones: the step then takes
            indices of the bank's pictures, and skips the base model's forward.

    Attributes:
        optimizer: The :class:`FlatAdamW`; learning-rate schedulers attach to it.
        cat_factor: As above.

    Raises:
        AdapterError, InvalidValueError, ShapeError, DtypeError, DeviceError: Naming what was expected and what came.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: Any,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = 1.0,
        cat_factor: float = 1.0,
        snr_gamma: float | None = None,
        prediction_type: str | None = None,
        accumulate: int = 1,
        predict: Predict | None = None,
        generator: torch.Generator | None = None,
        teacher_bank: TeacherBank | None = None,
    ) -> None:
        # PEFT is imported only where a model with its layers is trained.
        from cat_rs import peft

        if accumulate < 1:
            raise InvalidValueError(f"CatStep: `accumulate` must be at least 1, got {accumulate}")
        if snr_gamma is not None and not snr_gamma > 0:
            raise InvalidValueError(f"CatStep: `snr_gamma` must be > 0 or None, got {snr_gamma}")
        if not peft.has_adapter(model):
            raise AdapterError(
                "CatStep: `model` must have PEFT adapter layers (model.add_adapter(LoraConfig(...))), got none"
            )
        self.trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
        if not self.trainable:
            raise AdapterError("CatStep: `model` must have trainable adapter parameters, got all of them frozen")
        self.model = model
        self.cat_factor = cat_factor
        self.snr_gamma = snr_gamma
        self.accumulate = accumulate
        self.generator = generator
        self._schedule = NoiseSchedule(scheduler, prediction_type)
        self._schedule.weights(torch.zeros(1, dtype=torch.long), snr_gamma)
        self._teacher_bank = teacher_bank
        if teacher_bank is not None:
            teacher_bank.check_model(model, self._schedule)
        self._predict = predict or _denoiser_predict(model)
        self._adapter_disabled: Callable[[torch.nn.Module], AbstractContextManager[None]] = peft.adapter_disabled
        peft.patch_peft(model)
        patch_frozen_convolutions(model)
        self.optimizer = FlatAdamW(self.trainable.values(), lr, betas, eps, weight_decay, max_grad_norm=max_grad_norm)
        self._accumulated = 0

    @property
    def cat_factor(self) -> float:
        """Weight of the preservation term."""
        return self._cat_factor

    @cat_factor.setter
    def cat_factor(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise InvalidValueError(f"CatStep: `cat_factor` must be a finite number >= 0, got {value}")
        self._cat_factor = float(value)

    def __call__(
        self,
        latents: torch.Tensor,
        cond: Cond,
        cond_no_trigger: Cond,
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        sample_weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> StepMetrics:
        """Runs one step; every ``accumulate``-th call updates the adapter.

        Args:
            latents: x, [B, ...], in the model's dtype, scaled as the model expects. With a teacher bank, indices of
                its pictures instead, [B] int64; noise and timesteps must not be given then.
            cond: The prompts with the trigger: ``encoder_hidden_states`` [B, L, D], or a nested mapping of the model's
                keyword arguments, whose tensors have a batch dimension.
            cond_no_trigger: The same prompts without the trigger, in the same form.
            noise: [B, ...]; drawn from the standard normal by default.
            timesteps: [B]; drawn uniformly from the schedule by default.
            sample_weight: w, [B], >= 0; multiplies the min-SNR weights.
            mask: m, of the latents' shape up to dimensions of size 1.

        Returns:
            The step's metrics. Where ``grad_norm`` is not finite, the adapter was left as it was.
        """
        base = None
        if self._teacher_bank is not None:
            if noise is not None or timesteps is not None:
                raise InvalidValueError(
                    "CatStep: `noise` and `timesteps` must not be given with a teacher bank, which holds them"
                )
            self._teacher_bank.check_cond(latents, _as_kwargs("cond_no_trigger", cond_no_trigger))
            latents, noise, timesteps, base = self._teacher_bank.draw(latents, self.generator)
        elif latents.dtype == torch.int64:
            raise DtypeError(
                "CatStep: `latents` must have dtype float32, float64, bfloat16 or float16, got int64; picture indices "
                "need a teacher_bank"
            )
        if latents.dim() < 2 or latents.shape[0] == 0:
            raise ShapeError(f"CatStep: `latents` must have shape [B, ...] with B >= 1, got {list(latents.shape)}")
        batch = latents.shape[0]
        with_trigger, without_trigger = _as_kwargs("cond", cond), _as_kwargs("cond_no_trigger", cond_no_trigger)
        if noise is None:
            noise = torch.randn(latents.shape, dtype=latents.dtype, generator=self.generator)
        if timesteps is None:
            timesteps = self._schedule.draw(batch, self.generator)
        signal_rate, noise_rate = self._schedule.rates(timesteps, batch)
        weight = self._schedule.weights(timesteps, self.snr_gamma)
        if weight is None:
            weight = sample_weight
        elif sample_weight is not None:
            if sample_weight.shape != (batch,):
                got = list(sample_weight.shape)
                raise ShapeError(f"CatStep: `sample_weight` must have shape [{batch}], got {got}")
            weight = weight * sample_weight

        preserve = self._cat_factor > 0
        noisy, target = _core.noising(
            latents, noise, signal_rate, noise_rate, self._schedule.prediction_type, 2 if preserve else 1
        )
        if preserve:
            if base is None:
                with torch.no_grad(), self._adapter_disabled(self.model):
                    base = self._predict(self.model, noisy[:batch], timesteps, without_trigger)
            student = self._predict(
                self.model, noisy, torch.cat([timesteps, timesteps]), _join("", with_trigger, without_trigger)
            )
        else:
            student = self._predict(self.model, noisy, timesteps, with_trigger)
        loss, parts, grad = _core.student_loss(
            student, target, base if preserve else None, weight, mask, self._cat_factor, 1.0 / self.accumulate
        )
        del base
        torch.autograd.backward(student, grad)
        diffusion, cat = parts.unbind()
        return StepMetrics(loss, diffusion, cat, torch.tensor(self._update()))

    def _update(self) -> float:
        """The optimizer step where it is due; returns the gradient norm, or NaN."""
        self._accumulated = (self._accumulated + 1) % self.accumulate
        if self._accumulated:
            return math.nan
        self.optimizer.step()
        return self.optimizer.grad_norm

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-for-bit resume needs: adapter, optimizer, accumulated gradients, generator."""
        return {
            "parameters": {name: param.detach().clone() for name, param in self.trainable.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "accumulated": self._accumulated,
            "gradients": {name: param.grad.clone() for name, param in self.trainable.items() if param.grad is not None}
            if self._accumulated
            else {},
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken.

        Raises:
            AdapterError: The state is of an adapter with other parameters.
        """
        saved = state_dict["parameters"]
        shapes = {name: list(param.shape) for name, param in self.trainable.items()}
        saved_shapes = {name: list(param.shape) for name, param in saved.items()}
        if shapes != saved_shapes:
            names = sorted(name for name in shapes | saved_shapes if shapes.get(name) != saved_shapes.get(name))
            raise AdapterError(
                f"CatStep: `state_dict` must be of this adapter, got other parameters: {len(names)} differ, e.g. "
                f"{names[0]}: {shapes.get(names[0])} here, {saved_shapes.get(names[0])} there"
            )
        for name, param in self.trainable.items():
            param.copy_(saved[name])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.optimizer.zero_grad()
        self._accumulated = state_dict["accumulated"]
        for name, saved_grad in state_dict["gradients"].items():
            grad = self.trainable[name].grad
            if grad is not None:
                grad.copy_(saved_grad)
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])
