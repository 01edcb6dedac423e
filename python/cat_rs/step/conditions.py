"""Conditions of a denoiser: evaluated once a step, and joined along the batch for the doubled student call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from cat_rs.arguments import check_plain, refusing, shown
from cat_rs.errors import InvalidValueError, ShapeError
from cat_rs.step import device_values, pytree
from cat_rs.step.adapters import Adapters
from cat_rs.step.denoiser import Convention

__all__ = ["Cond", "Conditions", "as_kwargs", "evaluate_conditions", "join_conditions"]

Cond = torch.Tensor | Mapping[str, Any]


class Conditions(NamedTuple):
    """Keyword arguments of the model.

    Attributes:
        trigger: c.
        no_trigger: c0; None for plain LoRA.
        base: What the base model predicts for, from the base text encoders; None where no text encoder trains, so that
            it is one of the others, and where the base model does not predict.
    """

    trigger: Mapping[str, Any]
    no_trigger: Mapping[str, Any] | None = None
    base: Mapping[str, Any] | None = None


def evaluate_conditions(
    cond: Cond | Callable[[], Cond],
    cond_no_trigger: Cond | Callable[[], Cond] | None,
    adapters: Adapters,
    *,
    preserve: bool,
    base: str | None,
) -> Conditions:
    """The conditions of a step.

    Args:
        cond, cond_no_trigger: As given to the step.
        adapters: Those that train.
        preserve: Whether to evaluate ``cond_no_trigger``.
        base: Name of the one for which the base model predicts; None if it does not.

    Raises:
        InvalidValueError: A condition has another type, or does not train the text encoders.
    """
    trains_text = bool(adapters.text_encoders)
    trigger = _evaluate("cond", cond, trains_text)
    no_trigger = _evaluate("cond_no_trigger", cond_no_trigger, trains_text) if preserve else None
    if base is None or not trains_text:
        return Conditions(trigger, no_trigger)
    with torch.no_grad(), adapters.disabled():
        given = cond if base == "cond" else cond_no_trigger
        return Conditions(trigger, no_trigger, _evaluate(base, given, trains_text))


def _evaluate(name: str, cond: Cond | Callable[[], Cond] | None, trains_text: bool) -> Mapping[str, Any]:
    if callable(cond):
        cond = cond()
    elif trains_text:
        raise InvalidValueError(
            f"CatStep: `{name}` must be a function that calls the text encoders, such as "
            f"lambda: text_encoder(input_ids)[0], for text_encoders to train, got {type(cond).__name__}"
        )
    kwargs = as_kwargs(name, cond)
    with refusing("CatStep", name, "a nested mapping of the model's keyword arguments", kwargs):
        tensors = list(pytree.tensors(kwargs))
    for tensor in tensors:
        check_plain("CatStep", name, tensor)
    if torch.is_grad_enabled():
        has_grad = any(tensor.requires_grad for tensor in tensors)
        if trains_text and not has_grad:
            raise InvalidValueError(
                f"CatStep: `{name}` must return what the text encoders compute with gradients, for text_encoders to "
                "train, got no tensor that requires a gradient"
            )
        if has_grad and not trains_text:
            # The base prediction would see the adapted encoder, and nothing would train it.
            raise InvalidValueError(
                f"CatStep: `{name}` must be constant without text_encoders, got a tensor that requires a gradient: "
                "give text_encoders=[...] to train them, or compute it under torch.no_grad()"
            )
    return kwargs


def as_kwargs(name: str, cond: Cond | None) -> Mapping[str, Any]:
    """A condition as a mapping of the model's keyword arguments."""
    if isinstance(cond, torch.Tensor):
        return {"encoder_hidden_states": cond}
    if isinstance(cond, Mapping):
        return cond
    raise InvalidValueError(
        f"CatStep: `{name}` must be a tensor (encoder_hidden_states) or a mapping of the model's keyword arguments, "
        f"got {type(cond).__name__}"
    )


