"""The order in which a training sees its pictures."""

from __future__ import annotations

from typing import Any

import torch


class BatchSampler:
    """Endless batches of indices; each pass over the pictures is in a new random order.

    Batches run across the end of a pass, so that all have the same size, also when there are fewer pictures than a
    batch holds. The order depends on the seed alone, and `state_dict` continues it anywhere.
    """

    def __init__(self, pictures: int, batch_size: int, seed: int) -> None:
        self._pictures = pictures
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def next_batch(self) -> list[int]:
        """Return the indices of the next batch."""
        while len(self._waiting) < self._batch_size:
            self._waiting += torch.randperm(self._pictures, generator=self._generator).tolist()
        batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the coming batches."""
        return {"waiting": list(self._waiting), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called."""
        self._waiting = list(state["waiting"])
        self._generator.set_state(state["generator"])
