"""Training from settings to adapter file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat_rs.options import ConfigError
from cat_rs.processes import Processes
from cat_rs.run_folder import METRICS_FILE
from cat_rs.step import cuda_graphs, device_values
from cat_rs.training.bank import open_bank
from cat_rs.training.captions import fill_template, pair_captions
from cat_rs.training.config import TrainConfig
from cat_rs.training.dataset import fingerprint, read_folder
from cat_rs.training.encoded_dataset import encode_dataset
from cat_rs.training.errors import CheckpointError, TrainingError, TrainingInterrupted
from cat_rs.training.evaluation import CheckpointEvaluations, figures_of, picture_of
from cat_rs.training.interrupt import InterruptGuard
from cat_rs.training.log import TrainingLog
from cat_rs.training.model import add_adapter, choose_device, load_pipeline
from cat_rs.training.model_card import make_card
from cat_rs.training.output_folder import OutputFolder
from cat_rs.training.preserved_pictures import open_set
from cat_rs.training.samples import Samples
from cat_rs.training.trackers import check_trackers, start_trackers
from cat_rs.training.trainer import Trainer

# Steps of a GPU whose figures are read at once, at least.
READ_EVERY = 20


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
    pictures, trains on `batch_size` of every batch of `batch_size` times the world size, and gets the same gradient.
    Rank 0 writes, evaluates and reports; the log holds means over the ranks. A signal to one rank, or a checkpoint
    that cannot be written, ends all after the same step.

    With `config.evaluate_every` the adapter is scored on the way, see `cat_rs.training.evaluation`; with
    `config.sample_every` it draws pictures. That changes nothing in what is learned.

    Args:
        config: The settings.
        progress: Show progress bars.
        report: Called with each line of news.

    Raises:
        ConfigError, DatasetError: The settings or the data cannot be used; an earlier run is as it was.
        TrainingError: The model cannot be used, or the loss is not finite; the last checkpoint stays.
        CheckpointError: A file cannot be written, such as on a full disk; the checkpoint before it stays.
        TrainingInterrupted: A signal came.
    """
    from tqdm import tqdm

    device = choose_device(config.device)
    if config.capture and not cuda_graphs.can_record(device):
        raise ConfigError(f"capture: expected a GPU to record on, got device {config.device}")
    if config.capture and config.gradient_checkpointing and not cuda_graphs.RECORDS_CHECKPOINTING:
        raise ConfigError("capture, gradient_checkpointing: expected one of them before PyTorch 2.10, got both")
    processes = Processes.init(device)
    device = processes.own_device(device)
    if not processes.is_main:
        progress, report = False, lambda _line: None
    bar = functools.partial(tqdm, disable=not progress, dynamic_ncols=True)

    # Whatever can be refused is refused before anything is written.
    output = OutputFolder(config)
    # On rank 0 alone: it may already write when another rank looks.
    processes.on_main(output.check)
    check_trackers(config)
    examples = read_folder(config.data, caption=fill_template(config))
    captions = pair_captions([example.caption for example in examples], config)
    report(f"{len(examples)} pictures; {captions.summary()}")
    if config.preserves() and config.steps < (every := config.preserved().preserve_every):
        report(f"no step has the preservation term, which is in one of {every} steps: steps is {config.steps}")
    data = fingerprint(examples, captions.preserved)
    evaluations, samples = CheckpointEvaluations(config), Samples(config)
    state = processes.on_main(lambda: output.resume_state(data, processes.world_size))
    processes.on_main(functools.partial(evaluations.load_encoder, device))
    if state is not None:
        report(f"continuing from {output.checkpoints.latest()}")

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        pipeline = load_pipeline(config.model, getattr(torch, config.dtype), device)
        has_set = config.preserved().preserve == "set"
        of_pictures = dataclasses.replace(captions, preserved=()) if has_set else captions
        dataset = encode_dataset(pipeline, bar(examples, desc="encoding pictures"), of_pictures, config)
        if has_set and not config.preserve_set:
            # Before pictures are drawn for a training that could not begin.
            processes.on_main(output.claim)
        preserved = open_set(config, pipeline, captions, processes, progress, report)
        unet, scheduler, pipeline_name = pipeline.unet, pipeline.scheduler, type(pipeline).__name__
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        add_adapter(unet, config)
        # Before an earlier run is deleted: a tracker may lack an account.
        trackers: list[Any] = []
        processes.on_main(lambda: trackers.extend(start_trackers(config)))
        processes.on_main(lambda: output.open(after_step=state["run"]["steps_done"] if state else 0))
        bank = open_bank(config, unet, scheduler, dataset, processes, progress)
        trainer = Trainer(config, unet, scheduler, dataset, processes, bank, preserved)
        if not processes.is_main:
            # The adapter is drawn; what dropout draws from here on differs between the ranks.
            torch.manual_seed(config.seed + processes.rank)
        processes.on_main(functools.partial(evaluations.open, pipeline, trainer.save_adapter))
        processes.on_main(functools.partial(samples.open, pipeline))
        # Without evaluations and samples, the VAE and the text encoders have done their work.
        del pipeline
        if state is not None:
            trainer.load_state_dict(state["run"])
            if not processes.is_main:
                trainer.load_rng_state_dict(state["other_processes"][processes.rank - 1])

        steps_bar = bar(total=config.steps, initial=trainer.steps_done, desc="training")
        seconds_before = state["seconds"] if state else 0.0
        log = TrainingLog(
            config,
            processes,
            trackers,
            steps_bar,
            after_step=trainer.steps_done,
            seconds_before=seconds_before,
        )

        def evaluate() -> None:
            """Score the adapter as it is now, and log it."""
            with log.paused():
                result, line = evaluations.evaluate(trainer.steps_done)
            log.add_evaluation(trainer.steps_done, figures_of(result))
            log.add_pictures("evaluation/pictures", trainer.steps_done, picture_of(result))
            with steps_bar.external_write_mode():
                report(line)

        def sample() -> None:
            """Draw the sample prompts with the adapter as it is now, and log the pictures."""
            with log.paused():
                grid = samples.draw(trainer.steps_done)
            log.add_pictures("samples", trainer.steps_done, np.stack([np.asarray(image) for image in grid.images]))

        # To read figures of a GPU, or another rank's, is to wait for it.
        reads_wait = device_values.is_gpu(device)
        read_every = max(config.log_every, READ_EVERY) if reads_wait else config.log_every
        meet_every = read_every if reads_wait and processes.world_size > 1 else 1

        with closing(log):
            if state is not None and processes.on_main(lambda: evaluations.resume(trainer.steps_done)):
                processes.on_main(evaluate)
            if state is not None and processes.on_main(lambda: samples.resume(trainer.steps_done)):
                processes.on_main(sample)
            with InterruptGuard(second_acts=processes.world_size == 1) as guard:
                while trainer.steps_done < config.steps:
                    lr = trainer.lr
                    figures = trainer.advance()
                    step = trainer.steps_done
                    log.add(step, lr, figures)
                    last = step == config.steps
                    signal_number = 0
                    if last or step % meet_every == 0:
                        signal_number = processes.all_reduce_max(guard.received or 0, device)
                    checkpoint_is_due = config.checkpoint_every > 0 and (last or step % config.checkpoint_every == 0)
                    save = signal_number > 0 or checkpoint_is_due
                    evaluation_is_due, samples_are_due = evaluations.is_due(step), samples.is_due(step)
                    if save or last or evaluation_is_due or samples_are_due or step % read_every == 0:
                        _flush(log, output)
                    if save:
                        _, *others = processes.all_gather_object(trainer.rng_state_dict())
                        save_checkpoint = functools.partial(output.save_checkpoint, trainer, others, data, log.seconds)
                        checkpoint = processes.on_main(save_checkpoint)
                        if signal_number > 0 and not last:
                            raise TrainingInterrupted(step, checkpoint, signal_number)
                    if evaluation_is_due:
                        processes.on_main(evaluate)
                    if samples_are_due:
                        processes.on_main(sample)

        def finish() -> Path:
            """Write the adapter and its card."""
            return output.finish(
                trainer,
                make_card(
                    config,
                    steps=trainer.steps_done,
                    pipeline=pipeline_name,
                    picture_count=len(examples),
                    evaluation=evaluations.last(),
                ),
                report,
            )

        adapter = processes.on_main(finish)
        return TrainResult(
            output_dir=output.path,
            adapter=adapter,
            metrics=output.path / METRICS_FILE,
            steps=trainer.steps_done,
            captions_changed=captions.changed,
            skipped_steps=log.skipped,
            seconds=log.seconds,
        )


def _flush(log: TrainingLog, output: OutputFolder) -> None:
    """Write the log; a loss that is not finite ends here, before it could reach a checkpoint."""
    try:
        log.flush()
    except TrainingError as error:
        latest = output.checkpoints.latest()
        kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
        raise TrainingError(f"{error}; {kept}") from None
    except OSError as error:
        raise CheckpointError(f"cannot write the log in {output.path}: {error}") from error
