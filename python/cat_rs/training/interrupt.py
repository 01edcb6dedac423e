"""Ctrl-C that lets the running step finish."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptGuard:
    """Context manager that only notes the first SIGINT or SIGTERM in `received`; the second acts as usual.

    Python delivers signals to the main thread; in another thread the guard does nothing.

    Args:
        second_acts: Whether a second signal acts. Not so under a launcher, which passes the terminal's signals on, so
            that each comes twice, and ends what does not stop in time by itself.
    """

    def __init__(self, *, second_acts: bool = True) -> None:
        self.received: int | None = None
        self._second_acts = second_acts
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        hint = ""
        if self._second_acts:
            self._restore()
            hint = "; once more stops at once"
        print(f"\nstopping after this step{hint}", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
