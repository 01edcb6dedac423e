"""Pictures that the base model drew, as latents: what the preservation term is taken at, for every adapter of a model.

Shape letters: N pictures, K stored draws of each, P samples, [...] one latent.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from cat_rs.adapter_file.disk import write_safetensors
from cat_rs.arguments import check, check_module, check_no_mode, check_path, refusing
from cat_rs.atomic import locked_folder
from cat_rs.errors import InvalidValueError, ShapeError
from cat_rs.evaluation import EvaluationConfig, EvaluationFileError
from cat_rs.evaluation.disk_cache import Store, Tensors
from cat_rs.evaluation.distributed import compute_missing
from cat_rs.evaluation.fingerprint import canonical_json, pipeline_fingerprint, tensors_hash, text_hash
from cat_rs.evaluation.generation import (
    PictureRequest,
    generate_latents,
    picture_generator,
    request_batches,
    require_no_adapter,
    undisturbed,
)
from cat_rs.processes import Processes
from cat_rs.step import PreservationSamples, device_values
from cat_rs.step.inputs import check_generator
from cat_rs.step.noise_schedule import NoiseSchedule
from cat_rs.step.pytree import map_tensors, named_tensors
from cat_rs.step.teacher_bank import TeacherBank, base_fingerprint, check_base, read_stored
from cat_rs.text_files import is_unicode
from cat_rs.training.model import Conditioning, default_resolution, encode_caption, stack

__all__ = ["PreservationDraw", "PreservationSet", "content_key"]

FORMAT = "cat-rs preservation set 1"
SUFFIX = ".safetensors"
# What a stored draw of a picture has.
STORED = ("noise", "timesteps", "base_pred")


class PreservationDraw(NamedTuple):
    """Samples of a set, for ``cat_step(latents, cond, draw.cond, preserve=draw.samples)``.

    Attributes:
        samples: Latents, [P, ...]; of a set with stored draws also noise, timesteps and base predictions.
        cond: The embedded prompts: the model's keyword arguments, with batch dimension P.
        pictures: Which pictures of the set they are, [P] int64, on the CPU.
    """

    samples: PreservationSamples
    cond: Mapping[str, Any]
    pictures: torch.Tensor


class PreservationSet:
    """The base model's own pictures of prompts, as latents: samples for the preservation term of CAT.

    A set depends on the base model, the prompts and the sampler, and on no concept: built once, it serves every
    adapter that is trained on that model. With K stored draws of noise, timestep and base prediction for each picture,
    a step needs no forward of the base model; the draws then repeat throughout the training.

    A picture takes one latent in the model's dtype, each prompt its embedding, and each stored draw one latent more
    and a prediction in bfloat16.

    Create one with :meth:`build`, :meth:`load` or :meth:`joined`.

    Attributes:
        prompts: The prompt of each picture.
        latent_shape: [...], the shape of one latent.
        draws: K; 0 where a step draws noise and timesteps itself, and predicts with the base model.
        key: A hash of all that determines the set: model, prompts, sampler, seeds, size and K.
    """

    def __init__(
        self,
        tensors: Tensors,
        prompts: Sequence[str],
        key: str,
        device: torch.device,
        weights: torch.Tensor | None = None,
    ) -> None:
        self._tensors, self._texts, self._device = tensors, prompts, device
        self._cond = _nested({name: tensor for name, tensor in tensors.items() if name.startswith("cond[")})
        # How often each picture is drawn.
        self._weights = torch.ones(len(tensors["latents"])) if weights is None else weights
        self.prompts = tuple(prompts[index] for index in tensors["prompt"].tolist())
        self.latent_shape = tuple(tensors["latents"].shape[1:])
        self.draws = tensors["noise"].shape[1] if "noise" in tensors else 0
        self.key = key

    def __len__(self) -> int:
        """N."""
        return len(self._weights)

    @classmethod
    def build(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        path: str | os.PathLike[str],
        *,
        sampling: EvaluationConfig | None = None,
        draws: int = 0,
        processes: Processes | None = None,
        progress: bool = True,
    ) -> PreservationSet:
        """Draws a picture for each prompt and seed, and writes the set; one that is there already is only read.

        Each batch is written beside the file when it is done, so that a build that was killed goes on where it
        stopped. A file of another set is replaced when the new one is whole; one that is no set is refused. Under
        torch.distributed every rank calls this with a pipeline of its own, and they take the batches in turns.

        Args:
            pipeline: A Stable Diffusion or SDXL pipeline without an adapter.
            prompts: What to draw, without trigger words.
            path: The file, or a folder for a file that is named by ``key``.
            sampling: How to draw; by default one seed for each prompt, and else as ``EvaluationConfig()``.
            draws: K.
            processes: The processes that share the work; by default those of torch.distributed, or this one alone.
            progress: Show a progress bar.

        Raises:
            InvalidValueError, EvaluationInputError: Naming what was expected and what came.
            EvaluationFileError: A file cannot be read or written.
        """
        op = "PreservationSet.build"
        check_no_mode(op)
        texts = "a sequence of texts, at least one"
        check(op, "prompts", prompts, texts, lambda it: len(it) and not isinstance(it, str) and all(map(_is_text, it)))
        check(op, "pipeline", pipeline, "a Stable Diffusion or SDXL pipeline", lambda it: it.unet and it.encode_prompt)
        check(op, "draws", draws, "an integer of at least 0", lambda draws: int(draws) == draws >= 0)
        check_path(op, "path", path)
        expected = "an EvaluationConfig or None"
        check(op, "sampling", sampling, expected, lambda it: it is None or isinstance(it, EvaluationConfig))
        require_no_adapter(pipeline)
        processes = Processes.current() if processes is None else processes
        sampling, size = sampling or EvaluationConfig(seeds=(0,)), default_resolution(pipeline)
        sampling = replace(sampling, height=sampling.height or size, width=sampling.width or size)
        draws, key = int(draws), content_key(pipeline, prompts, sampling, int(draws))
        if Path(path).is_dir():
            file = Path(path, f"{key}{SUFFIX}")
        else:
            file = Path(path)
            processes.on_main(lambda: _check_replaceable(file))
        parts = file.with_name(f"{file.name}.parts")
        # A set that is there needs no place that can be written.
        if processes.on_main(lambda: _key_of(file) != key or parts.exists()):
            with ExitStack() as locked:
                processes.on_main(lambda: _lock(parts, locked, progress))
                if processes.on_main(lambda: _key_of(file)) != key:
                    cond = _encoded(pipeline, prompts, sampling)
                    made = _made(pipeline, prompts, cond, sampling, draws, key, parts, processes, progress)
                    processes.on_main(lambda: write_set(file, pipeline, prompts, cond, made, key))
                if processes.is_main:
                    shutil.rmtree(parts, ignore_errors=True)
        return cls.load(file, pipeline.unet, pipeline.scheduler)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: torch.nn.Module, scheduler: Any) -> PreservationSet:
        """Reads a set for the training of a model; its tensors are mapped into memory.

        Args:
            path: The file.
            model: The denoiser, with or without an adapter; samples come to its device.
            scheduler: As of :class:`CatStep`.

        Raises:
            InvalidValueError: The file is no set, or one of another base model or schedule.
            OSError: The file cannot be read.
        """
        op = "PreservationSet.load"
        check_no_mode(op)
        check_path(op, "path", path)
        check_module(op, "model", model)
        tensors, facts = _read_whole(op, path)
        with refusing(op, "path", "a whole preservation set", os.fspath(path)):
            argument, table = f"{op}: `path`, {os.fspath(path)},", tensors.pop("schedule")
            check_base(argument, facts, table, model, NoiseSchedule(scheduler))
            _check_whole(argument, tensors, len(json.loads(facts["prompts"])), len(table))
            return cls(tensors, json.loads(facts["prompts"]), facts["key"], next(model.parameters()).device)

    @classmethod
    def joined(cls, sets: Sequence[PreservationSet], shares: Sequence[float] | None = None) -> PreservationSet:
        """Several sets as one, of which each gives its share of the samples.

        Args:
            sets: Sets of one model and size, all with the same number of stored draws.
            shares: Of each set; equal ones by default.

        Raises:
            InvalidValueError, ShapeError: Naming what was expected and what came.
        """
        op = "PreservationSet.joined"
        check_no_mode(op)
        check(op, "sets", sets, "at least one PreservationSet", lambda it: {type(each) for each in it} == {cls})
        shares = [1.0] * len(sets) if shares is None else shares
        expected = f"{len(sets)} finite numbers > 0"
        check(op, "shares", shares, expected, lambda it: len(it) == len(sets) and 0 < min(it) <= max(it) < math.inf)
        first, *others = ({name: _row(tensor) for name, tensor in each._tensors.items()} for each in sets)
        for other in others:
            if other != first:
                raise ShapeError(f"{op}: `sets` must have tensors of the same shapes, got {first} and {other}")
        starts = itertools.accumulate((len(each._texts) for each in sets), initial=0)
        tensors = {name: torch.cat([each._tensors[name] for each in sets]) for name in first}
        rows = [each._tensors["prompt"] + start for each, start in zip(sets, starts, strict=False)]
        weights = [share * each._weights / each._weights.sum() for each, share in zip(sets, shares, strict=True)]
        return cls(
            tensors | {"prompt": torch.cat(rows)},
            [text for each in sets for text in each._texts],
            text_hash([[each.key for each in sets], list(shares)]),
            sets[0]._device,
            torch.cat(weights),
        )

    def draw(self, count: int, generator: torch.Generator | None = None) -> PreservationDraw:
        """Draws samples, with replacement; on a GPU without waiting for it.

        Args:
            count: P.
            generator: Chooses, on the CPU; by default torch's global one.
        """
        op = "PreservationSet.draw"
        check(op, "count", count, "an integer of at least 1", lambda count: int(count) == count >= 1)
        check_generator(op, generator, torch.device("cpu"))
        count, stored = int(count), {}
        with refusing(op, "count", "few enough for the memory", count):
            pictures = torch.multinomial(self._weights, count, replacement=True, generator=generator)
        if self.draws:
            draws = torch.randint(self.draws, (count,), generator=generator)
            stored = {name: self._sent(self._tensors[name][pictures, draws]) for name in STORED}
        samples = PreservationSamples(self._sent(self._tensors["latents"][pictures]), **stored)
        rows = self._tensors["prompt"][pictures]
        return PreservationDraw(samples, map_tensors(lambda tensor: self._sent(tensor[rows]), self._cond), pictures)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        return device_values.send(tensor, self._device)


def content_key(pipeline: Any, prompts: Sequence[str], sampling: EvaluationConfig, draws: int) -> str:
    """Return a hash of all that determines a set."""
    recipe = asdict(sampling)
    # It changes pictures only by rounding.
    del recipe["batch_size"]
    fingerprint = pipeline_fingerprint(pipeline)
    return text_hash([FORMAT, fingerprint, list(prompts), recipe, draws])


def _encoded(pipeline: Any, prompts: Sequence[str], sampling: EvaluationConfig) -> Conditioning:
    """The prompts as arguments of the denoiser, one a row, on the CPU."""
    cond = stack([encode_caption(pipeline, prompt) for prompt in prompts])
    if "added_cond_kwargs" in cond:
        sizes = [sampling.height, sampling.width, 0, 0, sampling.height, sampling.width]
        added = cond["added_cond_kwargs"]
        added["time_ids"] = added["text_embeds"].new_tensor(sizes).repeat(len(prompts), 1)
    return map_tensors(lambda tensor: tensor.cpu(), cond)


def _made(
    pipeline: Any,
    prompts: Sequence[str],
    cond: Conditioning,
    sampling: EvaluationConfig,
    draws: int,
    key: str,
    parts: Path,
    processes: Processes,
    progress: bool,
) -> list[Tensors]:
    """Every batch of pictures: read where it is there, else drawn and written."""
    batches = request_batches(prompts, sampling)
    keys = [
        canonical_json([key, [[request.prompt_index, request.seed] for request in requests]]) for requests in batches
    ]

    def compute(numbers: Sequence[int], add: Callable[[int, Tensors], None]) -> None:
        total = sum(len(batches[number]) for number in numbers)
        bar = tqdm(
            total=total,
            unit="picture",
            desc="preservation set",
            disable=not (progress and processes.is_main and total),
            dynamic_ncols=True,
        )
        with bar, undisturbed(pipeline):
            for number in numbers:
                add(number, _batch(pipeline, batches[number], cond, sampling, draws))
                bar.update(len(batches[number]))

    return compute_missing(keys, compute, Store[Tensors](parts, dict, dict), processes)


def _batch(
    pipeline: Any, requests: Sequence[PictureRequest], cond: Conditioning, sampling: EvaluationConfig, draws: int
) -> Tensors:
    """The pictures of one call of the pipeline, and K draws of each."""
    latents = generate_latents(pipeline, requests, sampling).to(pipeline.unet.dtype)
    if not latents.isfinite().all():
        raise InvalidValueError(
            f"PreservationSet.build: `pipeline` must draw finite latents, got others for {requests[0].prompt!r} or "
            "what is drawn with it"
        )
    rows = torch.tensor([request.prompt_index for request in requests])
    tensors = {"latents": latents, "prompt": rows}
    if not draws:
        return tensors
    bank = TeacherBank.build(
        pipeline.unet,
        pipeline.scheduler,
        latents,
        map_tensors(lambda tensor: tensor[rows], cond),
        draws=draws,
        # One of its own, so that a batch is the same whenever it is made.
        generator=picture_generator(requests[0].prompt_index, requests[0].seed),
        batch_size=sampling.batch_size,
    )
    every = torch.arange(len(rows)).repeat_interleave(draws), torch.arange(draws).repeat(len(rows))
    read = bank.read(*every)._asdict()
    return tensors | {name: read[name].unflatten(0, (len(rows), draws)) for name in STORED}


def write_set(
    file: Path, pipeline: Any, prompts: Sequence[str], cond: Conditioning, made: Sequence[Tensors], key: str
) -> None:
    """Write the pictures of all batches, and the prompts' embeddings."""
    schedule = NoiseSchedule(pipeline.scheduler)
    tensors = {
        "schedule": schedule.table(),
        **{f"cond{name}": tensor for name, tensor in named_tensors(cond)},
        **{name: torch.cat([part[name] for part in made]) for name in made[0]},
    }
    facts = {
        "format": FORMAT,
        "key": key,
        "model": base_fingerprint(pipeline.unet),
        "prediction_type": schedule.prediction_type,
        "prompts": json.dumps(list(prompts)),
        "content": tensors_hash(tensors),
    }
    with _file_errors(file):
        write_safetensors(file, tensors, facts)


