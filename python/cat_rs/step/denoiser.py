"""How a denoiser is called: its conditions, the timestep it takes, and what it returns, by model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from cat_rs.errors import InvalidValueError, ShapeError
from cat_rs.step import device_values
from cat_rs.unwrap import unwrap_model

__all__ = ["Cond", "Predict", "as_kwargs", "convention_of", "denoiser_predict", "join_conditions"]

Cond = torch.Tensor | Mapping[str, Any]
Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor]


class Convention(NamedTuple):
    """What a diffusers model class expects other than ``model(latents, timestep=t, **cond) -> prediction``.

    Attributes:
        time: Turns the scheduler's timesteps, 0..1000, and the model's config into what the model takes.
        sign: Times the output is the prediction.
        unbatched: Conditioning tensors that, with two dimensions, have no batch dimension.
        per_sample: Conditioning lists with one entry a sample.
        latents: The latents' argument.
        timestep: The timesteps' argument.
        list_of_frames: Whether latents [B, C, H, W] are taken, and returned, as a list of B tensors [C, 1, H, W].
    """

    time: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    sign: int = 1
    unbatched: tuple[str, ...] = ()
    per_sample: tuple[str, ...] = ()
    latents: str | None = None
    timestep: str = "timestep"
    list_of_frames: bool = False


def _thousandths(timesteps: torch.Tensor, config: Any) -> torch.Tensor:
    return timesteps / 1000


def _reversed_thousandths(timesteps: torch.Tensor, config: Any) -> torch.Tensor:
    return (1000 - timesteps) / 1000


def _scaled_by_config(timesteps: torch.Tensor, config: Any) -> torch.Tensor:
    return timesteps * config.timestep_scale


_POSITION_IDS = Convention(_thousandths, unbatched=("img_ids", "txt_ids"))
# As diffusers' pipelines and training scripts call these classes.
_CONVENTIONS = {
    "FluxTransformer2DModel": _POSITION_IDS,
    "Flux2Transformer2DModel": _POSITION_IDS,
    "ChromaTransformer2DModel": _POSITION_IDS,
    "LongCatImageTransformer2DModel": _POSITION_IDS,
    "OvisImageTransformer2DModel": _POSITION_IDS,
    "QwenImageTransformer2DModel": Convention(_thousandths, per_sample=("img_shapes",)),
    "QwenImage21Transformer2DModel": Convention(_thousandths, per_sample=("img_shapes",)),
    "SanaTransformer2DModel": Convention(_scaled_by_config),
    "Lumina2Transformer2DModel": Convention(_reversed_thousandths, sign=-1),
    "ZImageTransformer2DModel": Convention(
        _reversed_thousandths, sign=-1, per_sample=("cap_feats",), latents="x", timestep="t", list_of_frames=True
    ),
}


def convention_of(model: torch.nn.Module) -> Convention:
    """The convention of the model's class or of the nearest class it derives from; the plain one for others."""
    names = (cls.__name__ for cls in type(unwrap_model(model, peft=True)).__mro__)
    return next((_CONVENTIONS[name] for name in names if name in _CONVENTIONS), Convention())


def as_kwargs(name: str, cond: Cond) -> Mapping[str, Any]:
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
    batch: int,
    *,
    unbatched: Collection[str] = (),
    convention: Convention = Convention(),  # noqa: B008 (an immutable tuple)
) -> dict[str, Any]:
    """Both conditions along the batch.

    A tensor whose first dimension is ``batch`` has a batch dimension and is concatenated. Every other value, a tensor
    of another first dimension included, belongs to no sample: it must be equal in both and is passed once.

    Args:
        first, second: Nested mappings and sequences of tensors and other values, of the same structure.
        batch: B.
        unbatched: Keys of the outer mapping whose tensors have no batch dimension even where their first dimension is
            B by chance.
        convention: Of the model: further such keys, and keys of lists with one entry a sample.

    Raises:
        InvalidValueError, ShapeError: The conditions do not match; the message names the entry.
    """
    _check_keys("", first, second)
    joined = {}
    for key in first:
        name, pair = f"[{key!r}]", (first[key], second[key])
        if key in unbatched or (key in convention.unbatched and getattr(pair[0], "ndim", 0) == 2):
            joined[key] = _shared(name, *pair, batch)
        elif key in convention.per_sample:
            joined[key] = _samples(name, *pair, batch)
        else:
            joined[key] = _join(name, *pair, batch)
    return joined


