"""Base predictions computed once, for stored draws of noise and timestep.

Shape letters: P pictures, K draws a picture, B batch, [...] one latent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cat_rs.adapter_file.disk import TensorParts, write_safetensors
from cat_rs.arguments import (
    check,
    check_memory,
    check_module,
    check_no_mode,
    check_path,
    check_tensor,
    refusing,
    shown,
)
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.ops.noising import noising
from cat_rs.step.conditions import Cond, as_kwargs
from cat_rs.step.denoiser import Predict, denoiser_predict, predicted
from cat_rs.step.inputs import check_generator, check_tensors
from cat_rs.step.noise_schedule import NoiseSchedule
from cat_rs.step.pytree import map_tensors, named_tensors

__all__ = ["TeacherBank", "TeacherDraws", "base_fingerprint", "check_base", "read_stored"]

FORMAT = "cat-rs teacher bank 1"
STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# PyTorch's CPU generator reads 32 bits of a seed.
SEEDS = 2**32
# Values kept of each picture's condition, and of each weight for the model's fingerprint.
SAMPLED = 256
# Rounding of a condition or a latent that is computed again, relative to its norm; other captions or pictures are much
# farther away.
ROUNDING = 0.02


class TeacherDraws(NamedTuple):
    """Stored draws, one a sample.

    Attributes:
        latents: x, [B, ...].
        noise: [B, ...], in the latents' dtype.
        timesteps: [B].
        base_pred: f_base(z_t, t, c0), [B, ...], in the bank's dtype.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    base_pred: torch.Tensor


