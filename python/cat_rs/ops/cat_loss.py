"""The CAT loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat_rs._native import core_of
from cat_rs.arguments import as_float, check_tensor
from cat_rs.errors import ShapeError
from cat_rs.ops.operator import empty_for_none, fake_gradients, none_for_empty, reraise, stream_of

__all__ = ["CatLossParts", "cat_loss", "student_loss"]


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


def _evaluate(
    tensors: Sequence[Any],
    settings: tuple[float, bool],
    scale: float | Tensor = 1.0,
    wanted: Sequence[bool] = (False, False),
) -> Any:
    """The total, the terms, and the wanted gradients of both predictions times ``scale``."""
    arguments: tuple[Any, ...] = (*tensors, *settings, scale, tuple(wanted), stream_of(tensors[0]))
    return core_of(tensors[0]).cat_loss(*arguments)


def _as_tensor(terms: tuple[float, float] | Tensor, total: Tensor) -> Tensor:
    """[diffusion, cat]: on the CPU the kernel returns numbers, of which nobody may ask."""
    return terms if isinstance(terms, Tensor) else total.new_tensor(terms)


class CatLossFunction(torch.autograd.Function):
    """Values and both gradients in one pass; the first backward hands the gradients over, a later one recomputes."""

    @staticmethod
    def forward(
        ctx: Any,
        model_pred: Tensor,
        model_pred_no_trigger: Tensor,
        target: Tensor,
        base_pred: Tensor,
        sample_weight: Tensor | None,
        mask: Tensor | None,
        preserve_weight: Tensor | None,
        preserve_mask: Tensor | None,
        cat_factor: float,
        mask_normalize: bool,
        parts: list[Any],
    ) -> Tensor:
        weights_and_masks = (sample_weight, mask, preserve_weight, preserve_mask)
        tensors = (model_pred, target, model_pred_no_trigger, base_pred, *weights_and_masks)
        # Unscaled, a float16 gradient of a mean over many elements is subnormal: it waits for the loss scale.
        deferred = torch.float16 in (model_pred.dtype, model_pred_no_trigger.dtype)
        wanted = (False, False) if deferred else ctx.needs_input_grad[:2]
        total, terms, *grads = _evaluate(tensors, (cat_factor, mask_normalize), 1.0, wanted)
        parts.append(terms)
        ctx.save_for_backward(*tensors)
        ctx.settings = cat_factor, mask_normalize
        ctx.grads = None if deferred else grads
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd is off here but under create_graph=True; the guard against a second derivative is not free.
        if torch.is_grad_enabled():
            return _cat_loss_gradients_once(ctx, grad_total)
        return CatLossFunction.gradients(ctx, grad_total)

    @staticmethod
    def gradients(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments of ``forward``."""
        # Nobody else holds the precomputed gradients, so they may be scaled in place and given away.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, _, *grads = _evaluate(ctx.saved_tensors, ctx.settings, grad_total, ctx.needs_input_grad[:2])
        # Reading a number of a GPU would wait for it.
        elif grad_total.is_cuda or grad_total.item() != 1.0:
            core_of(grad_total).scale_gradients(grads[0], grads[1], grad_total, stream_of(grad_total))
        return (*grads, *[None] * 9)


_cat_loss_gradients_once = once_differentiable(CatLossFunction.gradients)


