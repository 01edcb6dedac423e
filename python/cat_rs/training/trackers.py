"""Where the log of a training goes beside its own file: TensorBoard, and trackers of accelerate such as wandb.

A tracker has accelerate's methods `log`, `log_images` (not all of them) and `finish`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cat_rs.options import ConfigError
from cat_rs.run_folder import TENSORBOARD_FOLDER
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import TrainingError
from cat_rs.training.model import choose_device

_PROJECT = "cat-rs"


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker that accelerate does not know or that is not installed."""
    if not config.log_with:
        return
    from accelerate.tracking import get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in config.log_with if name not in installed]
    if missing:
        raise ConfigError(
            f"log_with: expected trackers that accelerate knows and that are installed ({', '.join(installed)}), "
            f"got {', '.join(missing)}"
        )


def start_trackers(config: TrainConfig) -> list[Any]:
    """Start the trackers of accelerate, in a folder whose earlier run is still there.

    Raises:
        TrainingError: One cannot start, such as for want of an account.
    """
    return [_start(name, config) for name in dict.fromkeys(config.log_with) if name != "tensorboard"]


def open_tensorboard(config: TrainConfig, after_step: int) -> list[Any]:
    """Open TensorBoard's log of a training that continues after a step; nothing where the settings ask for none."""
    return [_TensorBoard(config, after_step)] if config.tensorboard or "tensorboard" in config.log_with else []


def _start(name: str, config: TrainConfig) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # accelerate's own logger refuses to work before it knows the processes.
    PartialState(cpu=choose_device(config.device).type == "cpu")
    kind = LOGGER_TYPE_TO_CLASS[name]
    folder = [config.output_dir] if kind.requires_logging_directory else []
    settings = {"name": Path(config.output_dir).resolve().name, "dir": config.output_dir} if name == "wandb" else {}
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        tracker = kind(_PROJECT, *folder, **settings)
        tracker.start()
        tracker.store_init_configuration({key: _plain(value) for key, value in config.effective().items()})
    except Exception as error:
        # Each of these libraries has errors of its own.
        raise TrainingError(f"log_with: {name} cannot start: {error}") from error
    return tracker


def _plain(value: Any) -> Any:
    """Trackers take no lists."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


class _TensorBoard:
    """Like accelerate's tracker, which has no word for the step from which a resumed log is written anew."""

    def __init__(self, config: TrainConfig, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.output_dir, TENSORBOARD_FOLDER)
        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, values: dict[str, Any], step: int) -> None:
        for name, pictures in values.items():
            self._writer.add_images(name, pictures, step, dataformats="NHWC")

    def finish(self) -> None:
        self._writer.close()
