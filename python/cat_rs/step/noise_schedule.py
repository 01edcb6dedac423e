"""Timesteps, rates of signal and noise, and loss weights, from a diffusers scheduler."""

from __future__ import annotations

from typing import Any

import torch

from cat_rs.arguments import check, check_tensor, refusing, shown
from cat_rs.errors import DeviceError, InvalidValueError, ShapeError
from cat_rs.ops.noising import snr_weights
from cat_rs.step import device_values

__all__ = ["NoiseSchedule"]


class NoiseSchedule:
    """The noise schedule of a diffusers scheduler.

    Args:
        scheduler: One with a table ``alphas_cumprod`` (DDPM, DDIM and their kin) or a flow-matching one
            (FlowMatchEulerDiscreteScheduler and its kin).
        prediction_type: "epsilon", "v_prediction" or "flow"; by default the scheduler's own.
        device: Device of the tables and of drawn timesteps.

    Raises:
        InvalidValueError: The scheduler has no such table, or the prediction type does not fit it.
    """

    def __init__(self, scheduler: Any, prediction_type: str | None = None, device: torch.device | str = "cpu") -> None:
        check("CatStep", "prediction_type", prediction_type, "a str or None", lambda it: it is None or type(it) is str)
        self.device = torch.device(device)
        config = getattr(scheduler, "config", {})
        self.alphas_cumprod: torch.Tensor | None = getattr(scheduler, "alphas_cumprod", None)
        if self.alphas_cumprod is not None:
            check_tensor("CatStep", "scheduler.alphas_cumprod", self.alphas_cumprod)
            self.alphas_cumprod = self.alphas_cumprod.to(self.device, torch.float32)
            self.signal_rates = self.alphas_cumprod.sqrt()
            self.noise_rates = (1 - self.alphas_cumprod).sqrt()
            self.prediction_type = prediction_type or config.get("prediction_type", "epsilon")
            expected: tuple[str, ...] = ("epsilon", "v_prediction")
        elif type(scheduler).__name__.startswith("FlowMatch") and hasattr(scheduler, "timesteps"):
            # Sampling replaces a scheduler's timesteps by the few that it visits: a new one has those of training.
            scheduler = type(scheduler).from_config(config)
            self.timesteps: torch.Tensor = scheduler.timesteps.to(self.device, torch.float32)
            self.num_train_timesteps: int = config["num_train_timesteps"]
            self.prediction_type = prediction_type or "flow"
            expected = ("flow",)
        else:
            raise InvalidValueError(
                "CatStep: `scheduler` must be a diffusers scheduler with a table alphas_cumprod or a FlowMatch one, "
                f"got {type(scheduler).__name__}"
            )
        if self.prediction_type not in expected:
            raise InvalidValueError(
                f"CatStep: `prediction_type` must be {' or '.join(map(repr, expected))} for "
                f"{type(scheduler).__name__}, got {self.prediction_type!r}"
            )

    def draw(self, batch: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Timesteps drawn uniformly from the schedule, [batch]."""
        if self.alphas_cumprod is not None:
            return torch.randint(len(self.alphas_cumprod), (batch,), generator=generator, device=self.device)
        drawn = torch.randint(len(self.timesteps), (batch,), generator=generator, device=self.device)
        return self.timesteps[drawn]

    def rates(self, timesteps: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of latent and noise in z_t at each timestep, [batch] each.

        On a GPU the timesteps' range is not checked, which would have to wait for their values.
        """
        check_tensor("CatStep", "timesteps", timesteps)
        if timesteps.shape != (batch,):
            raise ShapeError(f"CatStep: `timesteps` must have shape [{batch}], got {list(timesteps.shape)}")
        if timesteps.device != self.device:
            raise DeviceError(f"CatStep: `timesteps` must be on {self.device}, got {timesteps.device}")
        if self.alphas_cumprod is None:
            noise_rate = timesteps.to(torch.float32) / self.num_train_timesteps
            self._check_range(timesteps, self.num_train_timesteps)
            return 1 - noise_rate, noise_rate
        if timesteps.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InvalidValueError(f"CatStep: `timesteps` must be integers, got {timesteps.dtype}")
        self._check_range(timesteps, len(self.alphas_cumprod) - 1)
        # As an index, uint8 would be a mask.
        indices = timesteps.to(torch.int64)
        return self.signal_rates[indices], self.noise_rates[indices]

    @staticmethod
    def _check_range(timesteps: torch.Tensor, last: int) -> None:
        if device_values.is_gpu(timesteps.device):
            return
        with refusing("CatStep", "timesteps", "numbers", timesteps):
            low, high = timesteps.min().item(), timesteps.max().item()
        if not 0 <= low <= high <= last:
            raise InvalidValueError(f"CatStep: `timesteps` must be in 0..{last}, got {low}..{high}")

    def check_snr_gamma(self, snr_gamma: float | None) -> None:
        """Raises InvalidValueError where the schedule has no min-SNR weights of this gamma."""
        if snr_gamma is None:
            return
        check("CatStep", "snr_gamma", snr_gamma, "> 0 or None", lambda gamma: gamma > 0)
        if self.alphas_cumprod is None:
            got = shown(snr_gamma)
            raise InvalidValueError(f"CatStep: `snr_gamma` must be None for a flow-matching scheduler, got {got}")

    def weights(
        self, timesteps: torch.Tensor, snr_gamma: float | None, sample_weight: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The loss's weight of each sample: its own times that of min-SNR, [B]; None where it has neither."""
        self.check_snr_gamma(snr_gamma)
        if snr_gamma is None or self.alphas_cumprod is None:
            return sample_weight
        weights = snr_weights(timesteps, self.alphas_cumprod, snr_gamma, self.prediction_type)
        if sample_weight is None:
            return weights
        if sample_weight.shape != weights.shape:
            expected, got = list(weights.shape), list(sample_weight.shape)
            raise ShapeError(f"CatStep: `sample_weight` must have shape {expected}, got {got}")
        with refusing("CatStep", "sample_weight", "a dense tensor of floats", sample_weight):
            return weights * sample_weight

    def table(self) -> torch.Tensor:
        """The numbers that decide z_t at each timestep, 1-dim, on the CPU."""
        if self.alphas_cumprod is not None:
            return self.alphas_cumprod.cpu()
        return torch.cat([self.timesteps.cpu(), torch.tensor([float(self.num_train_timesteps)])])