def cat_loss(
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    *,
    cat_factor: float = 1.0,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    mask_normalize: bool = False,
    preserve_weight: Tensor | None = None,
    preserve_mask: Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | CatLossParts:
    r"""The Contrastive Adapter Training loss (Park et al., arXiv 2404.07554).

    .. math::
        L = L_{diff} + \lambda L_{cat}

        L_{diff} = \frac{1}{B} \sum_i w_i \operatorname{mean}(m (f(c) - y)^2)

        L_{cat} = \frac{1}{P} \sum_j w'_j \operatorname{mean}(m' (f(c_0) - f_{base}(c_0))^2)

    where the means run over a sample's elements and lambda is ``cat_factor``. In CAT both terms are over the same
    samples, P = B; the predictions without the trigger may also be those of other latents, with their own noise and
    timesteps.

    Values and both gradients come from one pass over the inputs. Sums accumulate in float32 lanes and float64 totals
    (float64 throughout if an input is float64) in an order that does not depend on the number of threads. Inputs that
    are not contiguous are copied once.

    The tensors are on the CPU or on one CUDA device. On CUDA the call waits for nothing, so the sample weights' values
    are not checked.

    Args:
        model_pred: f(z_t, t, c), the prediction for the prompt with the trigger word, [B, ...]; float32, float64,
            bfloat16 or float16. Each of the four tensors may have its own of these dtypes.
        target: y, the diffusion target (noise, velocity or flow), of the same shape; a constant.
        model_pred_no_trigger: f(z_t, t, c0), the prediction for the prompt without the trigger word, [P, ...], equal
            in the other dimensions.
        base_pred: f_base(z_t, t, c0), the base model's prediction for that prompt, [P, ...]; a constant.
        cat_factor: Weight of the preservation term, >= 0.
        sample_weight: w, [B], >= 0 (min-SNR, for example).
        mask: m, of the predictions' shape up to dimensions of size 1; bool or float.
        mask_normalize: Divide each sample by the mask's sum instead of by its number of elements. A sample masked
            out whole counts as zero.
        preserve_weight: w', [P], >= 0; ``sample_weight`` if None.
        preserve_mask: m', of the shape of ``model_pred_no_trigger`` up to dimensions of size 1; ``mask`` if None.
        return_parts: Return a :class:`CatLossParts` instead of the total alone.

    Returns:
        The loss, a 0-dim float32 tensor (float64 if an input is float64), or its parts.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    check_tensor("cat_loss", "model_pred", model_pred)
    check_tensor("cat_loss", "model_pred_no_trigger", model_pred_no_trigger)
    preserve_weight = sample_weight if preserve_weight is None else preserve_weight
    preserve_mask = mask if preserve_mask is None else preserve_mask
    weights_and_masks = (sample_weight, mask, preserve_weight, preserve_mask)
    if torch.compiler.is_compiling():
        predictions = (model_pred, target, model_pred_no_trigger, base_pred)
        total, values = cat_loss_operator(*predictions, *weights_and_masks, cat_factor, mask_normalize)
        return CatLossParts(total, *values.unbind()) if return_parts else total
    factor = cat_factor if type(cat_factor) is float else as_float("cat_loss", "cat_factor", cat_factor)
    tensors = (model_pred, model_pred_no_trigger, target, base_pred, *weights_and_masks)
    parts: list[Any] = []
    try:
        total = CatLossFunction.apply(*tensors, factor, mask_normalize, parts)
    except RuntimeError as error:
        names = ("model_pred", "model_pred_no_trigger", "target", "base_pred")
        more = ("sample_weight", "mask", "preserve_weight", "preserve_mask")
        reraise("cat_loss", error, **dict(zip((*names, *more), tensors, strict=True)))
    if not return_parts:
        return total
    return CatLossParts(total, *_as_tensor(parts[0], total).unbind())


def student_loss(
    student: Tensor,
    target: Tensor,
    base: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    preserve_weight: Tensor | None,
    preserve_mask: Tensor | None,
    cat_factor: float | Tensor,
    scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a training step over the samples of both terms in one batch, and its gradient, outside of autograd.

    As :func:`cat_loss`, with the student's predictions for both terms in one tensor and their gradients in another.
    On CUDA the call waits for nothing.

    Args:
        student: f(z_t, t, c) and f(z_t, t, c0), [B + P, ...]; f(z_t, t, c), [B, ...], without ``base``.
        target: y, [B, ...].
        base: f_base(z_t, t, c0), [P, ...]; None for plain LoRA.
        sample_weight: w, [B], >= 0.
        mask: m, of the target's shape up to dimensions of size 1.
        preserve_weight: w', [P], >= 0.
        preserve_mask: m', of the shape of ``base_pred`` up to dimensions of size 1.
        cat_factor: Weight of the preservation term: a number >= 0, or a 0-dim float64 tensor on the student's device.
        scale: Of the gradient, e.g. 1 / accumulated micro-steps: a number, or such a tensor.

    Returns:
        The loss, 0-dim; [diffusion, cat], without the factor; scale * dL/dstudent, of the student's shape and dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    return core_of(student).student_loss(
        student,
        target,
        base,
        sample_weight,
        mask,
        preserve_weight,
        preserve_mask,
        cat_factor,
        scale,
        stream_of(student),
    )


@torch.library.custom_op("cat_rs::cat_loss", mutates_args=())
def cat_loss_operator(
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    preserve_weight: Tensor | None,
    preserve_mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`cat_loss`. Returns the total and [diffusion, cat]."""
    weights_and_masks = (sample_weight, mask, preserve_weight, preserve_mask)
    tensors = (model_pred, target, model_pred_no_trigger, base_pred, *weights_and_masks)
    total, terms, _, _ = _evaluate(tensors, (cat_factor, mask_normalize))
    return total, _as_tensor(terms, total)


@cat_loss_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    wide = any(tensor.dtype == torch.float64 for tensor in arguments[:4])
    dtype = torch.float64 if wide else torch.float32
    return arguments[0].new_empty((), dtype=dtype), arguments[0].new_empty(2, dtype=dtype)


@torch.library.custom_op("cat_rs::cat_loss_backward", mutates_args=())
def _cat_loss_backward(
    grad_total: Tensor,
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    preserve_weight: Tensor | None,
    preserve_mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    check_tensor("cat_loss", "grad_total", grad_total)
    if grad_total.numel() != 1 or grad_total.dtype not in (torch.float32, torch.float64):
        got = f"{grad_total.dtype} of shape {list(grad_total.shape)}"
        raise ShapeError(f"cat_loss: `grad_total` must be one float32 or float64 element, got {got}")
    weights_and_masks = (sample_weight, mask, preserve_weight, preserve_mask)
    tensors = (model_pred, target, model_pred_no_trigger, base_pred, *weights_and_masks)
    _, _, *gradients = _evaluate(tensors, (cat_factor, mask_normalize), grad_total, wanted)
    first, second = empty_for_none(gradients, (model_pred, model_pred_no_trigger))
    # Both lie in one buffer, which the outputs of an operator must not.
    return [first, second.clone()]


@_cat_loss_backward.register_fake
def _(grad_total: Tensor, *arguments: Any) -> list[Tensor]:
    return fake_gradients((arguments[0], arguments[2]), arguments[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, grad_total: Tensor, grad_parts: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    gradients = _cat_loss_backward(grad_total, *ctx.saved_tensors, *ctx.settings, wanted)
    first, second = none_for_empty(gradients, wanted)
    return first, None, second, *[None] * 7


cat_loss_operator.register_autograd(_differentiate, setup_context=_save)
