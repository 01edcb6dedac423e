"""One training in memory: the model, the step, the order of the data, and the state of all three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cat_rs._version import __version__
from cat_rs.adapter_file import save_lora
from cat_rs.options import ConfigError
from cat_rs.processes import Processes
from cat_rs.step import CatStep, PreservationSamples
from cat_rs.step.cat_factor import CatFactor, CatFactorRamp, CatFactorRatio, CatFactorTarget
from cat_rs.step.teacher_bank import TeacherBank
from cat_rs.training.config import TrainConfig, base_model_name
from cat_rs.training.encoded_dataset import EncodedDataset
from cat_rs.training.preservation_set import PreservationSet
from cat_rs.training.sampler import BatchSampler


class Trainer:
    """Advances a training by one optimizer step at a time; `state_dict` continues it bit for bit.

    Noise, timesteps and latents are drawn from the trainer's own generators, so that two trainings with the same seed
    see the same draws whatever their adapters draw; dropout uses torch's global generator.

    With several ranks, each takes its part of a batch that is `world_size` times as large, and draws noise, timesteps
    and latents of its own.

    Args:
        config: The settings.
        unet: The U-Net with its adapter.
        scheduler: The model's noise scheduler.
        dataset: The encoded pictures.
        processes: The ranks that train together.
        bank: Base predictions of all views of the dataset; None predicts anew in every step.
        preserved: Pictures for the preservation term; None takes it at those of the dataset.
    """

    def __init__(
        self,
        config: TrainConfig,
        unet: Any,
        scheduler: Any,
        dataset: EncodedDataset,
        processes: Processes,
        bank: TeacherBank | None = None,
        preserved: PreservationSet | None = None,
    ) -> None:
        from diffusers.optimization import get_scheduler

        self.unet = unet
        self.steps_done = 0
        self._config = config
        self._world_size = processes.world_size
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._dataset = dataset
        self._from_bank = bank is not None
        self._preserved = preserved
        self._device: torch.device = unet.device
        self._generator = torch.Generator(self._device).manual_seed(config.seed + processes.rank)
        # On the CPU they share one generator.
        on_cpu = self._device.type == "cpu"
        self._choices = self._generator if on_cpu else torch.Generator().manual_seed(config.seed + processes.rank)
        self._sampler = BatchSampler(len(dataset), config.batch_size * processes.world_size, config.seed)
        self._part = slice(config.batch_size * processes.rank, config.batch_size * (processes.rank + 1))
        self._step = CatStep(
            unet,
            scheduler,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm or None,
            cat_factor=_cat_factor(config),
            preserve_every=config.preserved().preserve_every,
            preservation=config.preservation,
            snr_gamma=config.snr_gamma,
            noise_offset=config.noise_offset,
            accumulate=config.accumulate,
            grad_scaler=torch.amp.GradScaler(self._device.type) if self._dtype == torch.float16 else None,
            generator=self._choices if self._from_bank else self._generator,
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
            loss, diffusion, cat (means over the accumulated batches; cat is NaN in a step without a preservation
            term), grad_norm and cat_factor, as one tensor on the device.
        """
        metrics = [self._advance_batch() for _ in range(self._config.accumulate)]
        self._lr_scheduler.step()
        self.steps_done += 1
        means = torch.stack(metrics).mean(0)
        # The gradient is whole, and its norm taken, only in the last batch.
        means[3] = metrics[-1][3]
        return means

    def save_adapter(self, folder: Path) -> Path:
        """Write the adapter as it is now into a folder, with the training metadata."""
        config = self._config
        metadata = {
            "version": __version__,
            "base_model": base_model_name(config),
            "trigger": config.class_words(),
            "cat_factor": config.cat_factor,
            "cat_factor_end": config.cat_factor_end,
            "cat_ratio": config.cat_ratio,
            "cat_drift": config.cat_drift,
            "preservation": config.preservation,
            **config.preserved()._replace(teacher_draws=self._stored_draws())._asdict(),
            "snr_gamma": config.snr_gamma,
            "rank": config.rank,
            "lr": config.lr,
            "batch_size": config.batch_size * config.accumulate * self._world_size,
            "seed": config.seed,
            "steps": self.steps_done,
        }
        return save_lora(folder, self.unet, metadata=metadata)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on; the step's state holds the generator's."""
        return {
            "steps_done": self.steps_done,
            "step": self._step.state_dict(),
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "order": self._sampler.state_dict(),
            "choices": self._choices.get_state(),
            "preserved": self._preserved_key(),
            **self._global_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called, with the same settings.

        Raises:
            ConfigError: The preservation set is another.
        """
        if state.get("preserved") != self._preserved_key():
            raise ConfigError("resume: expected the preservation set of the checkpoint, got another")
        self.steps_done = state["steps_done"]
        self._step.load_state_dict(state["step"])
        self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        self._sampler.load_state_dict(state["order"])
        self._choices.set_state(state.get("choices", self._choices.get_state()))
        self._set_global_rng_state(state)

    def rng_state_dict(self) -> dict[str, Any]:
        """Return the part of `state_dict` that differs between ranks: the state of the random generators."""
        generators = {"generator": self._generator.get_state(), "choices": self._choices.get_state()}
        return {**generators, **self._global_rng_state()}

    def load_rng_state_dict(self, state: dict[str, Any]) -> None:
        """Continue to draw where `rng_state_dict` was called."""
        self._generator.set_state(state["generator"])
        self._choices.set_state(state.get("choices", self._choices.get_state()))
        self._set_global_rng_state(state)

    def _global_rng_state(self) -> dict[str, Any]:
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }

    def _set_global_rng_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self._device)

    def _stored_draws(self) -> int:
        """How many base predictions each picture has that the steps use."""
        if self._preserved is None:
            return self._config.preserved().teacher_draws
        return self._preserved.draws if self._config.preservation == "cat" else 0

    def _preserved_key(self) -> str | None:
        return None if self._preserved is None else self._preserved.key

    def _advance_batch(self) -> torch.Tensor:
        pictures = self._sampler.next_batch()[self._part]
        batch = self._dataset.batch(pictures, self._generator, self._choices, from_bank=self._from_bank)
        latents = batch.latents if self._from_bank else batch.latents.to(self._dtype)
        if self._preserved is None or not self._step.preserves_next:
            metrics = self._step(latents, batch.cond, batch.cond_no_trigger)
        else:
            drawn = self._preserved.draw(self._config.preserve_batch or self._config.batch_size, self._choices)
            # Other terms would see stored noise again and again, and no base prediction of it.
            samples = (
                drawn.samples if self._config.preservation == "cat" else PreservationSamples(drawn.samples.latents)
            )
            metrics = self._step(latents, batch.cond, drawn.cond, preserve=samples)
        return torch.stack([value.float() for value in metrics])


def _cat_factor(config: TrainConfig) -> CatFactor:
    """Return the weight of the preservation term as the settings describe it."""
    start = config.cat_factor
    if config.cat_ratio is not None:
        return CatFactorRatio(config.cat_ratio, maximum=start)
    if config.cat_drift is not None:
        return CatFactorTarget(config.cat_drift, start=start, minimum=0.1 * start, maximum=100 * start)
    if config.cat_factor_end is None:
        return config.cat_factor
    last = max(config.steps - 1, 1)
    return CatFactorRamp(config.cat_factor, config.cat_factor_end, last, config.cat_factor_shape)
