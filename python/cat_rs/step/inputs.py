"""Inputs of a step: its checks and random draws, all that happens before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cat_rs.arguments import check, check_plain, check_tensor
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.step import device_values
from cat_rs.step.conditions import Conditions
from cat_rs.step.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from cat_rs.step.teacher_bank import TeacherBank

__all__ = [
    "PreservationSamples",
    "StepInputs",
    "check_generator",
    "check_options",
    "check_preserve",
    "check_tensors",
    "draw",
    "draw_noise",
    "draw_preserved",
    "draw_stored",
]


class PreservationSamples(NamedTuple):
    """Latents whose base predictions are to stay, in place of the concept's own: pictures that the base model drew.

    Attributes:
        latents: x', [P, ...]; in the other dimensions as the concept's latents.
        noise: [P, ...]; drawn from the standard normal if None.
        timesteps: [P]; drawn uniformly from the schedule if None.
        sample_weight: w', [P], >= 0; multiplies the min-SNR weights.
        mask: m', of the latents' shape up to dimensions of size 1.
        base_pred: f_base(z'_t, t, c0) where it is known, [P, ...], in any float dtype; noise and timesteps must then
            be those that it was predicted for. The step does without the base model's forward for these samples.
    """

    latents: torch.Tensor
    noise: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    sample_weight: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    base_pred: torch.Tensor | None = None


class StepInputs(NamedTuple):
    """The tensors that a step computes with.

    Attributes:
        latents, noise, timesteps: x, [B, ...], [B, ...] and [B].
        base_pred: f_base(z_t, t, c0) of a teacher bank, [B, ...].
        sample_weight, mask: As given.
        conditions: The model's keyword arguments.
        preserves: Whether there is a preservation term.
        preserve: Its samples, where they are not the concept's.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    base_pred: torch.Tensor | None
    sample_weight: torch.Tensor | None
    mask: torch.Tensor | None
    conditions: Conditions
    preserves: bool
    preserve: PreservationSamples | None


# The first four fields.
Draws = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def check_options(
    device: torch.device,
    accumulate: int,
    preserve_every: int,
    noise_offset: float,
    generator: torch.Generator | None,
    teacher_bank: TeacherBank | None,
    text_encoders: Sequence[torch.nn.Module],
) -> None:
    """Checks the options of CatStep that concern its inputs."""
    for name, count in (("accumulate", accumulate), ("preserve_every", preserve_every)):
        check("CatStep", name, count, "an integer of at least 1", lambda count: int(count) == count >= 1)
    check("CatStep", "noise_offset", noise_offset, "a finite number", math.isfinite)
    # With a bank it only chooses among the stored draws.
    check_generator("CatStep", generator, device if teacher_bank is None else torch.device("cpu"))
    if teacher_bank is not None:
        check("CatStep", "teacher_bank", teacher_bank, "a TeacherBank or None", lambda it: callable(it.check_model))
        if text_encoders or noise_offset:
            raise InvalidValueError(
                "CatStep: `text_encoders` and `noise_offset` must not be given with a teacher bank, whose base "
                "predictions and noise are fixed"
            )


def check_generator(op: str, generator: torch.Generator | None, device: torch.device) -> None:
    """Refuses what does not draw on that device."""
    expected = "a torch.Generator or None"
    check(op, "generator", generator, expected, lambda it: it is None or isinstance(it, torch.Generator))
    if generator is not None and generator.device.type != device.type:
        raise DeviceError(f"{op}: `generator` must be on {device}, got one on {generator.device}")


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuses what is no tensor, or none with memory of its own; None is nothing to check."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(op, name, tensor)
            check_plain(op, name, tensor)


def draw(
    latents: torch.Tensor,
    noise: torch.Tensor | None,
    timesteps: torch.Tensor | None,
    schedule: NoiseSchedule,
    noise_offset: float,
    generator: torch.Generator | None,
) -> Draws:
    """Checks the latents, and draws noise and timesteps where they are not given."""
    check_tensor("CatStep", "latents", latents)
    check_tensors("CatStep", latents=latents, noise=noise, timesteps=timesteps)
    if latents.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise DtypeError(
            "CatStep: `latents` must have dtype float32, float64, bfloat16 or float16, got "
            f"{str(latents.dtype).removeprefix('torch.')}; picture indices need a teacher_bank"
        )
    if latents.dim() < 2 or latents.shape[0] == 0:
        raise ShapeError(f"CatStep: `latents` must have shape [B, ...] with B >= 1, got {list(latents.shape)}")
    if latents.device != schedule.device:
        expected = "the CPU" if schedule.device.type == "cpu" else schedule.device
        raise DeviceError(f"CatStep: `latents` must be on {expected}, got {latents.device}")
    if noise is None:
        noise = draw_noise(latents, noise_offset, generator)
    if timesteps is None:
        timesteps = schedule.draw(latents.shape[0], generator)
    return latents, noise, timesteps, None


def check_preserve(samples: PreservationSamples | None, teacher_bank: TeacherBank | None) -> None:
    """Refuses what are no samples, and samples beside a bank."""
    expected = "PreservationSamples or None"
    check("CatStep", "preserve", samples, expected, lambda it: it is None or isinstance(it, PreservationSamples))
    if samples is not None and teacher_bank is not None:
        raise InvalidValueError("CatStep: `preserve` must be None with a teacher bank, got samples")


def draw_preserved(
    samples: PreservationSamples,
    latents: torch.Tensor,
    schedule: NoiseSchedule,
    noise_offset: float,
    generator: torch.Generator | None,
) -> PreservationSamples:
    """Checks the samples beside the concept's latents, and draws noise and timesteps where they are not given."""
    base_pred = samples.base_pred
    check_tensors("CatStep", **{"preserve.base_pred": base_pred})
    if base_pred is not None and (samples.noise is None or samples.timesteps is None):
        raise InvalidValueError(
            "CatStep: `preserve.noise` and `preserve.timesteps` must be those of the base predictions, got none"
        )
    noise, timesteps = draw(samples.latents, samples.noise, samples.timesteps, schedule, noise_offset, generator)[1:3]
    if samples.latents.shape[1:] != latents.shape[1:] or samples.latents.dtype != latents.dtype:
        sizes = ", ".join(map(str, latents.shape[1:]))
        raise ShapeError(
            f"CatStep: `preserve.latents` must have shape [P, {sizes}] and dtype {latents.dtype} as `latents`, got "
            f"{list(samples.latents.shape)} and {samples.latents.dtype}"
        )
    if base_pred is not None and (base_pred.shape, base_pred.device) != (samples.latents.shape, latents.device):
        raise ShapeError(
            f"CatStep: `preserve.base_pred` must have shape {list(samples.latents.shape)} on {latents.device}, got "
            f"{list(base_pred.shape)} on {base_pred.device}"
        )
    return samples._replace(noise=noise, timesteps=timesteps)


def draw_noise(latents: torch.Tensor, noise_offset: float, generator: torch.Generator | None) -> torch.Tensor:
    """Standard normal noise of the latents' shape, plus ``noise_offset`` times a draw for each sample and channel."""
    options: dict[str, Any] = {"dtype": latents.dtype, "device": latents.device, "generator": generator}
    noise = torch.randn(latents.shape, **options)
    if noise_offset:
        if latents.dim() < 4:
            raise ShapeError(
                f"CatStep: `latents` must have shape [B, C, H, W] or [B, C, F, H, W] for noise_offset, "
                f"got {list(latents.shape)}"
            )
        shape = (*latents.shape[:2], *(1 for _ in latents.shape[2:]))
        noise += noise_offset * torch.randn(shape, **options)
    return noise


def draw_stored(
    pictures: torch.Tensor,
    noise: torch.Tensor | None,
    timesteps: torch.Tensor | None,
    bank: TeacherBank,
    conditions: Conditions,
    generator: torch.Generator | None,
    device: torch.device,
    *,
    compare: bool,
) -> Draws:
    """Reads a stored draw of each picture to the device, and checks that the conditions are those of the bank.

    Args:
        compare: Whether to compare the conditions' values too, for which a GPU is waited for.
    """
    if noise is not None or timesteps is not None:
        raise InvalidValueError(
            "CatStep: `noise` and `timesteps` must not be given with a teacher bank, which holds them"
        )
    if conditions.no_trigger is not None:
        bank.check_cond(pictures, conditions.no_trigger, compare=compare)
    latents, noise, drawn_timesteps, base_pred = bank.draw(pictures, generator)
    return (
        device_values.send(latents, device),
        device_values.send(noise, device),
        device_values.send(drawn_timesteps, device),
        device_values.send(base_pred, device),
    )
