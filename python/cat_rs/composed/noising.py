"""Noising of latents."""

from __future__ import annotations

from torch import Tensor

from cat_rs.composed.checks import Checks, integer, text, undisturbed
from cat_rs.dtypes import compute_dtype

__all__ = ["noising"]


@undisturbed
def noising(
    latents: Tensor,
    noise: Tensor,
    signal_rate: Tensor,
    noise_rate: Tensor,
    prediction_type: str,
    copies: int,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `cat_rs.ops.noising.noising`."""
    checks = Checks("noising")
    prediction_type = text("prediction_type", prediction_type)
    copies = integer("copies", copies, 0, 2**64 - 1, "0..2**64 - 1")
    if prediction_type not in ("epsilon", "v_prediction", "velocity", "flow"):
        checks.refuse("prediction_type", "'epsilon', 'v_prediction' or 'flow'", f"'{prediction_type}'")
    _check(checks, latents, noise, signal_rate, noise_rate, copies)
    dtype = compute_dtype(latents, noise)
    x, n = latents.to(dtype), noise.to(dtype)
    by_sample = [-1] + [1] * (x.dim() - 1)
    signal, sigma = signal_rate.to(dtype).reshape(by_sample), noise_rate.to(dtype).reshape(by_sample)
    noisy = (signal * x + sigma * n).to(latents.dtype).repeat([copies] + [1] * (x.dim() - 1))
    if prediction_type == "epsilon":
        return noisy, noise.contiguous()
    target = n - x if prediction_type == "flow" else signal * n - sigma * x
    return noisy, target.to(noise.dtype)


def _check(
    checks: Checks, latents: Tensor, noise: Tensor, signal_rate: Tensor, noise_rate: Tensor, copies: int
) -> None:
    checks.floats("latents", latents)
    checks.floats("noise", noise)
    if latents.numel() == 0 or latents.dim() == 0:
        checks.refuse_shape("latents", "[B, ...] with no empty dimension", latents)
    checks.shape("noise", noise, latents.shape)
    checks.constant("latents", latents)
    checks.constant("noise", noise)
    if copies == 0:
        checks.refuse("copies", "at least 1", copies)
    if copies * len(latents) >= 2**63:
        checks.refuse("copies", "few enough for a batch below 2^63", copies)
    for name, rate in (("signal_rate", signal_rate), ("noise_rate", noise_rate)):
        checks.floats(name, rate)
        checks.shape(name, rate, latents.shape[:1])
