"""Plain definitions of what cat_rs computes, as one would write them with PyTorch and NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array = NDArray[np.float64]


class CatLoss(NamedTuple):
    """The CAT loss and its terms."""

    total: torch.Tensor
    diffusion: torch.Tensor
    cat: torch.Tensor


def cat_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    model_pred_no_trigger: torch.Tensor,
    base_pred: torch.Tensor,
    *,
    cat_factor: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    mask_normalize: bool = False,
    preserve_weight: torch.Tensor | None = None,
    preserve_mask: torch.Tensor | None = None,
) -> CatLoss:
    """The CAT loss in float64: gradients reach the arguments through torch.autograd."""

    def term(
        pred: torch.Tensor, constant: torch.Tensor, sample_weight: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        error = (pred.double() - constant.double()) ** 2
        batch = error.shape[0]
        full_mask = torch.ones_like(error) if mask is None else mask.double().expand_as(error)
        sums = (full_mask * error).reshape(batch, -1).sum(1)
        weights = torch.ones_like(sums) if sample_weight is None else sample_weight.double()
        if mask_normalize:
            counts = full_mask.reshape(batch, -1).sum(1)
            means = torch.where(counts == 0, 0.0, sums / torch.where(counts == 0, 1.0, counts))
        else:
            means = sums / error[0].numel()
        return (weights * means).mean()

    diffusion = term(model_pred, target, sample_weight, mask)
    own_weight = sample_weight if preserve_weight is None else preserve_weight
    own_mask = mask if preserve_mask is None else preserve_mask
    cat = term(model_pred_no_trigger, base_pred, own_weight, own_mask)
    return CatLoss(diffusion + cat_factor * cat, diffusion, cat)


def consistency_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    base_pred: torch.Tensor,
    beta: float,
    sample_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> CatLoss:
    """DCO's loss in float64, the diffusion term, and by how much it exceeds the base model's."""
    nothing = torch.zeros_like(model_pred)

    def term(pred: torch.Tensor, i: int) -> torch.Tensor:
        weight = None if sample_weight is None else sample_weight[i : i + 1]
        own_mask = None if mask is None else mask.expand_as(pred)[i : i + 1]
        one = slice(i, i + 1)
        return cat_loss(pred[one], target[one], nothing[one], nothing[one], sample_weight=weight, mask=own_mask).total

    pairs = [(term(model_pred, i), term(base_pred, i)) for i in range(len(target))]
    losses = [torch.log(1 + torch.exp(beta * (own - base))) for own, base in pairs]
    margin = torch.stack([own - base for own, base in pairs]).mean()
    return CatLoss(torch.stack(losses).mean(), torch.stack([own for own, _ in pairs]).mean(), margin)


def update_norm(model: torch.nn.Module) -> torch.Tensor:
    """sum ||s B A||_F^2 over a PEFT model's LoRA layers, in float64, from the whole product."""
    return torch.stack(
        [
            (layer.scaling["default"] * B.weight.double().flatten(1) @ A.weight.double().flatten(1)).square().sum()
            for _, layer, A, B in lora_layers(model)
        ]
    ).sum()


def lora_layers(model: torch.nn.Module) -> list[tuple[str, Any, Any, Any]]:
    """Name, layer, A and B of the LoRA layers of the adapter "default"."""
    found: list[tuple[str, Any]] = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    return [(name, layer, layer.lora_A["default"], layer.lora_B["default"]) for name, layer in found]


def layer_changes(model: torch.nn.Module, base_model: torch.nn.Module, call: Callable[[Any], Any]) -> torch.Tensor:
    """mean (s B A x)^2 / mean (W x + b)^2, averaged over the layers, while ``call`` runs the base model."""
    changes: list[torch.Tensor] = []
    hooks = []
    for name, layer, A, B in lora_layers(model):

        def compare(
            module: Any, given: Any, output: Any, A: Any = A, B: Any = B, scaling: float = layer.scaling["default"]
        ) -> None:
            with torch.enable_grad():
                change = scaling * B(A(given[0].detach().to(A.weight.dtype)))
                changes.append(change.double().square().mean() / output.detach().double().square().mean())

        hooks.append(base_model.get_submodule(name).register_forward_hook(compare))
    with torch.no_grad():
        call(base_model)
    for hook in hooks:
        hook.remove()
    return torch.stack(changes).mean()


def snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str = "epsilon"
) -> torch.Tensor:
    """Min-SNR weights, as the formulas read."""
    alphas = alphas_cumprod.double()[timesteps]
    snr = alphas / (1 - alphas)
    bounded = snr.clamp(max=gamma)
    return bounded / snr if prediction_type == "epsilon" else bounded / (snr + 1)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """y = x W^T + b + scaling (x A^T) B^T in float64."""
    y = x.double() @ weight.double().T + scaling * (x.double() @ lora_A.double().T) @ lora_B.double().T
    return y if bias is None else y + bias.double()


