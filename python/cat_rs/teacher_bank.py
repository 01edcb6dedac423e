"""Base predictions computed once: draws of noise and timestep for each picture, and what the base model predicts.

Shape letters: P pictures, K draws a picture, B batch, [...] one latent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cat_rs.atomic import new_file
from cat_rs.denoiser import Cond, Predict, as_kwargs, denoiser_predict
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.ops.noising import noising
from cat_rs.schedule import NoiseSchedule

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["TeacherBank", "TeacherDraws"]

FORMAT = "cat-rs teacher bank 1"
STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# PyTorch's CPU generator reads 32 bits of a seed.
SEEDS = 2**32
# Values kept of each picture's condition, and of each weight for the model's fingerprint.
SAMPLED = 256
# What rounding may do to a condition or a latent that is computed again, relative to its norm; other captions or
# pictures are much farther away.
SAME = 0.02
# File names of the dtypes that a bank holds.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


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

    A step with a bank takes a stored draw instead of a fresh one and so saves the base model's forward. The same K
    draws of a picture come again and again: too few of them preserve less. A bank belongs to one base model, one
    schedule, one set of pictures and their captions without the trigger.

    Only the prediction and a seed are kept of a draw; its noise is drawn again from the seed when it is read. A draw
    costs the latent's size in ``dtype`` and 16 bytes.

    Made by :meth:`build` or :meth:`load`.

    Attributes:
        pictures: P.
        draws: K.
        dtype: Of the stored predictions.
        prediction_type: "epsilon", "v_prediction" or "flow".
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> None:
        self._tensors, self._facts = tensors, facts
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
            model: The model that will be trained, its adapter on or off, or the base model alone; on the CPU.
            scheduler: As of :class:`CatStep`.
            latents: x, [P, ...], in the model's dtype, scaled as the model expects.
            cond_no_trigger: The pictures' prompts without the trigger, in the form that :class:`CatStep` takes, with
                batch dimension P.
            draws: K.
            latents_std: Standard deviation of the latents, [P, ...], as a VAE's posterior has: each draw then has
                latents of its own, latents + latents_std * (standard normal).
            generator: Draws the timesteps and a seed for each draw; by default torch's global one.
            dtype: To store predictions in: bfloat16, float16 or float32.
            path: File to write the bank into as it is built; the bank returned reads from it as it needs. An older
                file there is replaced when the new one is whole. By default the bank is in memory.
            batch_size: Draws predicted in one call of the model.
            prediction_type, predict: As of :class:`CatStep`.
            progress: Show a progress bar (needs tqdm).

        Raises:
            InvalidValueError, ShapeError, DtypeError, DeviceError: Naming what was expected and what came.
            OSError: The file cannot be written; nothing is left behind.
        """
        _check_latents(latents, latents_std)
        for name, value in (("draws", draws), ("batch_size", batch_size)):
            if value < 1:
                raise InvalidValueError(f"TeacherBank.build: `{name}` must be at least 1, got {value}")
        if dtype not in STORAGE_DTYPES:
            raise DtypeError(
                f"TeacherBank.build: `dtype` must be {_names(STORAGE_DTYPES)}, got {str(dtype).removeprefix('torch.')}"
            )
        schedule = NoiseSchedule(scheduler, prediction_type)
        cond = as_kwargs("cond_no_trigger", cond_no_trigger)
        count = len(latents)
        timesteps = schedule.draw(count * draws, generator).reshape(count, draws)
        seeds = torch.randint(SEEDS, (count, draws), generator=generator)
        leaves = dict(_leaves("", cond))
        for name, leaf in leaves.items():
            if leaf.dim() == 0 or len(leaf) != count:
                raise ShapeError(
                    f"TeacherBank.build: `cond_no_trigger{name}` must have a batch dimension of the {count} pictures, "
                    f"got {list(leaf.shape)}"
                )
        tensors = {
            "base": torch.empty((count, draws, *latents.shape[1:]), dtype=dtype, device="meta"),
            # A copy that lies as a file's does: noise is drawn in memory order.
            "latents": latents.detach().clone(memory_format=torch.contiguous_format),
            "timesteps": timesteps,
            "seeds": seeds,
            "schedule": _table(schedule),
            **({} if latents_std is None else {"latents_std": latents_std.detach().clone()}),
            **{f"cond{name}": _sampled(leaf) for name, leaf in leaves.items()},
        }
        facts = {
            "format": FORMAT,
            "pictures": str(count),
            "draws": str(draws),
            "prediction_type": schedule.prediction_type,
            "model": _fingerprint(model),
            "cond_shapes": json.dumps({name: list(leaf.shape[1:]) for name, leaf in leaves.items()}),
        }
        # Everything but the predictions is known: the bank itself reads the draws that they are made from.
        bank = cls(tensors, facts)
        tensors["noise_check"] = bank._first_noise()
        predictions = bank._predict(model, schedule, cond, predict or denoiser_predict(model), batch_size, progress)
        if path is not None:
            with new_file(path) as file:
                _write(file, tensors, facts, predictions)
            return cls.load(path, latents=None)
        base = torch.empty(tensors["base"].shape, dtype=dtype)
        done = 0
        for chunk in predictions:
            base.flatten(0, 1)[done : done + len(chunk)] = chunk
            done += len(chunk)
        return cls({**tensors, "base": base}, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, latents: torch.Tensor | None) -> TeacherBank:
        """Opens a bank that :meth:`build` wrote; predictions are mapped into memory and read as they are needed.

        Args:
            path: The file.
            latents: The pictures' latents now, [P, ...], to refuse a bank of other pictures; None trusts the file.

        Raises:
            InvalidValueError: The file is no bank of this format, or one of other pictures, or this PyTorch draws
                other noise from its seeds.
            OSError: The file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        # safe_open's own error does not tell a missing file from a folder.
        with open(path, "rb"):
            pass
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise InvalidValueError(
                        f"TeacherBank.load: `path` must be a file of format {FORMAT!r}, got {path} of format "
                        f"{facts.get('format')!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise InvalidValueError(f"TeacherBank.load: `path` must be a teacher bank, got {path}: {error}") from error
        bank = cls(tensors, facts)
        if not torch.allclose(bank._first_noise(), tensors["noise_check"], rtol=0, atol=0.05):
            raise InvalidValueError(
                f"TeacherBank.load: `path` must be a bank whose seeds give the same noise here, got {path}: it was "
                "built with another PyTorch; build it anew"
            )
        if latents is not None:
            bank._check_same_latents(latents)
        return bank

    def read(self, pictures: torch.Tensor, draws: torch.Tensor) -> TeacherDraws:
        """Stored draws.

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
        """One of each picture's draws, uniformly: ``read(pictures, torch.randint(K, [B], generator=generator))``."""
        _check_index("CatStep: `latents` with a teacher bank", pictures, self.pictures)
        return self.read(pictures, torch.randint(self.draws, pictures.shape, generator=generator))

    def check_model(self, model: torch.nn.Module, schedule: NoiseSchedule) -> None:
        """Refuses a step of another base model or schedule.

        Weights are compared by a sample of each, its dtype included.

        Raises:
            InvalidValueError: The predictions are not those of this base model and schedule.
        """
        must = "CatStep: `teacher_bank` must be of"
        if self.prediction_type != schedule.prediction_type:
            raise InvalidValueError(
                f"{must} prediction type {schedule.prediction_type!r}, got one of {self.prediction_type!r}"
            )
        ours, theirs = _table(schedule), self._tensors["schedule"]
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
            raise InvalidValueError(f"{must} this scheduler's noise schedule, got one of another")
        if self._facts["model"] != (fingerprint := _fingerprint(model)):
            raise InvalidValueError(
                f"{must} this base model (fingerprint {fingerprint[:12]}), got one of another base model or dtype "
                f"({self._facts['model'][:12]})"
            )

    def check_cond(self, pictures: torch.Tensor, cond_no_trigger: Mapping[str, Any]) -> None:
        """Refuses conditions that the predictions of these pictures were not made with.

        A sample of each picture's condition is compared.

        Raises:
            InvalidValueError, ShapeError: They differ by more than rounding.
        """
        _check_index("CatStep: `latents` with a teacher bank", pictures, self.pictures)
        leaves = dict(_leaves("", cond_no_trigger))
        if leaves.keys() != self._cond_shapes.keys():
            raise InvalidValueError(
                f"CatStep: `cond_no_trigger` must have the teacher bank's tensors {sorted(self._cond_shapes)}, got "
                f"{sorted(leaves)}"
            )
        for name, leaf in leaves.items():
            expected = [len(pictures), *self._cond_shapes[name]]
            if list(leaf.shape) != expected:
                raise ShapeError(
                    f"CatStep: `cond_no_trigger{name}` must have shape {expected} as in the teacher bank, got "
                    f"{list(leaf.shape)}"
                )
            place = _first_difference(_sampled(leaf), self._tensors[f"cond{name}"][pictures])
            if place is not None:
                raise InvalidValueError(
                    f"CatStep: `cond_no_trigger{name}` must be what the teacher bank's predictions were made with, "
                    f"got another at index {place} (picture {int(pictures[place])}): other captions, another order of "
                    "pictures, or another text encoder"
                )

    def _check_same_latents(self, latents: torch.Tensor) -> None:
        if latents.shape != self._latents.shape:
            raise ShapeError(
                f"TeacherBank.load: `latents` must have the bank's shape {list(self._latents.shape)}, got "
                f"{list(latents.shape)}"
            )
        place = _first_difference(latents.flatten(1), self._latents.flatten(1))
        if place is not None:
            raise InvalidValueError(
                f"TeacherBank.load: `latents` must be those that the bank was built from, got another picture {place}"
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
        """The start of the first draw's noise, which tells whether seeds mean here what they meant at the build."""
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
        """Base predictions in the storage dtype, picture after picture, `batch_size` at a time."""
        # PEFT is imported only where a model with its layers is trained.
        from cat_rs.peft import adapter_disabled

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
                base = predict(model, noisy, timesteps, _take(cond, pictures))
            if base.shape != latents.shape:
                raise ShapeError(
                    f"TeacherBank.build: `model` must predict the latents' shape {list(latents.shape)}, got "
                    f"{list(base.shape)}"
                )
            stored = base.to(self.dtype)
            if not stored.isfinite().all():
                raise InvalidValueError(
                    f"TeacherBank.build: `model` must predict finite numbers that fit {self.dtype}, got others for "
                    f"pictures {int(pictures[0])}..{int(pictures[-1])}"
                )
            yield stored


def _check_latents(latents: torch.Tensor, latents_std: torch.Tensor | None) -> None:
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


def _check_index(what: str, index: torch.Tensor, count: int) -> None:
    if index.dtype != torch.int64:
        raise DtypeError(f"{what} must be int64 indices, got {index.dtype}")
    if index.dim() != 1 or index.numel() == 0:
        raise ShapeError(f"{what} must have shape [B] with B >= 1, got {list(index.shape)}")
    low, high = int(index.min()), int(index.max())
    if not 0 <= low <= high < count:
        raise InvalidValueError(f"{what} must be indices in 0..{count - 1}, got {low}..{high}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a condition, by the expression that finds them."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}[{key!r}]", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}[{index}]", inner)