class TeacherBank:
    """Draws of (noise, timestep) with their base predictions, K for each of P pictures, in memory or in a file.

    A step with a bank takes a stored draw instead of a fresh one, which saves the base model's forward. The K draws of
    a picture repeat throughout the training: too few of them preserve less. A bank belongs to one base model, one
    schedule, one set of pictures and their captions without the trigger.

    Each draw stores one latent-sized prediction in ``dtype`` plus 16 bytes; its noise is regenerated from a seed.

    Create one with :meth:`build` or :meth:`load`.

    Attributes:
        pictures: P.
        draws: K.
        dtype: Of the stored predictions.
        prediction_type: "epsilon", "v_prediction" or "flow".
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> None:
        self._tensors, self._metadata = tensors, facts
        self._base, self._latents, self._latents_std = tensors["base"], tensors["latents"], tensors.get("latents_std")
        self._timesteps, self._seeds = tensors["timesteps"], tensors["seeds"]
        self._cond_shapes: dict[str, list[int]] = json.loads(facts["cond_shapes"])
        self.pictures, self.draws = self._seeds.shape
        self.dtype = self._base.dtype
        self.prediction_type = facts["prediction_type"]

    @classmethod
    def build(
        cls,
        model: torch.nn.Module,
        scheduler: Any,
        latents: torch.Tensor,
        cond_no_trigger: Cond,
        *,
        draws: int,
        latents_std: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.bfloat16,
        path: str | os.PathLike[str] | None = None,
        batch_size: int = 8,
        prediction_type: str | None = None,
        predict: Predict | None = None,
        progress: bool = False,
    ) -> TeacherBank:
        """Draws noise and timesteps and predicts with the base model: P * K forwards.

        Args:
            model: The model that will be trained, its adapter on or off, or the base model alone.
            scheduler: As of :class:`CatStep`.
            latents: x, [P, ...], in the model's dtype, scaled as the model expects; on the CPU.
            cond_no_trigger: The pictures' prompts without the trigger, in the form that :class:`CatStep` takes, with
                batch dimension P.
            draws: K.
            latents_std: Standard deviation of the latents, [P, ...], such as that of a VAE's posterior: each draw then
                has its own latents, latents + latents_std * (standard normal).
            generator: Draws the timesteps and a seed for each draw; by default torch's global one.
            dtype: Dtype of the stored predictions: bfloat16, float16 or float32.
            path: File that the bank is written to while it is built, and that the returned bank reads from on demand.
                An older file there is replaced when the new one is complete. By default the bank is in memory.
            batch_size: Draws predicted in one call of the model.
            prediction_type: As of :class:`CatStep`.
            predict: As of :class:`CatStep`.
            progress: Show a progress bar (needs tqdm).

        Raises:
            InvalidValueError, ShapeError, DtypeError, DeviceError: Naming what was expected and what came.
            OSError: The file cannot be written; nothing is left behind.
        """
        op = "TeacherBank.build"
        check_no_mode(op)
        check_module(op, "model", model)
        for name, value in (("draws", draws), ("batch_size", batch_size)):
            check(op, name, value, "an integer of at least 1", lambda value: int(value) == value >= 1)
        _check_latents(latents, latents_std)
        if not isinstance(dtype, torch.dtype) or dtype not in STORAGE_DTYPES:
            got = shown(dtype).removeprefix("torch.")
            raise DtypeError(f"{op}: `dtype` must be bfloat16, float16 or float32, got {got}")
        if path is not None:
            check_path(op, "path", path)
        check_generator(op, generator, torch.device("cpu"))
        check(op, "predict", predict, "a function or None", lambda it: it is None or callable(it))
        schedule = NoiseSchedule(scheduler, prediction_type)
        cond = as_kwargs("cond_no_trigger", cond_no_trigger)
        pictures = len(latents)
        cond_tensors = _batched_tensors(cond, pictures)
        with refusing(op, "draws", "few enough for the memory", draws):
            timesteps = schedule.draw(pictures * draws, generator).reshape(pictures, draws)
        tensors = {
            "base": torch.empty((pictures, draws, *latents.shape[1:]), dtype=dtype, device="meta"),
            # A copy in the memory order that a file has, which is the order that noise is drawn in.
            "latents": latents.detach().clone(memory_format=torch.contiguous_format),
            "timesteps": timesteps,
            "seeds": torch.randint(SEEDS, (pictures, draws), generator=generator),
            "schedule": schedule.table(),
            **({} if latents_std is None else {"latents_std": latents_std.detach().clone()}),
            **{f"cond{name}": _sampled(tensor) for name, tensor in cond_tensors.items()},
        }
        metadata = {
            "format": FORMAT,
            "pictures": str(pictures),
            "draws": str(draws),
            "prediction_type": schedule.prediction_type,
            "model": base_fingerprint(model),
            "cond_shapes": json.dumps({name: list(tensor.shape[1:]) for name, tensor in cond_tensors.items()}),
        }
        # A bank without predictions reads the draws that the predictions are made from.
        bank = cls(tensors, metadata)
        tensors["noise_check"] = bank._first_noise()
        predictions = bank._predict(model, schedule, cond, predict or denoiser_predict(model), batch_size, progress)
        if path is not None:
            parts = TensorParts(dtype, tuple(tensors["base"].shape), predictions)
            write_safetensors(path, {**tensors, "base": parts}, metadata)
            return cls.load(path, latents=None)
        base = torch.empty_like(tensors["base"], device="cpu")
        for rows, part in zip(base.flatten(0, 1).split(batch_size), predictions, strict=True):
            rows.copy_(part)
        return cls({**tensors, "base": base}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, latents: torch.Tensor | None) -> TeacherBank:
        """Opens a bank that :meth:`build` wrote; predictions are mapped into memory and read on demand.

        Args:
            path: The file.
            latents: The pictures' current latents, [P, ...], to refuse a bank of other pictures; None trusts the file.

        Raises:
            InvalidValueError: The file is no bank of this format, or has other pictures, or this PyTorch draws other
                noise from its seeds.
            OSError: The file cannot be read.
        """
        check_no_mode("TeacherBank.load")
        check_path("TeacherBank.load", "path", path)
        tensors, metadata = read_stored("TeacherBank.load", path, FORMAT)
        bank = cls(tensors, metadata)
        if not torch.allclose(bank._first_noise(), tensors["noise_check"], rtol=0, atol=0.05):
            raise InvalidValueError(
                f"TeacherBank.load: `path` must be a bank whose seeds give the same noise here, got {path}: it was "
                "built with another PyTorch; build it anew"
            )
        if latents is not None:
            check_tensors("TeacherBank.load", latents=latents)
            check_memory("TeacherBank.load", "latents", latents)
            with refusing("TeacherBank.load", "latents", "a dense tensor on the CPU", latents):
                bank._check_same_latents(latents)
        return bank

    def read(self, pictures: torch.Tensor, draws: torch.Tensor) -> TeacherDraws:
        """Reads stored draws.

        Args:
            pictures: Indices below P, [B] int64.
            draws: Indices below K, [B] int64.
        """
        for name, index, count in (("pictures", pictures, self.pictures), ("draws", draws, self.draws)):
            _check_index(f"TeacherBank.read: `{name}`", index, count)
        if pictures.shape != draws.shape:
            raise ShapeError(
                f"TeacherBank.read: `draws` must have pictures' shape {list(pictures.shape)}, got {list(draws.shape)}"
            )
        latents, noise = self._redraw(pictures, draws)
        return TeacherDraws(latents, noise, self._timesteps[pictures, draws], self._base[pictures, draws])

    def draw(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> TeacherDraws:
        """Reads one draw of each picture: ``read(pictures, torch.randint(K, [B], generator=generator))``."""
        _check_index("CatStep: `latents` with a teacher bank", pictures, self.pictures)
        return self.read(pictures, torch.randint(self.draws, pictures.shape, generator=generator))

    def check_model(self, model: torch.nn.Module, schedule: NoiseSchedule) -> None:
        """Refuses a step of another base model or schedule.

        Raises:
            InvalidValueError: The predictions are not those of this base model and schedule.
        """
        check_base("CatStep: `teacher_bank`", self._metadata, self._tensors["schedule"], model, schedule)

    def check_cond(self, pictures: torch.Tensor, cond_no_trigger: Mapping[str, Any], *, compare: bool = True) -> None:
        """Refuses conditions other than those that these pictures' predictions were made with.

        A sample of each picture's condition is compared, or with ``compare=False`` its names and shapes alone.

        Raises:
            InvalidValueError, ShapeError: They differ by more than rounding.
        """
        _check_index("CatStep: `latents` with a teacher bank", pictures, self.pictures)
        ours = dict(named_tensors(cond_no_trigger))
        if ours.keys() != self._cond_shapes.keys():
            raise InvalidValueError(
                f"CatStep: `cond_no_trigger` must have the teacher bank's tensors {sorted(self._cond_shapes)}, got "
                f"{sorted(ours)}"
            )
        for name, tensor in ours.items():
            expected = [len(pictures), *self._cond_shapes[name]]
            if list(tensor.shape) != expected:
                raise ShapeError(
                    f"CatStep: `cond_no_trigger{name}` must have shape {expected} as in the teacher bank, got "
                    f"{list(tensor.shape)}"
                )
            if not compare:
                continue
            row = _first_difference(_sampled(tensor), self._tensors[f"cond{name}"][pictures])
            if row is not None:
                raise InvalidValueError(
                    f"CatStep: `cond_no_trigger{name}` must be what the teacher bank's predictions were made with, "
                    f"got another at index {row} (picture {int(pictures[row])}): other captions, another order of "
                    "pictures, or another text encoder"
                )

    def _check_same_latents(self, latents: torch.Tensor) -> None:
        if latents.shape != self._latents.shape:
            raise ShapeError(
                f"TeacherBank.load: `latents` must have the bank's shape {list(self._latents.shape)}, got "
                f"{list(latents.shape)}"
            )
        picture = _first_difference(latents.flatten(1), self._latents.flatten(1))
        if picture is not None:
            raise InvalidValueError(
                f"TeacherBank.load: `latents` must be those that the bank was built from, got another picture "
                f"{picture}"
            )

    def _redraw(self, pictures: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and noise of stored draws, from their seeds."""
        latents = self._latents[pictures]
        noise = torch.empty_like(latents)
        deviation = None if self._latents_std is None else torch.empty_like(latents)
        generator = torch.Generator()
        for row, seed in enumerate(self._seeds[pictures, draws].tolist()):
            generator.manual_seed(seed)
            noise[row].normal_(generator=generator)
            if deviation is not None:
                deviation[row].normal_(generator=generator)
        if self._latents_std is not None and deviation is not None:
            latents = latents + self._latents_std[pictures] * deviation
        return latents, noise

    def _first_noise(self) -> torch.Tensor:
        """The start of the first draw's noise, to detect a PyTorch that draws other noise from the seeds."""
        first = torch.zeros(1, dtype=torch.long)
        return self._redraw(first, first)[1].flatten()[:SAMPLED].float()

    def _predict(
        self,
        model: torch.nn.Module,
        schedule: NoiseSchedule,
        cond: Mapping[str, Any],
        predict: Predict,
        batch_size: int,
        progress: bool,
    ) -> Iterator[torch.Tensor]:
        """Base predictions in the storage dtype, picture after picture, ``batch_size`` at a time."""
        # PEFT is imported only where a model with its layers is trained.
        from cat_rs.peft import adapter_disabled

        device = next(model.parameters()).device
        chunks: Any = torch.arange(self.pictures * self.draws).split(batch_size)
        if progress:
            from tqdm import tqdm

            chunks = tqdm(chunks, desc="base predictions", dynamic_ncols=True)
        for chunk in chunks:
            pictures, draws = chunk // self.draws, chunk % self.draws
            latents, noise = self._redraw(pictures, draws)
            timesteps = self._timesteps[pictures, draws]
            rates = schedule.rates(timesteps, len(chunk))
            noisy, _ = noising(latents, noise, *rates, schedule.prediction_type)
            with torch.no_grad(), adapter_disabled(model):
                own = map_tensors(functools.partial(_rows_on, device, pictures), cond)
                base = predicted("TeacherBank.build", predict, model, noisy.to(device), timesteps.to(device), own)
            stored = base.to("cpu", self.dtype)
            if not stored.isfinite().all():
                raise InvalidValueError(
                    f"TeacherBank.build: `model` must predict finite numbers that fit {self.dtype}, got others for "
                    f"pictures {int(pictures[0])}..{int(pictures[-1])}"
                )
            yield stored


