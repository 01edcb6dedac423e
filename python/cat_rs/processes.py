"""The processes of one training or evaluation: their ranks, and what they exchange."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cat_rs.errors import CatRsError
from cat_rs.options import ConfigError

# Where torchrun and accelerate, MPICH, Open MPI and MVAPICH put the world size.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

T = TypeVar("T")


class Processes:
    """The processes that `torchrun` or `accelerate launch` started; a single one without them.

    The methods that pass something on are collective: every rank calls them, in the same order.

    Attributes:
        rank: The rank of this process.
        world_size: The number of processes.
        local_rank: The rank of this process on its machine.
        is_main: Whether this is rank 0, which writes and reports.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.is_main = rank == 0

    @classmethod
    def current(cls) -> Processes:
        """Return the processes of torch.distributed's default group; a single one where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    @classmethod
    def init(cls, device: torch.device) -> Processes:
        """Join the processes that a launcher started; they stay joined until they end.

        Args:
            device: The device of the model, which decides the backend.

        Raises:
            ConfigError: The launcher was asked for several processes, and started one.
        """
        started = max(int(os.environ.get(name, "1")) for name in _COUNTS)
        if started == 1 and not (dist.is_available() and dist.is_initialized()):
            # `accelerate launch --cpu --num_processes N` prepares N > 1 processes and starts them with mpirun only.
            if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
                raise ConfigError(
                    "processes: expected the number given to accelerate launch, got 1, as --cpu starts without "
                    "--mpirun_hostfile; start them with torchrun --nproc-per-node N -m cat_rs.cli COMMAND"
                )
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def own_device(self, device: torch.device) -> torch.device:
        """Return the GPU of this rank where `device` is any GPU."""
        any_gpu = device == torch.device("cuda")
        return torch.device("cuda", self.local_rank) if any_gpu and self.world_size > 1 else device

    def on_main(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0; every rank gets what it returns, or the error of this package that it raises."""
        if self.world_size == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = act()
            except CatRsError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks; tensors must be on the CPU."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_all(self, act: Callable[[], T]) -> list[T]:
        """Call `act` on every rank; every rank gets all results, in the order of the ranks.

        An error of this package on one rank is raised on all of them, once all are done.
        """
        if self.world_size == 1:
            return [act()]
        outcome: tuple[Any, CatRsError | None]
        try:
            outcome = act(), None
        except CatRsError as error:
            outcome = None, error
        outcomes = self.all_gather_object(outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the ranks; it is not finite where one of the values is not."""
        if self.world_size == 1:
            return values
        values = values / self.world_size
        dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int, device: torch.device) -> int:
        """Return the largest of the ranks' values."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value, device=device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)


def leave() -> None:
    """Destroy the process groups before this process ends: their threads must not outlive the interpreter."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # An optimizer and its learning-rate scheduler refer to each other, and to the group, whose threads they keep.
        gc.collect()