def _check_keys(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    if first.keys() != second.keys():
        raise InvalidValueError(
            f"CatStep: `cond_no_trigger{name}` must have cond's keys {sorted(first)}, got {sorted(second)}"
        )


def _join(name: str, first: Any, second: Any, batch: int) -> Any:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape:
            raise ShapeError(
                f"CatStep: `cond_no_trigger{name}` must have cond's shape {list(first.shape)} for one batch of both, "
                f"got {list(second.shape)}"
            )
        return torch.cat([first, second]) if first.shape[:1] == (batch,) else _shared(name, first, second, batch)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        _check_keys(name, first, second)
        return {key: _join(f"{name}[{key!r}]", first[key], second[key], batch) for key in first}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return type(first)([_join(f"{name}[{index}]", *pair, batch) for index, pair in pairs])
    return _shared(name, first, second, batch)


def _shared(name: str, first: Any, second: Any, batch: int) -> Any:
    """What belongs to no sample."""
    tensors = isinstance(first, torch.Tensor), isinstance(second, torch.Tensor)
    if all(tensors):
        if first is not second and not _equal(first, second):
            must = "be cond's tensor itself on a GPU" if device_values.is_gpu(first.device) else "equal cond's tensor"
            raise ShapeError(
                f"CatStep: `cond_no_trigger{name}` must have a batch dimension of {batch} or, without one, {must}, "
                f"got another tensor of shape {list(second.shape)}"
            )
    elif any(tensors) or first != second:
        raise InvalidValueError(f"CatStep: `cond_no_trigger{name}` must equal cond's {first!r}, got {second!r}")
    return first


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal; on a GPU, where values would have to be waited for, whether they are the same."""
    if device_values.is_gpu(first.device):
        return all(
            one == other
            for one, other in (
                (first.data_ptr(), second.data_ptr()),
                (first.shape, second.shape),
                (first.stride(), second.stride()),
                (first.dtype, second.dtype),
            )
        )
    return torch.equal(first, second)


def _samples(name: str, first: Any, second: Any, batch: int) -> Any:
    """Lists with one entry a sample, one after the other."""
    for side, entries in (("cond", first), ("cond_no_trigger", second)):
        if not isinstance(entries, list | tuple) or len(entries) != batch:
            got = f"{len(entries)} entries" if isinstance(entries, list | tuple) else type(entries).__name__
            raise ShapeError(f"CatStep: `{side}{name}` must be a list with one entry a sample, {batch}, got {got}")
    return [*first, *second]


def denoiser_predict(model: torch.nn.Module) -> Predict:
    """How to call a diffusers denoiser: its first argument is the latent, and it takes ``timestep``.

    Of an output with the variance beside the mean (PixArt and other models with twice the latents' channels), the
    prediction is the first half, as in diffusers' training scripts.

    Raises:
        InvalidValueError: The model is called in another way.
    """
    inner = unwrap_model(model, peft=True)
    convention = convention_of(model)
    parameters = list(inspect.signature(inner.forward).parameters)
    if not parameters or convention.timestep not in parameters:
        raise InvalidValueError(
            f"CatStep: `model` must take its latent first and have an argument 'timestep', got {type(inner).__name__} "
            f"with {parameters}: pass predict=lambda model, latents, timesteps, cond: ..."
        )
    latent_name = convention.latents or parameters[0]
    options = {"return_dict": False} if "return_dict" in parameters else {}
    config = getattr(inner, "config", None)
    out_channels = getattr(config, "out_channels", None)

    def predict(
        model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        time = convention.time(timesteps, config) if convention.time else timesteps
        z: Any = list(latents.unsqueeze(2).unbind()) if convention.list_of_frames else latents
        output = model(**{latent_name: z, convention.timestep: time}, **cond, **options)
        output = output[0] if isinstance(output, tuple) else output
        if convention.list_of_frames:
            output = torch.stack(output).squeeze(2)
        if output.dim() > 3 and out_channels == output.shape[1] == 2 * latents.shape[1]:
            output = output.chunk(2, dim=1)[0].contiguous()
        return -output if convention.sign < 0 else output

    return predict