def _check_whole(argument: str, tensors: Tensors, prompts: int, timesteps: int) -> None:
    """Refuse a set whose tensors do not belong together, or hold what no build writes."""
    pictures, rows = tensors["latents"], tensors["prompt"]
    stored = [tensors[name] for name in STORED if name in tensors]
    cond = [tensor for name, tensor in tensors.items() if name.startswith("cond[")]
    fits = (
        len(pictures) == len(rows) > 0
        and bool(((rows >= 0) & (rows < prompts)).all())
        and all(len(tensor) == prompts for tensor in cond)
        and (not stored or (len(stored) == len(STORED) and all(len(tensor) == len(pictures) for tensor in stored)))
        and (not stored or bool(((tensors["timesteps"] >= 0) & (tensors["timesteps"] < timesteps)).all()))
        # NaN spreads to both ends; nothing is as large as the tensors.
        and all(bool(torch.stack(tensor.aminmax()).isfinite().all()) for tensor in tensors.values())
    )
    if not fits:
        raise InvalidValueError(
            f"{argument} must have a prompt and finite latents for each picture, and all or none of "
            f"{', '.join(STORED)} with timesteps of the schedule, got another"
        )


def _read_whole(op: str, path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, str]]:
    """The tensors and facts of a set, refused where a byte of it is not what was written."""
    tensors, facts = read_stored(op, path, FORMAT)
    if tensors_hash(tensors) != facts.get("content"):
        raise InvalidValueError(
            f"{op}: `path` must be a whole preservation set, got {path}, which is damaged; build it again"
        )
    return tensors, facts


