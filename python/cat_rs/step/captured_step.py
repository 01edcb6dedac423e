"""A step on CUDA through recorded graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cat_rs.arguments import check
from cat_rs.errors import InvalidValueError
from cat_rs.step import cuda_graphs
from cat_rs.step.cuda_graphs import CapturedFunctions
from cat_rs.step.inputs import StepInputs
from cat_rs.step.optimizer import FlatAdamW

__all__ = ["CapturedStep"]

ForwardBackward = Callable[[StepInputs], tuple[torch.Tensor, torch.Tensor]]


class CapturedStep:
    """Forward and backward as one CUDA graph, with the optimizer step where nothing has to happen between them.

    Args:
        model: The model whose forward is recorded.
        optimizer: Optimizer of the parameters that train.
        device: Device of the model.
        max_captures: Largest number of input signatures.
        text_encoders: Must be empty.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: FlatAdamW,
        device: torch.device,
        max_captures: int,
        text_encoders: Sequence[torch.nn.Module],
    ) -> None:
        if not cuda_graphs.can_record(device):
            raise InvalidValueError(f"CatStep: `capture` must be False for a model on {device}, got True")
        check("CatStep", "max_captures", max_captures, "at least 1", lambda captures: captures >= 1)
        if text_encoders:
            raise InvalidValueError(
                "CatStep: `capture` must be False with text_encoders, got True: a graph would replay the prompts that "
                "it was recorded with"
            )
        self._optimizer = optimizer
        self._graphs = CapturedFunctions("CatStep", device, max_captures)
        self._places = _places_of(model)
        self._addresses: list[int] = []

    def __call__(
        self, forward_backward: ForwardBackward, inputs: StepInputs, settings: tuple[Any, ...], *, with_update: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Runs, records or replays a step: ``forward_backward(inputs)`` and, ``with_update``, the optimizer step.

        Args:
            forward_backward: Adds to the gradients of the optimizer's parameters; returns loss and [diffusion, cat].
            inputs: The tensors that it reads.
            settings: All other values that the kernels depend on.
            with_update: Whether the optimizer step belongs to the graph.

        Returns:
            Loss, [diffusion, cat], and the gradient norm, which is None without the optimizer step.
        """
        kind = inputs.latents.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

        def function(inputs: StepInputs) -> tuple[torch.Tensor, ...]:
            # Autocast's copies of the weights must not be shared between a recording and what is outside of it.
            torch.clear_autocast_cache()
            loss, parts = forward_backward(inputs)
            torch.clear_autocast_cache()
            return (loss, parts, torch.as_tensor(self._optimizer.launch())) if with_update else (loss, parts)

        self._optimizer.before_launch()
        addresses = [0 if (tensor := table.get(name)) is None else tensor.data_ptr() for table, name in self._places]
        if addresses != self._addresses:
            # Graphs read weights where they were.
            self._graphs.forget()
            self._addresses = addresses
        variant = (with_update, self._optimizer.active_spans, autocast, *settings)
        loss, parts, *norm = self._graphs(function, inputs, variant)
        if not with_update:
            self._optimizer.after_gradients()
            return loss, parts, None
        self._optimizer.after_launch(norm[0])
        return loss, parts, norm[0]


def _places_of(model: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    """The tables that hold the model's parameters and buffers, and their names there."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    return [(table, name) for table in tables for name, tensor in table.items() if _has_address(tensor)]


def _has_address(tensor: torch.Tensor | None) -> bool:
    try:
        return tensor is not None and tensor.data_ptr() != 0
    except RuntimeError:  # sharded by FSDP
        return False
