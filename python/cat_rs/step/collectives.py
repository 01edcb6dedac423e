"""Data parallelism: ranks that train one adapter start alike and average their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from cat_rs.errors import DeviceError, InvalidValueError

__all__ = [
    "average_",
    "broadcast_",
    "check_alike",
    "check_group",
    "data_parallel_group",
    "sharding_of",
]

Group = Any


def data_parallel_group(process_group: Group | None) -> Group | None:
    """The group given, else torch.distributed's default one; None where there is none."""
    if process_group is not None or not (dist.is_available() and dist.is_initialized()):
        return process_group
    return dist.group.WORLD


def check_group(owner: str, group: Group) -> None:
    """Refuses what is not a process group of this rank.

    Raises:
        InvalidValueError: Naming `process_group` of the owner.
    """
    if not isinstance(group, dist.ProcessGroup):
        # new_group returns a number to the ranks that are not in the group.
        got = "one without this rank" if group == dist.GroupMember.NON_GROUP_MEMBER else type(group).__name__
        raise InvalidValueError(
            f"{owner}: `process_group` must be a torch.distributed process group with this rank, got {got}"
        )


def check_alike(owner: str, group: Group, params: Iterable[torch.Tensor]) -> None:
    """Refuses parameters that the ranks cannot average, since a collective over them would hang or mix up values.

    Raises:
        DeviceError: The group cannot move tensors of the parameters' device.
        InvalidValueError: A rank has parameters of other shapes or dtypes than rank 0; raised on all ranks alike.
    """
    params = list(params)
    backends = dist.get_backend_config(group)
    served = {part.partition(":")[0] for part in backends.split(",")}
    for device in {param.device.type for param in params} - served:
        raise DeviceError(
            f"{owner}: `process_group` must have a backend for tensors on {device}, as gloo has for the CPU, "
            f"got {backends}"
        )
    ours = [(list(param.shape), str(param.dtype)) for param in params]
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, ours, group=group)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            first = next(
                (pair for pair in zip(everyones[0], theirs, strict=False) if pair[0] != pair[1]),
                (f"{len(everyones[0])} parameters", f"{len(theirs)} parameters"),
            )
            raise InvalidValueError(
                f"{owner}: `params` must have the same shapes and dtypes on every rank, got {first[0]} on rank 0 and "
                f"{first[1]} on rank {rank}"
            )


def broadcast_(tensor: torch.Tensor, group: Group) -> None:
    """Gives every rank the values of the group's rank 0, in place."""
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


def average_(tensor: torch.Tensor, group: Group) -> None:
    """Averages over the group's ranks, in place, by one all_reduce; all ranks get the same bits."""
    # Divided first, as DistributedDataParallel does: a sum of float16 gradients could overflow.
    tensor.div_(group.size())
    dist.all_reduce(tensor, group=group)


def sharding_of(param: torch.Tensor) -> str | None:
    """A description of what shards the parameter; None where nothing does."""
    # By each library's marks on a parameter, since importing the libraries costs more than the rest of the package.
    if hasattr(param, "device_mesh") and hasattr(param, "placements"):
        return "a DTensor, as fully_shard and tensor parallelism make it"
    if getattr(param, "_fsdp_flattened", False):
        return "a part of FullyShardedDataParallel's flat parameter"
    if hasattr(param, "ds_id"):
        return "a parameter partitioned by DeepSpeed ZeRO-3"
    return None