def _check_replaceable(file: Path) -> None:
    """Refuse to write a set in the place of something else."""
    if file.exists():
        try:
            read_stored("PreservationSet.build", file, FORMAT)
        except (InvalidValueError, OSError) as error:
            raise InvalidValueError(
                f"PreservationSet.build: `path` must be new, or a set to replace, got {file}, which is none"
            ) from error


def _key_of(file: Path) -> str | None:
    """The key of the set in a file; None where there is none that is whole."""
    try:
        return _read_whole("PreservationSet.build", file)[1].get("key")
    except (InvalidValueError, OSError):
        return None


def _lock(folder: Path, stack: ExitStack, progress: bool) -> None:
    """Keep another build of the same file waiting, which then finds the set."""

    def waits() -> None:
        tqdm.write("preservation set: waiting for another process, which draws it", file=sys.stderr)

    with _file_errors(folder):
        stack.enter_context(locked_folder(folder, waits if progress else None))
    stack.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    """Leave nothing of a build that was refused before its first batch."""
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into ours, which reach all ranks."""
    try:
        yield
    except OSError as error:
        raise EvaluationFileError(f"PreservationSet.build: cannot write {path}: {error}") from error


def _nested(tensors: Tensors) -> dict[str, Any]:
    """Tensors that are named by subscripts, such as ``cond['text']``, as a nested mapping."""
    nested: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = re.findall(r"\['(\w+)'\]", name)
        place = nested
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = tensor
    return nested


def _row(tensor: torch.Tensor) -> str:
    """Shape and dtype of what a tensor has for each picture or prompt."""
    return f"{list(tensor.shape[1:])} {tensor.dtype}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_unicode(value)