def check_base(
    argument: str, facts: Mapping[str, str], table: torch.Tensor, model: torch.nn.Module, schedule: NoiseSchedule
) -> None:
    """Refuses a base model or schedule other than those that stored tensors were made with.

    Of each weight a sample of its values and its dtype are compared.

    Args:
        argument: What errors call the stored tensors, such as "CatStep: `teacher_bank`".
        facts: Their prediction_type, and as model its fingerprint.
        table: That of their schedule.
        model: The model, its adapter on or off, or the base model alone.
        schedule: That of the training.

    Raises:
        InvalidValueError: They are others.
    """
    must = f"{argument} must be of"
    if facts["prediction_type"] != schedule.prediction_type:
        raise InvalidValueError(
            f"{must} prediction type {schedule.prediction_type!r}, got one of {facts['prediction_type']!r}"
        )
    ours = schedule.table()
    if ours.shape != table.shape or not torch.allclose(ours, table, rtol=1e-4, atol=1e-6):
        raise InvalidValueError(f"{must} this scheduler's noise schedule, got one of another")
    if facts["model"] != (fingerprint := base_fingerprint(model)):
        raise InvalidValueError(
            f"{must} this base model (fingerprint {fingerprint[:12]}), got one of another base model or dtype "
            f"({facts['model'][:12]})"
        )