def _take(value: Any, index: torch.Tensor) -> Any:
    """A condition of some of the pictures."""
    if isinstance(value, torch.Tensor):
        return value[index]
    if isinstance(value, Mapping):
        return {key: _take(inner, index) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_take(inner, index) for inner in value])
    return value


def _sampled(leaf: torch.Tensor) -> torch.Tensor:
    """Values of each row at equal distances, [len(leaf), at most SAMPLED] float32."""
    rows = leaf.detach().reshape(len(leaf), -1)
    return rows[:, :: max(1, math.ceil(rows.shape[1] / SAMPLED))].to("cpu", torch.float32).contiguous()


def _first_difference(ours: torch.Tensor, theirs: torch.Tensor) -> int | None:
    """The first row that differs by more than rounding."""
    # Written so that NaN differs.
    same = (ours.float() - theirs.float()).norm(dim=1) <= SAME * theirs.float().norm(dim=1)
    return None if same.all() else int((~same).nonzero()[0])


def _table(schedule: NoiseSchedule) -> torch.Tensor:
    """What decides z_t at each timestep."""
    if schedule.alphas_cumprod is not None:
        return schedule.alphas_cumprod
    return torch.cat([schedule.timesteps, torch.tensor([float(schedule.num_train_timesteps)])])


def _fingerprint(model: torch.nn.Module) -> str:
    """A hash of names, shapes, dtypes and a sample of the values of the base model's parameters."""
    from cat_rs.peft import base_parameters

    digest = hashlib.sha256()
    for name, param in base_parameters(model):
        values = param.detach().reshape(-1)
        sample = values[:: max(1, math.ceil(values.numel() / SAMPLED))].to("cpu").contiguous()
        digest.update(f"{name} {param.dtype} {list(param.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str], base: Iterator[torch.Tensor]
) -> None:
    """Writes a safetensors file, the predictions as they come: the bank need not fit into memory."""
    # The widest first, as safetensors does, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(facts)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for part in base if name == "base" else (tensors[name],):
            file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