def lora_up(
    y: torch.Tensor, hidden: torch.Tensor, lora_B: torch.Tensor, scaling: float, channels_second: bool
) -> torch.Tensor:
    """y + scaling * B h over the last or the second dimension, in float64."""
    channel = 1 if channels_second else -1
    branch = (hidden.double().movedim(channel, -1) @ lora_B.double().T).movedim(-1, channel)
    return y.double() + scaling * branch


def noising(
    latents: torch.Tensor,
    noise: torch.Tensor,
    signal_rate: torch.Tensor,
    noise_rate: torch.Tensor,
    prediction_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_t and the training target in float64."""
    x, n = latents.double(), noise.double()
    shape = [-1] + [1] * (x.dim() - 1)
    signal, sigma = signal_rate.double().reshape(shape), noise_rate.double().reshape(shape)
    targets = {"epsilon": n, "v_prediction": signal * n - sigma * x, "flow": n - x}
    return signal * x + sigma * n, targets[prediction_type]


def similarity(a: Any, b: Any) -> Array:
    """(1 + cos) / 2 of paired rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return (1 + cosines) / 2


def cross_similarity(a: Any, b: Any) -> Array:
    """(1 + cos) / 2 of every row of a with every row of b, [N, M]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cosines = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]
    return (1 + cosines) / 2


def harmonic_mean(values: Any) -> float:
    """n / sum(1 / v)."""
    values = np.asarray(values, np.float64)
    return float(len(values) / np.sum(1 / values))


def bootstrap(
    samples: Sequence[Sequence[Any]],
    statistic: str,
    resamples: int,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
) -> Array:
    """The statistic of each sample in each bootstrap sample, [S, resamples].

    A sample holds groups of values. Every group is resampled by itself, with the same draws for all samples, whole
    clusters at a time; with several groups the statistic is their harmonic mean.
    """
    generator = np.random.default_rng(seed)
    of_group = harmonic_mean if statistic == "harmonic_mean" else np.mean
    groups = [np.asarray(group, np.float64) for group in zip(*samples, strict=True)]
    numbers = clusters or [np.arange(group.shape[1]) for group in groups]
    members = [[np.flatnonzero(own == cluster) for cluster in np.unique(own)] for own in numbers]
    statistics = np.empty((len(samples), resamples))
    for resample in range(resamples):
        drawn = []
        for group, own in zip(groups, members, strict=True):
            indices = np.concatenate([own[cluster] for cluster in generator.integers(len(own), size=len(own))])
            drawn.append([of_group(values) for values in group[:, indices]])
        for sample, of_groups in enumerate(zip(*drawn, strict=True)):
            statistics[sample, resample] = of_groups[0] if len(of_groups) == 1 else harmonic_mean(of_groups)
    return statistics


def kps(base_no_trigger: Any, adapted_no_trigger: Any, base_trigger: Any, adapted_trigger: Any) -> dict[str, float]:
    """UPS, TPS and KPS from their definitions."""
    ups = harmonic_mean(similarity(base_no_trigger, adapted_no_trigger))
    tps = harmonic_mean(similarity(base_trigger, adapted_trigger))
    return {"kps": harmonic_mean([ups, tps]), "ups": ups, "tps": tps}


Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor]


def denoiser_predict(
    model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
) -> torch.Tensor:
    """A diffusers denoiser's prediction."""
    return model(latents, timestep=timesteps, return_dict=False, **cond)[0]


class PlainRecipe:
    """CAT training as one writes it by hand: two models, three calls, F.mse_loss, clip_grad_norm_, AdamW.

    Args:
        model: The model with the adapter; what requires a gradient is trained. Parameters below float32 are trained
            through a float32 copy, as mixed-precision training does.
        base_model: The frozen model without an adapter.
        scheduler: A diffusers scheduler; makes the noisy latents and the velocity.
        cat_factor, preserve_every, preservation, snr_gamma, prediction_type, accumulate, max_grad_norm: As of
            cat_rs.CatStep.
        predict: How to call the model.
        text_encoders: Further modules that train.
        grad_scaler: Scales the loss.
        adamw: Further settings of torch.optim.AdamW.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base_model: torch.nn.Module,
        scheduler: Any,
        *,
        cat_factor: float = 1.0,
        preserve_every: int = 1,
        preservation: str = "cat",
        snr_gamma: float | None = None,
        prediction_type: str = "epsilon",
        accumulate: int = 1,
        max_grad_norm: float | None = 1.0,
        predict: Predict = denoiser_predict,
        text_encoders: Sequence[torch.nn.Module] = (),
        grad_scaler: torch.amp.GradScaler | None = None,
        **adamw: Any,
    ) -> None:
        self.model, self.base_model, self.scheduler, self.predict = model, base_model, scheduler, predict
        self.cat_factor, self.snr_gamma, self.prediction_type = cat_factor, snr_gamma, prediction_type
        self.accumulate, self.max_grad_norm, self.preserve_every = accumulate, max_grad_norm, preserve_every
        self.preservation = preservation
        self.grad_scaler = grad_scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.trainable = [
            param for trained in (model, *text_encoders) for param in trained.parameters() if param.requires_grad
        ]
        self.masters = [
            param if param.dtype in (torch.float32, torch.float64) else param.detach().float().requires_grad_()
            for param in self.trainable
        ]
        self.optimizer = torch.optim.AdamW(self.masters, foreach=False, **adamw)
        self.calls = 0

    def __call__(
        self,
        latents: torch.Tensor,
        cond: torch.Tensor | Mapping[str, Any],
        cond_no_trigger: torch.Tensor | Mapping[str, Any] | None = None,
        *,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        sample_weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cond_base: Mapping[str, Any] | None = None,
        preserve: Any = None,
    ) -> dict[str, float]:
        """One step; returns loss, diffusion, cat and, on an optimizer step, grad_norm.

        Where text encoders train, ``cond_base`` is the base model's condition, of the base text encoders.
        ``preserve`` has the latents, noise, timesteps, sample_weight and mask of the preservation term.
        """
        cond, cond_no_trigger = (
            {"encoder_hidden_states": c} if isinstance(c, torch.Tensor) else c for c in (cond, cond_no_trigger)
        )
        noisy, target = self._noising(latents, noise, timesteps)
        weight = self._weight(timesteps, sample_weight)
        student = self.predict(self.model, noisy, timesteps, cond)
        diffusion = self._mse(student, target, weight, mask)
        cat = torch.zeros(())
        in_turn = (self.calls // self.accumulate + 1) % self.preserve_every == 0
        if self.cat_factor and in_turn:
            if self.preservation == "dco":
                with torch.no_grad():
                    base = self.predict(self.base_model, noisy, timesteps, cond_base or cond)
                dco = consistency_loss(student, target, base, self.cat_factor, weight, mask)
                cat = dco.cat
            elif self.preservation == "l2":
                cat = update_norm(self.model).to(diffusion.dtype)
            else:
                if preserve is not None:
                    timesteps, mask = preserve.timesteps, preserve.mask
                    noisy, target = self._noising(preserve.latents, preserve.noise, timesteps)
                    weight = self._weight(timesteps, preserve.sample_weight)
                cond_base = cond_base or cond_no_trigger
                cat = self._cat(noisy, timesteps, target, cond_no_trigger, cond_base, weight, mask)
        loss = diffusion + self.preserve_every * self.cat_factor * cat
        if self.preservation == "dco" and self.cat_factor:
            loss = dco.total.to(diffusion.dtype)
        self.grad_scaler.scale(loss / self.accumulate).backward()
        metrics = {"loss": loss.item(), "diffusion": diffusion.item(), "cat": cat.item() if in_turn else math.nan}
        self.calls += 1
        if self.calls % self.accumulate == 0:
            metrics["grad_norm"] = self._update()
        return metrics

    def _cat(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        target: torch.Tensor,
        cond: Mapping[str, Any],
        cond_base: Mapping[str, Any],
        weight: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The term of preservation samples."""
        if self.preservation == "layers":
            changes = layer_changes(
                self.model, self.base_model, lambda base: self.predict(base, noisy, timesteps, cond_base)
            )
            return changes.to(noisy.dtype)
        student = self.predict(self.model, noisy, timesteps, cond)
        if self.preservation == "prior":
            return self._mse(student, target, weight, mask)
        with torch.no_grad():
            base = self.predict(self.base_model, noisy, timesteps, cond_base)
        return self._mse(student, base, weight, mask)

    def _noising(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prediction_type == "flow":
            return self.scheduler.scale_noise(latents, timesteps, noise), noise - latents
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.prediction_type == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, noise, timesteps)
        return noisy, noise

    def _weight(self, timesteps: torch.Tensor, sample_weight: torch.Tensor | None) -> torch.Tensor | None:
        if self.snr_gamma is None:
            return sample_weight
        snr = snr_weights(timesteps, self.scheduler.alphas_cumprod, self.snr_gamma, self.prediction_type)
        return snr if sample_weight is None else snr * sample_weight

    @staticmethod
    def _mse(
        pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        # Losses are computed in at least float32, as training scripts do.
        dtype = torch.promote_types(pred.dtype, torch.float32)
        pred, target = pred.to(dtype), target.to(dtype)
        if weight is None and mask is None:
            return F.mse_loss(pred, target)
        error = F.mse_loss(pred, target, reduction="none")
        if mask is not None:
            error = error * mask
        means = error.mean(dim=list(range(1, error.dim())))
        return (means if weight is None else means * weight.to(dtype)).mean()

    def _update(self) -> float:
        for master, param in zip(self.masters, self.trainable, strict=True):
            if master is not param:
                master.grad = param.grad.float()
        self.grad_scaler.unscale_(self.optimizer)
        limit = torch.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.masters, limit)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        for master, param in zip(self.masters, self.trainable, strict=True):
            if master is not param:
                param.data.copy_(master)
            param.grad = None
        return float(norm)
