"""Noising of latents, and the weights of timesteps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cat_rs._native import core_of
from cat_rs.arguments import check, check_memory, check_tensor, shown
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.ops.operator import stream_of

__all__ = ["noising", "snr_weights"]


def noising(
    latents: Tensor,
    noise: Tensor,
    signal_rate: Tensor,
    noise_rate: Tensor,
    prediction_type: str,
    *,
    copies: int = 1,
) -> tuple[Tensor, Tensor]:
    """The noisy latents and the training target in one pass.

    z_t = signal_rate * x + noise_rate * n. The target is n for "epsilon", signal_rate * n - noise_rate * x for
    "v_prediction" (Salimans & Ho, arXiv 2202.00512) and n - x for "flow".

    Args:
        latents: x, [B, ...]; float32, float64, bfloat16 or float16; computed in float32 or float64.
        noise: n, of the same shape.
        signal_rate: [B], for example sqrt(alphas_cumprod[t]), or 1 - sigma for flows.
        noise_rate: [B], for example sqrt(1 - alphas_cumprod[t]), or sigma for flows.
        prediction_type: "epsilon", "v_prediction" or "flow".
        copies: How often z_t is repeated along the batch; 2 makes the doubled student batch.

    Returns:
        z_t, [copies * B, ...] in the latents' dtype, and the target, [B, ...] in the noise's dtype (for "epsilon"
        the noise itself).

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    check_tensor("noising", "latents", latents)
    if torch.compiler.is_compiling():
        return noising_operator(latents, noise, signal_rate, noise_rate, prediction_type, copies)
    return core_of(latents).noising(
        latents, noise, signal_rate, noise_rate, prediction_type, copies, stream_of(latents)
    )


def snr_weights(
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    gamma: float,
    prediction_type: str = "epsilon",
) -> Tensor:
    """Min-SNR loss weights (Hang et al., arXiv 2303.09556).

    min(SNR, gamma) / SNR for "epsilon" and min(SNR, gamma) / (SNR + 1) for "v_prediction", where
    SNR = alphas_cumprod[t] / (1 - alphas_cumprod[t]). At SNR = 0 the first is its limit, 1.

    Args:
        timesteps: [B], integers.
        alphas_cumprod: The scheduler's table, [T].
        gamma: The bound, > 0; 5 is usual.
        prediction_type: "epsilon" or "v_prediction".

    Returns:
        [B], in the table's dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    _check_tables(timesteps, alphas_cumprod)
    check("snr_weights", "gamma", gamma, "> 0", lambda gamma: float(gamma) > 0)
    gamma = float(gamma)
    try:
        alphas = alphas_cumprod[timesteps.to(torch.int64)]  # as an index, uint8 would be a mask
    except IndexError as error:
        got = f"{int(timesteps.min())}..{int(timesteps.max())}"
        expected = f"in 0..{len(alphas_cumprod) - 1}"
        raise InvalidValueError(f"snr_weights: `timesteps` must be {expected}, got {got}") from error
    inverse_snr = (1 - alphas) / alphas
    if prediction_type == "epsilon":
        return (gamma * inverse_snr).clamp(max=1)
    if prediction_type == "v_prediction":
        snr = alphas / (1 - alphas)
        return torch.where(snr < gamma, alphas, gamma * (1 - alphas))
    expected = "'epsilon' or 'v_prediction'"
    raise InvalidValueError(f"snr_weights: `prediction_type` must be {expected}, got {shown(prediction_type)}")


def _check_tables(timesteps: Tensor, alphas_cumprod: Tensor) -> None:
    for name, tensor, letter in (("timesteps", timesteps, "B"), ("alphas_cumprod", alphas_cumprod, "T")):
        check_tensor("snr_weights", name, tensor)
        dense = tensor.layout == torch.strided and not tensor.is_nested
        if not dense or tensor.dim() != 1:
            got = list(tensor.shape) if dense else "a sparse or nested tensor"
            raise ShapeError(f"snr_weights: `{name}` must be dense of shape [{letter}], got {got}")
        if not torch.compiler.is_compiling():
            check_memory("snr_weights", name, tensor)
    if timesteps.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise DtypeError(f"snr_weights: `timesteps` must be integers, got {timesteps.dtype}")
    if alphas_cumprod.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise DtypeError(f"snr_weights: `alphas_cumprod` must have a float dtype, got {alphas_cumprod.dtype}")
    if timesteps.device != alphas_cumprod.device and timesteps.device.type != "cpu":
        raise DeviceError(
            f"snr_weights: `timesteps` must be on {alphas_cumprod.device} or the CPU, got {timesteps.device}"
        )


@torch.library.custom_op("cat_rs::noising", mutates_args=())
def noising_operator(
    latents: Tensor, noise: Tensor, signal_rate: Tensor, noise_rate: Tensor, prediction_type: str, copies: int
) -> tuple[Tensor, Tensor]:
    """See :func:`noising`."""
    stream = stream_of(latents)
    noisy, target = core_of(latents).noising(latents, noise, signal_rate, noise_rate, prediction_type, copies, stream)
    return noisy, target.clone() if target is noise else target


@noising_operator.register_fake
def _(latents: Tensor, noise: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return latents.new_empty((others[-1] * latents.shape[0], *latents.shape[1:])), noise.new_empty(noise.shape)
