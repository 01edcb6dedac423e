"""The model inside what data parallelism, compilation and PEFT put around it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["unwrap_model"]

# Names of the modules within torch.compile's and FullyShardedDataParallel's wrappers.
_INNER_NAMES = ("_orig_mod", "_fsdp_wrapped_module")


def unwrap_model(model: torch.nn.Module, *, ddp_only: bool = False, peft: bool = False) -> torch.nn.Module:
    """The module inside DistributedDataParallel, DataParallel, torch.compile and FSDP1, nested in any order.

    Args:
        model: Any module.
        ddp_only: Stop at what is not DistributedDataParallel. Calls may go around it, which then reduces no gradient;
            the other wrappers have to be called for what they do.
        peft: Unwrap a PeftModel too, down to the model whose layers it adapted.
    """
    while True:
        inner = _inner_module(model, ddp_only, peft)
        if inner is None:
            return model
        model = inner


def _inner_module(model: torch.nn.Module, ddp_only: bool, peft: bool) -> Any:
    if isinstance(model, DistributedDataParallel):
        return model.module
    if ddp_only:
        return None
    if isinstance(model, DataParallel):
        return model.module
    # Among the module's own children: wrappers pass unknown attributes on to what they wrap.
    for name in _INNER_NAMES:
        if name in model._modules:
            return model._modules[name]
    # By name, since importing PEFT costs more than the rest of the package.
    if peft and hasattr(type(model), "get_base_model"):
        return model.get_base_model()  # type: ignore[operator]
    return None
