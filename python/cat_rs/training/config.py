"""The settings of a training."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cat_rs.atomic import write_bytes
from cat_rs.options import ConfigError, check_range, from_mapping, option, read_config_file

_MODEL = "model and data"
_CAT = "contrastive adapter training"
_ADAPTER = "adapter"
_OPTIMIZER = "optimization"
_PICTURES = "pictures"
_EVALUATION = "evaluation"
_OUTPUT = "output and checkpoints"
_MACHINE = "machine"

# Settings that may change when a training is resumed: they do not change what was learned before.
_FREE_ON_RESUME = frozenset(
    {"data", "output_dir", "steps", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}
    | {"resume", "overwrite", "capture", "log_with", "sample_every", "sample_prompts"}
    | {"evaluate_every", "evaluate_prompts", "evaluate_concept", "evaluate_encoder", "evaluate_seeds"}
    | {"evaluate_inference_steps", "evaluate_guidance", "evaluate_batch", "evaluate_keep"}
)

# Settings that mean nothing beside other preservations than these.
_BESIDE_PRESERVATION = {
    "teacher_draws": ("cat",),
    "preserve_prompts": ("cat", "prior", "layers"),
    "cat_ratio": ("cat", "l2", "layers"),
    "cat_drift": ("cat", "l2", "layers"),
}


# What trainings did before there were such settings.
_BEFORE_THEY_CAME = {"preserve": "captions", "preserve_every": 1, "teacher_draws": 0}


class Preserved(NamedTuple):
    """What the preservation term is taken at, in which steps, and with how many stored base predictions a picture."""

    preserve: Literal["captions", "blank", "set"]
    preserve_every: int
    teacher_draws: int


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `train` needs to know, under the names of the command line and the config file.

    `cat-rs train --help` describes each. Raises ConfigError for a value out of range.
    """

    model: str = option(group=_MODEL, help="SD or SDXL model: a folder or a hub id", metavar="DIR_OR_ID")
    data: str = option(group=_MODEL, help="folder of pictures of the concept", metavar="FOLDER")
    output_dir: str = option(
        "adapter", group=_MODEL, help="folder for the adapter, log and checkpoints", metavar="DIR"
    )
    caption: str | None = option(
        None,
        group=_MODEL,
        help="caption of pictures that have none in metadata.jsonl or a .txt beside them; "
        "{trigger}, {class_word} and {name} (of the file) are filled in",
        metavar="TEXT",
    )

    trigger: tuple[str, ...] = option(
        (),
        group=_CAT,
        help="trigger words of the captions; WORD=CLASS gives one a class word of its own",
        metavar="WORD",
    )
    class_word: str | None = option(
        None,
        group=_CAT,
        help="what the concept is an example of; stands in for the trigger in the caption c0",
        metavar="WORD",
    )
    cat_factor: float = option(
        1.0, group=_CAT, help="weight of the preservation term: L = L_diff + cat_factor * L_cat; 0 is plain LoRA"
    )
    cat_factor_end: float | None = option(
        None, group=_CAT, help="weight of the preservation term in the last step; as in the first if not given"
    )
    cat_factor_shape: Literal["linear", "cosine"] = option(
        "linear", group=_CAT, help="how the weight goes from the first step to the last"
    )
    cat_ratio: float | None = option(
        None,
        group=_CAT,
        help="keep cat_factor * L_cat at this fraction of L_diff instead; cat_factor is then its upper bound",
        metavar="RATIO",
    )
    cat_drift: float | None = option(
        None,
        group=_CAT,
        help="hold L_cat at this fraction of L_diff instead: the weight begins with cat_factor, rises while the "
        "fraction is above this one, and falls while it is below, between a tenth and a hundred times cat_factor",
        metavar="DRIFT",
    )
    preserve_every: int | None = option(
        None,
        group=_CAT,
        help="the preservation term is in every so many steps only, at so many times its weight; the others cost what "
        "plain LoRA costs; if not given, 4 with a set, --preservation cat and a constant factor, else 1",
    )
    preservation: Literal["cat", "prior", "dco", "l2", "layers"] = option(
        "cat",
        group=_CAT,
        help="what keeps the base model: its predictions without the trigger (cat); prior preservation, which learns "
        "the pictures of --preserve set (prior); Direct Consistency Optimization, "
        "whose beta is cat_factor (dco); the norm of the weights' change (l2); the change of each layer's output "
        "(layers)",
    )
    preserve: Literal["captions", "blank", "set"] | None = option(
        None,
        group=_CAT,
        help="what L_cat is taken at: a set of pictures that the base model drew for the captions without the trigger "
        "and for general prompts, the default of --preservation cat and prior; or the pictures of the concept, for "
        "those captions or for the empty one (blank)",
    )
    preserve_prompts: str | None = option(
        None,
        group=_CAT,
        help="file of prompts to preserve, one a line, in the place of the bundled general prompts; with --preserve "
        "captions, beside them",
        metavar="FILE",
    )
    preserve_share: float = option(
        0.5, group=_CAT, help="how often one of them takes the place of a caption without the trigger"
    )
    preserve_set: tuple[str, ...] = option(
        (),
        group=_CAT,
        help="sets that cat-rs preserve wrote, with equal shares; if not given, the set is built, and kept in the "
        "user's cache for other trainings",
        metavar="FILE",
    )
    preserve_batch: int | None = option(
        None, group=_CAT, help="pictures of the set in a batch; batch_size if not given"
    )
    snr_gamma: float | None = option(
        None, group=_CAT, help="weight both terms by min-SNR with this gamma (5 is usual)", metavar="GAMMA"
    )
    teacher_draws: int | None = option(
        None,
        group=_CAT,
        help="cached base predictions per picture of the set, or of the concept (per view of it, with crops or "
        "mirroring); 0 predicts anew in every step; if not given, 8 for a set that the training builds for "
        "--preservation cat without --noise-offset, else 0; a set that is given has its own",
    )

    rank: int = option(16, group=_ADAPTER, help="rank r: A is r x in, B is out x r")
    lora_alpha: float | None = option(None, group=_ADAPTER, help="scaling = lora_alpha / r; the rank if not given")
    lora_dropout: float = option(0.0, group=_ADAPTER, help="dropout in front of A")
    target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), group=_ADAPTER, help="layers that get an adapter", metavar="NAME"
    )

    steps: int = option(500, group=_OPTIMIZER, help="optimizer steps")
    batch_size: int = option(4, group=_OPTIMIZER, help="pictures in a batch, of each process")
    accumulate: int = option(1, group=_OPTIMIZER, help="batches in an optimizer step")
    lr: float = option(1e-4, group=_OPTIMIZER, help="learning rate")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", group=_OPTIMIZER, help="how the learning rate changes")
    lr_warmup_steps: int = option(
        0, group=_OPTIMIZER, help="steps until the learning rate is reached; not with constant"
    )
    weight_decay: float = option(1e-2, group=_OPTIMIZER, help="decoupled weight decay of AdamW")
    beta1: float = option(0.9, group=_OPTIMIZER, help="decay of AdamW's mean of gradients")
    beta2: float = option(0.999, group=_OPTIMIZER, help="decay of AdamW's mean of squared gradients")
    eps: float = option(1e-8, group=_OPTIMIZER, help="AdamW's epsilon")
    max_grad_norm: float = option(1.0, group=_OPTIMIZER, help="clip the gradient to this norm; 0 does not clip")
    seed: int = option(0, group=_OPTIMIZER, help="seed of the adapter, the order, the noise and the timesteps")

    resolution: int | None = option(None, group=_PICTURES, help="side in pixels; the model's own if not given")
    noise_offset: float = option(0.0, group=_PICTURES, help="one more draw of noise for each sample and channel")
    crop: Literal["center", "random"] = option("center", group=_PICTURES, help="which square of a picture is used")
    crops: int = option(4, group=_PICTURES, help="random crops prepared for each picture")
    flip: bool = option(False, group=_PICTURES, help="also train on mirrored pictures")

    evaluate_every: int = option(
        0,
        group=_EVALUATION,
        help="steps between evaluations of the adapter; 0 is never. They go to the folder evaluations, the best one's "
        "adapter to the folder best, once its identity is beyond the base model's interval",
    )
    evaluate_prompts: str | None = option(
        None, group=_EVALUATION, help="file of prompts, as for cat-rs evaluate", metavar="FILE"
    )
    evaluate_concept: str | None = option(
        None, group=_EVALUATION, help="which concept of a file with several", metavar="NAME"
    )
    evaluate_encoder: str = option(
        "openai/clip-vit-large-patch14",
        group=_EVALUATION,
        help="CLIP model: a folder or a hub id",
        metavar="DIR_OR_ID",
    )
    evaluate_seeds: tuple[int, ...] = option(
        (0, 1), group=_EVALUATION, help="one picture for each prompt and seed", metavar="N"
    )
    evaluate_inference_steps: int = option(16, group=_EVALUATION, help="denoising steps of a picture")
    evaluate_guidance: float = option(3.0, group=_EVALUATION, help="classifier-free guidance; 1 is none")
    evaluate_batch: int = option(8, group=_EVALUATION, help="pictures drawn at once")
    evaluate_keep: float = option(
        0.95,
        group=_EVALUATION,
        help="the best checkpoint is that of the highest UPS among those whose identity has come this part of the way "
        "from the base model's to the run's highest",
    )

    sample_every: int = option(
        0,
        group=_EVALUATION,
        help="steps between pictures of --sample-prompts in the folder samples and the trackers, drawn as evaluations "
        "are; 0 is never",
    )
    sample_prompts: tuple[str, ...] = option(
        (), group=_EVALUATION, help="prompts, or files of them, one a line", metavar="FILE_OR_TEXT"
    )

    checkpoint_every: int = option(100, group=_OUTPUT, help="steps between checkpoints; 0 writes none on the way")
    keep_checkpoints: int = option(2, group=_OUTPUT, help="how many of the latest checkpoints stay")
    resume: bool = option(False, group=_OUTPUT, help="continue from the latest checkpoint in the output folder")
    overwrite: bool = option(False, group=_OUTPUT, help="delete the run that is in the output folder")
    log_every: int = option(
        1, group=_OUTPUT, help="steps between updates of the progress bar and metrics.jsonl; on a GPU at least 20"
    )
    tensorboard: bool = option(True, group=_OUTPUT, help="write a TensorBoard log")
    log_with: tuple[str, ...] = option(
        (), group=_OUTPUT, help="trackers of accelerate that get the log too, such as wandb", metavar="NAME"
    )

    device: str = option("auto", group=_MACHINE, help="cpu, cuda or cuda:N; auto takes a GPU if there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        group=_MACHINE,
        help="of the frozen weights; the adapter is trained in float32, with a scaled loss for float16",
    )
    gradient_checkpointing: bool = option(False, group=_MACHINE, help="recompute activations: less memory, more time")
    capture: bool = option(False, group=_MACHINE, help="on a GPU: record the step as a CUDA graph and replay it")

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size", "accumulate", "crops", "keep_checkpoints", "log_every"):
            check_range(name, getattr(self, name), 1)
        for name in ("preserve_every", "preserve_batch", "evaluate_inference_steps", "evaluate_batch"):
            check_range(name, getattr(self, name), 1)
        for name in ("cat_factor", "weight_decay", "lr_warmup_steps", "max_grad_norm", "checkpoint_every", "seed"):
            check_range(name, getattr(self, name), 0)
        for name in ("cat_factor_end", "noise_offset", "teacher_draws", "evaluate_every", "evaluate_guidance"):
            check_range(name, getattr(self, name), 0)
        check_range("sample_every", self.sample_every, 0)
        for name in ("lr", "eps", "snr_gamma", "cat_ratio", "cat_drift", "lora_alpha", "resolution"):
            check_range(name, getattr(self, name), 0, exclusive=True)
        for name in ("beta1", "beta2", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not 0 < self.preserve_share <= 1:
            raise ConfigError(f"preserve_share: expected a number in (0, 1], got {self.preserve_share}")
        rules = [name for name in ("cat_ratio", "cat_drift", "cat_factor_end") if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ConfigError(f"{', '.join(rules)}: expected one of them, got {len(rules)}")
        for name in ("cat_ratio", "cat_drift", "preserve_prompts"):
            if getattr(self, name) is not None and not self.preserves():
                raise ConfigError(f"cat_factor: expected a number > 0 with {name}, got 0")
        if not self.target_modules:
            raise ConfigError("target_modules: expected at least one layer name, got none")
        self._check_preserved()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ConfigError(
                "lr_warmup_steps: expected 0 with lr_scheduler constant, which does not warm up, got "
                f"{self.lr_warmup_steps}; constant_with_warmup does"
            )
        if not 0 <= self.evaluate_keep <= 1:
            raise ConfigError(f"evaluate_keep: expected a number in [0, 1], got {self.evaluate_keep}")
        if self.evaluate_every and self.evaluate_prompts is None:
            raise ConfigError("evaluate_prompts: expected a file of prompts with evaluate_every, got none")
        if self.sample_every and not self.sample_prompts:
            raise ConfigError("sample_prompts: expected a prompt or a file of them with sample_every, got none")
        if self.resume and self.overwrite:
            raise ConfigError("resume, overwrite: expected one of them, got both")

    def _check_preserved(self) -> None:
        """Raise ConfigError where settings of the preservation term do not go together."""
        for name in ("preserve_set", "preserve_batch"):
            if getattr(self, name) and not self.preserves():
                raise ConfigError(f"{name}: expected none with cat_factor 0, got {getattr(self, name)}")
        preserve, every, draws = self.preserved()
        has_set = preserve == "set"
        if not self.preserves() and preserve != "captions":
            raise ConfigError(f"preserve: expected captions with cat_factor 0, got {preserve}")
        if preserve != "captions" and self.preservation not in ("cat", "prior", "layers"):
            expected = f"cat, prior or layers with preserve {preserve}"
            raise ConfigError(f"preservation: expected {expected}, got {self.preservation}")
        if not has_set and self.preservation == "prior":
            raise ConfigError(f"preserve: expected set with preservation prior, which learns it, got {preserve}")
        if not self.trigger and self.preserves():
            raise ConfigError("trigger: expected a trigger word, which cat_factor > 0 needs; got none")
        for name, allowed in _BESIDE_PRESERVATION.items():
            if getattr(self, name) and self.preservation not in allowed:
                expected = " or ".join(allowed)
                raise ConfigError(f"preservation: expected {expected} with {name}, got {self.preservation}")
        if self.preservation == "dco" and every > 1:
            raise ConfigError(f"preserve_every: expected 1 with preservation dco, got {every}")
        if every > 1 and not self.preserves():
            raise ConfigError(f"preserve_every: expected 1 with cat_factor 0, got {every}")
        if draws and not self.preserves():
            raise ConfigError(f"teacher_draws: expected 0 with cat_factor 0, got {draws}")
        if not has_set and (self.preserve_set or self.preserve_batch is not None):
            raise ConfigError(f"preserve: expected set with preserve_set or preserve_batch, got {preserve}")
        takes_share = self.preserve_prompts is not None or (has_set and not self.preserve_set)
        if self.preserve_share != type(self).preserve_share and not takes_share:
            raise ConfigError(
                "preserve_share: expected it with preserve_prompts, or with preserve set and no preserve_set, got "
                f"{self.preserve_share} without"
            )
        if self.preserve_set and (self.preserve_prompts is not None or draws):
            raise ConfigError(
                "preserve_set: expected none with preserve_prompts or teacher_draws, with which one is built; got both"
            )
        if not has_set and draws and (self.preserve_prompts is not None or self.noise_offset):
            # A bank holds one prompt a picture, and its noise.
            raise ConfigError("teacher_draws: expected 0 with preserve_prompts or noise_offset, got both")

    def preserves(self) -> bool:
        """Whether the preservation term has a weight in any step."""
        return self.cat_factor > 0 or (self.cat_factor_end or 0) > 0

    def preserved(self) -> Preserved:
        """Return `preserve`, `preserve_every` and `teacher_draws` as given, or as the study found them best."""
        preserve = self.preserve
        if preserve is None:
            needs_set = self.preserves() and (self.preservation in ("cat", "prior") or self.preserve_set)
            preserve = "set" if needs_set else "captions"
        of_recipe = preserve == "set" and self.preservation == "cat"
        every, draws = self.preserve_every, self.teacher_draws
        if every is None:
            # A factor that follows L_cat wants to see it in every step.
            every = 4 if of_recipe and self.cat_ratio is None and self.cat_drift is None else 1
        if draws is None:
            # Stored noise has no offset.
            draws = 8 if of_recipe and not self.preserve_set and not self.noise_offset else 0
        return Preserved(preserve, every, draws)

    def class_words(self) -> dict[str, str | None]:
        """Return trigger word -> class word."""
        pairs = (trigger.partition("=") for trigger in self.trigger)
        return {word: own_class or self.class_word for word, _, own_class in pairs}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as a config file holds them."""
        values = dataclasses.asdict(self)
        return {name: _plain(value) for name, value in values.items()}

    def effective(self) -> dict[str, Any]:
        """Return the settings as plain values, those of `preserved` as they take effect."""
        return self.to_dict() | self.preserved()._asdict()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a YAML or JSON file; raises ConfigError for an unknown key."""
        return from_mapping(cls, read_config_file(path), str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` reads: JSON for the suffix `.json`, else YAML."""
        import yaml

        values = self.to_dict()
        as_json = Path(path).suffix == ".json"
        text = json.dumps(values, indent=2) if as_json else yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_bytes(path, text.encode())

    def check_continues(self, earlier: dict[str, Any]) -> None:
        """Raise ConfigError if these settings cannot continue a training with the settings `earlier`."""
        values = self.effective()
        # An option that came after the checkpoint was written had its default there.
        defaults = {field.name: _plain(field.default) for field in dataclasses.fields(self)} | _BEFORE_THEY_CAME
        before = {name: earlier.get(name, defaults[name]) for name in values}
        names = [name for name in values if name not in _FREE_ON_RESUME and values[name] != before[name]]
        if names:
            changes = ", ".join(f"{name} was {before[name]!r}, is {values[name]!r}" for name in names)
            raise ConfigError(f"resume: expected the settings of the checkpoint; {changes}")


def base_model_name(config: TrainConfig) -> str:
    """Return the model's hub id, or the name of its folder: a local path is nobody else's business."""
    model = Path(config.model)
    return model.resolve().name if model.is_dir() else config.model


def learning_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what is learned from the pictures, without local paths."""
    without = _FREE_ON_RESUME - {"steps"} | {"model", "device"}
    values = {name: value for name, value in config.effective().items() if name not in without}
    if config.preserve_prompts is not None:
        values["preserve_prompts"] = Path(config.preserve_prompts).name
    values["preserve_set"] = [Path(file).name for file in config.preserve_set]
    return values


def _plain(value: Any) -> Any:
    """Return a value as a config file holds it."""
    return list(value) if isinstance(value, tuple) else value
