"""Gradient accumulation: which call of a step updates the adapter."""

from __future__ import annotations

import sys

from cat_rs.arguments import check
from cat_rs.errors import InvalidValueError

__all__ = ["Accumulation"]


class Accumulation:
    """Counts calls to one optimizer step.

    Attributes:
        calls: Calls since the last optimizer step.
    """

    def __init__(self) -> None:
        self.calls = 0
        # accelerate's flag is True unless accelerator.accumulate is in use, as one False shows.
        self._accelerate_accumulates = False

    def is_due(self, accumulate: int, sync_gradients: bool | None) -> bool:
        """Whether the coming call makes an optimizer step.

        Args:
            accumulate: Calls per optimizer step, >= 1.
            sync_gradients: The caller's answer; None counts calls.

        Raises:
            InvalidValueError: The caller accumulates where the step does not, or accelerate counts otherwise.
        """
        expected = "True, False or None"
        check("CatStep", "sync_gradients", sync_gradients, expected, lambda it: it is None or isinstance(it, bool))
        if sync_gradients is not None:
            if accumulate == 1 and not sync_gradients:
                raise InvalidValueError(
                    "CatStep: `sync_gradients` must be True with accumulate=1, got False: give accumulate the number "
                    "of accelerate's gradient_accumulation_steps"
                )
            return sync_gradients
        due = self.calls + 1 >= accumulate
        theirs = _accelerates_flag()
        self._accelerate_accumulates |= theirs is False
        if self._accelerate_accumulates and theirs is not due:
            raise InvalidValueError(
                "CatStep: `sync_gradients` must be accelerator.sync_gradients within accelerator.accumulate, got "
                f"None: accelerate {'updates' if theirs else 'accumulates'} in this call, the step would "
                f"{'update' if due else 'accumulate'}"
            )
        return due

    def count(self, due: bool) -> None:
        """Takes note of a call that made the optimizer step, or of one more that did not."""
        self.calls = 0 if due else self.calls + 1


def _accelerates_flag() -> bool | None:
    """``accelerator.sync_gradients``; None where there is no accelerator that accumulates."""
    module = sys.modules.get("accelerate.state")
    if module is None or not module.GradientState._shared_state:
        return None
    state = module.GradientState()
    return bool(state.sync_gradients) if state.num_steps > 1 else None
