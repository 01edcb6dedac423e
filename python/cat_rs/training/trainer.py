"""Training from settings to adapter file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cat_rs import device
from cat_rs.adapter_file.paths import DIFFUSERS_FILE
from cat_rs.options import ConfigError
from cat_rs.processes import Processes
from cat_rs.training.cache import TrainingCache, build_cache
from cat_rs.training.captions import CaptionPairs, fill_template, pair_captions
from cat_rs.training.checkpoint import CheckpointFolder, load_state
from cat_rs.training.config import TrainConfig
from cat_rs.training.dataset import Example, fingerprint, read_folder
from cat_rs.training.errors import CheckpointError, TrainingError, TrainingInterrupted
from cat_rs.training.evaluation import (
    BEST_FOLDER,
    EVALUATION_FOLDER,
    CheckpointEvaluations,
    evaluation_is_due,
    figures_of,
    picture_of,
    read_prompts,
)
from cat_rs.training.interrupt import InterruptGuard
from cat_rs.training.log import METRICS_FILE, TENSORBOARD_FOLDER, MetricsLog
from cat_rs.training.model import add_adapter, choose_device, load_pipeline
from cat_rs.training.recorder import Recorder
from cat_rs.training.run import TrainingRun
from cat_rs.training.saver import Saver

if TYPE_CHECKING:
    from cat_rs import TeacherBank
    from cat_rs.evaluation import EvaluationPrompts

BANK_FILE = "teacher_bank.safetensors"
CHECKPOINT_FOLDER = "checkpoints"
CONFIG_FILE = "train_config.yaml"
_RUN_FILES = (
    CHECKPOINT_FOLDER,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    DIFFUSERS_FILE,
    CONFIG_FILE,
    BANK_FILE,
    EVALUATION_FOLDER,
    BEST_FOLDER,
)


@dataclass(frozen=True)
class TrainResult:
    """What a finished training leaves.

    Attributes:
        output_dir: Folder that `pipe.load_lora_weights` reads.
        adapter: The adapter file in it.
        metrics: The log: a JSON object a line and step.
        steps: Finished optimizer steps.
        captions_changed: How many captions held the trigger.
        skipped_steps: Steps that left the weights alone because their gradient was not finite.
        seconds: Time in the training loop, resumed parts included, evaluations not.
    """

    output_dir: Path
    adapter: Path
    metrics: Path
    steps: int
    captions_changed: int
    skipped_steps: int
    seconds: float


def train(config: TrainConfig, *, progress: bool = True, report: Callable[[str], object] = print) -> TrainResult:
    """Train a LoRA, with the preservation term of CAT if `config.cat_factor` > 0.

    Writes the adapter, the log and checkpoints into `config.output_dir`. Ctrl-C (SIGINT) and SIGTERM finish the
    running step and write a checkpoint. Torch's global random state is as before afterwards.

    Started by `torchrun` or `accelerate launch --multi_gpu`, the processes train one adapter: each encodes all
    pictures, trains on `batch_size` of every batch of `batch_size` times their number, and gets the same gradient.
    The main process writes, evaluates and reports; the log holds means over the processes. A signal to one, or a
    checkpoint that cannot be written, ends all after the same step.

    With `config.evaluate_every` the adapter is scored on the way, see `cat_rs.training.evaluation`. That changes
    nothing in what is learned.

    Args:
        config: The settings.
        progress: Show progress bars.
        report: Called with each line of news.

    Raises:
        ConfigError, DatasetError: The settings or the data cannot be used; nothing was written.
        TrainingError: The model cannot be used, or the loss is not finite; the last checkpoint stays.
        CheckpointError: A file cannot be written, such as on a full disk; the checkpoint before it stays.
        TrainingInterrupted: A signal came.
    """
    return _Training(config, progress, report).go()


class _Training:
    """The stages of `train` and what they share."""

    def __init__(self, config: TrainConfig, progress: bool, report: Callable[[str], object]) -> None:
        self._config = config
        self._device = choose_device(config.device)
        if config.capture and not device.is_gpu(self._device):
            raise ConfigError(f"capture: expected a GPU to record on, got device {config.device}")
        if config.teacher_draws and device.is_gpu(self._device):
            raise ConfigError(f"teacher_draws: expected 0 on a GPU, got {config.teacher_draws}")
        self._processes = Processes.joined(self._device)
        if self._device == torch.device("cuda") and self._processes.count > 1:
            self._device = torch.device("cuda", self._processes.local_rank)
        self._progress = progress and self._processes.is_main
        self._report = report if self._processes.is_main else _say_nothing
        self._output = Path(config.output_dir)
        self._checkpoints = CheckpointFolder(self._output / CHECKPOINT_FOLDER, config.keep_checkpoints)

    def go(self) -> TrainResult:
        # In the main process alone: it may already write when another one looks.
        self._processes.on_main(self._check_output)
        examples = read_folder(self._config.data, caption=fill_template(self._config))
        captions = pair_captions([example.caption for example in examples], self._config)
        self._report(f"{len(examples)} pictures; {captions.summary()}")
        data = fingerprint(examples, captions.preserved)
        prompts = read_prompts(self._config) if self._config.evaluate_every else None
        state = self._processes.on_main(lambda: self._earlier_state(data))
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._config.seed)
            pipeline = load_pipeline(self._config.model, getattr(torch, self._config.dtype), self._device)
            saver = Saver(self._config, self._checkpoints, data, self._processes)
            run = self._prepare(pipeline, self._encode(pipeline, examples, captions))
            if not self._processes.is_main:
                # The adapter is drawn; what dropout draws from here on differs between the processes.
                torch.manual_seed(self._config.seed + self._processes.rank)
            evaluations = None if prompts is None else self._evaluations(pipeline, prompts, run, saver)
            # Without evaluations, the VAE and the text encoders have done their work.
            del pipeline
            return self._train(run, saver, evaluations, state, captions.changed)

    def _check_output(self) -> None:
        """Keep an earlier run in the output folder from being mixed with this one."""
        earlier = [name for name in _RUN_FILES if (self._output / name).exists()]
        if earlier and not (self._config.resume or self._config.overwrite):
            raise ConfigError(
                f"output_dir: expected a folder without a run, got {self._output} with {', '.join(earlier)}; "
                f"give --resume, --overwrite or another --output-dir"
            )

    def _earlier_state(self, data: str) -> dict[str, Any] | None:
        """The state to continue from, checked against the settings and the data."""
        if not self._config.resume:
            return None
        checkpoint = self._checkpoints.latest()
        if checkpoint is None:
            raise ConfigError(f"resume: expected a checkpoint in {self._output / CHECKPOINT_FOLDER}, got none")
        state = load_state(checkpoint)
        self._config.check_continues(state["config"])
        if state["data"] != data:
            raise ConfigError(f"resume: expected the pictures and captions of {checkpoint}, got others")
        # A checkpoint of version 0.1 is one process's.
        processes = 1 + len(state.get("other_processes", ()))
        if processes != self._processes.count:
            raise ConfigError(
                f"resume: expected as many processes as wrote {checkpoint}, {processes}, got {self._processes.count}"
            )
        self._report(f"continuing from {checkpoint}")
        return state

    def _encode(self, pipeline: Any, examples: list[Example], captions: CaptionPairs) -> TrainingCache:
        bar = self._bar(examples, desc="encoding pictures")
        return build_cache(pipeline, bar, captions, self._config)

    def _prepare(self, pipeline: Any, cache: TrainingCache) -> TrainingRun:
        unet = pipeline.unet
        if self._config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        add_adapter(unet, self._config)
        self._processes.on_main(self._open_output)
        bank = self._bank(unet, pipeline.scheduler, cache)
        return TrainingRun(self._config, unet, pipeline.scheduler, cache, self._processes, bank)

    def _bank(self, unet: Any, scheduler: Any, cache: TrainingCache) -> TeacherBank | None:
        """The run's cached base predictions, in the output folder while it lasts; a resumed run finds them there."""
        from cat_rs import TeacherBank

        if not self._config.teacher_draws:
            return None
        mean, std, cond_no_trigger = cache.all_views()
        latents, latents_std = (values.to(getattr(torch, self._config.dtype)) for values in (mean, std))

        def build() -> Path:
            path = self._output / BANK_FILE
            if self._config.resume and path.exists():
                return path
            try:
                TeacherBank.build(
                    unet,
                    scheduler,
                    latents,
                    cond_no_trigger,
                    draws=self._config.teacher_draws,
                    latents_std=latents_std,
                    # A generator of its own, so that a resumed run whose bank is gone builds the same one.
                    generator=torch.Generator().manual_seed(self._config.seed),
                    path=path,
                    progress=self._progress,
                )
            except OSError as error:
                raise CheckpointError(f"cannot write {path}: {error}") from error
            return path

        # All processes read the main one's file.
        return TeacherBank.load(self._processes.on_main(build), latents=latents)

    def _evaluations(
        self, pipeline: Any, prompts: EvaluationPrompts, run: TrainingRun, saver: Saver
    ) -> CheckpointEvaluations | None:
        """What evaluates the run in the main process; None in the others."""
        made: list[CheckpointEvaluations] = []

        def make() -> None:
            dtype = getattr(torch, self._config.dtype)
            if pipeline.vae.dtype != dtype:
                # Encoding the pictures took it to float32.
                pipeline.vae.to(dtype)
            made.append(
                CheckpointEvaluations(self._config, pipeline, prompts, lambda folder: saver.write_adapter(run, folder))
            )

        self._processes.on_main(make)
        return made[0] if made else None

    def _train(
        self,
        run: TrainingRun,
        saver: Saver,
        evaluations: CheckpointEvaluations | None,
        state: dict[str, Any] | None,
        captions_changed: int,
    ) -> TrainResult:
        if state is not None:
            run.load_state_dict(state["run"])
            if not self._processes.is_main:
                run.load_draws_state_dict(state["other_processes"][self._processes.rank - 1])
        log = None
        if self._processes.is_main:
            log = MetricsLog(self._output, after_step=run.steps_done, tensorboard=self._config.tensorboard)
        bar = self._bar(total=self._config.steps, initial=run.steps_done, desc="training")
        recorder = Recorder(log, bar, self._processes, seconds_before=state["seconds"] if state else 0.0)
        try:
            if state is not None and self._config.evaluate_every:
                self._catch_up(evaluations, recorder, run.steps_done)
            self._loop(run, saver, recorder, evaluations)
        finally:
            bar.close()
            if log is not None:
                log.close()
        adapter = saver.save_adapter(run)
        if self._processes.is_main:
            (self._output / BANK_FILE).unlink(missing_ok=True)
        return TrainResult(
            output_dir=self._output,
            adapter=adapter,
            metrics=self._output / METRICS_FILE,
            steps=run.steps_done,
            captions_changed=captions_changed,
            skipped_steps=recorder.skipped,
            seconds=recorder.seconds,
        )

    def _open_output(self) -> None:
        try:
            if self._config.overwrite:
                _remove_run(self._output)
            self._output.mkdir(parents=True, exist_ok=True)
            self._config.save(self._output / CONFIG_FILE)
        except OSError as error:
            raise CheckpointError(f"cannot write to the output folder {self._output}: {error}") from error

    def _loop(
        self, run: TrainingRun, saver: Saver, recorder: Recorder, evaluations: CheckpointEvaluations | None
    ) -> None:
        with InterruptGuard(second_acts=self._processes.count == 1) as guard:
            while run.steps_done < self._config.steps:
                lr = run.lr
                figures = run.advance()
                recorder.add(run.steps_done, lr, figures)
                last = run.steps_done == self._config.steps
                signal_number = self._processes.highest(guard.received or 0, self._device)
                save = signal_number > 0 or self._checkpoint_is_due(run.steps_done, last)
                if save or last or run.steps_done % self._config.log_every == 0:
                    self._flush(recorder)
                if save:
                    checkpoint = saver.save_checkpoint(run, recorder.seconds)
                    if signal_number > 0 and not last:
                        raise TrainingInterrupted(run.steps_done, checkpoint, signal_number)
                if evaluation_is_due(self._config, run.steps_done):
                    self._evaluate(evaluations, recorder, run.steps_done)

    def _catch_up(self, evaluations: CheckpointEvaluations | None, recorder: Recorder, step: int) -> None:
        """Bring the evaluations to where the checkpoint is."""

        def is_missing() -> bool:
            if evaluations is None:
                return False
            evaluations.forget_after(step)
            return evaluations.is_missing(step)

        if self._processes.on_main(is_missing):
            self._evaluate(evaluations, recorder, step)

    def _evaluate(self, evaluations: CheckpointEvaluations | None, recorder: Recorder, step: int) -> None:
        """Score the adapter in the main process, while the others wait."""

        def act() -> None:
            if evaluations is None:
                return
            with recorder.paused():
                result, line = evaluations.evaluate(step)
            recorder.add_evaluation(step, figures_of(result), picture_of(result))
            with recorder.aside():
                self._report(line)

        self._processes.on_main(act)

    def _checkpoint_is_due(self, step: int, last: bool) -> bool:
        every = self._config.checkpoint_every
        return every > 0 and (last or step % every == 0)

    def _flush(self, recorder: Recorder) -> None:
        """Write the log; a loss that is not finite ends here, before it could reach a checkpoint."""
        try:
            recorder.flush()
        except TrainingError as error:
            latest = self._checkpoints.latest()
            kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
            raise TrainingError(f"{error}; {kept}") from None
        except OSError as error:
            raise CheckpointError(f"cannot write the log in {self._output}: {error}") from error

    def _bar(self, *items: Any, **settings: Any) -> Any:
        from tqdm import tqdm

        return tqdm(*items, disable=not self._progress, dynamic_ncols=True, **settings)


def _say_nothing(_line: str) -> None:
    """What the processes that do not report do with their news."""


def _remove_run(output: Path) -> None:
    for path in map(output.joinpath, _RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
