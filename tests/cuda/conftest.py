"""A GPU where there is none."""

from __future__ import annotations

import pytest

from tests.cuda.simulation import simulate_gpu


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for a GPU runs on the CPU."""
    simulate_gpu(monkeypatch)