def join_conditions(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    batches: tuple[int, int],
    *,
    unbatched: Collection[str] = (),
    convention: Convention = Convention(),  # noqa: B008 (an immutable tuple)
) -> dict[str, Any]:
    """Both conditions along the batch.

    A tensor whose first dimension is that of ``batches`` has a batch dimension and is concatenated. Every other value,
    a tensor of another first dimension included, belongs to no sample: it must be equal in both and is passed once.

    Args:
        first, second: Nested mappings and sequences of tensors and other values, of the same structure.
        batches: B and P, the samples of each.
        unbatched: Keys of the outer mapping whose tensors have no batch dimension even where their first dimension is
            B by chance.
        convention: Of the model: further such keys, and keys of lists with one entry a sample.

    Raises:
        InvalidValueError, ShapeError: The conditions do not match; the message names the entry.
    """
    joined = {}
    with refusing("CatStep", "cond_no_trigger", "what can be joined with cond", second):
        _check_keys("", first, second)
        for key in first:
            name, pair = f"[{key!r}]", (first[key], second[key])
            if key in unbatched or (key in convention.unbatched and getattr(pair[0], "ndim", 0) == 2):
                joined[key] = _shared(name, *pair, batches)
            elif key in convention.per_sample:
                joined[key] = _samples(name, *pair, batches)
            else:
                joined[key] = _join(name, *pair, batches)
    return joined


def _check_keys(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    if first.keys() != second.keys():
        raise InvalidValueError(
            f"CatStep: `cond_no_trigger{name}` must have cond's keys {sorted(first)}, got {sorted(second)}"
        )


def _join(name: str, first: Any, second: Any, batches: tuple[int, int]) -> Any:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape[:1] != batches[:1]:
            return _shared(name, first, second, batches)
        if second.shape != (batches[1], *first.shape[1:]):
            raise ShapeError(
                f"CatStep: `cond_no_trigger{name}` must have shape {[batches[1], *first.shape[1:]]} to stand beside "
                f"cond's {list(first.shape)} in one batch, got {list(second.shape)}"
            )
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        _check_keys(name, first, second)
        return {key: _join(f"{name}[{key!r}]", first[key], second[key], batches) for key in first}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return pytree.rebuild(first, [_join(f"{name}[{index}]", *pair, batches) for index, pair in pairs])
    return _shared(name, first, second, batches)


def _shared(name: str, first: Any, second: Any, batches: tuple[int, int]) -> Any:
    """What belongs to no sample: the same in both conditions."""
    are_tensors = isinstance(first, torch.Tensor), isinstance(second, torch.Tensor)
    if all(are_tensors):
        # Comparing values would wait for a GPU.
        on_gpu = device_values.is_gpu(first.device)
        if not (first is second or (_memory(first) == _memory(second) if on_gpu else torch.equal(first, second))):
            must = "be cond's tensor itself on a GPU" if on_gpu else "equal cond's tensor"
            raise ShapeError(
                f"CatStep: `cond_no_trigger{name}` must have a batch dimension of {batches[1]} or, without one, "
                f"{must}, got another tensor of shape {list(second.shape)}"
            )
    elif any(are_tensors) or first != second:
        must = f"`cond_no_trigger{name}` must equal cond's {shown(first)}"
        raise InvalidValueError(f"CatStep: {must}, got {shown(second)}")
    return first


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _samples(name: str, first: Any, second: Any, batches: tuple[int, int]) -> Any:
    """Both lists, which have one entry a sample."""
    for side, entries, batch in zip(("cond", "cond_no_trigger"), (first, second), batches, strict=True):
        if not isinstance(entries, list | tuple) or len(entries) != batch:
            got = f"{len(entries)} entries" if isinstance(entries, list | tuple) else type(entries).__name__
            raise ShapeError(f"CatStep: `{side}{name}` must be a list with one entry a sample, {batch}, got {got}")
    return [*first, *second]
