"""The up projection of a LoRA branch, added onto the output of its layer."""

from __future__ import annotations

from torch import Tensor

from cat_rs.composed.checks import Checks, undisturbed
from cat_rs.errors import LayoutError

__all__ = ["lora_up_backward", "lora_up_forward"]


@undisturbed
def lora_up_forward(y: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float, channels_second: bool) -> None:
    """Adds scaling * B h onto y in place. See `cat_rs.ops.lora_up.lora_up_`."""
    channel = _check("y", y, hidden, lora_b, scaling, channels_second)
    if not (y.is_contiguous() or (channels_second and y.movedim(1, -1).is_contiguous())):
        raise LayoutError("lora_up: `y` must be a contiguous or channels_last tensor, got one with other strides")
    y.add_((hidden.movedim(channel, -1) @ lora_b.T).movedim(-1, channel), alpha=scaling)


@undisturbed
def lora_up_backward(
    grad: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float, channels_second: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `lora_up_forward`: (dh, dB), each where wanted."""
    channel = _check("grad", grad, hidden, lora_b, scaling, channels_second)
    rows = grad.movedim(channel, -1)
    dh = scaling * (rows @ lora_b).movedim(-1, channel) if wanted[0] else None
    if not wanted[1]:
        return dh, None
    flat = rows.reshape(rows.shape[:-1].numel(), len(lora_b))
    return dh, scaling * (flat.T @ hidden.movedim(channel, -1).reshape(len(flat), lora_b.shape[1]))


def _check(name: str, y: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float, channels_second: bool) -> int:
    """Checks the layer's output or its gradient, and the rest beside it; returns the dimension of the channels."""
    checks = Checks("lora_up")
    dtype = checks.floats(name, y).dtype
    for argument, tensor in (("hidden", hidden), ("lora_B", lora_b)):
        checks.beside(argument, tensor, name, dtype, f"the dtype of `{name}`")
    if y.dim() < (2 if channels_second else 1):
        checks.refuse_shape(name, "[B, out, ...]" if channels_second else "[..., out]", y)
    if lora_b.dim() != 2:
        checks.refuse_shape("lora_B", "[out, r]", lora_b)
    channel, rank = 1 if channels_second else y.dim() - 1, lora_b.shape[1]
    checks.shape("lora_B", lora_b, [y.shape[channel], rank])
    checks.shape("hidden", hidden, [*y.shape[:channel], rank, *y.shape[channel + 1 :]])
    checks.finite("scaling", scaling)
    return channel
