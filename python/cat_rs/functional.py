"""The operations as functions of tensors, differentiable through torch.autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from cat_rs import operators
from cat_rs._native import _core, stream_of
from cat_rs.errors import DtypeError, InvalidValueError, ShapeError

__all__ = ["CatLossParts", "cat_loss", "lora_linear", "lora_up_", "noising", "snr_weights"]

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""The dtypes in which a layer computes with float32 weights rounded to them."""


def _check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise DtypeError(f"{op}: `{argument}` must be a torch.Tensor, got {type(value).__name__}")


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 weight in the lower dtype that its layer computes in; any other is left to the operation's checks."""
    return weight.to(dtype) if weight.dtype == torch.float32 and dtype in LOW_PRECISION else weight


class CatLossParts(NamedTuple):
    """The CAT loss and its terms, 0-dim tensors.

    Attributes:
        total: diffusion + cat_factor * cat; the one to call ``backward()`` on.
        diffusion: The diffusion term, detached.
        cat: The preservation term without its factor, detached.
    """

    total: torch.Tensor
    diffusion: torch.Tensor
    cat: torch.Tensor


class CatLossFunction(torch.autograd.Function):
    """Values and both gradients in one pass; the first backward hands the gradients over, a later one recomputes."""

    @staticmethod
    def forward(
        ctx: Any,
        model_pred: torch.Tensor,
        model_pred_no_trigger: torch.Tensor,
        target: torch.Tensor,
        base_pred: torch.Tensor,
        sample_weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        cat_factor: float,
        mask_normalize: bool,
        parts: list[Any],
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:2]
        # Unscaled, a float16 gradient of a mean over many elements is subnormal: it waits for the loss scale.
        deferred = torch.float16 in (model_pred.dtype, model_pred_no_trigger.dtype)
        total, values, *grads = _core.cat_loss(
            model_pred,
            target,
            model_pred_no_trigger,
            base_pred,
            sample_weight,
            mask,
            cat_factor,
            mask_normalize,
            1.0,
            (False, False) if deferred else wanted,
            stream_of(model_pred),
        )
        parts.append(values)
        ctx.save_for_backward(model_pred, target, model_pred_no_trigger, base_pred, sample_weight, mask)
        ctx.settings = cat_factor, mask_normalize
        ctx.grads = None if deferred else grads
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Autograd is off here but under create_graph=True; the guard against a second derivative is not free.
        if torch.is_grad_enabled():
            return _cat_loss_gradients_once(ctx, grad_total)
        return CatLossFunction.gradients(ctx, grad_total)

    @staticmethod
    def gradients(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the arguments of ``forward``."""
        # Reading a number of a GPU would wait for it.
        scale = grad_total if grad_total.is_cuda else grad_total.item()
        # Nobody else holds the precomputed gradients, so they may be scaled in place and given away.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            model_pred, target, model_pred_no_trigger, base_pred, sample_weight, mask = ctx.saved_tensors
            cat_factor, mask_normalize = ctx.settings
            _, _, *grads = _core.cat_loss(
                model_pred,
                target,
                model_pred_no_trigger,
                base_pred,
                sample_weight,
                mask,
                cat_factor,
                mask_normalize,
                scale,
                ctx.needs_input_grad[:2],
                stream_of(model_pred),
            )
        elif isinstance(scale, torch.Tensor):
            _core.scale_gradients_cuda(grads[0], grads[1], scale, stream=stream_of(scale))
        elif scale != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(scale)
        return (*grads, None, None, None, None, None, None, None)


_cat_loss_gradients_once = once_differentiable(CatLossFunction.gradients)


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
    return_parts: bool = False,
) -> torch.Tensor | CatLossParts:
    r"""The Contrastive Adapter Training loss (Park et al., arXiv 2404.07554).

    .. math::
        L = \frac1B \sum_i w_i \,\overline{m\,(f(c) - y)^2}
          + \text{cat\_factor} \cdot \frac1B \sum_i w_i \,\overline{m\,(f(c_0) - f_{base}(c_0))^2}

    where the bars are means over a sample's elements. Values and both gradients come from one pass over the
    inputs. Sums accumulate in float32 lanes and float64 totals (float64 throughout if an input is float64) in an
    order that does not depend on the number of threads. Inputs that are not contiguous are copied once.

    The tensors are on the CPU or on one CUDA device. On CUDA the call waits for nothing, so the sample weights' values
    are not checked.

    Args:
        model_pred: f(z_t, t, c), the prediction for the prompt with the trigger word, [B, ...]; float32, float64,
            bfloat16 or float16. Each of the four tensors may have its own of these dtypes.
        target: y, the diffusion target (noise, velocity or flow), of the same shape; a constant.
        model_pred_no_trigger: f(z_t, t, c0), the prediction for the prompt without the trigger word.
        base_pred: f_base(z_t, t, c0), the base model's prediction for that prompt; a constant.
        cat_factor: Weight of the preservation term, >= 0.
        sample_weight: w, [B], >= 0; shared by both terms (min-SNR, for example).
        mask: m, of the predictions' shape up to dimensions of size 1; bool or float; shared by both terms.
        mask_normalize: Divide each sample by the mask's sum instead of by its number of elements. A sample masked
            out whole counts as zero.
        return_parts: Return a :class:`CatLossParts` instead of the total alone.

    Returns:
        The loss, a 0-dim float32 tensor (float64 if an input is float64), or its parts.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    _check_tensor("cat_loss", "model_pred", model_pred)
    _check_tensor("cat_loss", "model_pred_no_trigger", model_pred_no_trigger)
    if torch.compiler.is_compiling():
        total, values = operators.cat_loss(
            model_pred,
            target,
            model_pred_no_trigger,
            base_pred,
            sample_weight,
            mask,
            cat_factor,
            mask_normalize,
        )
        return CatLossParts(total, *values.unbind()) if return_parts else total
    parts: list[Any] = []
    total = CatLossFunction.apply(
        model_pred,
        model_pred_no_trigger,
        target,
        base_pred,
        sample_weight,
        mask,
        float(cat_factor),
        mask_normalize,
        parts,
    )
    if not return_parts:
        return total
    (values,) = parts
    return CatLossParts(total, *(values if isinstance(values, torch.Tensor) else total.new_tensor(values)).unbind())


def snr_weights(
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    gamma: float,
    prediction_type: str = "epsilon",
) -> torch.Tensor:
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
        ShapeError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    if not gamma > 0:
        raise InvalidValueError(f"snr_weights: `gamma` must be > 0, got {gamma}")
    if timesteps.dim() != 1 or alphas_cumprod.dim() != 1:
        raise ShapeError(
            "snr_weights: `timesteps` must have shape [B] and `alphas_cumprod` [T], "
            f"got {list(timesteps.shape)} and {list(alphas_cumprod.shape)}"
        )
    alphas = alphas_cumprod[timesteps]
    inverse_snr = (1 - alphas) / alphas
    if prediction_type == "epsilon":
        return (gamma * inverse_snr).clamp(max=1)
    if prediction_type == "v_prediction":
        snr = alphas / (1 - alphas)
        return torch.where(snr < gamma, alphas, gamma * (1 - alphas))
    raise InvalidValueError(
        f"snr_weights: `prediction_type` must be 'epsilon' or 'v_prediction', got {prediction_type!r}"
    )


class WeightCopyFunction(torch.autograd.Function):
    """A weight's copy in low precision in the weight's place: its gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Autograd converts a gradient to the dtype of what it belongs to.
        return grad, None


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b + scaling (x A^T) B^T with W frozen; saves x and scaling * x A^T.

    ``copies`` are A and B in x's dtype where somebody keeps them; else float32 ones are rounded here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        copies: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        low_A, low_B = copies or (rounded(lora_A, x.dtype), rounded(lora_B, x.dtype))
        y, hidden = _core.lora_linear_forward(x, weight, bias, low_A, low_B, scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, low_A, low_B, hidden)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_A, lora_B, low_A, low_B, hidden = ctx.saved_tensors
        needs, scaling = ctx.needs_input_grad, ctx.scaling
        # Autograd converts the gradients of float32 A and B, which come in x's dtype.
        if torch.is_grad_enabled():  # create_graph=True: operations that can be differentiated again
            lora_A, lora_B = rounded(lora_A, x.dtype), rounded(lora_B, x.dtype)
            rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            inner = scaling * (grad_rows @ lora_B)
            dx = (grad_rows @ weight + inner @ lora_A).view_as(x) if needs[0] else None
            dA, dB = inner.T @ rows, scaling * (grad_rows.T @ (rows @ lora_A.T))
        else:
            wanted = (needs[0], needs[3], needs[4])
            dx, dA, dB = _core.lora_linear_backward(grad, x, weight, low_A, low_B, hidden, scaling, wanted)
        return dx, None, grad.reshape(-1, grad.shape[-1]).sum(0) if needs[2] else None, dA, dB, None, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """A frozen linear layer with a LoRA branch (Hu et al., arXiv 2106.09685).

    y = x W^T + b + scaling (x A^T) B^T. Gradients, with g = dL/dy: dB = scaling g^T (x A^T),
    dA = scaling (g B)^T x, dx = g W + scaling (g B) A, the last only where x needs it. Saves x and the [M, r]
    product scaling x A^T for the backward pass.

    A and B may be float32 beside x and W in bfloat16 or float16. Then the branch is computed in x's dtype, with A and
    B rounded to it once, and their gradients are products in x's dtype converted to float32. In float16 these need
    the usual loss scale: for a small B, g B is below the smallest float16.

    Args:
        x: [..., in]; float32, float64, bfloat16 or float16.
        weight: W, [out, in], frozen, in x's dtype.
        bias: b, [out], or None; trained if it requires a gradient.
        lora_A: A, [r, in], in x's dtype, or float32 beside bfloat16 and float16.
        lora_B: B, [out, r], likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.

    Returns:
        y, [..., out], in x's dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        _check_tensor("lora_linear", name, value)
    if weight.requires_grad:
        raise InvalidValueError(
            "lora_linear: `weight` must be frozen, got a tensor with requires_grad=True: call requires_grad_(False)"
        )
    if torch.compiler.is_compiling():
        lora_A, lora_B = rounded(lora_A, x.dtype), rounded(lora_B, x.dtype)
        return operators.lora_linear(x, weight, bias, lora_A, lora_B, scaling)[0]
    return LoraLinearFunction.apply(x, weight, bias, lora_A, lora_B, float(scaling), None)


class LoraUpFunction(torch.autograd.Function):
    """y += scaling B h in place; saves h. ``copy`` is B in y's dtype where somebody keeps it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        hidden: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        channels_second: bool,
        copy: torch.Tensor | None,
    ) -> torch.Tensor:
        low_B = rounded(lora_B, y.dtype) if copy is None else copy
        _core.lora_up_forward(y, hidden, low_B, scaling, channels_second)
        ctx.mark_dirty(y)
        ctx.save_for_backward(hidden, lora_B, low_B)
        ctx.settings = scaling, channels_second
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, lora_B, low_B = ctx.saved_tensors
        scaling, channels_second = ctx.settings
        wanted = ctx.needs_input_grad[1:3]
        if torch.is_grad_enabled():  # create_graph=True: operations that can be differentiated again
            lora_B = rounded(lora_B, hidden.dtype)
            channel = 1 if channels_second else -1
            dh = scaling * (grad.movedim(channel, -1) @ lora_B).movedim(-1, channel)
            dB = scaling * grad.movedim(channel, 0).flatten(1) @ hidden.movedim(channel, 0).flatten(1).T
        else:
            dh, dB = _core.lora_up_backward(grad, hidden, low_B, scaling, channels_second, wanted)
        return grad, dh, dB, None, None, None


def lora_up_(
    y: torch.Tensor, hidden: torch.Tensor, lora_B: torch.Tensor, scaling: float, *, channels_second: bool = False
) -> torch.Tensor:
    """Adds the up projection of a LoRA branch onto a layer's output, in place: y += scaling B h.

    For branches whose down projection h = A x stays a call of its own: convolutions, dropout, further adapters.
    Gradients, with g = dL/dy: dh = scaling B^T g, dB = scaling g h^T, and g goes on to y.

    Args:
        y: The layer's output, [..., out], or [B, out, ...] with ``channels_second``, contiguous or channels_last;
            float32, float64, bfloat16 or float16. Nothing else may hold it for its own backward pass.
        hidden: h, of y's shape with r for out, in y's dtype.
        lora_B: B, [out, r], in y's dtype, or float32 beside bfloat16 and float16: see :func:`lora_linear`.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
        channels_second: Whether the channels are the second dimension, as in convolutions, or the last.

    Returns:
        y; under torch.compile a new tensor.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, InvalidValueError: Naming the argument, what was expected and
            what came.
    """
    _check_tensor("lora_up", "y", y)
    _check_tensor("lora_up", "lora_B", lora_B)
    if torch.compiler.is_compiling():
        return operators.lora_up(y, hidden, rounded(lora_B, y.dtype), scaling, channels_second)
    return LoraUpFunction.apply(y, hidden, lora_B, float(scaling), channels_second, None)


def noising(
    latents: torch.Tensor,
    noise: torch.Tensor,
    signal_rate: torch.Tensor,
    noise_rate: torch.Tensor,
    prediction_type: str,
    *,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    if torch.compiler.is_compiling():
        return operators.noising(latents, noise, signal_rate, noise_rate, prediction_type, copies)
    return _core.noising(latents, noise, signal_rate, noise_rate, prediction_type, copies, stream_of(latents))
