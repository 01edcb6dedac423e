"""How a denoiser is called: the arguments it takes and what it returns, by model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cat_rs.arguments import check
from cat_rs.errors import DtypeError, InvalidValueError, ShapeError
from cat_rs.step import pytree
from cat_rs.unwrap import unwrap_model

__all__ = ["Convention", "Predict", "convention_of", "denoiser_predict", "predicted"]

Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor]


class Convention(NamedTuple):
    """How a diffusers model class deviates from ``model(latents, timestep=t, **cond) -> prediction``.

    Attributes:
        time: Converts the scheduler's timesteps, 0..1000, for the model; also takes the model's config.
        sign: Factor that turns the output into the prediction.
        unbatched: Keys of conditioning tensors that have no batch dimension where they have two dimensions.
        per_sample: Keys of conditioning lists with one entry a sample.
        latents: Name of the latents' argument; by default the first one.
        timestep: Name of the timesteps' argument.
        list_of_frames: Whether the model takes and returns latents [B, C, H, W] as a list of B tensors [C, 1, H, W].
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
    """The convention of the model's class or of its nearest known base class; the plain one for others."""
    names = (cls.__name__ for cls in type(unwrap_model(model, peft=True)).__mro__)
    return next((_CONVENTIONS[name] for name in names if name in _CONVENTIONS), Convention())


def predicted(
    op: str,
    predict: Predict,
    model: torch.nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    cond: Mapping[str, Any],
    cond_name: str = "cond",
) -> torch.Tensor:
    """``predict``'s answer, which has the latents' shape; an error of the model tells what it was called with.

    Raises:
        InvalidValueError, ShapeError: It answers something else.
    """
    try:
        prediction = predict(model, latents, timesteps, cond)
    except Exception as error:
        conditions = list(pytree.named_tensors(cond, cond_name))
        _check_given(op, model, latents, conditions, error)
        # Python 3.10 has no notes.
        if hasattr(error, "add_note"):
            given = [("latents", latents), ("timesteps", timesteps), *conditions]
            shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in given)
            error.add_note(f"`latents` and `cond` must be what `model` takes, got {shapes}")
        raise
    expected = "a function that returns a tensor"
    check(op, "predict", prediction, expected, lambda it: isinstance(it, torch.Tensor))
    if prediction.shape != latents.shape:
        shapes = f"{list(latents.shape)}, got {list(prediction.shape)}"
        raise ShapeError(f"{op}: `model` must predict the latents' shape {shapes}")
    return prediction


def _check_given(
    op: str,
    model: torch.nn.Module,
    latents: torch.Tensor,
    conditions: Sequence[tuple[str, torch.Tensor]],
    error: Exception,
) -> None:
    """Raises where a diffusers denoiser failed because it takes other tensors than these."""
    inner = unwrap_model(model, peft=True)
    channels = getattr(getattr(inner, "config", None), "in_channels", None)
    if isinstance(channels, int) and channels != latents.shape[-1 if latents.dim() == 3 else 1]:
        raise ShapeError(
            f"{op}: `latents` must have {channels} channels, as {type(inner).__name__} takes, got "
            f"{list(latents.shape)}: pictures must be encoded by the VAE first"
        ) from error
    dtypes = {each.dtype for each in inner.parameters() if each.is_floating_point() and not each.requires_grad}
    for name, tensor in [("latents", latents), *conditions]:
        is_other = dtypes and tensor.is_floating_point() and tensor.dtype not in dtypes
        if is_other and not torch.is_autocast_enabled(tensor.device.type):
            expected = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            got = str(tensor.dtype).removeprefix("torch.")
            raise DtypeError(f"{op}: `{name}` must have the model's dtype {expected}, got {got}") from error
    unbatched = tuple(f"[{key!r}]" for key in convention_of(model).unbatched)
    for name, tensor in conditions:
        has_batch = tensor.is_floating_point() and tensor.dim() > 1 and not name.endswith(unbatched)
        if has_batch and len(tensor) != len(latents):
            raise ShapeError(
                f"{op}: `{name}` must have the latents' batch size {len(latents)}, got {list(tensor.shape)}"
            ) from error


def denoiser_predict(model: torch.nn.Module) -> Predict:
    """A function that calls a diffusers denoiser, whose first argument is the latent and which takes ``timestep``.

    Where the output has twice the latents' channels, variance beside mean (PixArt and others), the prediction is its
    first half, as in diffusers' training scripts.

    Raises:
        InvalidValueError: The model does not have these arguments.
    """
    inner = unwrap_model(model, peft=True)
    convention = convention_of(model)
    parameters = list(inspect.signature(inner.forward).parameters)
    if not parameters or convention.timestep not in parameters:
        raise InvalidValueError(
            f"CatStep: `model` must take its latent first and have an argument 'timestep', got {type(inner).__name__} "
            f"with {parameters}: pass predict=lambda model, latents, timesteps, cond: ..."
        )
    options = {"return_dict": False} if "return_dict" in parameters else {}
    return _Call(convention, convention.latents or parameters[0], options, getattr(inner, "config", None))


@dataclass(frozen=True)
class _Call:
    """The call of a diffusers denoiser: an object, not a closure, so that a step can be pickled.

    Attributes:
        convention: The model class's.
        latents: Name of the latents' argument.
        options: Further arguments.
        config: The model's.
    """

    convention: Convention
    latents: str
    options: dict[str, Any]
    config: Any

    def __call__(
        self, model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        convention, out_channels = self.convention, getattr(self.config, "out_channels", None)
        time = convention.time(timesteps, self.config) if convention.time else timesteps
        z: Any = list(latents.unsqueeze(2).unbind()) if convention.list_of_frames else latents
        output = model(**{self.latents: z, convention.timestep: time}, **cond, **self.options)
        output = output[0] if isinstance(output, tuple) else output
        if convention.list_of_frames:
            output = torch.stack(output).squeeze(2)
        if output.dim() > 3 and out_channels == output.shape[1] == 2 * latents.shape[1]:
            output = output.chunk(2, dim=1)[0].contiguous()
        return -output if convention.sign < 0 else output
