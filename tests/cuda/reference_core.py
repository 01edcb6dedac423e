"""What a step calls of the extension, in plain PyTorch, with its signatures: for tensors that have no values."""

from __future__ import annotations

import torch


@torch.no_grad()
def noising(
    latents: torch.Tensor,
    noise: torch.Tensor,
    signal_rate: torch.Tensor,
    noise_rate: torch.Tensor,
    prediction_type: str,
    copies: int,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_t, repeated, and the target, for "epsilon"."""
    assert isinstance(stream, int)
    noisy = signal_rate[:, None, None, None] * latents + noise_rate[:, None, None, None] * noise
    return noisy.repeat(copies, 1, 1, 1), noise


@torch.no_grad()
def student_loss(
    student: torch.Tensor,
    target: torch.Tensor,
    base: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    preserve_weight: torch.Tensor | None,
    preserve_mask: torch.Tensor | None,
    cat_factor: torch.Tensor,
    scale: torch.Tensor,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, [diffusion, cat] and dL/dstudent of both terms' samples."""
    assert isinstance(stream, int)
    batch = target.shape[0]
    terms = [(student[:batch], target, torch.ones_like(cat_factor))]
    if base is not None:
        terms.append((student[batch:], base, cat_factor))
    values, grads = [], []
    samples = ((sample_weight, mask), (preserve_weight, preserve_mask))
    for (pred, constant, factor), (weight, mask) in zip(terms, samples, strict=False):
        error = pred.float() - constant.float()
        weighted = error if mask is None else error * mask
        share = torch.full((len(error),), 1 / error.numel(), device=student.device)
        if weight is not None:
            share = share * weight.float()
        share = share.reshape(-1, *[1] * (error.dim() - 1))
        values.append((share * weighted * error).sum())
        grads.append((2 * factor * scale * share * weighted).to(student.dtype))
    cat = values[1] if base is not None else torch.zeros_like(values[0])
    return values[0] + cat_factor * cat, torch.stack([values[0], cat]), torch.cat(grads)


@torch.no_grad()
def sum_of_squares(grad: torch.Tensor, sums: torch.Tensor, index: int, stream: int) -> None:
    """``sums[index]`` becomes the sum of the squared gradient."""
    assert isinstance(stream, int)
    sums[index].copy_(grad.double().square().sum())


@torch.no_grad()
def adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    low_precision: torch.Tensor | None,
    *,
    settings: torch.Tensor,
    sums: torch.Tensor,
    step: torch.Tensor,
    skipped: torch.Tensor | None,
    stream: int,
) -> None:
    """Clips, updates and zeroes; where the norm is not finite only zeroes, and counts that."""
    assert isinstance(stream, int)
    assert settings.dtype == torch.float64
    lr, beta1, beta2, eps, weight_decay, max_grad_norm = settings.unbind()
    norm = sums.sum().sqrt()
    finite = norm.isfinite()
    step.add_(finite.to(step.dtype))
    clipped = grad.to(param.dtype) * (max_grad_norm.double() / (norm + 1e-6)).clamp(max=1).to(param.dtype)
    first = exp_avg + (1 - beta1) * (clipped - exp_avg)
    second = beta2 * exp_avg_sq + (1 - beta2) * clipped * clipped
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    updated = param * (1 - lr * weight_decay) - lr / (1 - beta1**step) * first / denominator
    for buffer, value in ((param, updated), (exp_avg, first), (exp_avg_sq, second)):
        buffer.copy_(torch.where(finite, value, buffer))
    if low_precision is not None:
        low_precision.copy_(torch.where(finite, param.to(low_precision.dtype), low_precision))
    if skipped is not None:
        skipped.add_((~finite).to(skipped.dtype))
    grad.zero_()
