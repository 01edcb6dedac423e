"""One training run in memory: the model, the step, the order of the data, and the state of all three."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cat_rs.processes import Processes
from cat_rs.training.cache import TrainingCache
from cat_rs.training.config import TrainConfig
from cat_rs.training.order import ShuffledOrder

if TYPE_CHECKING:
    from cat_rs import TeacherBank


def _cat_factor(config: TrainConfig) -> Any:
    """The weight of the preservation term as the settings describe it."""
    import cat_rs

    if config.cat_ratio is not None:
        return cat_rs.CatFactorRatio(config.cat_ratio, maximum=config.cat_factor)
    if config.cat_factor_end is None:
        return config.cat_factor
    last = max(config.steps - 1, 1)
    return cat_rs.CatFactorRamp(config.cat_factor, config.cat_factor_end, last, config.cat_factor_shape)


class TrainingRun:
    """Advances by one optimizer step at a time; `state_dict` continues it bit for bit.

    Noise, timesteps and latents are drawn from a generator of the run's own, so that two runs of the same seed see the
    same draws whatever their adapters draw; dropout uses torch's global generator.

    Of several processes, each takes its part of a batch that is `processes.count` times as large, and draws noise,
    timesteps and latents of its own.

    Args:
        config: The settings.
        unet: With its adapter.
        scheduler: The model's.
        cache: The pictures.
        processes: Those of the run.
        bank: Base predictions of all views of the cache; None predicts anew in every step.
    """

    def __init__(
        self,
        config: TrainConfig,
        unet: Any,
        scheduler: Any,
        cache: TrainingCache,
        processes: Processes,
        bank: TeacherBank | None = None,
    ) -> None:
        from diffusers.optimization import get_scheduler

        import cat_rs

        self.unet = unet
        self.steps_done = 0
        self._accumulate = config.accumulate
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._cache = cache
        self._from_bank = bank is not None
        self._device: torch.device = unet.device
        self._generator = torch.Generator(self._device).manual_seed(config.seed + processes.rank)
        self._order = ShuffledOrder(len(cache), config.batch_size * processes.count, config.seed)
        self._part = slice(config.batch_size * processes.rank, config.batch_size * (processes.rank + 1))
        self._step = cat_rs.CatStep(
            unet,
            scheduler,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm or None,
            cat_factor=_cat_factor(config),
            snr_gamma=config.snr_gamma,
            noise_offset=config.noise_offset,
            accumulate=config.accumulate,
            generator=self._generator,
            teacher_bank=bank,
            capture=config.capture,
        )
        self._lr_scheduler = get_scheduler(
            config.lr_scheduler,
            self._step.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.steps,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._step.optimizer.param_groups[0]["lr"])

    def advance(self) -> torch.Tensor:
        """Do one optimizer step.

        Returns:
            loss, diffusion, cat (means over the accumulated batches), grad_norm and cat_factor, as one tensor on the
            device.
        """
        metrics = [self._advance_batch() for _ in range(self._accumulate)]
        self._lr_scheduler.step()
        self.steps_done += 1
        means = torch.stack(metrics).mean(0)
        # The gradient is whole, and its norm taken, only in the last batch.
        means[3] = metrics[-1][3]
        return means

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the run goes on; the step's state holds the generator's."""
        return {
            "steps_done": self.steps_done,
            "step": self._step.state_dict(),
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "order": self._order.state_dict(),
            **self._global_draws(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called, in a run with the same settings."""
        self.steps_done = state["steps_done"]
        self._step.load_state_dict(state["step"])
        self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        self._order.load_state_dict(state["order"])
        self._load_global_draws(state)

    def draws_state_dict(self) -> dict[str, Any]:
        """The part of `state_dict` that differs between processes: what they draw next."""
        return {"generator": self._generator.get_state(), **self._global_draws()}

    def load_draws_state_dict(self, state: dict[str, Any]) -> None:
        """Continue to draw where `draws_state_dict` was called."""
        self._generator.set_state(state["generator"])
        self._load_global_draws(state)

    def _global_draws(self) -> dict[str, Any]:
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }

    def _load_global_draws(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self._device)

    def _advance_batch(self) -> torch.Tensor:
        pictures = self._order.next_batch()[self._part]
        batch = self._cache.batch(pictures, self._generator, from_bank=self._from_bank)
        latents = batch.latents if self._from_bank else batch.latents.to(self._dtype)
        metrics = self._step(latents, batch.cond, batch.cond_no_trigger)
        return torch.stack([value.float() for value in metrics])