def read_stored(
    op: str, path: str | os.PathLike[str], expected: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file of the expected format, mapped into memory, and its metadata."""
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise InvalidValueError(f"{op}: `path` must be a file, got {path}, a pipe or a device")
    # safe_open's own error does not tell a missing file from a folder.
    with open(path, "rb"):
        pass
    must = f"{op}: `path` must be a file of format {expected!r}, got {path}"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != expected:
                raise InvalidValueError(f"{must} of format {metadata.get('format')!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise InvalidValueError(f"{must}: {error}") from error


def _check_latents(latents: torch.Tensor, latents_std: torch.Tensor | None) -> None:
    check_tensor("TeacherBank.build", "latents", latents)
    check_tensors("TeacherBank.build", latents=latents, latents_std=latents_std)
    if latents.dim() < 2 or latents.numel() == 0:
        raise ShapeError(
            f"TeacherBank.build: `latents` must have shape [P, ...] with P >= 1, got {list(latents.shape)}"
        )
    if not latents.is_floating_point():
        raise DtypeError(f"TeacherBank.build: `latents` must be floating-point, got {latents.dtype}")
    if latents.device.type != "cpu":
        raise DeviceError(f"TeacherBank.build: `latents` must be on the CPU, got {latents.device}")
    if latents_std is not None and (latents_std.shape, latents_std.dtype) != (latents.shape, latents.dtype):
        raise ShapeError(
            f"TeacherBank.build: `latents_std` must have latents' shape and dtype {list(latents.shape)} "
            f"{latents.dtype}, got {list(latents_std.shape)} {latents_std.dtype}"
        )


def _rows_on(device: torch.device, rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor, wherever it is, on a device."""
    return tensor[rows.to(tensor.device)].to(device)


def _check_index(what: str, index: torch.Tensor, count: int) -> None:
    op, _, argument = what.partition(": ")
    argument = argument.split("`")[1]
    check_tensors(op, **{argument: index})
    if index.dtype != torch.int64:
        raise DtypeError(f"{what} must be int64 indices, got {index.dtype}")
    if index.device.type != "cpu":
        raise DeviceError(f"{what} must be indices on the CPU, got {index.device}")
    with refusing(op, argument, "a tensor on the CPU", index):
        if index.dim() != 1 or index.numel() == 0:
            raise ShapeError(f"{what} must have shape [B] with B >= 1, got {list(index.shape)}")
        low, high = int(index.min()), int(index.max())
    if not 0 <= low <= high < count:
        raise InvalidValueError(f"{what} must be indices in 0..{count - 1}, got {low}..{high}")


def _batched_tensors(cond: Mapping[str, Any], pictures: int) -> dict[str, torch.Tensor]:
    """The tensors of a condition by name; all must have a batch dimension."""
    tensors = dict(named_tensors(cond))
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or len(tensor) != pictures:
            raise ShapeError(
                f"TeacherBank.build: `cond_no_trigger{name}` must have a batch dimension of the {pictures} pictures, "
                f"got {list(tensor.shape)}"
            )
    return tensors


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Values of each row at equal distances, [rows, at most SAMPLED] float32."""
    rows = tensor.detach().reshape(len(tensor), -1)
    return rows[:, :: max(1, math.ceil(rows.shape[1] / SAMPLED))].to("cpu", torch.float32).contiguous()


def _first_difference(ours: torch.Tensor, theirs: torch.Tensor) -> int | None:
    """The first row that differs by more than rounding."""
    # Written so that NaN differs.
    same = (ours.float() - theirs.float()).norm(dim=1) <= ROUNDING * theirs.float().norm(dim=1)
    return None if same.all() else int((~same).nonzero()[0])


def base_fingerprint(model: torch.nn.Module) -> str:
    """A hash of names, shapes, dtypes and a sample of the values of the base model's parameters."""
    from cat_rs.peft import base_parameters

    digest = hashlib.sha256()
    for name, param in base_parameters(model):
        values = param.detach().reshape(-1)
        sample = values[:: max(1, math.ceil(values.numel() / SAMPLED))].to("cpu").contiguous()
        digest.update(f"{name} {param.dtype} {list(param.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
